"""The status of the leader: its lease, whether the queue of commit requests advances, and waiting for an election.

**Held is not healthy.** A leader may renew its lease and still settle no request, because a lock on the data blocks its
batch or its process is stuck. So the status also looks at the age of the oldest pending request: above
STALLED_SECONDS the leader is unhealthy, and the reason gives the age.

**Waiting** for a leader is woken by the notification of an election or release; the lease row is what counts (rule I7).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NoReturn

from psycopg import Connection

from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.supervisor import Supervisor, retry_until
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.database.session import command_session, open_session
from pgcoord_cli.core.leader.lease import Lease, ask_to_step_down, read_lease
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Fenced, NoLeader, PgcoordError, TimedOut
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.status")

STALLED_SECONDS = 5.0
"""Age of the oldest pending request above which the queue counts as not advancing."""

RUN_HINT = "start a leader with: pgcoord leader run"


def status_document(conn: Connection[Any]) -> dict[str, dict[str, Any]]:
    """Returns lease, queue and health under the keys that scripts count on. Times and ages are the server's.

    `hidden` under `health` is what this role may not see of other sessions, and the right that it lacks, or None.
    """
    lease = read_lease(conn)
    pending, oldest = conn.execute(sql("commits", "queue_state")).fetchone() or (0, None)
    stalled, standbys, hidden = conn.execute(sql("lease", "waits_for_standby")).fetchone() or (None, "", 0)
    reason = _unhealthy_reason(lease, oldest)
    # This explains the other reasons, and is the one that an operator can act on: the leader's commit holds the lease
    # row until the standby has confirmed it, so neither renewals nor other candidates get on (rule I16).
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
        "health": {"healthy": reason is None, "reason": reason, "hidden": _hidden(hidden, standbys)},
    }


def _hidden(sessions: int, standbys: str) -> str | None:
    """Returns what this role may not see, for a message, or None if that cannot change the status."""
    if not sessions or not standbys:
        return None
    return (
        f"what {sessions} sessions of other roles wait for is hidden, so a commit that waits for a synchronous standby "
        f"({standbys}) may be missing here: to see it, this role needs a GRANT of pg_read_all_stats"
    )


def _unhealthy_reason(lease: Lease, oldest_pending_seconds: float | None) -> str | None:
    if not lease.held:
        return "no leader"
    if oldest_pending_seconds is not None and oldest_pending_seconds > STALLED_SECONDS:
        return (
            "the leader renews its lease, but the queue does not advance: "
            f"the oldest commit request has been pending for {oldest_pending_seconds:.0f}s"
        )
    return None


def watch_status(settings: Settings, seconds: float, show: Callable[[dict[str, dict[str, Any]]], None]) -> NoReturn:
    """Passes the status to `show` now, whenever the leader changes, and otherwise every `seconds`, for ever.

    Raises the error of the first session; later trouble is logged and retried (rule I17).
    """
    # writes=True here and below: it writes nothing, but a standby refuses LISTEN, for good.
    open_session(settings, "leader status", writes=True).close()
    with closing(Wakeup()) as wakeup:
        outage = Outage(_log, "the status is unknown", "the status is known")
        supervisor = Supervisor(wakeup, lambda: False, outage=outage)

        def watch() -> str | None:
            try:
                with command_session(settings, "leader status", writes=True) as conn:
                    notifications = listen(conn, [channels.leadership(settings.schema)], wakeup)
                    while True:
                        document = status_document(conn)
                        supervisor.recovered()
                        show(document)
                        notifications.wait(seconds)
            except PgcoordError as error:
                return error.reason

        supervisor.run(watch)
    raise AssertionError("a watch ends by an exception only")


def wait_for_leader(conn: Connection[Any], schema: str, seconds: float, *, after_epoch: int = 0) -> Lease:
    """Waits until a lease later than `after_epoch` is held, and returns it. Raises NoLeader after `seconds`."""
    with closing(Wakeup()) as wakeup:
        notifications = listen(conn, [channels.leadership(schema)], wakeup)
        deadline = time.monotonic() + seconds
        while not (lease := read_lease(conn)).held or lease.epoch <= after_epoch:
            if time.monotonic() >= deadline:
                raise NoLeader(f"no leader was elected within {seconds:g}s", hint=RUN_HINT)
            # No longer than a poll interval, because a notification may be lost (rule I7).
            notifications.wait(min(channels.POLL_SECONDS, deadline - time.monotonic()))
    return lease


def assert_epoch(conn: Connection[Any], epoch: int) -> None:
    """Raises Fenced unless the lease is held and its epoch is `epoch`."""
    lease = read_lease(conn)
    if not (lease.held and lease.epoch == epoch):
        now = f"epoch {lease.epoch} is held by {lease.leader_addr}" if lease.held else "no leader"
        raise Fenced(f"epoch {epoch} does not hold the lease: {now}")


def step_down(conn: Connection[Any], schema: str) -> tuple[int, str]:
    """Asks the leader to step down and returns its epoch and node id. Raises NoLeader if there is none."""
    asked = ask_to_step_down(conn, schema)
    if asked is None:
        raise NoLeader("no leader to step down", hint=RUN_HINT)
    return asked


def await_leader(
    settings: Settings, conn: Connection[Any], command: str, seconds: float, *, after_epoch: int = 0
) -> Lease:
    """Does the same as `wait_for_leader` for a command whose purpose is the wait itself: raises TimedOut.

    `conn` must be of a primary, because a standby refuses LISTEN. When `conn`, a session of `command`, is lost, or a
    statement fails, it is closed and the wait goes on over another.
    """
    deadline = time.monotonic() + seconds
    first = [conn]

    def attempt(recovered: Callable[[], None]) -> Lease:
        session = first.pop() if first else open_session(settings, command, writes=True)
        with mapped_errors(), closing(session):
            read_lease(session)
            recovered()
            return wait_for_leader(session, settings.schema, deadline - time.monotonic(), after_epoch=after_epoch)

    try:
        return retry_until(deadline, attempt, Outage(_log, "the leader is unknown", "connected"), (NoLeader,))
    except NoLeader as error:
        raise TimedOut(f"no leader was elected within {seconds:g}s", hint=error.hint) from None
    except PgcoordError as error:
        raise TimedOut(f"no leader was found within {seconds:g}s: {error.message}", hint=error.hint) from error
