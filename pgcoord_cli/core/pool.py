"""A few connections, shared by turns and replaced when they break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from psycopg import AsyncConnection

from pgcoord_cli.db.lane import Lane

Opener = Callable[[], Awaitable[AsyncConnection[Any]]]


class Pool:
    """At most `size` connections, opened when first needed. Nobody holds one while waiting for an outcome."""

    def __init__(self, opener: Opener, size: int) -> None:
        self._opener = opener
        self._free: asyncio.LifoQueue[Lane | None] = asyncio.LifoQueue()
        for _ in range(size):
            self._free.put_nowait(None)
        self._closed = False

    @asynccontextmanager
    async def lane(self) -> AsyncIterator[Lane]:
        """A connection for one statement; if it breaks, or is left half way, it is not given to anybody again."""
        lane = await self._free.get()
        try:
            if lane is None or not lane.is_usable:
                lane = None
                lane = Lane(await self._opener())
            yield lane
        finally:
            await self._give_back(lane)

    async def _give_back(self, lane: Lane | None) -> None:
        if lane is not None and (self._closed or not lane.is_usable):
            await lane.close()
            lane = None
        self._free.put_nowait(lane)

    async def close(self) -> None:
        """Closes what is free now and the rest as it is given back."""
        self._closed = True
        idle = [self._free.get_nowait() for _ in range(self._free.qsize())]
        for lane in idle:
            if lane is not None:
                await lane.close()
            self._free.put_nowait(None)
