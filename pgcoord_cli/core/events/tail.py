"""Tails: reading an outbox from a cursor on, for as long as one likes, without ever missing an event (rule I10).

    for event in tail(settings, "completion", start=From.cursor(stored)):
        handle(event)
        stored = event.cursor

**One round** reads the events after the position. While there are many, rounds follow each other; the reader's pace
is the pace, and no more than one batch is in memory. When a round brings nothing new, the tail asks to be woken,
lists the writers that may have missed that, and reads once more (`core.events.tail_connection`, `core.events.outbox`). Only then does it wait:
for a notification, or for the poll interval; for moments where a writer is on its way. `core.events.watermark` decides what of
a round may be delivered: a gap is stepped over only when nobody is left who could fill it.

**Woken** by one event, the tail reads it and waits again: whoever writes still wakes it. Where events come in company,
writers that had to notify one after the other would lose most of their pace. So then the tail says that it is awake
and reads on every five milliseconds, until a reading brings no more than one.

**Held up.** A reading at a gap that moved nothing is followed by short ones, until one moves. When a gap stays for
longer than two seconds, the tail names the transactions that may fill it.

**Without follow** it ends once it has passed what was in sight when it began, or when a gap before that holds it up. It
never asks to be woken.

**From now** means: whatever becomes visible from now on. Writers that are under way may hold ids below the last one
in sight; so the tail begins before the first such gap and leaves out what was in sight already. It looks back
100,000 ids for that. From a time on is the same, from the first event of that time on.

**Lost connections**, and queries that fail, end the connection. The tail says so, backs off, connects and goes on from
its position. What is wrong at the very beginning is raised instead.

**A crash of the server** takes with it what had not reached its disk: ids that were drawn and rolled back, and, where
writers commit with `synchronous_commit = off`, events that have been delivered. Those ids are given out again. So a
tail never goes beyond the last id in sight, forgets with a lost connection what was in sight beyond its position, and
when it then finds itself ahead of the outbox, it says so and goes back to its end.

**Garbage collection** raises the outbox's floor before it deletes. A tail that finds a gap looks at the floor before it
steps over it, so that it cannot take collected events for rolled-back ones: CursorExpired.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.channels import POLL_SECONDS
from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.outbox import OUTBOXES, Event, Outbox
from pgcoord_cli.core.events.tail_connection import Bounds, Holder, Reading, TailConnection, list_holders
from pgcoord_cli.core.events.watermark import Watermark
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import FINAL, CursorExpired, PgcoordError, UsageError
from pgcoord_cli.settings import Settings

LOOK_BACK = 100_000
"""How many ids before the head may still be under way when a tail starts from now."""

BATCH_LIMIT = 4_000
GAP_LIMIT = 50
"""How many events a tail reads that is held up at a gap: enough to see whether the gap is filled, and cheap."""

PACE_SECONDS = 0.005
"""How long a tail that has company to read lets it gather."""

HELD_UP_AFTER = 2.0
FIRST_RECHECK = 0.005
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0

_FINAL = (CursorExpired, *FINAL)


class StartPosition(NamedTuple):
    """Where a tail starts or ends: now, the beginning, a position, or a time in milliseconds (negative: ago)."""

    how: str
    value: int = 0

    @classmethod
    def now(cls) -> StartPosition:
        """At what becomes visible from now on."""
        return cls("now")

    @classmethod
    def beginning(cls) -> StartPosition:
        """At the oldest event that is kept."""
        return cls("beginning")

    @classmethod
    def position(cls, event_id: int) -> StartPosition:
        """After the event of this id."""
        return cls("position", event_id)

    @classmethod
    def time(cls, when: datetime | timedelta) -> StartPosition:
        """At the first event that occurred then or later; a timedelta counts back from the server's clock."""
        if isinstance(when, timedelta):
            return cls("time", -max(1, round(when.total_seconds() * 1000)))
        return cls("time", max(0, round(when.timestamp() * 1000)))


