"""Tails: read an outbox from a cursor on, for as long as the caller wants, and miss no event (rule I10).

    with closing(Tail(settings, COMPLETION, start=StartPosition.position(stored))) as tail:
        for batch in tail.batches():
            handle(batch.events)
            stored = batch.position

Programs use `tail` (`core.events.event_iterator`) or `tail_async` (`core.events.async_tail`), which iterate over single
events.

**One round** reads the events after the position. While a read returns a full batch, the next one follows at once, at
the pace of the caller; at most one batch is in memory. When a read returns the last visible event, the tail requests
wakeups, lists the open transactions that may not have seen the request, and reads once more
(`core.events.tail_connection`, `core.events.outbox`). Only then it waits: for a notification or the poll interval, or
for milliseconds while a listed transaction is open. `core.events.watermark` decides which events of a reading may be
delivered; a tail passes a gap only when no open transaction can fill it.

**After a wakeup** the tail reads, and waits again if it found one event; the wakeup request stays. Writers that notify
commit one after the other, so when a read finds more than one event, the tail cancels the request and reads every
PACE_SECONDS until a read finds at most one.

**Held up.** After a read at a gap that delivered nothing, the tail reads with a small limit until the watermark
advances. When a gap stays for longer than STALL_SECONDS, the tail reports the transactions that may fill it.

**Without `follow`** the tail ends when it has passed the last event that was visible when it began, or when it has
been held up at a gap before that event for STALL_SECONDS. It never requests wakeups.

**From now** means every event that becomes visible after the start. Transactions that are open at the start may hold
ids below the highest visible one; the tail therefore begins before the first gap that they may fill, within the last
LOOK_BACK ids, and leaves out the events that were visible at the start. A start at a time does the same from the first
event of that time on.

**Lost connections** and failed statements close the connection. The tail reports it, backs off, reconnects and
continues from its position; a right that was taken away is waited for, too. An error of the first connection, and a
refusal before the first read, are raised instead.

**A loss.** A crash of the server, a failover or a restore may take events away that have been delivered, and the
sequence hands their ids out again. A tail therefore never advances beyond the highest visible id, and remembers the
identity of the last event that it has passed. When it starts, when it reconnects, and when the outbox ends before its
position, it compares that (`core.events.history`), and raises HistoryChanged if the outbox has another event there.
When it reconnects it also forgets which ids above its position were visible.

**Garbage collection** raises the floor of the outbox in the transaction that deletes. A tail at a gap compares its
position with the floor before it passes the gap, so that it does not take deleted events for rolled-back ones: it
raises CursorExpired.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from enum import Enum
from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.channels import POLL_SECONDS
from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.filters import EVERYTHING, Filters
from pgcoord_cli.core.events.history import PassedEvent, check_history, expired
from pgcoord_cli.core.events.notices import Notice, OnNotice, ignore_notice
from pgcoord_cli.core.events.outbox import Event, Outbox
from pgcoord_cli.core.events.stall_detector import StallDetector
from pgcoord_cli.core.events.start_position import NOW, StartPosition, VisibleAtStart
from pgcoord_cli.core.events.tail_connection import (
    BlockingTransaction,
    Bounds,
    Reading,
    TailConnection,
    list_blocking_transactions,
)
from pgcoord_cli.core.events.watermark import Watermark
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import PERMANENT_ERRORS, CursorExpired, PgcoordError, UnsuitableServer
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.tail")

LOOK_BACK = 100_000
"""How many ids below the highest visible one are searched for gaps when a tail starts from now or from a time."""

BATCH_LIMIT = 4_000
"""Events in one read."""

GAP_LIMIT = 50
"""Events in one read at a gap: enough to see whether the gap has been filled, and cheap."""

PACE_SECONDS = 0.005
"""Seconds between two reads of a tail that finds several events each time."""

REFUSALS = (*PERMANENT_ERRORS, UnsuitableServer)
"""Errors that end a tail before its first read."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts to connect."""


class Step(Enum):
    """What a tail does next."""

    CATCH_UP = "cancel wakeups and read at once"
    PACED = "pause, then cancel wakeups and read with a gap check"
    BEFORE_WAIT = "request wakeups and read with a gap check"
    AFTER_WAKEUP = "read; the wakeup request stays"
    WAIT = "wait for a notification or the poll interval"


