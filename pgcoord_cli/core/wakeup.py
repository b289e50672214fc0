"""Waiting for whichever comes first: a notification, a call from another thread or a signal, a deadline.

No waiting in pgcoord is a sleep loop (rule I7). A thread that waits here blocks in the kernel on its connection's
socket and on a pipe; `Wakeup.set` writes a byte into that pipe, which is safe from signal handlers and threads.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import Any

from psycopg import AsyncConnection, Connection, sql


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
        with suppress(BlockingIOError):  # the pipe is full of wake-ups already
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
        """Gives the pipe back."""
        os.close(self._reader)
        os.close(self._writer)


class Notifications:
    """The notifications of one listening connection, waited for together with a Wakeup."""

    def __init__(self, conn: Connection[Any], wakeup: Wakeup) -> None:
        self._conn = conn
        self._wakeup = wakeup
        self._arrived = False
        conn.add_notify_handler(self._on_notify)

    def _on_notify(self, _notification: Any) -> None:
        self._arrived = True

    def wait(self, seconds: float) -> bool:
        """True once a notification came, be it since the last wait; False at the deadline or a wake-up."""
        if not self._arrived:
            poll = select.poll()
            poll.register(self._conn.fileno(), select.POLLIN)
            poll.register(self._wakeup.fileno(), select.POLLIN)
            ready = dict(poll.poll(max(0.0, seconds) * 1000))
            self._wakeup.clear()
            if self._conn.fileno() in ready:
                self._arrived = bool(received(self._conn))
        arrived, self._arrived = self._arrived, False
        return arrived


def received(conn: Connection[Any] | AsyncConnection[Any]) -> set[str]:
    """The channels of the notifications that have reached an idle connection's socket; raises when it is closed."""
    conn.pgconn.consume_input()
    found = set()
    while notification := conn.pgconn.notifies():
        found.add(notification.relname.decode())
    return found


def listen(conn: Connection[Any], channel: str, wakeup: Wakeup) -> Notifications:
    """Listens to a channel on this connection; look at the tables once after this, then wait."""
    notifications = Notifications(conn, wakeup)
    conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
    return notifications