class Filters(NamedTuple):
    """What to deliver; an empty filter passes everything, and an event without the value passes none on it."""

    partitions: frozenset[int] = frozenset()
    namespaces: frozenset[str] = frozenset()
    instance_tags: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()

    def passes(self, event: Event) -> bool:
        """Whether an event is wanted."""
        return (
            (not self.partitions or event.partition_key in self.partitions)
            and (not self.namespaces or event.namespace in self.namespaces)
            and (not self.instance_tags or event.instance_tag in self.instance_tags)
            and (not self.kinds or event.kind in self.kinds)
        )


NOW = StartPosition.now()
EVERYTHING = Filters()


class Step(Enum):
    """How a tail reads next, or that it waits."""

    GO_ON = "read at once; no writer needs to wake this tail"
    PACED = "the same after a moment, with a look at who may fill a gap"
    BEFORE_WAITING = "read after asking to be woken, with a look at who may have missed that"
    WOKEN = "read; whoever writes from now on still wakes this tail"
    WAIT = "wait for news"


class Batch(NamedTuple):
    """Events in order, and the position once they are dealt with: what was filtered out or never came is passed."""

    events: list[Event]
    position: int


class Notice(NamedTuple):
    """Something other than an event: `disconnected`, `connected` or `held_up`, and the cursor at that moment."""

    type: str
    cursor: str
    message: str
    held_event_id: int | None = None
    holders: tuple[Holder, ...] = ()


Report = Callable[[Notice], None]


def silently(_notice: Notice) -> None:
    """Nobody wants to hear of it."""


