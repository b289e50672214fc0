"""A few connections, shared by turns and replaced when they break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import AsyncConnection

from pgcoord_cli.db.connection import is_connection_lost

Opener = Callable[[], Awaitable[AsyncConnection[Any]]]


class Pool:
    """At most `size` connections, opened when first needed. Nobody holds one while waiting for an outcome."""

    def __init__(self, opener: Opener, size: int) -> None:
        self._opener = opener
        self._free: asyncio.LifoQueue[AsyncConnection[Any] | None] = asyncio.LifoQueue()
        for _ in range(size):
            self._free.put_nowait(None)
        self._closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection[Any]]:
        """A connection for one statement or transaction; a broken one is dropped, and the error goes on."""
        conn = await self._free.get()
        try:
            if conn is None or conn.closed:
                conn = None
                conn = await self._opener()
            yield conn
        except psycopg.Error as error:
            if conn is not None and is_connection_lost(error):
                await conn.close()
            raise
        except asyncio.CancelledError:
            # A statement was abandoned half way: what the connection would answer next belongs to nobody.
            if conn is not None:
                await conn.close()
            raise
        finally:
            await self._give_back(conn)

    async def _give_back(self, conn: AsyncConnection[Any] | None) -> None:
        if self._closed and conn is not None:
            await conn.close()
        self._free.put_nowait(None if conn is None or conn.closed else conn)

    async def close(self) -> None:
        """Closes what is free now and the rest as it is given back."""
        self._closed = True
        idle = [self._free.get_nowait() for _ in range(self._free.qsize())]
        for conn in idle:
            if conn is not None:
                await conn.close()
