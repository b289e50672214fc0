"""Reading commit requests: those that are pending in the queue, and those that were settled."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection

from pgcoord_cli.db.sqlfiles import sql

SHORTEST_RETENTION = 60.0
"""Seconds for which a settled request is kept at least; garbage collection refuses less (rule I11).

Three readers need settled requests: a client that asks for its outcome, a new leader that rebuilds the conflict window,
and a client that submits again a request that a crash may have lost. None of them relies on a request that is older; a
client relies on half of it (`core.kv.submissions`).
"""


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
