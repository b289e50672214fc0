"""Whether a position belongs to the history that the outbox now has (rule I21).

A crash, a failover that loses commits, a restore, and TRUNCATE with RESTART IDENTITY take events away, and the sequence
gives their ids out again. A position is only a number: with such a history it would stand for other events, and a tail
would skip the new ones below it. So a tail, a cursor file and a subscription keep, beside the position, the identity of
the last event that was *passed* (delivered, or left out by a filter): its id, its execution and the time of its insert.
At every start and reconnect this is compared with the event that the outbox has at that id. Garbage collection keeps
the event at the lowest position of a subscription, and notes the identity of the last event that it deleted, so that a
position exactly at the floor can be compared as well.

**Where to go on** after a difference: lost events were inserted before the loss, new ones after it. The suggested
cursor is that of the last event before the first one that was inserted later than the event that was passed.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.outbox import Event, Outbox
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import CursorExpired, HistoryChanged

MAX_EXECUTION_ID = 200
"""Characters of an execution id that are kept and compared: a lease event may have one of any length."""


class PassedEvent(NamedTuple):
    """The identity of an event that a reader has passed. The time is in milliseconds since 1970-01-01 UTC."""

    event_id: int
    execution_id: str
    committed_at_ms: int

    @classmethod
    def of(cls, event: Event) -> PassedEvent:
        """Returns the identity of an event."""
        return cls(event.event_id, event.execution_id[:MAX_EXECUTION_ID], event.committed_at_ms)

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(self._asdict(), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PassedEvent | None:
        """Returns the identity in a JSON object, or None if there is none in it."""
        try:
            fields = json.loads(text)
            return cls(int(fields["event_id"]), str(fields["execution_id"]), int(fields["committed_at_ms"]))
        except (ValueError, TypeError, KeyError):
            return None

    def __str__(self) -> str:
        try:
            inserted = f"{datetime.fromtimestamp(self.committed_at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S.%f}Z"
        except (ValueError, OverflowError, OSError):  # a client may have inserted any number
            inserted = f"{self.committed_at_ms} ms since 1970"
        return f"execution {self.execution_id}, inserted at {inserted}"


class Place(NamedTuple):
    """What an outbox holds at an event id: its bounds, the last id drawn, and the event's identity, if it is known."""

    head: int
    collected_through: int
    drawn_through: int
    execution_id: str | None
    committed_at_ms: int | None


def find_difference(position: int, passed: PassedEvent | None, place: Place) -> str | None:
    """Returns why a position does not belong to the history of the outbox, or None if nothing contradicts it. Pure."""
    if passed is not None:
        if place.execution_id is not None and place.committed_at_ms is not None:
            here = PassedEvent(passed.event_id, place.execution_id[:MAX_EXECUTION_ID], place.committed_at_ms)
            if here != passed:
                return f"event {passed.event_id} was of {passed}, and now is of {here}"
        elif passed.event_id > place.collected_through:
            return (
                f"event {passed.event_id}, of {passed}, is no longer there, and garbage collection has not deleted it"
            )
    last = max(place.head, place.drawn_through)
    if position > last:
        return f"cursor {to_cursor(position)} is ahead of the outbox, whose last id is {to_cursor(last)}"
    return None


def check_history(conn: Connection[Any], outbox: Outbox, position: int, passed: PassedEvent | None) -> None:
    """Raises HistoryChanged if `position` belongs to another history, CursorExpired if events after it were deleted."""
    with mapped_errors():
        values = [passed.event_id if passed else None]
        row = conn.execute(sql("tail", "place", outbox=outbox.table), values).fetchone()
        assert row is not None
        place = Place(*row)
        if difference := find_difference(position, passed, place):
            raise _history_changed(conn, outbox, passed, place, difference)
    if position < place.collected_through:
        raise expired(position, place.collected_through)


def _history_changed(
    conn: Connection[Any], outbox: Outbox, passed: PassedEvent | None, place: Place, difference: str
) -> HistoryChanged:
    resume_at, reason = place.collected_through, "resume at the oldest event that is kept"
    if passed is not None:
        row = conn.execute(sql("tail", "resume_after_loss", outbox=outbox.table), [passed.committed_at_ms]).fetchone()
        resume_at, reason = (row[0] if row else resume_at), "resume at the first event inserted since"
    error = HistoryChanged(
        f"{difference}: the database has been restored, truncated or has lost commits, and gives ids out again, "
        "or the cursor is of another outbox or database",
        hint=f"{reason}: --from {to_cursor(resume_at)}; --from-start delivers all that is kept",
    )
    error.resume_at, error.resume_reason = to_cursor(resume_at), reason
    return error


def expired(position: int, collected_through: int) -> CursorExpired:
    """Returns the error for a position whose next events have been deleted; `resume_at` is the first valid cursor."""
    error = CursorExpired(
        f"garbage collection has deleted events after cursor {to_cursor(position)}",
        hint=f"resume at the oldest event that is kept: --from {to_cursor(collected_through)}",
    )
    error.resume_at = to_cursor(collected_through)
    return error


def last_passed(conn: Connection[Any], outbox: Outbox, position: int) -> PassedEvent | None:
    """Returns the last event up to `position`, stored or noted by garbage collection; None if there is none."""
    with mapped_errors():
        row = conn.execute(sql("tail", "last_passed", outbox=outbox.table), [position]).fetchone()
    return PassedEvent(row[0], row[1][:MAX_EXECUTION_ID], row[2]) if row else None
