"""Outboxes: tables of events that services insert into, each in a transaction of its own, and that tails read.

**Writing** is a plain INSERT that leaves `event_id` out, by any program in any language; `append_lease_event` and
`append_completion_event` are that INSERT for psycopg. An id of one's own is refused. A trigger does the rest
before the statement draws its first id (`announce_events` in the migration):

1. It takes a shared advisory lock that ends with the transaction. Whoever holds it may have drawn an id that
   nobody sees yet; whoever does not hold it has not. `core.events.watermark` builds on that and on nothing else.
2. It looks whether a tail waits, and if so has PostgreSQL notify the tails at the commit, once a transaction.

**Waiting tails.** PostgreSQL lets transactions that notify commit one at a time only, so that writers would pay for
every notification, and most of those would go to tails that are awake. So a tail that has nothing to do says until
when writers are to wake it (in a sequence, outside of all transactions), and says it anew before that time has come;
a busy one takes it back, and one that has ended, however it did, is forgotten after that. Between a writer's look and
its commit a tail may begin to wait. It would miss that writer, were it not that the writer announced itself before it
looked: a tail lists the announced writers after it asked to be woken, and while there are any it looks again after
moments rather than after the poll interval. What a notification does is only ever to wake (rule I7), and a tail that
is never notified is right, but late: where two tails wait and the later one takes back what it asked, the earlier one
may be, until it asks again.

**Prepared transactions.** PostgreSQL refuses to prepare a transaction that notifies. Who uses two-phase commit says
`SET LOCAL pgcoord.notify = off` in it; its events are noticed when the tails look by themselves.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection, RawCursor
from psycopg.rows import tuple_row

from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.db.sqlfiles import sql

LEASE_EVENT_TYPES = frozenset({"acquired", "renewed", "expired", "reclaimed", "revoked"})
OUTCOMES = frozenset({"success", "failed", "cancelled", "skipped"})


class LeaseEvent(NamedTuple):
    """What happened to a lease. Times are milliseconds since 1970, UTC."""

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
        """Where to resume so that what comes after this event is next."""
        return to_cursor(self.event_id)

    @property
    def kind(self) -> str:
        """The event type."""
        return self.event_type


class CompletionEvent(NamedTuple):
    """How an execution ended. Times are milliseconds since 1970, UTC."""

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
        """Where to resume so that what comes after this event is next."""
        return to_cursor(self.event_id)

    @property
    def kind(self) -> str:
        """The outcome."""
        return self.outcome


Event = LeaseEvent | CompletionEvent


class Outbox(NamedTuple):
    """One of the two outboxes. `noun` is its name in statements and commands, `kinds` what event kinds there are."""

    noun: str
    table: str
    event: type[LeaseEvent] | type[CompletionEvent]
    kinds: frozenset[str]


LEASE = Outbox("lease", "lease_events", LeaseEvent, LEASE_EVENT_TYPES)
COMPLETION = Outbox("completion", "completion_events", CompletionEvent, OUTCOMES)
OUTBOXES = {outbox.noun: outbox for outbox in (LEASE, COMPLETION)}


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
    schema: str = "pgcoord",
) -> int:
    """Writes a lease event in the transaction that `conn` is in; returns its id. It occurred now by default."""
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
    schema: str = "pgcoord",
) -> int:
    """Writes a completion event in the transaction that `conn` is in; returns its id. It occurred now by default."""
    labels = partition_key, namespace, instance_tag
    return _append(conn, schema, COMPLETION, execution_id, flow_id, outcome, labels, occurred_at)


def _append(
    conn: Connection[Any], schema: str, outbox: Outbox, execution_id: UUID | str, link: UUID | str | None, kind: str,
    labels: tuple[int, str | None, str | None], occurred_at: datetime | None,
) -> int:  # fmt: skip
    milliseconds = None if occurred_at is None else round(occurred_at.timestamp() * 1000)
    values = [str(execution_id), None if link is None else str(link), kind, *labels, milliseconds]
    statement = sql("outbox", f"append_{outbox.noun}_event", schema=schema)
    # The caller's connection keeps its cursor and row factories: both are chosen for this one cursor.
    row = RawCursor(conn, row_factory=tuple_row).execute(statement, values).fetchone()
    assert row is not None
    return int(row[0])
