"""A few connections that run whatever statements come up, and are replaced when they break.

A statement takes the connection that is free; where none is, one more is opened, up to the pool's size, and the
statement goes over whichever is ready first. Nobody holds a connection for longer than one statement. Where one broke
under a statement, the idle ones are not trusted either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from psycopg import AsyncConnection

from pgcoord_cli.core.concurrency.backoff import jittered
from pgcoord_cli.db.lane import Answer, Lane, PendingStatement
from pgcoord_cli.errors import ConnectionFailed

RETRY_SECONDS = 1.0
"""After one more connection could not be opened, the next attempt waits so long, if somebody still waits then."""

CLOSED = "this client was closed"

Opener = Callable[[], Awaitable[AsyncConnection[Any]]]


class Pool:
    """At most `size` connections, opened when first needed; `opener` makes one, or raises what is in the way.

    A connection that leaves a statement without an answer for `patience` seconds, if there are any, is taken for lost.
    """

    def __init__(self, opener: Opener, size: int, patience: float | None = None) -> None:
        self._opener = opener
        self._size = size
        self._patience = patience
        self._lanes: set[Lane] = set()
        self._free: list[Lane] = []
        """The last one used comes first: its process is still warm."""
        self._waiting: deque[PendingStatement] = deque()
        self._openings: set[asyncio.Task[Lane]] = set()
        self._closed = False

    def run(self, text: str, parameters: Sequence[bytes | None], done: Callable[[Answer], None]) -> None:
        """Runs a statement; `done` gets its rows, a psycopg.Error, or what opening a connection raised."""
        self._waiting.append(PendingStatement(text, parameters, done))
        self._advance()

    async def open(self) -> None:
        """Opens one connection, and raises what is in the way."""
        self._add(await self._open_another())

    async def close(self) -> None:
        """Closes every connection; who waits for a statement is told so."""
        self._closed = True
        for opening in self._openings:
            opening.cancel()
        await asyncio.gather(*self._openings, return_exceptions=True)
        for lane in list(self._lanes):
            self._forget(lane)
            lane.close()
        self._advance()

    def _advance(self) -> None:
        while self._waiting and self._free:
            statement, lane = self._waiting.popleft(), self._free.pop()
            lane.run(statement._replace(done=partial(self._on_answer, lane, statement.done)))
        while self._waiting and self._closed:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._waiting.popleft().done, ConnectionFailed(CLOSED))
        while len(self._openings) < min(len(self._waiting), self._size - len(self._lanes)):
            opening = asyncio.create_task(self._open_another())
            self._openings.add(opening)
            opening.add_done_callback(self._on_opened)

    def _on_answer(self, lane: Lane, done: Callable[[Answer], None], answer: Answer) -> None:
        if lane.is_open:
            self._free.append(lane)
        else:
            self._forget(lane)
            self._close_idle()
        try:
            done(answer)
        finally:
            self._advance()

    def _close_idle(self) -> None:
        """What ended one connection has probably ended the others, and a second try should not find that out too."""
        for lane in list(self._free):
            self._forget(lane)
            lane.close()

    async def _open_another(self) -> Lane:
        return Lane(await self._opener(), patience=self._patience)

    def _on_opened(self, opening: asyncio.Task[Lane]) -> None:
        """One who waits goes on. Where that failed, all wait for the connections there are, or one hears why."""
        self._openings.discard(opening)
        if opening.cancelled():
            return
        try:
            self._add(opening.result())
        except Exception as error:  # noqa: BLE001 - handed on
            if self._lanes:
                asyncio.get_running_loop().call_later(jittered(RETRY_SECONDS), self._advance)
                return
            if self._waiting:
                self._waiting.popleft().done(error)
        self._advance()

    def _add(self, lane: Lane) -> None:
        lane.on_lost = partial(self._forget, lane)
        self._lanes.add(lane)
        self._free.append(lane)

    def _forget(self, lane: Lane) -> None:
        """Leaves room for another in its place."""
        self._lanes.discard(lane)
        if lane in self._free:
            self._free.remove(lane)
