"""Iterating over the events of an outbox: `tail` for programs that may block (`core.events.tail`).

    for event in tail("completion", start=StartPosition.cursor(stored)):
        handle(event)
        stored = event.cursor

The iterator holds one connection from the first event on, until it ends, is closed or is dropped. It reads a batch at a
time, so that a slow caller slows the reading down and at most one batch is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.filters import EVERYTHING, Filters
from pgcoord_cli.core.events.notices import OnNotice, ignore_notice
from pgcoord_cli.core.events.outbox import CompletionEvent, Event, LeaseEvent, outbox_named
from pgcoord_cli.core.events.start_position import NOW, StartPosition
from pgcoord_cli.core.events.tail import Tail
from pgcoord_cli.db.connection import require_process
from pgcoord_cli.settings import resolve_arguments

E = TypeVar("E", bound=Event)


class Place:
    """How far the caller of an iterator has got."""

    cursor: str | None = None


class EventIterator(Generic[E]):
    """The events of an outbox in ascending order. Made by `tail`; an iterator, and a context manager that closes it."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._place = Place()
        # A generator without a reference to this object, so that both go, and the connection with them, when the
        # caller drops them.
        self._events: Iterator[Any] = _events(tail, self._place)

    def __iter__(self) -> Iterator[E]:
        return self._events

    def __next__(self) -> E:
        event: E = next(self._events)
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def cursor(self) -> str | None:
        """The cursor to resume from once every event that was returned has been handled.

        It is that of the last event, and moves on past events that the filters leave out. None before the first read.
        """
        return self._place.cursor

    def stop(self) -> None:
        """Ends the iteration after the events that have been read. For signal handlers and other threads."""
        self._tail.stop()

    def close(self) -> None:
        """Closes the connection. Not while another thread waits for the next event: `stop` is for that."""
        self._events.close()  # type: ignore[attr-defined]
        self._tail.close()


def _events(tail: Tail, place: Place) -> Iterator[Event]:
    process = os.getpid()
    with closing(tail):
        for batch in tail.batches():
            for event in batch.events:
                place.cursor = event.cursor
                yield event
                require_process(process, "this iterator")
            place.cursor = to_cursor(batch.position)


@overload
def tail(
    outbox: Literal["lease"],
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> EventIterator[LeaseEvent]: ...


@overload
def tail(
    outbox: Literal["completion"],
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> EventIterator[CompletionEvent]: ...


@overload
def tail(
    outbox: str,
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> EventIterator[LeaseEvent | CompletionEvent]: ...


def tail(
    outbox: str,
    dsn: str | None = None,
    *,
    schema: str | None = None,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: OnNotice = ignore_notice,
) -> EventIterator[Any]:
    """Iterates over the events of an outbox, `lease` or `completion`, in ascending order, each at least once.

    `dsn` is a connection string of libpq, `schema` the cluster's; what is left out comes from PGCOORD_DSN,
    PGCOORD_SCHEMA and libpq's environment. With `follow` the iteration waits for further events and does not end;
    without, it ends after the events that were committed when it began.

    Raises UsageError for a malformed argument. The first `next` raises ConnectionFailed, SchemaMissing,
    PermissionDenied, UnsuitableServer, and UsageError if `start` lies beyond the last event; any may raise
    CursorExpired, if garbage collection has deleted events that come next. Later trouble, such as a lost connection
    or a locked table, is ridden out; `report` is called with a Notice then, and when an open transaction holds the tail
    up.
    """
    settings = resolve_arguments(dsn, schema)
    return EventIterator(
        Tail(settings, outbox_named(outbox), start=start, filters=filters, follow=follow, report=report)
    )
