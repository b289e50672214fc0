"""Watching keys: being told when a value is no longer what it was.

Every batch that commits notifies one channel. Then, and once in a poll interval, all watched keys are read in one
statement, and a watch whose key holds something else than expected is over. A value that changes and changes back
between two looks may go unnoticed, as in FoundationDB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import suppress

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.async_listener import AsyncListener
from pgcoord_cli.core.kv.snapshots import ReadSet, SnapshotReader
from pgcoord_cli.errors import PgcoordError


class Watch:
    """Await it: returns once the key no longer holds `expected`. It looks from the moment its transaction commits."""

    def __init__(self, key: bytes, expected: bytes | None) -> None:
        self.key = key
        self.expected = expected
        self.changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Generator[None, None, None]:
        return self.changed.__await__()

    def cancel(self) -> None:
        """Stops looking."""
        self.changed.cancel()


class Watcher:
    """Looks after the watches of one client."""

    def __init__(self, schema: str, reader: SnapshotReader, listener: AsyncListener) -> None:
        self._channel = channels.data(schema)
        self._reader = reader
        self._look = asyncio.Event()
        self._listener = listener
        self._watches: set[Watch] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, watch: Watch) -> None:
        """Begins to look after a watch."""
        if self._closed:
            watch.cancel()
            return
        self._watches.add(watch)
        self._look.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Cancels every watch."""
        self._closed = True
        for watch in self._watches:
            watch.cancel()
        self._watches.clear()
        if self._task:
            self._task.cancel()  # it may be waiting for a server that is down
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff = Backoff(0.05, 1.0)
        await self._listener.listen(self._channel, self._look.set)
        while self._watches:
            self._look.clear()
            try:
                await self._look_once()
                backoff.reset()
            except PgcoordError:
                await backoff.pause()
            with suppress(TimeoutError):
                async with asyncio.timeout(channels.POLL_SECONDS):
                    await self._look.wait()

    async def _look_once(self) -> None:
        self._watches = {watch for watch in self._watches if not watch.changed.done()}
        keys = tuple({watch.key for watch in self._watches})
        if not keys:
            return
        values = (await self._reader.read(ReadSet(keys))).values
        for watch in list(self._watches):
            if watch.key in values and values[watch.key] != watch.expected and not watch.changed.done():
                watch.changed.set_result(None)
                self._watches.discard(watch)
