"""Looking at commit requests: what is in the queue, and what became of the rest."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection

from pgcoord_cli.db.sqlfiles import sql

SHORTEST_RETENTION = 60.0
"""Seconds for which a settled request is kept at least.

A client that asks for its outcome, a new leader that rebuilds the conflict window, and a client that submits again
what a crash lost reach back that far. Garbage collection never goes below it (rule I11); a client stops asking at half.
"""


class Status(StrEnum):
    """What a request can be. All but pending are final."""

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
    """The newest `limit` requests, newest first."""
    return [CommitRequest(*row) for row in conn.execute(sql("commits", "list"), [status, limit])]


def find_request(conn: Connection[Any], request_id: UUID) -> CommitRequest | None:
    """The request that a client made under this id, or None."""
    row = conn.execute(sql("commits", "show"), [request_id]).fetchone()
    return CommitRequest(*row) if row else None
