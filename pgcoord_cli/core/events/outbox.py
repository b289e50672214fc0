"""Outboxes: tables of events that services insert into, each in its own transaction, and that tails read.

**Writing.** A service writes an event with a plain INSERT that leaves `event_id` out, in any language;
`append_lease_event` and `append_completion_event` are that INSERT for psycopg. PostgreSQL refuses an explicit
`event_id`. Before the statement draws its first id, the trigger `announce_events` (migration 0003) does two things:

1. It takes a shared advisory lock that is released when the transaction ends. A transaction that holds the lock may
   have drawn ids that are not visible yet; one that does not hold it has drawn none. `core.events.watermark` depends
   on this and on nothing else.
2. It reads whether a tail has requested wakeups, and if so calls `pg_notify`. PostgreSQL delivers the notification
   when the transaction commits, once a transaction.

**Wakeup requests.** PostgreSQL serialises the commits of transactions that notify, so notifications cost writers
throughput, and most would go to tails that are reading anyway. A tail that is about to wait therefore stores until when
it requests wakeups, in a sequence, which takes effect outside of all transactions. It renews the request before that
time, and cancels it when it reads continuously; the request of a tail that has ended expires. A tail may begin to
wait between a writer's read of the sequence and that writer's commit, and would then not be notified. But the writer
took its lock before it read the sequence. So the tail lists the open transactions *after* it stored its request, and
while the list is not empty it reads again after milliseconds instead of after the poll interval.

A notification only wakes (rule I7): a tail that is not notified still delivers every event, at most one poll interval
later. This happens, for example, when two tails wait and the later one cancels: the sequence holds only the latest
request, so the earlier tail is not notified until it renews.

**Prepared transactions.** PostgreSQL refuses PREPARE TRANSACTION after NOTIFY. A service that uses two-phase commit
runs `SET LOCAL pgcoord.notify = off` in the transaction; tails find its events at their next poll.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection, RawCursor
from psycopg.rows import tuple_row

from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import resolve_schema

LEASE_EVENT_TYPES = frozenset({"acquired", "renewed", "expired", "reclaimed", "revoked"})
OUTCOMES = frozenset({"success", "failed", "cancelled", "skipped"})


class LeaseEvent(NamedTuple):
    """A transition of an execution's lease. Times are in milliseconds since 1970-01-01 UTC."""

    event_id: int
    execution_id: str
    lease_id: str | None
    event_type: str
    occurred_at_ms: int
    partition_key: int
    namespace: str | None
    instance_tag: str | None
    committed_at_ms: int

    @property
    def cursor(self) -> str:
        """The cursor that resumes after this event."""
        return to_cursor(self.event_id)

    @property
    def kind(self) -> str:
        """The event type, one of LEASE_EVENT_TYPES unless a newer pgcoord or a service wrote another."""
        return self.event_type


class CompletionEvent(NamedTuple):
    """The end of an execution. Times are in milliseconds since 1970-01-01 UTC."""

    event_id: int
    execution_id: str
    flow_id: str | None
    outcome: str
    occurred_at_ms: int
    partition_key: int
    namespace: str | None
    instance_tag: str | None
    committed_at_ms: int

    @property
    def cursor(self) -> str:
        """The cursor that resumes after this event."""
        return to_cursor(self.event_id)

    @property
    def kind(self) -> str:
        """The outcome, one of OUTCOMES unless a newer pgcoord or a service wrote another."""
        return self.outcome


Event = LeaseEvent | CompletionEvent


class Outbox(NamedTuple):
    """One of the two outboxes.

    `noun` is its name in commands and in the names of SQL statements, `event` the class of its rows, `kinds` the
    event types or outcomes that this version knows.
    """

    noun: str
    table: str
    event: type[LeaseEvent] | type[CompletionEvent]
    kinds: frozenset[str]


LEASE = Outbox("lease", "lease_events", LeaseEvent, LEASE_EVENT_TYPES)
COMPLETION = Outbox("completion", "completion_events", CompletionEvent, OUTCOMES)
OUTBOXES = {outbox.noun: outbox for outbox in (LEASE, COMPLETION)}


def outbox_named(noun: str) -> Outbox:
    """Returns the outbox of this name, `lease` or `completion`. Raises UsageError for any other."""
    if noun not in OUTBOXES:
        raise UsageError(f"outbox: {noun!r} is not one of {', '.join(OUTBOXES)}")
    return OUTBOXES[noun]


def append_lease_event(
    conn: Connection[Any],
    execution_id: UUID | str,
    event_type: str,
    *,
    lease_id: UUID | str | None = None,
    partition_key: int = 0,
    namespace: str | None = None,
    instance_tag: str | None = None,
    occurred_at: datetime | None = None,
    schema: str | None = None,
) -> int:
    """Inserts a lease event in the transaction that `conn` is in, and returns its event id.

    `conn` is a connection of the caller, in any state that takes an INSERT. Nothing about it is changed: neither its
    factories, nor its settings, nor its transaction. `event_type` is one of LEASE_EVENT_TYPES. `occurred_at` is the
    server's clock by default; `schema` is PGCOORD_SCHEMA or `pgcoord` by default.

    Raises UsageError for an invalid schema name or an unknown event type, before anything is sent, and psycopg's own
    errors, so that a caller's handling of serialisation failures works here too.
    """
    labels = partition_key, namespace, instance_tag
    return _append(conn, schema, LEASE, execution_id, lease_id, event_type, labels, occurred_at)


def append_completion_event(
    conn: Connection[Any],
    execution_id: UUID | str,
    outcome: str,
    *,
    flow_id: UUID | str | None = None,
    partition_key: int = 0,
    namespace: str | None = None,
    instance_tag: str | None = None,
    occurred_at: datetime | None = None,
    schema: str | None = None,
) -> int:
    """Inserts a completion event in the transaction that `conn` is in, and returns its event id.

    `execution_id` and `flow_id` are UUIDs, `outcome` is one of OUTCOMES. Everything else is as for
    `append_lease_event`.
    """
    labels = partition_key, namespace, instance_tag
    return _append(conn, schema, COMPLETION, execution_id, flow_id, outcome, labels, occurred_at)


def _append(
    conn: Connection[Any], schema: str | None, outbox: Outbox, execution_id: UUID | str, link: UUID | str | None,
    kind: str, labels: tuple[int, str | None, str | None], occurred_at: datetime | None,
) -> int:  # fmt: skip
    if kind not in outbox.kinds:
        argument = "event_type" if outbox is LEASE else "outcome"
        raise UsageError(f"{argument}: {kind!r} is not one of {', '.join(sorted(outbox.kinds))}")
    # None lets the statement read the server's clock: no decision about time depends on this machine's (rule I12).
    milliseconds = None if occurred_at is None else round(occurred_at.timestamp() * 1000)
    values = [str(execution_id), None if link is None else str(link), kind, *labels, milliseconds]
    statement = sql("outbox", f"append_{outbox.noun}_event", schema=resolve_schema(schema))
    # The caller's connection keeps its cursor and row factories: both are chosen for this one cursor.
    row = RawCursor(conn, row_factory=tuple_row).execute(statement, values).fetchone()
    assert row is not None
    return int(row[0])
