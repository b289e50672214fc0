"""Reading commit requests: those that are pending in the queue, and those that were settled."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg import Connection

from pgcoord_cli.db.connection import translate
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import OutcomeUnknown

SHORTEST_RETENTION = 60.0
"""Seconds for which a settled request is kept at least; garbage collection refuses less (rule I11).

Three readers need settled requests: a client that asks for its outcome, a new leader that rebuilds the conflict window,
and a client that submits again a request that a crash may have lost. None of them relies on a request that is older; a
client relies on half of it (`core.kv.submissions`).
"""


CONFIRM_SECONDS = 10.0
"""How long a status is held back for the synchronous standbys to confirm it."""


class Status(StrEnum):
    """The status of a request. All but pending are terminal."""

    PENDING = "pending"
    COMMITTED = "committed"
    CONFLICT = "conflict"
    TOO_OLD = "too_old"
    REJECTED = "rejected"
    ORPHANED = "orphaned"


class CommitRequest(NamedTuple):
    """A request without its payload."""

    id: int
    request_id: UUID
    status: str
    commit_version: int | None
    read_version: int
    epoch: int
    reason: str | None
    created_at: datetime
    resolved_at: datetime | None


def list_requests(conn: Connection[Any], status: Status | None, limit: int) -> list[CommitRequest]:
    """Returns the newest `limit` requests, newest first; with a status, only those that have it."""
    return [CommitRequest(*row) for row in conn.execute(sql("commits", "list"), [status, limit])]


def find_request(conn: Connection[Any], request_id: UUID) -> CommitRequest | None:
    """Returns the request with this id, which the client made, or None."""
    row = conn.execute(sql("commits", "show"), [request_id]).fetchone()
    return CommitRequest(*row) if row else None


def confirm(conn: Connection[Any], request: CommitRequest) -> CommitRequest:
    """Returns `request` once the synchronous standbys have what its row says; at once where there are none.

    A row can be visible although a failover would lose it, when the wait for the standby was cut short (rule I16).
    Raises OutcomeUnknown after CONFIRM_SECONDS.
    """
    row = conn.execute(sql("commits", "needs_barrier")).fetchone()
    if row and row[0] and request.status != Status.PENDING:
        try:
            Pipeline(conn, CONFIRM_SECONDS).fetch(sql("commits", "barrier"), [])
        except psycopg.Error as error:
            raise OutcomeUnknown(
                f"request {request.request_id} is {request.status} here, but no synchronous standby has confirmed it: "
                f"{translate(error).message}",
                hint="a failover may lose it; ask again once the standby is back",
            ) from None
    return request