class Batch(NamedTuple):
    """Events in ascending order, and the position after them, which also passes filtered and rolled-back ids.

    `passed` is the last event up to the position, delivered or filtered out; None if the outbox never had one.
    """

    events: list[Event]
    position: int
    passed: PassedEvent | None = None


class Tail:
    """One reader of an outbox. `batches` blocks; `stop` may be called from a signal handler or another thread."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        *,
        start: StartPosition = NOW,
        until: StartPosition | None = None,
        filters: Filters = EVERYTHING,
        follow: bool = True,
        report: OnNotice = ignore_notice,
    ) -> None:
        self._settings = settings
        self._outbox = outbox
        self._start = start
        self._until = until
        self._filters = filters
        self._follow = follow
        self._report = report
        self._wakeup = Wakeup()
        self._watermark: Watermark | None = None
        self._passed = start.passed
        self._end: int | None = None
        self._stop_at: int | None = None
        self._visible_at_start = VisibleAtStart(0, [])
        self._stopping = False
        self._is_interrupted = False
        self._outage = Outage(_log, "disconnected", "connected", outbox=outbox.noun)

    @property
    def position(self) -> int | None:
        """The id up to which this tail has read; None before the start has been resolved."""
        return self._watermark.position if self._watermark else None

    def stop(self) -> None:
        """Makes `batches` end after the current batch."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """Releases the descriptors of this tail."""
        self._wakeup.close()

    def batches(self) -> Iterator[Batch]:
        """Yields batches until `stop`, the end, or, without `follow`, until the tail has caught up.

        The first batch is empty and holds the position at which the tail starts. Raises ConnectionFailed if the first
        connection fails, SchemaMissing, UnsuitableServer and PermissionDenied before the first batch, UsageError if the
        start lies beyond the last event, and CursorExpired if garbage collection has deleted events after the position.
        Later trouble, such as a lost connection or a locked table, is reported and ridden out; without `follow` only
        after the first batch.
        """
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        has_connected = False
        while not self._stopping:
            try:
                with closing(TailConnection(self._settings, self._outbox, self._wakeup)) as connection:
                    has_connected = True
                    if self._watermark is None:
                        self._watermark = self._begin(connection)
                        yield Batch([], self._watermark.position, self._passed)
                    else:
                        connection.check_history(self._watermark.position, self._passed)
                        # The server may also have lost ids above the position that the old watermark had seen.
                        self._watermark = Watermark(self._watermark.position)
                    yield from self._read_on(connection, self._watermark, backoff)
                    return
            except PgcoordError as error:
                if not has_connected or self._is_final(error):
                    raise
                self._is_interrupted = True
                then = "not started yet" if self._watermark is None else f"resuming after {self._cursor}"
                self._outage.failed(f"{error.reason}; {then}", cursor=self._cursor)
                self._notify("disconnected", error.message)
            self._wakeup.wait(backoff.next_pause())

    def _is_final(self, error: PgcoordError) -> bool:
        """Whether an error after the first connection ends the tail; all others are ridden out (rule I17)."""
        if isinstance(error, CursorExpired):  # a position of another history means nothing
            return True
        # Before the first read a refusal is the caller's mistake; later a right that was taken away may be given back.
        # Without `follow` any trouble ends a tail that has delivered nothing.
        return self._watermark is None and (not self._follow or isinstance(error, REFUSALS))

    # -- start and end

    def _begin(self, connection: TailConnection) -> Watermark:
        bounds = connection.bounds()
        position = self._resolve_start(connection, bounds)
        if self._passed is None:
            self._passed = connection.last_passed(position)
        if self._until:
            self._end = self._resolve_end(connection, self._until, bounds)
        ends = [self._end, None if self._follow else bounds.head]
        self._stop_at = min((end for end in ends if end is not None), default=None)
        return Watermark(position)

    def _resolve_start(self, connection: TailConnection, bounds: Bounds) -> int:
        how, value, passed = self._start
        if how == "beginning":
            return bounds.collected_through
        if how == "position":
            connection.check_history(value, passed)
            return value
        first = connection.first_at(value) if how == "time" else None
        position = bounds.head if first is None else first - 1
        # Open transactions may hold ids below the position that become visible from now on.
        gaps = connection.gaps_before(position, LOOK_BACK)
        self._visible_at_start = VisibleAtStart(position, gaps)
        return max(gaps[0][0] - 1, bounds.collected_through) if gaps else position

    def _resolve_end(self, connection: TailConnection, until: StartPosition, bounds: Bounds) -> int:
        if until.how == "position":
            return until.value
        first = connection.first_at(until.value)
        return bounds.head if first is None else first - 1

    # -- reading

    def _read_on(self, connection: TailConnection, watermark: Watermark, backoff: Backoff) -> Iterator[Batch]:
        stall = StallDetector()
        step, limit = Step.CATCH_UP, BATCH_LIMIT
        while not self._stopping:
            reading = self._read(connection, watermark.position, step, limit)
            if self._is_interrupted:
                # Not as soon as it has connected: a table may still be locked, or a right be missing.
                self._is_interrupted = False
                backoff.reset()
                self._outage.ended(cursor=self._cursor)
                self._notify("connected", "connected again")
            if reading.bounds and reading.bounds.head < watermark.position:
                connection.check_history(watermark.position, self._passed)
            batch = self._advance(watermark, reading)
            # Reads at a gap repeat; events beyond it would be fetched again each time and thrown away.
            limit = GAP_LIMIT if watermark.is_at_gap and batch is None else BATCH_LIMIT
            was_held_up = stall.is_known
            stall.record(has_moved=batch is not None, is_at_gap=watermark.is_at_gap)
            if was_held_up and not stall.is_known:
                self._log_event(logging.INFO, "goes on", "no longer held up")
            if batch:
                yield batch
            if self._stop_at is not None and watermark.position >= self._stop_at:
                return
            step = self._next_step(connection, step, reading, watermark, has_moved=batch is not None)
            if step is Step.PACED:
                connection.pause(PACE_SECONDS)
            elif step is Step.WAIT:
                if not self._should_wait(connection, watermark, stall):
                    return
                step = self._wait(connection, watermark, stall, reading.open_transactions)

    def _read(self, connection: TailConnection, position: int, step: Step, limit: int) -> Reading:
        if step is Step.AFTER_WAKEUP:
            return connection.read(position, limit)
        # A tail that does not follow ends instead of waiting, so writers need not notify it.
        if step is Step.BEFORE_WAIT and self._follow:
            return connection.request_wakeups_and_read(position, limit)
        return connection.cancel_wakeups_and_read(position, limit, check_gaps=step is not Step.CATCH_UP)

    def _next_step(
        self, connection: TailConnection, step: Step, reading: Reading, watermark: Watermark, *, has_moved: bool
    ) -> Step:
        """Returns the step that follows `step`, which produced `reading`."""
        if not reading.is_whole and not watermark.is_at_gap:
            return Step.CATCH_UP
        # Several events at once: notifications would serialise the commits of their writers. Not after CATCH_UP,
        # whose last read says nothing about the rate at which events arrive.
        if has_moved and len(reading.events) > 1 and self._follow and step is not Step.CATCH_UP:
            return Step.PACED
        # The request must outlast the wait, or it has to be renewed first.
        if (
            step is Step.AFTER_WAKEUP
            and has_moved
            and not watermark.is_at_gap
            and connection.has_requested_wakeups_for(POLL_SECONDS)
        ):
            return Step.WAIT
        # Only after a read that found nothing *after* the request: an event committed before it was not notified.
        if step is Step.BEFORE_WAIT and not has_moved and not watermark.needs_list:
            return Step.WAIT
        return Step.BEFORE_WAIT

    def _advance(self, watermark: Watermark, reading: Reading) -> Batch | None:
        """Advances the watermark; returns the batch that may be delivered, None if the position stays.

        Raises CursorExpired if garbage collection has deleted events after the position.
        """
        before = watermark.position
        ids = [event.event_id for event in reading.events]
        count = watermark.advance(ids, reading.open_transactions, is_whole=reading.is_whole)
        if reading.bounds:
            # Before anything is returned: the gap that was just passed may be deleted events, not rolled-back ids.
            if before < reading.bounds.collected_through:
                raise expired(before, reading.bounds.collected_through)
            # The end may be an id without an event; that it has been drawn lets the watermark settle up to it.
            if self._end is not None and reading.bounds.head >= self._end:
                watermark.note_drawn(self._end)
        if watermark.position == before:
            return None
        # Events beyond the end are not delivered, so their ids must not count as passed either.
        position = watermark.position if self._end is None else min(watermark.position, max(before, self._end))
        passed = bisect_right(reading.events, position, hi=count, key=lambda event: event.event_id)
        if passed:
            self._passed = PassedEvent.of(reading.events[passed - 1])
        return Batch(self._select(reading.events[:count]), position, self._passed)

    def _select(self, events: list[Event]) -> list[Event]:
        # Without filters and past the start, the common case in a catch-up, no event needs to be looked at.
        is_past_start = events and events[0].event_id > self._visible_at_start.head
        if is_past_start and self._end is None and self._filters == EVERYTHING:
            return events
        return [event for event in events if self._is_selected(event)]

    def _is_selected(self, event: Event) -> bool:
        if event.event_id in self._visible_at_start:
            return False
        if self._end is not None and event.event_id > self._end:
            return False
        return self._filters.passes(event)

    # -- waiting

    def _should_wait(self, connection: TailConnection, watermark: Watermark, stall: StallDetector) -> bool:
        """Reports a stall; returns whether to wait. A tail that does not follow waits at a gap, until the stall."""
        if stall.has_begun():
            self._report_stall(connection, watermark)
            return self._follow
        return self._follow or watermark.is_at_gap

    def _wait(
        self,
        connection: TailConnection,
        watermark: Watermark,
        stall: StallDetector,
        open_transactions: Sequence[str] | None,
    ) -> Step:
        """Blocks until there may be new events; returns the step that reads them."""
        # A transaction that was open when wakeups were requested may commit without notifying, and a rollback, which
        # settles a gap as well, never notifies. Neither may cost a whole poll interval.
        if watermark.is_at_gap or open_transactions:
            connection.wait(stall.next_recheck())
            return Step.BEFORE_WAIT
        # Also without a notification: NOTIFY only wakes (rule I7).
        return Step.AFTER_WAKEUP if connection.wait(POLL_SECONDS) else Step.BEFORE_WAIT

    def _report_stall(self, connection: TailConnection, watermark: Watermark) -> None:
        holders = tuple(connection.blocking_transactions())
        missing = watermark.position + 1
        who = "; ".join(map(str, holders)) or "a transaction that has just ended"
        message = f"event {missing} may still be committed by {who}"
        holding = [{"pid": holder.pid, "application": holder.application} for holder in holders]
        self._log_event(logging.WARNING, "held up", message, held_event_id=missing, holders=holding)
        self._notify("held_up", message, missing, holders)

    def _log_event(self, level: int, event: str, message: str, **fields: Any) -> None:
        fields |= {"event": event.replace(" ", "_"), "outbox": self._outbox.noun, "cursor": self._cursor}
        _log.log(level, "%s at %s: %s", event, self._cursor, message, extra=fields)

    @property
    def _cursor(self) -> str:
        return to_cursor(self.position or 0)

    def _notify(
        self, kind: str, message: str, held: int | None = None, holders: tuple[BlockingTransaction, ...] = ()
    ) -> None:
        self._report(Notice(kind, self._cursor, message, held, holders))


def lag_document(
    conn: Connection[Any], outbox: Outbox, position: int, passed: PassedEvent | None = None
) -> dict[str, Any]:
    """Returns how far `position` is behind: the number of events after it, the last cursor, the oldest open writer.

    Raises what `check_history` raises.
    """
    with mapped_errors():
        bounds = Bounds(*(conn.execute(sql("tail", "bounds", outbox=outbox.table)).fetchone() or (0, 0)))
        check_history(conn, outbox, position, passed)
        (waiting,) = conn.execute(sql("tail", "count", outbox=outbox.table), [position]).fetchone() or (0,)
    holders = [holder._asdict() for holder in list_blocking_transactions(conn, outbox)]
    return {
        "outbox": outbox.table,
        "position": to_cursor(position),
        "head": to_cursor(bounds.head),
        "lag": waiting,
        "holder": holders[0] if holders else None,
    }
