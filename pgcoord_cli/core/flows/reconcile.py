"""Reconcilers: one tick of each repairs what crashes left behind. Made for cron; any number may run at once.

- **dependency** dispatches completion events that nobody dispatched, once they are older than a threshold by the
  server's clock; younger ones are on their way. Events share transactions, a hundred each. When one such transaction is
  refused, its events are tried one by one, so that a bad one harms only itself: it is noted, backs off, and after
  QUARANTINE_AFTER attempts is left alone until somebody has it tried again.
- **lease-expiry** takes back the leases of workers that vanished.
- **sibling-cancel** ends what need not run any more since enough of its siblings succeeded.
- **orphaned-commits** marks commit requests that outlived every leader.

Each skips what somebody else is at, and reports how many rows it looked at (`scanned`), changed (`reconciled`), found
done (`noop`), left out by the filters (`filtered`) and could not change (`errors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection
from psycopg.rows import dict_row

from pgcoord_cli.core.flows.dispatch import dispatch_all
from pgcoord_cli.core.gc import DEFAULT_RETENTION, orphan_batch
from pgcoord_cli.db.connection import is_connection_lost
from pgcoord_cli.db.sqlfiles import sql

EVENTS_A_TRANSACTION = 100
QUARANTINE_AFTER = 8
MOST_LOSSES = 5
"""An execution whose worker vanished more often than this has failed."""

DEFAULT_BATCH_LIMIT = 1_000
DEFAULT_STALE_MS = 1_000


class Scope(NamedTuple):
    """What one tick may touch."""

    batch_limit: int = DEFAULT_BATCH_LIMIT
    stale_threshold_ms: int = DEFAULT_STALE_MS
    namespace: str | None = None
    instance_tag: str | None = None


class Tick(NamedTuple):
    """What one tick of one reconciler did."""

    scanned: int = 0
    reconciled: int = 0
    noop: int = 0
    filtered: int = 0
    errors: int = 0

    def __add__(self, other: Tick) -> Tick:  # type: ignore[override]
        return Tick(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


Complain = Callable[[int, str], None]
"""Hears of an event that could not be dispatched, and why."""


def dependency(conn: Connection[Any], scope: Scope, complain: Complain) -> Tick:
    """Dispatches stale events, oldest first."""
    bounds = [scope.stale_threshold_ms, scope.batch_limit, scope.namespace, scope.instance_tag]
    events = [row[0] for row in conn.execute(sql("reconcile", "undispatched"), bounds)]
    filtered = 0
    if scope.namespace or scope.instance_tag:
        filtered = _number(conn, "filtered", bounds)
    tick = Tick(scanned=len(events), filtered=filtered)
    for chunk in _chunks(events, EVENTS_A_TRANSACTION):
        tick += _dispatch_chunk(conn, chunk, complain)
    return tick


def _dispatch_chunk(conn: Connection[Any], events: Sequence[int], complain: Complain) -> Tick:
    try:
        claimed = len(dispatch_all(conn, events))
    except psycopg.Error as error:
        if is_connection_lost(error):
            raise
        if len(events) == 1:
            return _note_failure(conn, events[0], error, complain)
        tick = Tick()
        for event in events:
            tick += _dispatch_chunk(conn, [event], complain)
        return tick
    return Tick(reconciled=claimed, noop=len(events) - claimed)


def _note_failure(conn: Connection[Any], event: int, error: psycopg.Error, complain: Complain) -> Tick:
    reason = error.diag.message_primary or type(error).__name__
    attempts, is_quarantined = conn.execute(
        sql("reconcile", "note_failure"), [event, reason, QUARANTINE_AFTER]
    ).fetchone() or (0, False)
    complain(event, f"{reason} (attempt {attempts}{', quarantined' if is_quarantined else ''})")
    return Tick(errors=1)


def lease_expiry(conn: Connection[Any], scope: Scope, _complain: Complain) -> Tick:
    """Takes back leases that have run out."""
    values = [scope.batch_limit, scope.namespace, scope.instance_tag, MOST_LOSSES]
    scanned, expired = conn.execute(sql("reconcile", "expire_leases"), values).fetchone() or (0, 0)
    return Tick(scanned=scanned, reconciled=expired, noop=scanned - expired)


def sibling_cancel(conn: Connection[Any], scope: Scope, _complain: Complain) -> Tick:
    """Ends what need not run any more."""
    values = [scope.batch_limit, scope.namespace, scope.instance_tag]
    scanned, cancelled = conn.execute(sql("reconcile", "cancel_siblings"), values).fetchone() or (0, 0)
    return Tick(scanned=scanned, reconciled=cancelled, noop=scanned - cancelled)


def orphaned_commits(conn: Connection[Any], scope: Scope, _complain: Complain) -> Tick:
    """Marks commit requests that outlived every leader."""
    orphaned, _ = orphan_batch(conn, DEFAULT_RETENTION, scope.batch_limit)
    return Tick(scanned=orphaned, reconciled=orphaned)


RECONCILERS: dict[str, Callable[[Connection[Any], Scope, Complain], Tick]] = {
    "lease-expiry": lease_expiry,
    "sibling-cancel": sibling_cancel,
    "dependency": dependency,
    "orphaned-commits": orphaned_commits,
}
"""In the order in which one tick of all runs them: what the first ones end, the later ones carry on."""


def list_quarantined(conn: Connection[Any]) -> list[dict[str, Any]]:
    """The events that are not tried any more, and why."""
    return conn.cursor(row_factory=dict_row).execute(sql("reconcile", "quarantined")).fetchall()


def retry_quarantined(conn: Connection[Any], event_id: int | None) -> int:
    """Has one quarantined event tried again, or all; returns how many."""
    return conn.execute(sql("reconcile", "retry"), [event_id]).rowcount


def _number(conn: Connection[Any], name: str, values: Sequence[Any]) -> int:
    row = conn.execute(sql("reconcile", f"count_{name}"), values).fetchone()
    return int(row[0]) if row else 0


def _chunks(events: Sequence[int], size: int) -> Iterator[list[int]]:
    rest = iter(events)
    while chunk := list(islice(rest, size)):
        yield chunk
