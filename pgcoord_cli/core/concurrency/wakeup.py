"""Waiting for whichever comes first: a notification, a call from another thread or a signal, a deadline.

No waiting in pgcoord is a sleep loop (rule I7). A thread that waits here blocks in the kernel on its connection's
socket and on a pipe; `Wakeup.set` writes a byte into that pipe, which is safe from signal handlers and threads.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from psycopg import Connection, sql


class Wakeup:
    """Something that another thread or a signal handler can set, and a waiter can wait for beside a socket."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        """The end of the pipe that becomes readable."""
        return self._reader

    def set(self) -> None:
        """Wakes the waiter, now or when it next waits."""
        with suppress(OSError):  # the pipe is full of wake-ups already, or nobody waits any more
            os.write(self._writer, b"!")

    def wait(self, seconds: float) -> None:
        """Waits until it is set or the time is up, and takes the wake-up back."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        self.clear()

    def clear(self) -> None:
        """Takes back every wake-up so far."""
        with suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass

    def close(self) -> None:
        """Gives the pipe back; more than once is no harm."""
        descriptors, self._reader, self._writer = (self._reader, self._writer), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


class Notifications:
    """The notifications of one listening connection, waited for together with a Wakeup."""

    def __init__(self, conn: Connection[Any], wakeup: Wakeup) -> None:
        self._conn = conn
        self._wakeup = wakeup
        self._arrived: set[str] = set()
        conn.add_notify_handler(lambda notification: self._arrived.add(notification.channel))

    def wait(self, seconds: float) -> set[str]:
        """The channels that were notified since the last wait, once there is one; none at the deadline or a wake-up."""
        if heard := self._taken():
            return heard
        poll = select.poll()
        poll.register(self._conn.fileno(), select.POLLIN)
        poll.register(self._wakeup.fileno(), select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        self._wakeup.clear()
        return self._taken()

    def pause(self, seconds: float) -> None:
        """Waits for a wake-up or the deadline; what is notified until then is forgotten."""
        self._wakeup.wait(seconds)
        self._taken()

    def _taken(self) -> set[str]:
        """What cursors heard, and what lies in the connection unread; raises when that is closed."""
        heard, self._arrived = self._arrived | received(self._conn), set()
        return heard


def received(conn: Connection[Any]) -> set[str]:
    """The channels of the notifications that have reached an idle connection's socket; raises when it is closed."""
    conn.pgconn.consume_input()
    found = set()
    while notification := conn.pgconn.notifies():
        found.add(notification.relname.decode())
    return found


def listen(conn: Connection[Any], wanted: Sequence[str], wakeup: Wakeup) -> Notifications:
    """Listens to channels on this connection; look at the tables once after this, then wait."""
    notifications = Notifications(conn, wakeup)
    for channel in wanted:
        conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
    return notifications
