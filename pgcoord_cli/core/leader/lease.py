"""The lease: one row that names the leader and says until when it leads.

**Terms.** The time for which one leader leads is a *term*. It has an *epoch*, one higher than that of the term before,
and a *term id*, a random UUID. The pair is the fence (rule I2): every write of a leader checks both in its own
transaction. The epoch alone would not do: a database restored from a backup, or a standby that was promoted with data
missing, hands out an epoch for the second time, and only the term id tells the two leaders apart.

**Taking over.** A candidate that holds the leader lock takes the lease at once, because the session of the previous
leader has ended. Without the lock, the lease must have expired by the server's clock. Either way, the same statement
ends the previous term in `leader_history`. It is sent together with a statement that locks the row first: its
snapshot is then later than any transaction that the lock waited for, and a candidate that freezes leaves no transaction
open half way.

**Renewing** extends the lease if it still belongs to this term and has not expired. A term ends when its lease expires,
even if no candidate has taken the lease over: the former leader becomes a candidate again.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection

from pgcoord_cli.core.database import channels
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed

DEFAULT_TTL = 10.0
MIN_TTL = 1.0
"""Seconds for which a lease is valid after it was taken or renewed."""


class Lease(NamedTuple):
    """The lease row. `held` and `expires_in_seconds` come from the server's clock (rule I12).

    `conflict_floor` is the lowest read version that can be checked for conflicts. Ids up to `window_start_id` hold no
    commit of the conflict window; ids up to `queue_floor_id` hold no pending request.
    """

    epoch: int
    term_id: UUID | None
    leader_addr: str | None
    durable_version: int
    conflict_floor: int
    window_start_id: int
    queue_floor_id: int
    acquired_at: datetime | None
    renewed_at: datetime | None
    expires_at: datetime | None
    held: bool
    expires_in_seconds: float


class Term(NamedTuple):
    """A term that has begun, and the versions and ids that its first batch continues from. Fields as in `Lease`."""

    epoch: int
    term_id: UUID
    durable_version: int
    conflict_floor: int
    window_start_id: int
    queue_floor_id: int


def read_lease(conn: Connection[Any]) -> Lease:
    """Returns the lease row of one snapshot."""
    row = conn.execute(sql("lease", "read_lease")).fetchone()
    assert row is not None  # the migration inserts the only row
    return Lease(*row)


def take_over(conn: Connection[Any], schema: str, node_id: str, ttl: float, *, lock_held: bool) -> Term | None:
    """Begins a new term whose lease is valid for `ttl` seconds.

    Returns None if the lease is held and `lock_held`, that this session holds the leader lock, is False.
    """
    arguments = [node_id, ttl, lock_held, channels.leadership(schema)]
    # One pipeline is one transaction that the server completes without the client. In two statements, because the
    # snapshot of the second must be later than what the first waited for, or it would take the row as it was before.
    with conn.pipeline():
        conn.execute(sql("lease", "lock_lease"), prepare=False)
        taken = conn.execute(sql("lease", "take_over"), arguments, prepare=False)
    row = taken.fetchone()
    # The last column is the notification of other programs.
    return Term(*row[:-1]) if row else None


class Renewal(StrEnum):
    """The result of a renewal. The value of STEP_DOWN is also the reason that the history records."""

    RENEWED = "renewed"
    STEP_DOWN = "stepped down"
    TERM_ENDED = "term ended"


def renew(conn: Connection[Any], term: Term, ttl: float, *, lock_held: bool = True) -> Renewal:
    """Makes the lease valid for `ttl` seconds from now on the server's clock; `lock_held`: the leader lock.

    Returns STEP_DOWN if it was extended and the leader has been asked to step down, and TERM_ENDED if the lease has
    expired or belongs to another term.
    """
    row = conn.execute(sql("lease", "renew"), [term.epoch, term.term_id, ttl, lock_held]).fetchone()
    # No row has this epoch and term and is unexpired by the server's clock. An expired lease is not extended, because
    # another candidate may be taking it over at this moment.
    if row is None:
        return Renewal.TERM_ENDED
    return Renewal.STEP_DOWN if row[0] else Renewal.RENEWED


def ask_to_step_down(conn: Connection[Any], schema: str) -> tuple[int, str] | None:
    """Asks the leader to step down. Returns its epoch and node id, or None if there is no leader."""
    row = conn.execute(sql("lease", "ask_to_step_down"), [channels.leadership(schema)]).fetchone()
    return (row[0], row[1]) if row else None


class LeadershipRecord(NamedTuple):
    """One term in the history.

    `end_reason` is released, stepped down, failed, expired or lost, and None while the term lasts. `first_version` and
    `last_version` bound the commits of the term; without commits the last is one below the first.
    """

    epoch: int
    leader_addr: str
    acquired_at: datetime
    ended_at: datetime | None
    end_reason: str | None
    first_version: int
    last_version: int | None


def history(conn: Connection[Any], since_seconds: float | None, limit: int) -> list[LeadershipRecord]:
    """Returns up to `limit` terms that had not ended `since_seconds` ago, newest first. None: however old."""
    return [LeadershipRecord(*row) for row in conn.execute(sql("lease", "history"), [since_seconds, limit])]


def require_elected_here(conn: Connection[Any], term: Term) -> None:
    """Raises ConnectionFailed unless `conn` is connected to the server on which `term` began.

    With several hosts in the DSN, a failover between two connections of one leader connects the second to a copy of the
    lease row, with the same term, on another server.
    """
    row = conn.execute(sql("lease", "is_elected_here"), [term.term_id]).fetchone()
    if not (row and row[0]):
        raise ConnectionFailed(
            "the resolver is connected to another server than the one on which this leader was elected"
        )


def describe_holders(conn: Connection[Any]) -> str:
    """Describes the sessions that hold locks on the lease, for a message: pid, application, role, how long, why."""
    rows = conn.execute(sql("lease", "lease_holders")).fetchall()
    return "; ".join(_describe_holder(*row) for row in rows) or "a session that has ended since"


def _describe_holder(
    pid: int, application: str, role: str, waits_for_standby: bool | None, seconds: float | None
) -> str:
    since = "" if seconds is None else f" for {seconds:.0f}s"
    if waits_for_standby is None:  # PostgreSQL hides the wait events of other roles' sessions
        why = "; this role may not see what the session waits for (grant pg_read_all_stats)"
    else:
        why = ", waiting for a synchronous standby" if waits_for_standby else ""
    return f"pid {pid} ({application or 'no application name'}, role {role}){since}{why}"


def release(conn: Connection[Any], schema: str, term: Term, reason: str) -> bool:
    """Ends the term, recording `reason` in the history, and wakes the candidates. Returns False if it had ended."""
    # Compared with the fence, so that a superseded leader does not release its successor's lease.
    arguments = [term.epoch, term.term_id, reason, channels.leadership(schema)]
    return conn.execute(sql("lease", "release"), arguments).fetchone() is not None


def describe_successor(conn: Connection[Any]) -> str:
    """Names the present epoch and leader, for the message of a leader that was fenced."""
    row = conn.execute(sql("lease", "successor")).fetchone()
    assert row is not None
    return f"epoch {row[0]} ({row[1]})" if row[1] else f"epoch {row[0]} (no leader)"
