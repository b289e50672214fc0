"""Watches: futures that complete when the value of a key has changed.

Every settled batch with a commit, and every direct commit, notifies one channel. On each notification, and once in a
poll interval, all watched keys of a client are read in one snapshot, and a watch whose key no longer has the expected
value completes. A value that changes and changes back between two reads may go unnoticed, as in FoundationDB.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Iterable
from contextlib import suppress

import psycopg

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.async_listener import AsyncListener
from pgcoord_cli.core.kv.snapshots import ReadSet, SnapshotReader
from pgcoord_cli.db.connection import translate
from pgcoord_cli.errors import PgcoordError, TransactionCancelled

_log = logging.getLogger("pgcoord.kv")


class Watch:
    """An awaitable that returns once the value of `key` is not `expected` (None: absent).

    The key is watched from the commit of the watch's transaction on. Awaiting raises CancelledError when the watch was
    cancelled, or the client was closed; and if the transaction did not commit, the error with which it ended.
    """

    def __init__(self, key: bytes, expected: bytes | None) -> None:
        self.key = key
        self.expected = expected
        self.changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Generator[None, None, None]:
        return self.changed.__await__()

    def cancel(self) -> None:
        """Ends the watch; whatever awaits it raises CancelledError."""
        self.changed.cancel()

    def fail(self, error: Exception) -> None:
        """Ends the watch; whatever awaits it raises `error`. Does nothing if it has ended already."""
        if not self.changed.done():
            self.changed.set_exception(error)
            self.changed.exception()  # a watch that is never awaited must not be reported as an unhandled error


class TransactionWatches:
    """The watches of one life of a transaction, until it commits. They fail when it does not, or is dropped."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._watches: list[Watch] = []

    def add(self, key: bytes, value: bytes | None) -> Watch:
        """Returns a watch that expects the transaction to leave this value."""
        watch = Watch(key, value)
        self._watches.append(watch)
        return watch

    def start(self) -> None:
        """Starts the watches: the transaction has committed."""
        watches, self._watches = self._watches, []
        for watch in watches:
            self._watcher.add(watch)

    def fail(self, error: Exception) -> None:
        """Fails the watches: the transaction has not committed."""
        watches, self._watches = self._watches, []
        _fail(watches, error)

    def __del__(self) -> None:
        # In any thread, and possibly after the end of the event loop.
        if self._watches:
            with suppress(RuntimeError):
                error = TransactionCancelled("the transaction was dropped before its commit")
                self._watcher.loop.call_soon_threadsafe(_fail, self._watches, error)


def _fail(watches: Iterable[Watch], error: Exception) -> None:
    for watch in watches:
        watch.fail(error)


class Watcher:
    """Completes the watches of one client, with one task that runs while there are any."""

    def __init__(self, schema: str, reader: SnapshotReader, listener: AsyncListener) -> None:
        self.loop = asyncio.get_running_loop()
        self._channel = channels.data(schema)
        self._reader = reader
        self._wakeup = asyncio.Event()
        self._listener = listener
        self._watches: set[Watch] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, watch: Watch) -> None:
        """Starts to watch a key. Cancels the watch at once if the client was closed."""
        if self._closed:
            watch.cancel()
            return
        self._watches.add(watch)
        # Read at once: the value may have changed between the commit and this call, and was notified already.
        self._wakeup.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Cancels every watch, and ends the task."""
        self._closed = True
        for watch in self._watches:
            watch.cancel()
        self._watches.clear()
        if self._task:
            self._task.cancel()  # it may be waiting for a server that is down
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff = Backoff(0.05, 1.0)
        outage = Outage(_log, "watched keys are not read", "watched keys are read")
        while self._watches:
            # Cleared before the read: a notification during the read causes another one.
            self._wakeup.clear()
            try:
                await self._listener.listen(self._channel, self._wakeup.set)
                await self._check_once()
                backoff.reset()
                outage.ended()
            except (PgcoordError, psycopg.Error) as error:  # the server may be back at the next read
                outage.failed((translate(error) if isinstance(error, psycopg.Error) else error).message)
                await backoff.pause()
            except Exception as error:  # noqa: BLE001 - raised where the watches are awaited; later ones must go on
                self._fail_all(error)
            # Notifications only wake (rule I7): one that was lost costs a poll interval.
            with suppress(TimeoutError):
                async with asyncio.timeout(channels.POLL_SECONDS):
                    await self._wakeup.wait()

    def _fail_all(self, error: Exception) -> None:
        watches, self._watches = self._watches, set()
        _fail(watches, error)

    async def _check_once(self) -> None:
        self._watches = {watch for watch in self._watches if not watch.changed.done()}
        keys = tuple({watch.key for watch in self._watches})
        if not keys:
            return
        values = (await self._reader.read(ReadSet(keys))).values
        for watch in list(self._watches):
            # A watch may have been added during the read, with a key that the read lacks. The next read, for which
            # `add` has set the event, has that key.
            if watch.key in values and values[watch.key] != watch.expected and not watch.changed.done():
                watch.changed.set_result(None)
                self._watches.discard(watch)
