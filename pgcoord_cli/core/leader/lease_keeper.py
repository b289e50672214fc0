"""Standing for election, and renewing the lease of the leader that was elected.

**Candidate.** A dedicated connection waits for a session advisory lock, the leader lock, that the leader holds. The
server grants it the moment the leader's session ends, so a killed leader is replaced at once. A leader that is frozen
or cut off keeps its session, so the wait for the lock lasts no longer than the lease: once the lease has expired by
the server's clock, the candidate terminates the old leader's sessions and takes over. Neither lock nor clock keeps two
leaders from writing: the fence does (`core.leader.lease`).

**Renewal.** The same connection, still holding the lock, then renews the lease from a thread of its own, three times in
a time to live, so that no batch, however long, and no other connection can delay it.

**Trust window.** The leader trusts its lease until one time to live after the moment *before* the last successful
renewal was sent, by its monotonic clock. The server counts the same time to live from when it executed the renewal,
which is later. So however long the network held back the answer, the lease does not expire before the window ends, as
long as both clocks run at the same rate; their readings are never compared (rule I12). Outside the window the leader
starts no batch. The window saves work that the fence would refuse; it is not what keeps two leaders from writing.

**Stepping down.** The resolver, which listens anyway, calls `renew_now` at each notification on the leadership channel,
so that a request to step down takes effect at once: the resolver finishes its batch, the lease is released, and the
candidate that waits for the lock leads next.

**A locked lease row.** A renewal waits for the row of the lease no longer than until the next would be due. A commit
locks the row until it is durable, and where the server replicates synchronously, until a standby has confirmed it. No
session that may be committing is ever terminated (rule I16): while it waits there is no leader. Only a session that
waits for its client, in the middle of a direct commit that was called by hand, is terminated.

**End.** `stop` releases the lease, which wakes the other candidates. When the connection is lost, or a renewal finds
the lease expired or taken, the keeper sets `end_reason` and wakes the resolver.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.advisory_keys import lock_key
from pgcoord_cli.core.database.listener import Listener
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.leader import lease
from pgcoord_cli.core.leader.lease import Renewal, Term
from pgcoord_cli.db.connection import is_connection_lost, translate
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.leader")

RENEWALS_PER_TTL = 3
CANCEL_SECONDS = 2.0
"""Timeout of one cancellation request."""

CANCEL_AGAIN_SECONDS = 0.1
"""Pause between two cancellation requests."""

TERMINATION_SECONDS = 1.0
"""How long to wait for the leader lock of sessions that were terminated."""

STOP_SECONDS = 5.0
"""How long `stop` waits for a statement that waits for a synchronous standby and must not be cancelled."""


class LeaseKeeper(threading.Thread):
    """Stands for election and then renews the lease, on a connection and a thread of its own.

    `term` is set once elected, `end_reason` once the term or the attempt has ended, and `failure` if the attempt ended
    with an error that a retry would meet again. `wakeup` is set with each. `ttl` is in seconds.
    """

    def __init__(self, settings: Settings, node_id: str, ttl: float, wakeup: Wakeup) -> None:
        super().__init__(name="pgcoord-keeper", daemon=True)
        self.term: Term | None = None
        self.end_reason: str | None = None
        self.failure: Exception | None = None
        self._settings = settings
        self._node_id = node_id
        self._ttl = ttl
        self._wakeup = wakeup
        self._stopping = threading.Event()
        self._signal = Wakeup()
        self._resolver_done = threading.Event()
        self._standing = threading.Event()
        self._wait_mutex = threading.Lock()
        self._waits_for_lock = False
        self._trusted_until = 0.0
        self._locked = False
        self._stalled_since: float | None = None
        self._lock_key = lock_key(settings.schema, "election")
        self._release_reason = "released"

    # -- called from the resolver's thread

    @property
    def is_campaigning(self) -> bool:
        """Whether it is connected and stands for election."""
        return self._standing.is_set()

    def is_trusted(self) -> bool:
        """Returns whether the present moment is in the trust window, so that the lease cannot have expired."""
        return self.end_reason is None and time.monotonic() < self._trusted_until

    def renew_now(self) -> None:
        """Wakes the thread to renew at once, which shows whether the lease was taken or a step-down requested."""
        self._signal.set()

    def stop(self, reason: str = "released") -> None:
        """Ends the candidacy or releases the lease; `reason` goes into the history.

        Blocks until the thread has ended, at most about twice STOP_SECONDS: a thread whose statement waits for a
        synchronous standby is left behind.
        """
        self._release_reason = reason
        self._stopping.set()
        self._resolver_done.set()
        self._signal.set()
        deadline = time.monotonic() + STOP_SECONDS
        while self._standing.is_set() and self.is_alive() and time.monotonic() < deadline:
            # A cancellation that arrives before the statement has begun has no effect, so it is repeated.
            self._cancel_wait_for_lock()
            self.join(CANCEL_AGAIN_SECONDS)
        self.join(STOP_SECONDS)
        # A thread that is still alive waits for a standby and uses the signal later; it ends with the process.
        if not self.is_alive():
            self._signal.close()

    def _cancel_wait_for_lock(self) -> None:
        """Cancels the wait for the leader lock, and no other statement."""
        # While the mutex is held the thread cannot leave `_wait_for_lock`. A cancellation that came later would hit the
        # statement after it, a takeover or a release that may be committing (rule I16).
        with self._wait_mutex, suppress(psycopg.Error):
            if self._waits_for_lock:
                self._conn.cancel_safe(timeout=CANCEL_SECONDS)

    # -- the thread

    def run(self) -> None:
        try:
            self._conn = open_session(self._settings, "leader keeper", writes=True)
            try:
                self._stand_for_election()
                self._keep()
            finally:
                self._conn.close()
        except psycopg.Error as error:
            # Before the election, a retry mends a lost connection only. The candidate raises any other error.
            if self.term is None and not is_connection_lost(error):
                self.failure = translate(error)
            self._end(translate(error).message)
        except Exception as error:  # noqa: BLE001 - the candidate's thread raises it
            self.failure = error
            self._end(str(error))

    def _end(self, reason: str) -> None:
        # The first reason counts, but after a step-down the release may still find that the lease was taken.
        if self.end_reason in (None, Renewal.STEP_DOWN):
            self.end_reason = reason
        self._wakeup.set()

    def _stand_for_election(self) -> None:
        self._standing.set()
        self._wakeup.set()
        try:
            while self.term is None and not self._stopping.is_set():
                # No longer than the lease is valid: a frozen leader keeps the lock, but its lease expires.
                self._locked = self._wait_for_lock(lease.read_lease(self._conn).expires_in_seconds)
                if not self._stopping.is_set():
                    self._take_over()
        finally:
            self._standing.clear()

    def _wait_for_lock(self, seconds: float) -> bool:
        """Waits for the leader lock. Returns False after `seconds` or a cancellation, True with the lock held."""
        set_lock_timeout(self._conn, seconds)
        self._mark_waiting(True)
        try:
            self._conn.execute(sql("lease", "wait_for_leader_lock"), [self._lock_key])
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
            return False
        finally:
            self._mark_waiting(False)
        return True

    def _mark_waiting(self, waits: bool) -> None:
        with self._wait_mutex:
            self._waits_for_lock = waits

    def _take_over(self) -> None:
        """Takes the lease over and sets `term`; leaves it None where the lease is held or its row stays locked."""
        if not self._locked:
            present = lease.read_lease(self._conn)
            if present.held:
                return
            self._end_sessions_of(present.term_id)
        set_lock_timeout(self._conn, self._ttl)
        sent_at = time.monotonic()  # before the statement is sent: the trust window begins here
        try:
            term = lease.take_over(self._conn, self._settings.schema, self._node_id, self._ttl, lock_held=self._locked)
        except psycopg.errors.LockNotAvailable:
            self._on_locked_lease("the lease cannot be taken over")
            return  # `term` is None, so the candidate goes on standing
        self._on_unlocked_lease()
        if term:
            self._trusted_until = sent_at + self._ttl
            self.term = term
            self._wakeup.set()
            mark_leader_session(self._conn, self._settings.schema, term.term_id)

    def _end_sessions_of(self, term_id: UUID | None) -> None:
        """Terminates the sessions of a leader that is frozen or cut off, so that their locks are released."""
        if term_id is None:
            return
        # Without pg_signal_backend this candidate takes over all the same; the old leader's locks remain until it ends.
        with suppress(psycopg.errors.InsufficientPrivilege):
            # Found by the lock that a leader's sessions share, not by the leader lock: another candidate may have
            # got that one first. The key names the expired term, so that a leader that is elected at this moment is
            # not taken for it. Only sessions that wait for their client: any other may be committing (rule I16).
            key = session_key(self._settings.schema, term_id)
            if ended := self._conn.execute(sql("lease", "terminate_idle_leader_sessions"), [key]).fetchall():
                what = f"terminated {len(ended)} sessions of the leader whose lease had expired"
                _log.warning("%s: %s", self._node_id, what, extra={"node": self._node_id})
                self._locked = self._wait_for_lock(TERMINATION_SECONDS)

    def _keep(self) -> None:
        """Renews until the term ends or `stop` is called, which releases the lease."""
        if self.term is None:
            return
        # A renewal that waits for the row longer than this would be late for the next one.
        set_lock_timeout(self._conn, self._ttl / RENEWALS_PER_TTL)
        listener = Listener(self._conn, self._signal)  # also wakes when the connection ends
        while not self._stopping.is_set():
            if not self._renew(self.term):
                return
            listener.wait(self._ttl / RENEWALS_PER_TTL)
        self._release(self.term, self._release_reason)

    def _renew(self, term: Term) -> bool:
        """Renews the lease. Returns False if the term has ended, also by a step-down, after releasing the lease."""
        sent_at = time.monotonic()  # before the renewal is sent: the trust window begins here
        try:
            found = lease.renew(self._conn, term, self._ttl, lock_held=self._locked)
        except psycopg.errors.LockNotAvailable:
            if self._on_locked_lease("the lease cannot be renewed"):
                return self._renew(term)
            # The row may be locked by a commit that waits for a standby. Whether the lease has expired shows when the
            # row is free; the trust window is not extended, so this leader starts no batch after its end.
            return True
        self._on_unlocked_lease()
        if found == Renewal.TERM_ENDED:
            self._end(self._superseded())
        elif found == Renewal.STEP_DOWN:
            fields = {"node": self._node_id, "epoch": term.epoch}
            _log.info("%s: asked to step down from epoch %d", self._node_id, term.epoch, extra=fields)
            self._end(found)
            # The batch in hand is finished first. Without an answer in a time to live the lease expires anyway.
            self._resolver_done.wait(self._ttl)
            self._release(term, found)
        else:
            self._trusted_until = sent_at + self._ttl
            # Without the leader lock, candidates would notice the end of this leader only by the lease's expiry.
            self._locked = self._locked or self._try_lock()
        return found == Renewal.RENEWED

    def _on_locked_lease(self, what: str) -> bool:
        """Terminates sessions that are idle in a direct commit; returns True if there was one.

        Otherwise logs once, with `what`, which sessions hold the row locked, and returns False.
        """
        with suppress(psycopg.errors.InsufficientPrivilege):
            if self._conn.execute(sql("lease", "terminate_idle_direct_commits")).fetchall():
                what = "terminated a session that was idle in a direct commit and held the lease row locked"
                _log.warning("%s: %s", self._node_id, what, extra={"node": self._node_id})
                return True
        if self._stalled_since is None:
            self._stalled_since = time.monotonic()
            holders = lease.describe_holders(self._conn)
            _log.warning("%s: %s: its row is locked by %s", self._node_id, what, holders, extra={"node": self._node_id})
        return False

    def _on_unlocked_lease(self) -> None:
        if self._stalled_since is not None:
            seconds = time.monotonic() - self._stalled_since
            fields = {"node": self._node_id, "seconds": round(seconds, 3)}
            _log.info("%s: the lease row is free again, after %.0fs", self._node_id, seconds, extra=fields)
            self._stalled_since = None

    def _release(self, term: Term, reason: str) -> None:
        released = lease.release(self._conn, self._settings.schema, term, reason)
        self._end(reason if released else self._superseded())

    def _superseded(self) -> str:
        return f"superseded by {lease.describe_successor(self._conn)}"

    def _try_lock(self) -> bool:
        """Takes the leader lock if it is free; returns whether this session holds it now."""
        row = self._conn.execute(sql("lease", "try_leader_lock"), [self._lock_key]).fetchone()
        return bool(row and row[0])


def set_lock_timeout(conn: Connection[Any], seconds: float) -> None:
    """Sets the timeout for every wait for a lock in this session."""
    # At least a millisecond, because 0 would mean no timeout; and rounded up, so that a lease has expired by then.
    conn.execute("SELECT set_config('lock_timeout', $1, false)", [str(max(1, round(seconds * 1000) + 1))])


def session_key(schema: str, term_id: UUID) -> int:
    """The advisory lock key that every session of a term's leader holds in shared mode."""
    return lock_key(schema, f"leader session {term_id}")


def mark_leader_session(conn: Connection[Any], schema: str, term_id: UUID) -> None:
    """Marks a session as one of a term's leader, so that a successor finds it, should it stay with a lock."""
    conn.execute(sql("lease", "share_session_lock"), [session_key(schema, term_id)])
