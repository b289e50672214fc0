"""A few connections that run statements in the order in which they come up, and are replaced when they break.

A statement takes a free connection. Where none is free, another is opened, up to the pool's size, and the statement
runs on whichever is ready first. A connection belongs to one statement at a time and to none in between, so that a
program that thinks between two statements holds none.

A connection that was not used for IDLE_SECONDS is given back to the server, the last one too; the next statement opens
another. Both happen within one step of the event loop, so no statement can be on a connection that is closed as idle.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from psycopg import AsyncConnection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.db.callback_connection import Answer, CallbackConnection, PendingStatement
from pgcoord_cli.db.connection import require_process
from pgcoord_cli.errors import ConnectionFailed

_log = logging.getLogger("pgcoord.pool")

FIRST_PAUSE, LAST_PAUSE = 1.0, 5.0
"""Seconds between attempts to open one more connection while others work."""

IDLE_SECONDS = 10.0
"""Seconds after its last statement at which a connection is closed."""

CLOSED = "this client was closed"

Opener = Callable[[], Awaitable[AsyncConnection[Any]]]


class Pool:
    """At most `size` connections, opened when first needed; `opener` opens one, or raises why it cannot.

    A statement without an answer for `timeout` seconds counts as a lost connection; None: no limit. A connection that
    is not used for `idle_seconds` is closed.
    """

    def __init__(
        self, opener: Opener, size: int, timeout: float | None = None, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._opener = opener
        self._size = size
        self._timeout = timeout
        self._idle_seconds = idle_seconds
        self._idle_timer: asyncio.TimerHandle | None = None
        self._connections: set[CallbackConnection] = set()
        self._free: dict[CallbackConnection, float] = {}
        """With the time since when each is free. Used as a stack: the server process used last has its caches warm."""
        self._waiting: deque[PendingStatement] = deque()
        self._openings: set[asyncio.Task[CallbackConnection]] = set()
        self._backoff = Backoff(FIRST_PAUSE, LAST_PAUSE)
        self._closed = False
        self._opened_by = os.getpid()

    def require_own_process(self) -> None:
        """Raises UsageError in a process that was forked from the one that made the pool."""
        require_process(self._opened_by, "this client")

    def run(self, text: str, parameters: Sequence[bytes | None], done: Callable[[Answer], None]) -> None:
        """Runs a statement; `done` gets its rows, a psycopg.Error, or the error that opening a connection raised."""
        self._waiting.append(PendingStatement(text, parameters, done))
        self._advance()

    async def open(self) -> None:
        """Opens one connection. Raises why it cannot."""
        self._add(await self._open_another())

    async def close(self) -> None:
        """Closes every connection; statements that wait or run get an error as their answer.

        In a forked child, does nothing.
        """
        if os.getpid() != self._opened_by:
            return  # its sockets are closed, and the tasks belong to the parent's event loop
        self._closed = True
        if self._idle_timer:
            self._idle_timer.cancel()
        for opening in self._openings:
            opening.cancel()
        await asyncio.gather(*self._openings, return_exceptions=True)
        for connection in list(self._connections):
            self._forget(connection)
            connection.close()
        self._advance()

    def _advance(self) -> None:
        while self._waiting and self._free:
            statement, connection = self._waiting.popleft(), self._free.popitem()[0]
            connection.run(statement._replace(done=partial(self._on_answer, connection, statement.done)))
        while self._waiting and self._closed:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._waiting.popleft().done, ConnectionFailed(CLOSED))
        while len(self._openings) < min(len(self._waiting), self._size - len(self._connections)):
            opening = asyncio.create_task(self._open_another())
            self._openings.add(opening)
            opening.add_done_callback(self._on_opened)

    def _on_answer(self, connection: CallbackConnection, done: Callable[[Answer], None], answer: Answer) -> None:
        if connection.is_open:
            self._set_free(connection)
        else:
            self._forget(connection)
            _log.debug("a connection was lost; %d are left", len(self._connections))
            self._close_idle()
        try:
            done(answer)
        finally:
            self._advance()

    def _close_idle(self) -> None:
        # What ended one connection has probably ended the idle ones too; a retry must not find that out again.
        for connection in list(self._free):
            self._forget(connection)
            connection.close()

    async def _open_another(self) -> CallbackConnection:
        return CallbackConnection(await self._opener(), timeout=self._timeout)

    def _on_opened(self, opening: asyncio.Task[CallbackConnection]) -> None:
        """Adds the connection. Where opening failed, the statements wait for those that are open, or one gets why."""
        self._openings.discard(opening)
        if opening.cancelled():
            return
        try:
            self._add(opening.result())
        except Exception as error:  # noqa: BLE001 - passed to the statement that waits
            if self._connections:
                _log.debug("cannot open another connection beside %d: %s", len(self._connections), error)
                asyncio.get_running_loop().call_later(self._backoff.next_pause(), self._advance)
                return
            if self._waiting:
                # In a step of its own: what the callback raises must not keep the others waiting.
                asyncio.get_running_loop().call_soon(self._waiting.popleft().done, error)
        else:
            self._backoff.reset()
        self._advance()

    def _add(self, connection: CallbackConnection) -> None:
        connection.on_lost = partial(self._forget, connection)
        self._connections.add(connection)
        self._set_free(connection)

    def _forget(self, connection: CallbackConnection) -> None:
        # From now on another connection may be opened in its place.
        self._connections.discard(connection)
        self._free.pop(connection, None)

    def _set_free(self, connection: CallbackConnection) -> None:
        loop = asyncio.get_running_loop()
        self._free[connection] = loop.time()
        # One timer for all, and not one for each statement: when it fires, it checks which were not used since.
        if self._idle_timer is None:
            self._idle_timer = loop.call_later(self._idle_seconds, self._on_idle_timer)

    def _on_idle_timer(self) -> None:
        """Closes the connections that were not used for `idle_seconds`."""
        self._idle_timer = None
        loop = asyncio.get_running_loop()
        used_before = loop.time() - self._idle_seconds
        for connection in [free for free, since in self._free.items() if since <= used_before]:
            self._forget(connection)
            connection.close()
        if self._free:
            # The free ones are in the order in which they became free.
            self._idle_timer = loop.call_at(next(iter(self._free.values())) + self._idle_seconds, self._on_idle_timer)
