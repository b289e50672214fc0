"""Iterating over the events of an outbox from asyncio: `tail_async`.

    async for event in tail_async("completion", start=StartPosition.cursor(stored)):
        await handle(event)
        stored = event.cursor

**One thread** runs the blocking tail (`core.events.tail`) and hands its batches to the event loop: it waits for room,
a semaphore of BATCHES_AHEAD places, and then puts the batch into the iterator's queue by `call_soon_threadsafe`. The
iterator gives the place back when the caller has taken the last event of the batch. So a slow caller slows the reading
down, and neither side polls. Notices go the same way, without needing a place, and are reported in the event loop.

**The end.** The last thing that the thread puts into the queue says that it has ended, and why. An iterator that is
closed, cancelled in the middle or dropped stops the tail, takes what is still in the queue until it has that, and joins
the thread; the tail has closed its connection by then. A tail that is connecting or waits for an answer ends when it
has it, at the latest after the connect timeout or ANSWER_TIMEOUT_SECONDS.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, Self, overload

from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.event_iterator import E, Place
from pgcoord_cli.core.events.filters import EVERYTHING, Filters
from pgcoord_cli.core.events.notices import Notice, OnNotice, ignore_notice
from pgcoord_cli.core.events.outbox import CompletionEvent, Event, LeaseEvent, outbox_named
from pgcoord_cli.core.events.start_position import NOW, StartPosition
from pgcoord_cli.core.events.tail import Batch, Tail
from pgcoord_cli.db.connection import require_process
from pgcoord_cli.settings import resolve_arguments

BATCHES_AHEAD = 2
"""Batches that are read but not used up; each has up to BATCH_LIMIT events."""


class AsyncEventIterator(Generic[E]):
    """The events of an outbox in ascending order. Made by `tail_async`; an asynchronous iterator and context manager.

    `async with` and `aclose` wait until it is closed. One that is dropped, as at the end of a loop over it, is closed
    soon after.
    """

    def __init__(self, tail: Tail, handover: _Handover) -> None:
        self._tail = tail
        self._place = handover.place
        self._events: AsyncGenerator[Any, None] = handover.events(tail)

    def __aiter__(self) -> AsyncIterator[E]:
        return self._events

    async def __anext__(self) -> E:
        event: E = await anext(self._events)
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def cursor(self) -> str | None:
        """The cursor to resume from once every event that was returned has been handled.

        It is that of the last event, and moves on past events that the filters leave out. None before the first read.
        """
        return self._place.cursor

    def stop(self) -> None:
        """Ends the iteration after the events that have been read. For signal handlers and other tasks."""
        self._tail.stop()

    async def aclose(self) -> None:
        """Ends the tail's thread and closes its connection; returns when both have gone."""
        await self._events.aclose()
        self._tail.close()


class _Ended(NamedTuple):
    """The thread has ended; `error` is what the tail raised."""

    error: BaseException | None


class _Handover:
    """What the tail's thread and the event loop share. The iterator is not part of it, so that it can be dropped."""

    def __init__(self, report: OnNotice) -> None:
        self.place = Place()
        self._report = report
        self._room = threading.Semaphore(BATCHES_AHEAD)
        self._items: asyncio.Queue[Batch | Notice | _Ended] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop

    def put(self, item: Batch | Notice | _Ended) -> None:
        """Puts an item into the queue, from the tail's thread. Raises RuntimeError if the loop is closed."""
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def run(self, tail: Tail) -> None:
        """What the thread does."""
        error: BaseException | None = None
        try:
            for batch in tail.batches():
                self._room.acquire()
                self.put(batch)
        except BaseException as raised:  # noqa: BLE001 - raised again in the event loop
            error = raised
        with suppress(RuntimeError):  # the loop is closed: nothing waits for it
            self.put(_Ended(error))

    async def events(self, tail: Tail) -> AsyncGenerator[Event, None]:
        """Starts the thread, yields the events of its batches, and ends the thread."""
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self.run, args=(tail,), name="pgcoord/tail", daemon=True)
        thread.start()
        item: Batch | Notice | _Ended | None = None
        process = os.getpid()
        try:
            while not isinstance(item := await self._items.get(), _Ended):
                if isinstance(item, Notice):
                    self._report(item)
                    continue
                for event in item.events:
                    self.place.cursor = event.cursor
                    yield event
                    require_process(process, "this iterator")
                self.place.cursor = to_cursor(item.position)
                self._room.release()
            if item.error:
                raise item.error
        finally:
            if os.getpid() == process:  # a forked child has neither the thread nor its event loop
                await self._end(tail, thread, has_ended=isinstance(item, _Ended))

    async def _end(self, tail: Tail, thread: threading.Thread, *, has_ended: bool) -> None:
        """Ends the thread and closes the tail."""
        tail.stop()
        self._room.release()  # for a thread that waits for room
        try:
            if not has_ended:
                await self._wait_for_end()
        finally:
            thread.join()
            tail.close()

    async def _wait_for_end(self) -> None:
        """Waits until the thread has ended. A cancellation meanwhile takes effect then, so that nothing is left."""
        cancellation: asyncio.CancelledError | None = None
        while True:
            try:
                if isinstance(await self._items.get(), _Ended):
                    break
            except asyncio.CancelledError as error:
                cancellation = error
        if cancellation:
            raise cancellation


@overload
def tail_async(
    outbox: Literal["lease"],
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> AsyncEventIterator[LeaseEvent]: ...


@overload
def tail_async(
    outbox: Literal["completion"],
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> AsyncEventIterator[CompletionEvent]: ...


@overload
def tail_async(
    outbox: str,
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> AsyncEventIterator[LeaseEvent | CompletionEvent]: ...


def tail_async(
    outbox: str,
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> AsyncEventIterator[Any]:
    """Iterates over the events of an outbox, as `tail` does, without blocking the event loop.

    Arguments and errors are those of `tail`; `report` is called in the event loop.
    """
    settings = resolve_arguments(dsn, schema)
    handover = _Handover(report)
    tail = Tail(settings, outbox_named(outbox), start=start, filters=filters, follow=follow, report=handover.put)
    return AsyncEventIterator(tail, handover)
