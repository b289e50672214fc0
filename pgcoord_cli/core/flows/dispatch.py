"""Dispatch: applies completion events to the executions that depend on them.

**One hop, one transaction.** A dispatch claims the event (sets its dispatch time), locks the edge groups of the
downstream executions in key order, counts each edge that has no outcome yet, judges the groups, and moves the
downstream executions. A satisfied group makes its execution eligible. An impossible group ends its execution as
`skipped`, and that end writes a completion event of its own, the next hop. All of this commits together or not at all
(rule I9): a crash leaves an undispatched event for the reconciler or the next dispatcher, never half a hop.

**Exactly once.** An event is claimed once. An edge is counted once, however often its upstream's events are dispatched,
because counting sets the outcome of the edge. Events whose rows another transaction has locked are skipped.

**Transient errors** (serialization failure, deadlock, lock timeout) are retried three times with growing pauses. After
that the error is raised and the event stays undispatched, for the reconciler.

Any number of events can be dispatched in one transaction, at little more cost than one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.db.sqlfiles import sql

_log = logging.getLogger("pgcoord.dispatch")

TRIES = 4
"""Attempts at one transaction, the first included."""

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.16
"""Seconds between two attempts."""

TRANSIENT = ("40001", "40P01", "55P03")
"""SQLSTATE of serialization_failure, deadlock_detected and lock_not_available."""


class Advanced(NamedTuple):
    """The event was claimed by this call, and `edges` edges were counted for it, 0 if no execution depends on it."""

    edges: int


class NoOp(NamedTuple):
    """The event was not claimed: it has been dispatched, is being dispatched elsewhere, or does not exist."""


def dispatch_completion(conn: Connection[Any], event_id: int) -> Advanced | NoOp:
    """Dispatches one event. Raises psycopg's errors; transient ones after TRIES attempts."""
    counted = dispatch_all(conn, [event_id])
    return Advanced(counted[event_id]) if counted else NoOp()


def dispatch_all(conn: Connection[Any], event_ids: Sequence[int]) -> dict[int, int]:
    """Dispatches events in one transaction; returns the number of edges counted for each event that was claimed.

    Raises psycopg's errors; transient ones after TRIES attempts. No event has been dispatched then.
    """
    backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
    for remaining in reversed(range(TRIES)):
        try:
            # One statement, hence one transaction on an autocommit connection: a retry finds nothing half done.
            return dict(conn.execute(sql("flows", "dispatch"), [list(event_ids)]).fetchall())
        except psycopg.Error as error:
            # Any other error, such as a bad event or a lost connection, would come again.
            if error.sqlstate not in TRANSIENT or not remaining:
                raise
            _log.debug("dispatch is tried again: %s", error.diag.message_primary, extra={"event_ids": list(event_ids)})
        with closing(Wakeup()) as wakeup:
            wakeup.wait(backoff.next_pause())
    raise AssertionError
