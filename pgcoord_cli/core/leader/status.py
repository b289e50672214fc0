"""What there is to know about the leader: who leads, whether the work advances, and waiting for one.

**Held is not healthy.** A leader that renews its lease may still not drain the queue, because a lock on the data is in
its way, or its own process is stuck. So the status also looks at the oldest pending request: when that has waited
longer than anybody should, the leader is unhealthy, and the reason says since when.

**Waiting** is driven by the notification that every election sends; the lease row is the truth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from psycopg import Connection

from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.leader.lease import Lease, ask_to_step_down, read_lease
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Fenced, NoLeader, TimedOut

STALLED_SECONDS = 5.0
"""A request that waited longer than this shows that the leader's work does not advance."""

RUN_HINT = "start a leader with: pgcoord leader run"


def status_document(conn: Connection[Any]) -> dict[str, dict[str, Any]]:
    """Who leads and how long the queue is, under the keys that scripts count on. Times are the server's."""
    lease = read_lease(conn)
    pending, oldest = conn.execute(sql("commits", "queue_state")).fetchone() or (0, None)
    stalled, standbys = conn.execute(sql("lease", "waits_for_standby")).fetchone() or (None, "")
    reason = _ailment(lease, oldest)
    if stalled is not None:
        reason = (
            f"a commit has waited {stalled:.0f}s for a synchronous standby ({standbys}); until then no leader can write"
        )
    return {
        "leader": {
            "held": lease.held,
            "leader_addr": lease.leader_addr,
            "epoch": lease.epoch,
            "durable_version": lease.durable_version,
            "acquired_at": lease.acquired_at,
            "renewed_at": lease.renewed_at,
            "expires_at": lease.expires_at,
            "expires_in_seconds": lease.expires_in_seconds,
        },
        "queue": {"pending": pending, "oldest_pending_seconds": oldest},
        "health": {"healthy": reason is None, "reason": reason},
    }


def _ailment(lease: Lease, oldest_pending_seconds: float | None) -> str | None:
    if not lease.held:
        return "nobody leads"
    if oldest_pending_seconds is not None and oldest_pending_seconds > STALLED_SECONDS:
        return f"the lease is renewed, but a request has been pending for {oldest_pending_seconds:.0f}s"
    return None


def watch_status(conn: Connection[Any], schema: str, seconds: float) -> Iterator[dict[str, dict[str, Any]]]:
    """The status now, at every change of leadership, and otherwise once in `seconds`. Never ends by itself."""
    notifications = listen(conn, [channels.leadership(schema)], Wakeup())
    while True:
        yield status_document(conn)
        notifications.wait(seconds)


def wait_for_leader(conn: Connection[Any], schema: str, seconds: float, *, after_epoch: int = 0) -> Lease:
    """The lease once somebody holds one later than `after_epoch`; wakes at the election. NoLeader after `seconds`."""
    with closing(Wakeup()) as wakeup:
        notifications = listen(conn, [channels.leadership(schema)], wakeup)
        deadline = time.monotonic() + seconds
        while not (lease := read_lease(conn)).held or lease.epoch <= after_epoch:
            if time.monotonic() >= deadline:
                raise NoLeader(
                    f"nobody leads, and nobody was elected within {seconds:g}s",
                    hint=RUN_HINT,
                )
            notifications.wait(min(channels.POLL_SECONDS, deadline - time.monotonic()))
    return lease


def assert_epoch(conn: Connection[Any], epoch: int) -> None:
    """Fenced unless the lease is held in just this epoch."""
    lease = read_lease(conn)
    if not (lease.held and lease.epoch == epoch):
        now = f"epoch {lease.epoch} is held by {lease.leader_addr}" if lease.held else "nobody leads"
        raise Fenced(f"epoch {epoch} does not lead: {now}")


def step_down(conn: Connection[Any], schema: str) -> tuple[int, str]:
    """Asks the leader to step down; its epoch and node id. NoLeader when there is none."""
    asked = ask_to_step_down(conn, schema)
    if asked is None:
        raise NoLeader("nobody leads, so nobody can step down", hint=RUN_HINT)
    return asked


def await_leader(conn: Connection[Any], schema: str, seconds: float, *, after_epoch: int = 0) -> Lease:
    """`wait_for_leader`, for commands whose whole purpose is the wait: TimedOut instead of NoLeader."""
    try:
        return wait_for_leader(conn, schema, seconds, after_epoch=after_epoch)
    except NoLeader as error:
        raise TimedOut(error.message, hint=error.hint) from None
