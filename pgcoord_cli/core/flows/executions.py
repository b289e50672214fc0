"""Executions and their leases: claim an execution, renew its lease, end it.

**A claim** takes the oldest eligible executions whose rows no other claim has locked, and leases each to the worker
until a time by the server's clock. Each claim of an execution increments its lease epoch.

**The fence.** Every call of a worker names the lease epoch, and the statement that would change a row compares it under
the row's lock. If the lease has ended (it expired and was reclaimed, it was revoked, the execution was cancelled), the
call raises Fenced and changes nothing. A lease that has expired but has not been ended yet still belongs to its worker.

**Events.** Every transition of a lease writes a lease event, and every end of an execution a completion event, in the
transaction that makes the transition.
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
    """A leased execution. `attempt` counts from 1; `lease_epoch` is the fence that renew, complete and fail take."""

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
    """Leases up to `limit` eligible executions to `owner` for `seconds`, the oldest first; returns the claims.

    `namespace` and `instance_tag` restrict the executions, unless None.
    """
    return [
        Claim(*row)
        for row in conn.execute(sql("executions", "claim"), [owner, seconds, limit, namespace, instance_tag])
    ]


def renew(conn: Connection[Any], execution_id: UUID, lease_epoch: int, seconds: float) -> datetime:
    """Renews a lease for `seconds` from now; returns its new expiry.

    Raises Fenced if the lease has ended, ConditionFalse if there is no such execution.
    """
    row = conn.execute(sql("executions", "renew"), [execution_id, lease_epoch, seconds]).fetchone()
    if row is None:
        raise _fenced(conn, execution_id, lease_epoch)
    return row[0]  # type: ignore[no-any-return]


def complete(conn: Connection[Any], execution_id: UUID, lease_epoch: int) -> None:
    """Ends an execution as a success. Raises Fenced and ConditionFalse as `renew` does."""
    row = conn.execute(sql("executions", "complete"), [execution_id, lease_epoch]).fetchone()
    if not (row and row[0]):
        raise _fenced(conn, execution_id, lease_epoch)


def fail(conn: Connection[Any], execution_id: UUID, lease_epoch: int, reason: str | None = None) -> str:
    """Ends an attempt as a failure; returns `eligible` if another attempt follows, else `failed`.

    Raises Fenced and ConditionFalse as `renew` does.
    """
    row = conn.execute(sql("executions", "fail"), [execution_id, lease_epoch, reason]).fetchone()
    if row is None or row[0] is None:
        raise _fenced(conn, execution_id, lease_epoch)
    return str(row[0])


def revoke(conn: Connection[Any], execution_id: UUID, lease_epoch: int | None = None) -> None:
    """Revokes the lease of a running execution, which becomes eligible again.

    With a `lease_epoch`, only the lease of that epoch. Raises ConditionFalse if the execution is not running.
    """
    row = conn.execute(sql("executions", "revoke"), [execution_id, lease_epoch]).fetchone()
    if not (row and row[0]):
        state = execution_record(conn, execution_id)["state"]
        raise ConditionFalse(f"execution {execution_id} is not running: it is {state}")


def execution_record(conn: Connection[Any], execution_id: UUID) -> dict[str, Any]:
    """Returns an execution with its lease. Raises ConditionFalse if there is no such execution."""
    record = conn.cursor(row_factory=dict_row).execute(sql("executions", "show"), [execution_id]).fetchone()
    if record is None:
        raise ConditionFalse(f"there is no execution {execution_id}")
    return record


def seconds_to_next(conn: Connection[Any], namespace: str | None, instance_tag: str | None) -> float | None:
    """Returns the seconds until the next execution leaves its back-off, or None if none is in back-off."""
    row = conn.execute(sql("executions", "next_eligible"), [namespace, instance_tag]).fetchone()
    return row[0] if row else None


def _fenced(conn: Connection[Any], execution_id: UUID, lease_epoch: int) -> PgcoordError:
    """Returns the error for a call that changed no row: ConditionFalse if there is no such execution, else Fenced."""
    try:
        execution_record(conn, execution_id)
    except ConditionFalse as error:
        return error
    return Fenced(
        f"the lease of epoch {lease_epoch} on execution {execution_id} has ended; nothing was changed",
        hint=f"it expired, was revoked, or the execution has ended; see: pgcoord execution show {execution_id}",
    )
