"""Garbage collection: deleting what nobody can ask for any more.

**Commit requests.** A settled request is kept for a retention that is never shorter than what clients, new leaders
and resubmissions reach back (`core.commits.requests`). Older ones are deleted in small batches, oldest first, each batch a
transaction of its own that skips rows somebody else has locked, so that commits go on beside it and any number
of collectors can run. Pending requests are never deleted (rule I11). Those that outlived the retention without any
leader to settle them are first marked `orphaned`; from then on they are settled, and are kept for a retention more.

**Events** are deleted from the oldest on, by the server's clock, up to the first that has to stay: one that is younger
than the retention, that a subscription has not passed, that (being a completion) was not dispatched, or before which
a transaction that is still open may write. Each batch raises the outbox's floor in the
transaction that deletes, so that no tail takes collected events for some that never came.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.commits.requests import SHORTEST_RETENTION
from pgcoord_cli.core.events.outbox import Outbox
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import UsageError

DEFAULT_RETENTION = 600.0
DEFAULT_EVENT_RETENTION = 86_400.0
DEFAULT_BATCH_SIZE = 1_000


class Collected(NamedTuple):
    """What a run did to one table; under `dry_run`, `deleted` is what it would delete, `orphaned` is not counted."""

    table: str
    deleted: int
    batches: int
    orphaned: int | None
    oldest_kept: datetime | None
    dry_run: bool


class CollectedEvents(NamedTuple):
    """What a run did to an outbox; `furthest_behind` is the subscription that keeps it from doing more, if any does."""

    table: str
    deleted: int
    batches: int
    oldest_kept: datetime | None
    furthest_behind: str | None
    dry_run: bool


Progress = Callable[[int], bool]
"""Hears how many rows have been deleted, and says whether to go on."""


def check_retention(seconds: float) -> float:
    """`seconds`, or UsageError when that is shorter than what others rely on."""
    if seconds < SHORTEST_RETENTION:
        raise UsageError(
            f"--older-than: {seconds:g}s is shorter than {SHORTEST_RETENTION:g}s",
            hint="clients may still ask for outcomes that young, and a new leader needs them",
        )
    return seconds


def collect_commit_requests(conn: Connection[Any], older_than: float, batch_size: int, progress: Progress) -> Collected:
    """Deletes settled requests older than `older_than` seconds; `progress(deleted)` says whether to go on."""
    orphaned = _orphan_all(conn, older_than, batch_size, progress)
    deleted = batches = last_id = 0
    while progress(deleted):
        count, last_id = conn.execute(sql("gc", "delete_requests"), [last_id, older_than, batch_size]).fetchone() or (
            0,
            0,
        )
        deleted += count
        batches += count > 0
        if count < batch_size:
            break
    return Collected("commit_requests", deleted, batches, orphaned, _oldest_request(conn), False)


def _orphan_all(conn: Connection[Any], older_than: float, batch_size: int, progress: Progress) -> int:
    orphaned = last_id = 0
    while True:
        count, last_id = orphan_batch(conn, older_than, batch_size, last_id)
        orphaned += count
        if count < batch_size or not progress(0):
            return orphaned


def orphan_batch(conn: Connection[Any], older_than: float, batch_size: int, after_id: int = 0) -> tuple[int, int]:
    """Marks one batch of what outlived every leader: how many, and the last id."""
    return conn.execute(sql("gc", "orphan_requests"), [after_id, older_than, batch_size]).fetchone() or (0, 0)


def count_commit_requests(conn: Connection[Any], older_than: float) -> Collected:
    """What `collect_commit_requests` would delete at this moment."""
    row = conn.execute(sql("gc", "count_requests"), [older_than]).fetchone() or (0,)
    return Collected("commit_requests", row[0], 0, None, _oldest_request(conn), True)


def _oldest_request(conn: Connection[Any]) -> datetime | None:
    row = conn.execute(sql("gc", "oldest_request")).fetchone()
    return row[0] if row else None


def collect_events(
    conn: Connection[Any], outbox: Outbox, older_than: float, batch_size: int, progress: Progress
) -> CollectedEvents:
    """Deletes events older than `older_than` seconds, from the oldest on."""
    deleted = batches = last_id = 0
    is_last = False
    while not is_last and progress(deleted):
        before_ms, passed = conn.execute(sql("gc", "event_bound"), [outbox.table, older_than]).fetchone() or (0, 0)
        statement = sql("gc", f"delete_{outbox.table}")
        found = conn.execute(statement, [last_id, before_ms, batch_size, passed]).fetchone()
        count, last_id, is_last = found or (0, 0, True)
        deleted += count
        batches += count > 0
    return CollectedEvents(outbox.table, deleted, batches, *_oldest_event(conn, outbox), False)


def count_events(conn: Connection[Any], outbox: Outbox, older_than: float) -> CollectedEvents:
    """What `collect_events` would delete at this moment."""
    row = conn.execute(sql("gc", f"count_{outbox.table}"), [older_than]).fetchone() or (0,)
    return CollectedEvents(outbox.table, row[0], 0, *_oldest_event(conn, outbox), True)


def _oldest_event(conn: Connection[Any], outbox: Outbox) -> tuple[datetime | None, str | None]:
    return conn.execute(sql("gc", "oldest_event", outbox=outbox.table)).fetchone() or (None, None)
