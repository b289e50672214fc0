"""Reconcilers: one tick of each repairs what crashes left behind. Made for cron; any number may run at once.

- **dependency** dispatches completion events that have no dispatch time and are older than a threshold by the server's
  clock; younger ones are being dispatched normally. Events are dispatched EVENTS_A_TRANSACTION in a transaction. If
  such a transaction fails, its events are dispatched one by one, so that a bad event affects only itself: its failure
  is recorded, it backs off, and after QUARANTINE_AFTER attempts it is quarantined until an operator has it retried.
  Only failures that belong to the event count (`dispatch.EVENT_FAULT_CLASSES`). Trouble that passes, such as a lock or
  a missing right, changes nothing about the events: the tick raises it, after it has dispatched the events that the
  trouble does not concern.
- **lease-expiry** ends execution leases that have expired, and makes their executions eligible again.
- **sibling-cancel** cancels executions that a satisfied group with `cancel_remaining` no longer needs.
- **orphaned-commits** marks pending commit requests of superseded epochs, older than the retention, as orphaned, while
  no leader holds an unexpired lease.

Each skips rows that another transaction has locked, and returns how many rows it found (`scanned`), changed
(`reconciled`), found changed already (`noop`), left out by the filters (`filtered`) and failed to change (`errors`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection
from psycopg.rows import dict_row

from pgcoord_cli.core.flows.dispatch import (
    belongs_to_event,
    dispatch_all,
    dispatch_unless_locked,
    may_concern_one_event,
)
from pgcoord_cli.core.gc import DEFAULT_RETENTION, orphan_batch
from pgcoord_cli.db.connection import is_connection_lost
from pgcoord_cli.db.sqlfiles import sql

_log = logging.getLogger("pgcoord.reconcile")

EVENTS_A_TRANSACTION = 100
QUARANTINE_AFTER = 8
"""Failed attempts to dispatch an event before it is quarantined."""

GO_ON_SECONDS = 5.0
"""How long a tick dispatches other events after trouble that may concern one event only."""

MAX_LOST_LEASES = 5
"""An execution whose lease expires more often than this fails."""

DEFAULT_BATCH_LIMIT = 1_000
DEFAULT_STALE_MS = 1_000


class Scope(NamedTuple):
    """What one tick may change.

    At most `batch_limit` rows; events older than `stale_threshold_ms` milliseconds; of the namespace and the instance
    tag, unless None.
    """

    batch_limit: int = DEFAULT_BATCH_LIMIT
    stale_threshold_ms: int = DEFAULT_STALE_MS
    namespace: str | None = None
    instance_tag: str | None = None


class Tick(NamedTuple):
    """The counts of one tick of one reconciler, as the module's docstring defines them."""

    scanned: int = 0
    reconciled: int = 0
    noop: int = 0
    filtered: int = 0
    errors: int = 0

    def __add__(self, other: Tick) -> Tick:  # type: ignore[override]
        return Tick(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


OnError = Callable[[int, str], None]
"""Called with the id of an event that could not be dispatched, and the reason; both are logged, too."""


def ignore_error(_event: int, _why: str) -> None:
    """The OnError of a caller to which the log is enough."""


def dependency(conn: Connection[Any], scope: Scope, on_error: OnError) -> Tick:
    """Dispatches stale undispatched events, the oldest first. Raises psycopg's errors that belong to no event."""
    bounds = [scope.stale_threshold_ms, scope.batch_limit, scope.namespace, scope.instance_tag]
    # Read before the dispatches and without locks: what another session dispatches meanwhile counts as a no-op.
    events = [row[0] for row in conn.execute(sql("reconcile", "undispatched"), bounds)]
    # Counted only with a filter: without one it is zero, and the count would read the backlog once more.
    filtered = 0
    if scope.namespace or scope.instance_tag:
        filtered = _number(conn, "filtered", bounds)
    tick, passing = Tick(scanned=len(events), filtered=filtered), PassingTrouble()
    for chunk in _chunks(events, EVENTS_A_TRANSACTION):
        tick += _dispatch_chunk(conn, chunk, on_error, passing)
    passing.raise_first()
    return tick


def dispatch_backlog(conn: Connection[Any], is_over: Callable[[], bool] = lambda: False) -> None:
    """Dispatches undispatched events, however young, until a tick dispatches none; what fails is left to later ones."""
    while not is_over() and dependency(conn, Scope(stale_threshold_ms=0), ignore_error).reconciled:
        pass


class PassingTrouble:
    """Trouble of a tick that does not belong to an event, but may concern the rows of some events only."""

    def __init__(self) -> None:
        self._first: psycopg.Error | None = None
        self._ends_at = math.inf

    def set_aside(self, error: psycopg.Error) -> None:
        """Leaves an event to a later tick. Raises `error` if that is not one event's or has lasted for too long."""
        if is_connection_lost(error) or not may_concern_one_event(error) or time.monotonic() >= self._ends_at:
            raise self._first or error
        if self._first is None:
            self._first, self._ends_at = error, time.monotonic() + GO_ON_SECONDS

    def raise_first(self) -> None:
        """Raises the first error that was set aside, if any."""
        if self._first:
            raise self._first


def _dispatch_chunk(conn: Connection[Any], events: Sequence[int], on_error: OnError, passing: PassingTrouble) -> Tick:
    try:
        claimed = len(dispatch_all(conn, events))
    except psycopg.Error as error:
        if not belongs_to_event(error) and (is_connection_lost(error) or not may_concern_one_event(error)):
            raise  # says nothing about the events, and every further statement would fail in the same way
        # One by one: the refused transaction does not say which of its events was the cause.
        tick = Tick()
        for event in events:
            tick += _dispatch_one(conn, event, on_error, passing)
        return tick
    return Tick(reconciled=claimed, noop=len(events) - claimed)


def _dispatch_one(conn: Connection[Any], event: int, on_error: OnError, passing: PassingTrouble) -> Tick:
    try:
        is_claimed = dispatch_unless_locked(conn, event)
    except psycopg.Error as error:
        if belongs_to_event(error):
            return _note_failure(conn, event, error, on_error)
        passing.set_aside(error)
        return Tick()
    return Tick(reconciled=int(is_claimed), noop=int(not is_claimed))


def _note_failure(conn: Connection[Any], event: int, error: psycopg.Error, on_error: OnError) -> Tick:
    # In its own transaction, since the one of the dispatch has rolled back.
    reason = error.diag.message_primary or type(error).__name__
    attempts, is_quarantined = conn.execute(
        sql("reconcile", "note_failure"), [event, reason, QUARANTINE_AFTER]
    ).fetchone() or (0, False)
    why = f"{reason} (attempt {attempts}{', quarantined' if is_quarantined else ''})"
    level = logging.ERROR if is_quarantined else logging.WARNING
    _log.log(level, "event %d: %s", event, why, extra={"event_id": event, "attempts": attempts})
    on_error(event, why)
    return Tick(errors=1)


def lease_expiry(conn: Connection[Any], scope: Scope, _on_error: OnError) -> Tick:
    """Ends leases that have expired; an execution with more than MAX_LOST_LEASES of them fails."""
    values = [scope.batch_limit, scope.namespace, scope.instance_tag, MAX_LOST_LEASES]
    scanned, expired = conn.execute(sql("reconcile", "expire_leases"), values).fetchone() or (0, 0)
    return Tick(scanned=scanned, reconciled=expired, noop=scanned - expired)


def sibling_cancel(conn: Connection[Any], scope: Scope, _on_error: OnError) -> Tick:
    """Cancels executions whose downstream group is satisfied and cancels its siblings."""
    values = [scope.batch_limit, scope.namespace, scope.instance_tag]
    scanned, cancelled = conn.execute(sql("reconcile", "cancel_siblings"), values).fetchone() or (0, 0)
    return Tick(scanned=scanned, reconciled=cancelled, noop=scanned - cancelled)


def orphaned_commits(conn: Connection[Any], scope: Scope, _on_error: OnError) -> Tick:
    """Marks commit requests of superseded epochs that stayed pending for DEFAULT_RETENTION as orphaned."""
    orphaned, _ = orphan_batch(conn, DEFAULT_RETENTION, scope.batch_limit)
    return Tick(scanned=orphaned, reconciled=orphaned)


RECONCILERS: dict[str, Callable[[Connection[Any], Scope, OnError], Tick]] = {
    "lease-expiry": lease_expiry,
    "sibling-cancel": sibling_cancel,
    "dependency": dependency,
    "orphaned-commits": orphaned_commits,
}
"""In the order in which `reconcile all` runs them: the first two may write events that the third dispatches."""


def list_quarantined(conn: Connection[Any]) -> list[dict[str, Any]]:
    """Returns the quarantined events, each with its last error."""
    return conn.cursor(row_factory=dict_row).execute(sql("reconcile", "quarantined")).fetchall()


def retry_quarantined(conn: Connection[Any], event_id: int | None) -> int:
    """Releases one event from quarantine, or all if None; returns how many. The next tick dispatches them."""
    # Deletes the failure row, so that attempts and back-off start again from the beginning.
    return conn.execute(sql("reconcile", "retry"), [event_id]).rowcount


def _number(conn: Connection[Any], name: str, values: Sequence[Any]) -> int:
    row = conn.execute(sql("reconcile", f"count_{name}"), values).fetchone()
    return int(row[0]) if row else 0


def _chunks(events: Sequence[int], size: int) -> Iterator[list[int]]:
    rest = iter(events)
    while chunk := list(islice(rest, size)):
        yield chunk
