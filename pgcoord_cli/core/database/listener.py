"""LISTEN for threads: waiting for a notification, a wake-up or a deadline, whichever comes first.

The caller owns the connection. It calls `listen` once, reads the tables once after that, since a notification sent
earlier is not repeated, and then waits. `async_listener` is the same for the event loop.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Any

from psycopg import Connection, sql

from pgcoord_cli.core.concurrency.wakeup import Wakeup


class Listener:
    """The notifications of one connection, waited for together with a Wakeup."""

    def __init__(self, conn: Connection[Any], wakeup: Wakeup) -> None:
        self._conn = conn
        self._wakeup = wakeup
        self._arrived: set[str] = set()
        conn.add_notify_handler(lambda notification: self._arrived.add(notification.channel))

    def listen(self, channels: Sequence[str]) -> None:
        """Listens to channels. Raises psycopg's errors."""
        for channel in channels:
            self._conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def unlisten(self) -> None:
        """Listens to no channel any more. Raises psycopg's errors."""
        self._conn.execute("UNLISTEN *")

    def wait(self, seconds: float) -> set[str]:
        """Blocks until there is a notification; returns the channels notified since the last wait.

        Returns the empty set at a wake-up or after `seconds`. Raises OperationalError when the connection is closed.
        """
        if notified := self._take():
            return notified
        poll = select.poll()
        poll.register(self._conn.fileno(), select.POLLIN)
        poll.register(self._wakeup.fileno(), select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        self._wakeup.clear()
        return self._take()

    def pause(self, seconds: float) -> None:
        """Blocks until a wake-up or for `seconds`, and discards the notifications that arrived until then."""
        self._wakeup.wait(seconds)
        self._take()

    def _take(self) -> set[str]:
        # Notifications that arrived during a statement went to the handler; others are still unread in the socket.
        notified, self._arrived = self._arrived | unread_notifications(self._conn), set()
        return notified


def unread_notifications(conn: Connection[Any]) -> set[str]:
    """The channels of the notifications that wait in an idle connection's socket.

    Raises OperationalError when the connection is closed.
    """
    conn.pgconn.consume_input()
    found = set()
    while notification := conn.pgconn.notifies():
        found.add(notification.relname.decode())
    return found


def listen(conn: Connection[Any], channels: Sequence[str], wakeup: Wakeup) -> Listener:
    """A Listener that listens to `channels`. Read the tables once after this, then wait."""
    listener = Listener(conn, wakeup)
    listener.listen(channels)
    return listener
