"""The lease: one row that says who leads.

**Terms.** A leadership is named by its *epoch*, which grows by one with each, and its *term*, a random UUID. The
pair is the fence (rule I2): every write of a leader checks both in its own transaction, so that a database
restored from a backup, which hands out an epoch for the second time, still fences the old leader by the term.

**Taking over.** Whoever holds the election lock may take the lease at once, because the session of the leader
before is gone. Without the lock, the lease has to have run out by the server's clock. Either way the
previous leadership is closed in `leader_history` in the same statement. That one is sent together with another that
locks the row before: its snapshot is then later than whatever it had to wait for, and a candidate that freezes
leaves no transaction open half way.

**Renewing** extends a lease that is still this term's and has not run out. A lease that has run out is over even when
nobody took it: the leader stands for election again.
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


class Lease(NamedTuple):
    """The lease row. `held` and `expires_in_seconds` are judged by the server's clock."""

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
    """A leadership that has begun, and what its first batch continues from."""

    epoch: int
    term_id: UUID
    durable_version: int
    conflict_floor: int
    window_start_id: int
    queue_floor_id: int


def read_lease(conn: Connection[Any]) -> Lease:
    """The lease as it stands in this snapshot."""
    row = conn.execute(sql("lease", "read_lease")).fetchone()
    assert row is not None
    return Lease(*row)


def take_over(conn: Connection[Any], schema: str, node_id: str, ttl: float, *, lock_held: bool) -> Term | None:
    """Begins a new leadership; None when the lease is held and the election lock is not ours. `ttl` in seconds."""
    arguments = [node_id, ttl, lock_held, channels.leadership(schema)]
    with conn.pipeline():
        conn.execute(sql("lease", "lock_lease"), prepare=False)
        taken = conn.execute(sql("lease", "take_over"), arguments, prepare=False)
    row = taken.fetchone()
    return Term(*row[:-1]) if row else None


class Renewal(StrEnum):
    """What a renewal found."""

    RENEWED = "renewed"
    STEP_DOWN = "stepped down"
    OVER = "over"


def renew(conn: Connection[Any], term: Term, ttl: float) -> Renewal:
    """Extends the lease by `ttl` seconds, unless this leadership is over; says if it has been asked to step down."""
    row = conn.execute(sql("lease", "renew"), [term.epoch, term.term_id, ttl]).fetchone()
    if row is None:
        return Renewal.OVER
    return Renewal.STEP_DOWN if row[0] else Renewal.RENEWED


def ask_to_step_down(conn: Connection[Any], schema: str) -> tuple[int, str] | None:
    """Asks the present leader to step down; its epoch and node id, or None when nobody leads."""
    row = conn.execute(sql("lease", "ask_to_step_down"), [channels.leadership(schema)]).fetchone()
    return (row[0], row[1]) if row else None


class LeadershipRecord(NamedTuple):
    """One row of the history. `end_reason`: released, stepped down, expired, lost; None while it lasts."""

    epoch: int
    leader_addr: str
    acquired_at: datetime
    ended_at: datetime | None
    end_reason: str | None
    first_version: int
    last_version: int | None


def history(conn: Connection[Any], since_seconds: float | None, limit: int) -> list[LeadershipRecord]:
    """Leaderships that were not over before `since_seconds` ago, newest first."""
    return [LeadershipRecord(*row) for row in conn.execute(sql("lease", "history"), [since_seconds, limit])]


def require_elected_here(conn: Connection[Any], term: Term) -> None:
    """Raises ConnectionFailed unless `conn` leads to the server on which `term` was elected.

    With several hosts in the DSN, a failover between two connections leads to a copy of the lease with the same term.
    """
    row = conn.execute(sql("lease", "is_elected_here"), [term.term_id]).fetchone()
    if not (row and row[0]):
        raise ConnectionFailed(
            "the resolver's connection leads to another server than the one that elected this leader"
        )


def describe_holders(conn: Connection[Any]) -> str:
    """The sessions that have the lease row locked, in words, with what is known of why."""
    rows = conn.execute(sql("lease", "lease_holders")).fetchall()
    return "; ".join(_holder(*row) for row in rows) or "a session that has ended since"


def _holder(pid: int, application: str, role: str, waits_for_standby: bool | None, seconds: float | None) -> str:
    since = "" if seconds is None else f" for {seconds:.0f}s"
    if waits_for_standby is None:
        why = "; this role may not see what it waits for (grant pg_read_all_stats)"
    else:
        why = ", waiting for a synchronous standby" if waits_for_standby else ""
    return f"pid {pid} ({application or 'no application name'}, role {role}){since}{why}"


def release(conn: Connection[Any], schema: str, term: Term, reason: str) -> bool:
    """Ends the leadership cleanly; False when it was over already."""
    arguments = [term.epoch, term.term_id, reason, channels.leadership(schema)]
    return conn.execute(sql("lease", "release"), arguments).fetchone() is not None


def successor(conn: Connection[Any]) -> str:
    """Who holds the lease now, in words, for the message of a leader that was fenced."""
    row = conn.execute(sql("lease", "successor")).fetchone()
    assert row is not None
    return f"epoch {row[0]} ({row[1]})" if row[1] else f"epoch {row[0]} (nobody)"
