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

SHORT_LOCK_TIMEOUT = "50ms"
"""For an event of a transaction that has already failed: the others shall not wait for the locks on its rows."""

EVENT_FAULT_CLASSES = {
    "09": "triggered_action_exception: a trigger fails on the rows that the event changes",
    "21": "cardinality_violation: a query of a trigger finds several rows for one of the event's",
    "22": "data_exception: a value of the event, its edges or its policy cannot be computed with",
    "23": "integrity_constraint_violation: a constraint refuses what the event would change",
    "27": "triggered_data_change_violation: a trigger changes the rows that the event changes",
    "44": "with_check_option_violation: a view refuses what the event would change",
    "54": "program_limit_exceeded: a row or an index entry of the event is too large",
    "P0": "plpgsql_error: a trigger raises an error for the rows that the event changes",
}
"""The classes of SQLSTATE that belong to the event: the same dispatch fails again, whatever the server's state is.

Only these count as failed attempts. All others belong to the server, the session or the role, and pass without a change
of the event: 08, 57 and 58 (connection, cancellation, operating system), 25 (read-only), 40 and 55P03 (conflicts and
locks), 42 and 3F (a right or a table that is missing), 53 (resources), XX (internal errors).
"""

OWN_ROWS = ("40", "55", "57", "XX")
"""Classes of trouble that may concern the rows of one event only: a lock on them, or a statement that takes too long.

The connection is not lost: `is_connection_lost` finds the others of class 57.
"""


def belongs_to_event(error: psycopg.Error) -> bool:
    """Whether a dispatch failed because of the event itself, so that only a change of the data or a trigger helps."""
    return (error.sqlstate or "")[:2] in EVENT_FAULT_CLASSES


def may_concern_one_event(error: psycopg.Error) -> bool:
    """Whether other events may be dispatched although this error, which does not belong to the event, has occurred."""
    return (error.sqlstate or "")[:2] in OWN_ROWS


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


def dispatch_unless_locked(conn: Connection[Any], event_id: int) -> bool:
    """Dispatches one event, with SHORT_LOCK_TIMEOUT; returns whether it was claimed. Raises psycopg's errors."""
    with conn.transaction():
        conn.execute(f"SET LOCAL lock_timeout = '{SHORT_LOCK_TIMEOUT}'")
        return bool(conn.execute(sql("flows", "dispatch"), [[event_id]]).fetchall())
