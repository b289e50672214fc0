"""Standing for election, and keeping what was won.

**Candidate.** A dedicated connection asks for a session advisory lock that a living leader holds. The server grants
it the moment the leader's session ends, so a killed leader is replaced at once. A leader that is frozen or cut off
keeps its session, so the wait for the lock lasts no longer than the lease: when the lease has run out by the
server's clock, the candidate ends the sessions of the old leader and takes over. Neither lock nor clock is what keeps
two leaders from writing: the fence is (`core.leader.lease`).

**Keeper.** The same connection, still holding the lock, then renews the lease from a thread of its own, three times in
a time to live, so that no batch, however long, and no other connection can starve it. *Trust* ends one time to live
after the moment **before** the last successful renewal was sent: whatever the network did with the answer, the server
had not let the lease run out by then. A leader without trust starts nothing more.

The resolver, which listens anyway, passes on what the leadership channel says (`look`), so that a request to step down
is seen at once: the resolver finishes its batch, the lease is released, and whoever waits for the lock leads next.

A renewal waits no longer for the row of the lease than until the next would be due. A commit locks the row until it is
durable, and where the server replicates synchronously, until a standby has confirmed it. No session that may be
committing is ever terminated (rule I16): while such a wait lasts nobody leads. Only a session that waits for its
client, in the middle of a direct commit made by hand, is ended.

**End.** `stop` releases the lease and with it wakes the standbys. When the connection is lost, or a renewal finds
the lease run out or taken, the keeper says so through `over` and wakes the resolver.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

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
CANCEL_AGAIN_SECONDS = 0.1
TERMINATION_SECONDS = 1.0
"""How long a terminated session may take to release its locks."""

STOP_SECONDS = 5.0
"""How long `stop` waits for a statement that waits for a synchronous standby; it must not be cancelled."""


class LeaseKeeper(threading.Thread):
    """Stands for election and then holds the lease, on a connection and thread of its own.

    `wakeup` is set when `term` is won, and again when it is `over`. `ttl` is in seconds.
    """

    def __init__(self, settings: Settings, node_id: str, ttl: float, wakeup: Wakeup) -> None:
        super().__init__(name="pgcoord-keeper", daemon=True)
        self.term: Term | None = None
        self.over: str | None = None
        self.failure: Exception | None = None
        self._settings = settings
        self._node_id = node_id
        self._ttl = ttl
        self._wakeup = wakeup
        self._stopping = threading.Event()
        self._signal = Wakeup()
        self._resolver_done = threading.Event()
        self._campaigning = threading.Event()
        self._wait_mutex = threading.Lock()
        self._waits_for_lock = False
        self._trusted_until = 0.0
        self._locked = False
        self._stalled_since: float | None = None
        self._lock_key = lock_key(settings.schema, "election")
        self._release_reason = "released"

    # -- for the resolver's thread

    def is_trusted(self) -> bool:
        """Whether the server cannot have let the lease run out yet."""
        return self.over is None and time.monotonic() < self._trusted_until

    def look(self) -> None:
        """Has the lease renewed now, because something may have happened to it."""
        self._signal.set()

    def stop(self, reason: str = "released") -> None:
        """Gives up candidacy or lease, and waits until that is done. `reason` goes into the history."""
        self._release_reason = reason
        self._stopping.set()
        self._resolver_done.set()
        self._signal.set()
        give_up_at = time.monotonic() + STOP_SECONDS
        while self._campaigning.is_set() and self.is_alive() and time.monotonic() < give_up_at:
            # A cancellation can arrive before the statement it is meant for, so it is sent until it is heeded.
            self._cancel_wait_for_lock()
            self.join(CANCEL_AGAIN_SECONDS)
        self.join(STOP_SECONDS)
        # Otherwise the thread waits for a standby: it is abandoned, and ends with the process, which closes its socket.
        if not self.is_alive():
            self._signal.close()

    def _cancel_wait_for_lock(self) -> None:
        """Cancels the wait for the election lock, and nothing else.

        While the mutex is held the thread cannot go on to its next statement, so that the cancellation does not hit
        the taking over or the release of a lease won in the same moment.
        """
        with self._wait_mutex, suppress(psycopg.Error):
            if self._waits_for_lock:
                self._conn.cancel_safe(timeout=CANCEL_SECONDS)

    # -- the thread

    def run(self) -> None:
        try:
            self._conn = open_session(self._settings, "leader keeper", writes=True)
            try:
                self._campaign()
                self._keep()
            finally:
                self._conn.close()
        except psycopg.Error as error:
            # Before the election, anything but a lost connection would come again: whoever asked has to hear of it.
            if self.term is None and not is_connection_lost(error):
                self.failure = translate(error)
            self._end(translate(error).message)
        except Exception as error:  # noqa: BLE001 - it is raised again in the thread that asked
            self.failure = error
            self._end(str(error))

    def _end(self, why: str) -> None:
        if self.over in (None, Renewal.STEP_DOWN):
            self.over = why
        self._wakeup.set()

    def _campaign(self) -> None:
        self._campaigning.set()
        try:
            while self.term is None and not self._stopping.is_set():
                self._locked = self._wait_for_lock(lease.read_lease(self._conn).expires_in_seconds)
                if not self._stopping.is_set():
                    self._take_over()
        finally:
            self._campaigning.clear()

    def _wait_for_lock(self, seconds: float) -> bool:
        """True when the lock is ours; False when that took too long or was cancelled."""
        set_lock_timeout(self._conn, seconds)
        self._mark_waiting(True)
        try:
            self._conn.execute(sql("lease", "wait_for_election_lock"), [self._lock_key])
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
            return False
        finally:
            self._mark_waiting(False)
        return True

    def _mark_waiting(self, waits: bool) -> None:
        with self._wait_mutex:
            self._waits_for_lock = waits

    def _take_over(self) -> None:
        if not self._locked:
            if lease.read_lease(self._conn).held:
                return
            self._end_old_sessions()
        set_lock_timeout(self._conn, self._ttl)
        sent_at = time.monotonic()
        try:
            term = lease.take_over(self._conn, self._settings.schema, self._node_id, self._ttl, lock_held=self._locked)
        except psycopg.errors.LockNotAvailable:
            self._on_locked_lease("the lease cannot be taken over")
            return  # the campaign goes on
        self._on_unlocked_lease()
        if term:
            self._trusted_until = sent_at + self._ttl
            self.term = term
            self._wakeup.set()
            mark_leader_session(self._conn, self._settings.schema)

    def _end_old_sessions(self) -> None:
        """Ends the sessions of a leader that is frozen or cut off, so that none of its locks remains.

        Only sessions that wait for their client: any other may be committing, and waiting for a standby (rule I16).
        Not the holder of the election lock, which may be another candidate that was faster.
        """
        with suppress(psycopg.errors.InsufficientPrivilege):
            key = session_key(self._settings.schema)
            if self._conn.execute(sql("lease", "terminate_idle_leader_sessions"), [key]).fetchall():
                self._locked = self._wait_for_lock(TERMINATION_SECONDS)

    def _keep(self) -> None:
        if self.term is None:
            return
        set_lock_timeout(self._conn, self._ttl / RENEWALS_PER_TTL)
        listener = Listener(self._conn, self._signal)  # also wakes when the connection ends
        while not self._stopping.is_set():
            if not self._renew(self.term):
                return
            listener.wait(self._ttl / RENEWALS_PER_TTL)
        self._release(self.term, self._release_reason)

    def _renew(self, term: Term) -> bool:
        """Renews; False when the leadership is over, be it that another took it or that it was asked to step down."""
        sent_at = time.monotonic()
        try:
            found = lease.renew(self._conn, term, self._ttl)
        except psycopg.errors.LockNotAvailable:
            if self._on_locked_lease("the lease cannot be renewed"):
                return self._renew(term)
            # A commit that waits for a standby keeps the row. Whether the lease still stands shows once it is free;
            # until then this leader starts nothing, since its trust runs out.
            return True
        self._on_unlocked_lease()
        if found == Renewal.OVER:
            self._end(self._superseded())
        elif found == Renewal.STEP_DOWN:
            self._end(found)
            self._resolver_done.wait(self._ttl)
            self._release(term, found)
        else:
            self._trusted_until = sent_at + self._ttl
            self._locked = self._locked or self._try_lock()
        return found == Renewal.RENEWED

    def _on_locked_lease(self, what: str) -> bool:
        """Ends direct commits that were left open by hand; True if there was one.

        Otherwise logs, once, which sessions keep the row locked.
        """
        with suppress(psycopg.errors.InsufficientPrivilege):
            if self._conn.execute(sql("lease", "terminate_idle_direct_commits")).fetchall():
                return True
        if self._stalled_since is None:
            self._stalled_since = time.monotonic()
            _log.warning("%s: its row is locked by %s", what, lease.describe_holders(self._conn))
        return False

    def _on_unlocked_lease(self) -> None:
        if self._stalled_since is not None:
            _log.info("the lease row is free again after %.0f s", time.monotonic() - self._stalled_since)
            self._stalled_since = None

    def _release(self, term: Term, reason: str) -> None:
        released = lease.release(self._conn, self._settings.schema, term, reason)
        self._end(reason if released else self._superseded())

    def _superseded(self) -> str:
        return f"superseded by {lease.successor(self._conn)}"

    def _try_lock(self) -> bool:
        """Takes the election lock where it could not be had at the election, so that standbys wait for it again."""
        row = self._conn.execute(sql("lease", "try_election_lock"), [self._lock_key]).fetchone()
        return bool(row and row[0])


def set_lock_timeout(conn: Connection[Any], seconds: float) -> None:
    """Bounds every wait for a lock in this session; at least a millisecond, since 0 means for ever."""
    conn.execute("SELECT set_config('lock_timeout', $1, false)", [str(max(1, round(seconds * 1000) + 1))])


def session_key(schema: str) -> int:
    """Key of the lock that every session of a leader shares, so that a successor finds them."""
    return lock_key(schema, "leader session")


def mark_leader_session(conn: Connection[Any], schema: str) -> None:
    """Marks a session as a leader's; a successor ends it should it be stuck with a lock."""
    conn.execute(sql("lease", "share_session_lock"), [session_key(schema)])
