"""Executions and their leases: claiming work, keeping it, ending it.

**A claim** takes the oldest eligible executions that nobody else is just claiming, and leases each to the worker until
a time by the server's clock. The lease's epoch grows with every claim of that execution.

**The fence.** Whatever a worker does with its lease names the epoch, and the same statement that would change anything
checks it under the row's lock. A worker whose lease was taken away (it ran out and was reclaimed, it was revoked, the
execution was cancelled) is told so, Fenced, and has changed nothing. A lease that has run out but that nobody took away
yet is still its worker's.

**Events.** Every transition of a lease writes its lease event, and every end of an execution its completion event, in
the transaction that makes it true.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection
from psycopg.rows import dict_row

from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConditionFalse, Fenced, PgcoordError

DEFAULT_LEASE_SECONDS = 30.0


class Claim(NamedTuple):
    """An execution that was leased. `attempt` counts from 1; what one does with it names `lease_epoch`."""

    execution_id: UUID
    lease_id: UUID
    lease_epoch: int
    flow_id: UUID | None
    name: str
    command: list[str] | None
    attempt: int
    expires_at: datetime


def claim(
    conn: Connection[Any],
    owner: str,
    seconds: float = DEFAULT_LEASE_SECONDS,
    *,
    limit: int = 1,
    namespace: str | None = None,
    instance_tag: str | None = None,
) -> list[Claim]:
    """Leases up to `limit` eligible executions to `owner`, the oldest first."""
    return [
        Claim(*row)
        for row in conn.execute(sql("executions", "claim"), [owner, seconds, limit, namespace, instance_tag])
    ]


def renew(conn: Connection[Any], execution_id: UUID, lease_epoch: int, seconds: float) -> datetime:
    """Prolongs a lease from now on; returns until when. Fenced when it is over."""
    row = conn.execute(sql("executions", "renew"), [execution_id, lease_epoch, seconds]).fetchone()
    if row is None:
        raise _fenced(conn, execution_id, lease_epoch)
    return row[0]  # type: ignore[no-any-return]


def complete(conn: Connection[Any], execution_id: UUID, lease_epoch: int) -> None:
    """Ends an execution as a success. Fenced when the lease is over."""
    row = conn.execute(sql("executions", "complete"), [execution_id, lease_epoch]).fetchone()
    if not (row and row[0]):
        raise _fenced(conn, execution_id, lease_epoch)


def fail(conn: Connection[Any], execution_id: UUID, lease_epoch: int, reason: str | None = None) -> str:
    """Ends an attempt as a failure; `eligible` when there will be another, `failed` when not. Fenced as above."""
    row = conn.execute(sql("executions", "fail"), [execution_id, lease_epoch, reason]).fetchone()
    if row is None or row[0] is None:
        raise _fenced(conn, execution_id, lease_epoch)
    return str(row[0])


def revoke(conn: Connection[Any], execution_id: UUID, lease_epoch: int | None = None) -> None:
    """Takes a running execution away from its worker, for another to run. ConditionFalse when it is not running.

    With a `lease_epoch`, from that lease alone.
    """
    row = conn.execute(sql("executions", "revoke"), [execution_id, lease_epoch]).fetchone()
    if not (row and row[0]):
        state = execution_record(conn, execution_id)["state"]
        raise ConditionFalse(f"execution {execution_id} is not running: it is {state}")


def execution_record(conn: Connection[Any], execution_id: UUID) -> dict[str, Any]:
    """One execution and who runs it. ConditionFalse when there is none."""
    record = conn.cursor(row_factory=dict_row).execute(sql("executions", "show"), [execution_id]).fetchone()
    if record is None:
        raise ConditionFalse(f"there is no execution {execution_id}")
    return record


def seconds_to_next(conn: Connection[Any], namespace: str | None, instance_tag: str | None) -> float | None:
    """In how many seconds the next execution leaves its back-off; None when none does."""
    row = conn.execute(sql("executions", "next_eligible"), [namespace, instance_tag]).fetchone()
    return row[0] if row else None


def _fenced(conn: Connection[Any], execution_id: UUID, lease_epoch: int) -> PgcoordError:
    """What to raise when nothing was changed: that it is fenced, or that there is no such execution."""
    try:
        execution_record(conn, execution_id)
    except ConditionFalse as error:
        return error
    return Fenced(
        f"the lease of epoch {lease_epoch} on execution {execution_id} is over; nothing was changed",
        hint="it ran out, was revoked, or the execution has ended; see: pgcoord execution show",
    )
