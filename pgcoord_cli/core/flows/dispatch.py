"""Dispatch: carrying a completion to the executions that wait for it.

**One hop, one transaction.** Claim the event (it gets its dispatch time), lock the edge groups below it in the order of
their keys, count each edge that has no outcome yet, judge the groups, and move the executions below: a satisfied group
makes its execution eligible; an impossible one ends it as `skipped`, and that end writes its own completion event, the
next hop. All of it commits together or not at all (rule I9), so that a crash at any moment leaves an event that
nobody has dispatched, for the reconciler or the next follower, and never half a hop.

**Exactly once.** An event is claimed once; an edge is counted once, whoever dispatches what how often, since counting
fills its outcome. Events that somebody else is dispatching at this moment are left to them.

**Trouble that passes** (serialisation, deadlock, lock timeout) is tried again three times, after pauses that grow; then
the event is left where it is, for the reconciler.

Any number of events can take their hop in one transaction together; it costs little more than one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.db.sqlfiles import sql

TRIES = 4
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.16
TRANSIENT = ("40001", "40P01", "55P03")
"""Serialization failure, deadlock, lock not available."""


class Advanced(NamedTuple):
    """The event was claimed, and this many edges were counted for it; 0 for one that nobody waits for."""

    edges: int


class NoOp(NamedTuple):
    """There was nothing to do: the event has been dispatched, is being dispatched, or does not exist."""


def dispatch_completion(conn: Connection[Any], event_id: int) -> Advanced | NoOp:
    """Carries one event a hop further. Raises psycopg's errors; the transient ones after three more tries."""
    counted = dispatch_all(conn, [event_id])
    return Advanced(counted[event_id]) if counted else NoOp()


def dispatch_all(conn: Connection[Any], event_ids: Sequence[int]) -> dict[int, int]:
    """Carries events a hop further in one transaction: for each that was claimed, how many edges were counted."""
    backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
    for remaining in reversed(range(TRIES)):
        try:
            return dict(conn.execute(sql("flows", "dispatch"), [list(event_ids)]).fetchall())
        except psycopg.Error as error:
            if error.sqlstate not in TRANSIENT or not remaining:
                raise
        with closing(Wakeup()) as wakeup:
            wakeup.wait(backoff.next_pause())
    raise AssertionError
