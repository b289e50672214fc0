"""Garbage collection: deleting requests and events that can no longer be asked for.

**Commit requests.** A settled request is kept for a retention that is never shorter than the time for which clients,
new leaders and resubmissions need it (`core.commits.requests`). Older ones are deleted in small batches, oldest first.
Each batch is a transaction of its own that skips rows which other transactions have locked, so that commits go on
beside it and any number of collectors can run. Pending requests are never deleted (rule I11). Those of earlier epochs
that have outlived the retention, while there is no leader to settle them, are first marked `orphaned`; then they count
as settled and are kept for one retention more.

**Events** are deleted from the oldest on, by the server's clock, up to the first one that must stay: one that is
younger than the retention, or that a subscription has not passed, or a completion event that was not dispatched, or one
above an id that a still open transaction may yet write. Each batch raises the outbox's floor in the transaction that
deletes, so that a tail never takes collected events for ids that were never committed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.sql import Identifier

from pgcoord_cli.core.commits.requests import SHORTEST_RETENTION
from pgcoord_cli.core.events.outbox import Outbox
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import UsageError

DEFAULT_RETENTION = 600.0
DEFAULT_EVENT_RETENTION = 86_400.0
"""Seconds for which settled requests, and events, are kept."""

DEFAULT_BATCH_SIZE = 1_000
MOST_WRITERS = 3
"""How many of the open transactions that keep events are named."""


class Collected(NamedTuple):
    """The result of a run on commit requests.

    With `dry_run`, `deleted` is the number that would be deleted and `orphaned` is None. `oldest_kept` is the creation
    time of the oldest request that is left.
    """

    table: str
    deleted: int
    batches: int
    orphaned: int | None
    oldest_kept: datetime | None
    dry_run: bool


class CollectedEvents(NamedTuple):
    """The result of a run on an outbox.

    `furthest_behind` is the subscription with the lowest position, if that is below the last event. `oldest_kept` is
    the insertion time of the oldest event that is left. `held_back` tells which open transaction keeps events that are
    old enough, and which right this role lacks if it cannot see the transaction's start; None: none does.
    """

    table: str
    deleted: int
    batches: int
    oldest_kept: datetime | None
    furthest_behind: str | None
    dry_run: bool
    held_back: str | None


Progress = Callable[[int], bool]
"""Called between batches with the number of deleted rows; returns whether to go on."""


def check_retention(seconds: float) -> float:
    """Returns a retention in seconds. Raises UsageError if clients and new leaders need requests for longer."""
    if seconds < SHORTEST_RETENTION:
        raise UsageError(
            f"--older-than: {seconds:g}s is shorter than {SHORTEST_RETENTION:g}s",
            hint="until then clients may ask for outcomes, and a new leader needs the commits",
        )
    return seconds


def collect_commit_requests(conn: Connection[Any], older_than: float, batch_size: int, progress: Progress) -> Collected:
    """Orphans and then deletes requests older than `older_than` seconds, in batches, until `progress` returns False."""
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
    """Marks one batch of abandoned pending requests as orphaned. Returns their number and the last id."""
    return conn.execute(sql("gc", "orphan_requests"), [after_id, older_than, batch_size]).fetchone() or (0, 0)


def count_commit_requests(conn: Connection[Any], older_than: float) -> Collected:
    """Counts what `collect_commit_requests` would delete at this moment."""
    row = conn.execute(sql("gc", "count_requests"), [older_than]).fetchone() or (0,)
    return Collected("commit_requests", row[0], 0, None, _oldest_request(conn), True)


def _oldest_request(conn: Connection[Any]) -> datetime | None:
    row = conn.execute(sql("gc", "oldest_request")).fetchone()
    return row[0] if row else None


def collect_events(
    conn: Connection[Any], outbox: Outbox, older_than: float, batch_size: int, progress: Progress
) -> CollectedEvents:
    """Deletes events older than `older_than` seconds from the oldest on, in batches, until `progress` returns False."""
    deleted = batches = last_id = 0
    is_last = False
    while not is_last and progress(deleted):
        # A statement of its own before each deletion: every transaction that it finds closed has committed what the
        # snapshot of the deletion sees.
        before_ms, passed = conn.execute(sql("gc", "event_bound"), [outbox.table, older_than]).fetchone() or (0, 0)
        statement = sql("gc", f"delete_{outbox.table}")
        found = conn.execute(statement, [last_id, before_ms, batch_size, passed]).fetchone()
        count, last_id, is_last = found or (0, 0, True)
        deleted += count
        batches += count > 0
    held_back = _held_back(conn, outbox, older_than)
    return CollectedEvents(outbox.table, deleted, batches, *_oldest_event(conn, outbox), False, held_back)


def count_events(conn: Connection[Any], outbox: Outbox, older_than: float) -> CollectedEvents:
    """Counts what `collect_events` would delete at this moment."""
    row = conn.execute(sql("gc", f"count_{outbox.table}"), [older_than]).fetchone() or (0,)
    held_back = _held_back(conn, outbox, older_than)
    return CollectedEvents(outbox.table, row[0], 0, *_oldest_event(conn, outbox), True, held_back)


def _oldest_event(conn: Connection[Any], outbox: Outbox) -> tuple[datetime | None, str | None]:
    return conn.execute(sql("gc", "oldest_event", outbox=outbox.table)).fetchone() or (None, None)


def _held_back(conn: Connection[Any], outbox: Outbox, older_than: float) -> str | None:
    """Describes the transactions that keep events of the outbox which are older than `older_than` seconds."""
    writers = conn.execute(sql("gc", "blocking_writers", outbox=outbox.table), [older_than]).fetchall()
    if not writers:
        return None
    names = ", ".join(_writer(*writer[:4]) for writer in writers[:MOST_WRITERS])
    more = f" and {len(writers) - MOST_WRITERS} more" if len(writers) > MOST_WRITERS else ""
    text = f"old {outbox.table} are kept: transactions that may still commit events are open: {names}{more}"
    if any(pid is not None and since is None for pid, _, _, since, _ in writers):
        own_role = Identifier(writers[0][4]).as_string()
        text += f"; to see since when, the role needs: GRANT pg_read_all_stats TO {own_role}"
    return text


def _writer(pid: int | None, application: str | None, role: str | None, since: datetime | None) -> str:
    if pid is None:
        return "a prepared transaction (see pg_prepared_xacts)"
    begin = f" since {since:%Y-%m-%d %H:%M:%S}Z" if since else ""
    return f"{application or 'a session'} (pid {pid}, role {role}){begin}"