def tail(
    settings: Settings,
    outbox: str,
    *,
    start: StartPosition = NOW,
    filters: Filters = EVERYTHING,
    follow: bool = True,
    report: Report = silently,
) -> Iterator[Event]:
    """The events of an outbox (`lease`, `completion`), one by one, each with its cursor; endless if it is to `follow`.

    Raises ConnectionFailed, SchemaMissing, UnsuitableServer at the start and CursorExpired at any time; a lost
    connection is reported and mended.
    """
    one = Tail(settings, OUTBOXES[outbox], start=start, filters=filters, follow=follow, report=report)
    with closing(one) as reader:
        for batch in reader.batches():
            yield from batch.events


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
        report: Report = silently,
    ) -> None:
        self._settings = settings
        self._outbox = outbox
        self._start = start
        self._until = until
        self._filters = filters
        self._follow = follow
        self._report = report
        self._wakeup = Wakeup()
        self._frontier: Watermark | None = None
        self._end: int | None = None
        self._stop_at: int | None = None
        self._seen_before = SeenBefore(0, [])
        self._stopping = False

    @property
    def position(self) -> int | None:
        """How far this tail has read; None before it is known where it starts."""
        return self._frontier.position if self._frontier else None

    def stop(self) -> None:
        """Asks `batches` to end after the batch in hand."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """Gives back what this tail holds of the system."""
        self._wakeup.close()

    def batches(self) -> Iterator[Batch]:
        """Batches, in order, until stopped or, without `follow`, caught up. The first one says where it starts."""
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while not self._stopping:
            try:
                with closing(TailConnection(self._settings, self._outbox, self._wakeup)) as feed:
                    if self._frontier is None:
                        self._frontier = self._begin(feed)
                        yield Batch([], self._frontier.position)
                    else:
                        self._say("connected", self._check_after_crash(feed, self._frontier.position))
                    backoff.reset()
                    yield from self._read_on(feed, self._frontier)
                    return
            except PgcoordError as error:
                if self._frontier is None or isinstance(error, _FINAL):
                    raise
                self._say("disconnected", error.message)
            self._wakeup.wait(backoff.next_pause())

    def _check_after_crash(self, feed: TailConnection, position: int) -> str:
        """Goes back to the end of the outbox if that lies before the position; returns what to say.

        What was in sight beyond the position, the server may have lost, too.
        """
        head = feed.bounds().head
        self._frontier = Watermark(min(head, position))
        if head >= position:
            return "connected again"
        return f"connected again; the server has lost the events up to {position} and will give their ids to new ones"

    # -- where it starts and ends

    def _begin(self, feed: TailConnection) -> Watermark:
        bounds = feed.bounds()
        position = self._resolve_start(feed, bounds)
        if self._until:
            self._end = self._resolve_end(feed, self._until, bounds)
        ends = [self._end, None if self._follow else bounds.head]
        self._stop_at = min((end for end in ends if end is not None), default=None)
        return Watermark(position)

    def _resolve_start(self, feed: TailConnection, bounds: Bounds) -> int:
        how, value = self._start
        if how == "beginning":
            return bounds.collected_through
        if how == "position":
            check_position(value, bounds)
            return value
        first = feed.first_at(value) if how == "time" else None
        position = bounds.head if first is None else first - 1
        gaps = feed.gaps_before(position, LOOK_BACK)
        self._seen_before = SeenBefore(position, gaps)
        return max(gaps[0][0] - 1, bounds.collected_through) if gaps else position

    def _resolve_end(self, feed: TailConnection, until: StartPosition, bounds: Bounds) -> int:
        if until.how == "position":
            return until.value
        first = feed.first_at(until.value)
        return bounds.head if first is None else first - 1

    # -- reading

    def _read_on(self, feed: TailConnection, frontier: Watermark) -> Iterator[Batch]:
        patience = StallDetector()
        step, limit = Step.GO_ON, BATCH_LIMIT
        while not self._stopping:
            reading = self._read(feed, frontier.position, step, limit)
            batch = self._advance(frontier, reading)
            limit = GAP_LIMIT if frontier.is_at_gap and batch is None else BATCH_LIMIT
            patience.note(has_moved=batch is not None, is_at_gap=frontier.is_at_gap)
            if batch:
                yield batch
            if self._stop_at is not None and frontier.position >= self._stop_at:
                return
            step = self._next_step(feed, step, reading, frontier, has_moved=batch is not None)
            if step is Step.PACED:
                feed.pause(PACE_SECONDS)
            elif step is Step.WAIT:
                if not self._is_worth_waiting(feed, frontier, patience):
                    return
                step = self._await_news(feed, frontier, patience, reading.writers)

    def _read(self, feed: TailConnection, position: int, step: Step, limit: int) -> Reading:
        if step is Step.WOKEN:
            return feed.read(position, limit)
        if step is Step.BEFORE_WAITING and self._follow:
            return feed.read_before_waiting(position, limit)
        return feed.read_awake(position, limit, looking=step is not Step.GO_ON)

    def _next_step(
        self, feed: TailConnection, step: Step, reading: Reading, frontier: Watermark, *, has_moved: bool
    ) -> Step:
        """What to do after a step that brought this reading."""
        if not reading.is_whole and not frontier.is_at_gap:
            return Step.GO_ON
        if has_moved and len(reading.events) > 1 and self._follow and step is not Step.GO_ON:
            return Step.PACED
        if step is Step.WOKEN and has_moved and not frontier.is_at_gap and feed.is_woken_for(POLL_SECONDS):
            return Step.WAIT
        if step is Step.BEFORE_WAITING and not has_moved and not frontier.needs_list:
            return Step.WAIT
        return Step.BEFORE_WAITING

    def _advance(self, frontier: Watermark, reading: Reading) -> Batch | None:
        """What of a reading may be delivered now; None when that moves nothing."""
        before = frontier.position
        ids = [event.event_id for event in reading.events]
        count = frontier.advance(ids, reading.writers, is_whole=reading.is_whole)
        if reading.bounds:
            if before < reading.bounds.collected_through:
                raise expired(before, reading.bounds.collected_through)
            if self._end is not None and reading.bounds.head >= self._end:
                frontier.note_drawn(self._end)
        if frontier.position == before:
            return None
        position = frontier.position if self._end is None else min(frontier.position, max(before, self._end))
        return Batch(self._wanted(reading.events[:count]), position)

    def _wanted(self, events: list[Event]) -> list[Event]:
        if self._end is None and self._filters == EVERYTHING and events and events[0].event_id > self._seen_before.head:
            return events
        return [event for event in events if self._is_wanted(event)]

    def _is_wanted(self, event: Event) -> bool:
        if event.event_id <= self._seen_before.head and event.event_id in self._seen_before:
            return False
        if self._end is not None and event.event_id > self._end:
            return False
        return self._filters.passes(event)

    # -- waiting

    def _is_worth_waiting(self, feed: TailConnection, frontier: Watermark, patience: StallDetector) -> bool:
        """Without follow, only for what fills a gap, and not for long. Says so where something holds this tail up."""
        if patience.is_over():
            self._say_held_up(feed, frontier)
            return self._follow
        return self._follow or frontier.is_at_gap

    def _await_news(
        self, feed: TailConnection, frontier: Watermark, patience: StallDetector, writers: Sequence[str] | None
    ) -> Step:
        """Until there may be something new. Who is on the way now may not have been told that this tail sleeps."""
        if frontier.is_at_gap or writers:
            feed.wait(patience.next_recheck())
            return Step.BEFORE_WAITING
        return Step.WOKEN if feed.wait(POLL_SECONDS) else Step.BEFORE_WAITING

    def _say_held_up(self, feed: TailConnection, frontier: Watermark) -> None:
        holders = tuple(feed.holders())
        missing = frontier.position + 1
        who = "; ".join(map(str, holders)) or "a transaction that has just ended"
        self._say("held_up", f"event {missing} may still come: {who}", missing, holders)

    def _say(self, kind: str, message: str, held: int | None = None, holders: tuple[Holder, ...] = ()) -> None:
        self._report(Notice(kind, to_cursor(self.position or 0), message, held, holders))


class SeenBefore:
    """What a tail from now, or from a time, leaves out: ids up to `head` that do not lie in one of the `gaps`."""

    def __init__(self, head: int, gaps: list[tuple[int, int]]) -> None:
        self.head = head
        self._gaps = gaps

    def __contains__(self, event_id: int) -> bool:
        place = bisect_right(self._gaps, event_id, key=lambda gap: gap[0]) - 1
        is_in_gap = place >= 0 and event_id <= self._gaps[place][1]
        return event_id <= self.head and not is_in_gap


class StallDetector:
    """How long a tail has been waiting for the same thing: looks come more rarely, and once it is held up for long."""

    def __init__(self) -> None:
        self._recheck = FIRST_RECHECK
        self._over_at: float | None = None

    def note(self, *, has_moved: bool, is_at_gap: bool) -> None:
        """After each reading: what came of it."""
        if has_moved:
            self._recheck = FIRST_RECHECK
        if has_moved or not is_at_gap:
            self._over_at = None
        if is_at_gap and self._over_at is None:
            self._over_at = time.monotonic() + HELD_UP_AFTER

    def next_recheck(self) -> float:
        """Seconds until the next look."""
        seconds, self._recheck = self._recheck, min(self._recheck * 2, POLL_SECONDS)
        return seconds

    def is_over(self) -> bool:
        """Whether it is time to say that a gap holds this tail up; true once a gap."""
        over = self._over_at is not None and time.monotonic() >= self._over_at
        if over:
            self._over_at = math.inf
        return over


def check_position(position: int, bounds: Bounds) -> None:
    """UsageError when nothing has got that far, CursorExpired when what comes next is not kept any more."""
    if position > bounds.head:
        raise UsageError(
            f"cursor {to_cursor(position)} is ahead of the outbox, which ends at {to_cursor(bounds.head)}",
            hint="is it a cursor of another outbox or database?",
        )
    if position < bounds.collected_through:
        raise expired(position, bounds.collected_through)


def expired(position: int, collected_through: int) -> CursorExpired:
    """What to say of a position whose next events have been deleted."""
    error = CursorExpired(
        f"events after cursor {to_cursor(position)} have been collected as garbage",
        hint=f"resume at the oldest that is kept: --from {to_cursor(collected_through)}",
    )
    error.resume_at = to_cursor(collected_through)
    return error


def lag_document(conn: Connection[Any], outbox: Outbox, position: int) -> dict[str, Any]:
    """How far behind a position is: events that wait, the last in sight, and who may hold one that is not seen yet."""
    with mapped_errors():
        bounds = Bounds(*(conn.execute(sql("tail", f"{outbox.noun}_bounds")).fetchone() or (0, 0)))
        check_position(position, bounds)
        (waiting,) = conn.execute(sql("tail", f"{outbox.noun}_count"), [position]).fetchone() or (0,)
    holders = [holder._asdict() for holder in list_holders(conn, outbox)]
    return {
        "outbox": outbox.table,
        "position": to_cursor(position),
        "head": to_cursor(bounds.head),
        "lag": waiting,
        "holder": holders[0] if holders else None,
    }
