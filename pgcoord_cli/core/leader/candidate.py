"""One `pgcoord leader run`: stands for election, resolves commit requests while it leads, and stands again.

A term ends when the lease expires, another candidate takes it or a connection is lost. The candidate reports that and
stands for election again with a new keeper, resolver and connections, keeping nothing of the term. It ends when
it is stopped: it finishes the batch in hand and releases the lease.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.supervisor import Supervisor
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.database.session import command_session, open_session
from pgcoord_cli.core.leader import lease
from pgcoord_cli.core.leader.lease import Renewal, Term, describe_successor, read_lease
from pgcoord_cli.core.leader.lease_keeper import RENEWALS_PER_TTL, LeaseKeeper, mark_leader_session
from pgcoord_cli.core.leader.resolver import Resolver
from pgcoord_cli.db.connection import translate
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, Fenced, PgcoordError
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.candidate")

STOP_SECONDS = 5.0
"""How long `stop` waits for the batch in hand."""


class CandidateEvent(NamedTuple):
    """A change in the state of a candidate; `epoch` is that of the term that begins or ends.

    `event` is candidate (waits for the leader lock), elected, fenced (another leader has superseded this one), lost
    (the lease or a connection), released (on purpose), or unreachable (an attempt failed and is retried).
    """

    event: str
    node_id: str
    epoch: int | None
    detail: str


OnCandidateEvent = Callable[[CandidateEvent], None]

WAITING = "waiting for the leader lock"


def default_node_id() -> str:
    """Returns `host:pid`, which is unique among the candidates of a network."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Candidate:
    """One candidate. `run` blocks; `stop` may be called from a signal handler or another thread.

    `ttl` is the lease's time to live in seconds. `on_event` is called in the thread of `run`.
    """

    def __init__(self, settings: Settings, node_id: str, ttl: float, on_event: OnCandidateEvent) -> None:
        self._settings = settings
        self._node_id = node_id
        self._ttl = ttl
        self._on_event = on_event
        self._wakeup = Wakeup()
        self._abandon = Wakeup()
        self._stopping = False
        outage = Outage(_log, f"{node_id}: unreachable", f"{node_id}: candidate: {WAITING}", node=node_id)
        self._supervisor = Supervisor(
            self._wakeup, lambda: self._stopping, self._on_trouble, self._on_recovery, outage
        )  # fmt: skip

    def stop(self) -> None:
        """Asks `run` to finish the batch in hand, release the lease and return."""
        self._stopping = True
        self._wakeup.set()
        # A batch that waits for a synchronous standby may never end, and must not be cancelled (rule I16): the resolver
        # then closes its connection and leaves the commit to the server.
        timer = threading.Timer(STOP_SECONDS, self._abandon.set)
        timer.daemon = True
        timer.start()

    def run(self) -> None:
        """Stands for election and leads, again and again, until stopped.

        Raises PgcoordError when its first session is refused: an unsuitable server, a missing schema, no connection.
        """
        # The first session is only a check, so that its error ends the command instead of being retried (rule I17).
        open_session(self._settings, "leader run", writes=True).close()
        self._supervisor.run(self._attempt)

    def _attempt(self) -> str | None:
        """Serves one term; returns the trouble that ended it early, "" if that has been reported."""
        if not self._supervisor.is_in_trouble:
            self._on_event(CandidateEvent("candidate", self._node_id, None, WAITING))
        try:
            return "" if self._serve_one_term() else None
        except PgcoordError as error:
            return error.reason

    def _on_trouble(self, trouble: str) -> None:
        self._on_event(CandidateEvent("unreachable", self._node_id, None, trouble))

    def _on_recovery(self, attempts: int, seconds: float) -> None:
        detail = f"{WAITING}, after {attempts} attempts in {seconds:.0f}s"
        self._on_event(CandidateEvent("candidate", self._node_id, None, detail))

    def _serve_one_term(self) -> bool:
        """Waits to be elected, leads until the term ends, and reports how; returns True if an error ended it.

        Raises PgcoordError before an election.
        """
        keeper = LeaseKeeper(self._settings, self._node_id, self._ttl, self._wakeup)
        keeper.start()
        failure: tuple[str, str] | None = None
        try:
            term = self._await_election(keeper)
            if term:
                self._report("elected", term.epoch, f"durable version {term.durable_version}")
                failure = self._lead(keeper, term)
        finally:
            keeper.stop("failed" if failure else "released")
        if term:
            self._report_end(term, *(failure or _event_of(keeper.end_reason or "")))
        return failure is not None

    def _await_election(self, keeper: LeaseKeeper) -> Term | None:
        """Waits for the keeper to be elected and returns the term; None when stopped. Raises the keeper's error."""
        is_over = is_campaigning = False
        while not is_over:
            is_over = self._stopping or keeper.term is not None or keeper.end_reason is not None
            if not is_campaigning and (keeper.is_campaigning or keeper.term):
                is_campaigning = True
                self._log_campaign()
            if not is_over:
                self._wakeup.wait(channels.POLL_SECONDS)
        if isinstance(keeper.failure, PgcoordError):
            raise keeper.failure
        if keeper.end_reason and keeper.term is None:
            raise ConnectionFailed(keeper.end_reason)
        return keeper.term

    def _lead(self, keeper: LeaseKeeper, term: Term) -> tuple[str, str] | None:
        """Resolves until stopped or until the term ends. Returns event and detail if an error ended it first."""
        try:
            with closing(open_session(self._unlimited_settings(), "leader run", writes=True)) as conn:
                mark_leader_session(conn, self._settings.schema, term.term_id)
                # With several hosts in the DSN, this connection may have reached another server than the keeper's.
                lease.require_elected_here(conn, term)
                conn.execute(sql("lease", "make_commits_durable"))
                conn.execute(sql("session", "plan_once"))
                conn.prepare_threshold = 0
                self._resolve(conn, keeper, term)
        except Fenced as error:
            return "fenced", error.message
        except PgcoordError as error:
            return "lost", error.message
        except psycopg.Error as error:
            return "lost", translate(error).message
        return None

    def _report_end(self, term: Term, event: str, detail: str) -> None:
        """Reports how a term ended."""
        # A successor terminates the sessions of the leader that it fences, so a lost connection may mean a fence.
        if event == "lost":
            with suppress(PgcoordError), command_session(self._settings, "leader run", writes=False) as conn:
                if read_lease(conn).epoch > term.epoch:
                    event, detail = "fenced", f"superseded by {describe_successor(conn)}; {detail}"
        self._report(event, term.epoch, detail)

    def _unlimited_settings(self) -> Settings:
        """Returns the settings without timeouts for statements and locks."""
        # A long batch delays no renewal, which has its own connection, and the fence is checked at its end.
        return replace(self._settings, statement_timeout=0, lock_timeout=0)

    def _resolve(self, conn: Connection[Any], keeper: LeaseKeeper, term: Term) -> None:
        """Resolves batches until stopped or until the term ends. Raises Fenced, ConnectionFailed, psycopg.Error."""
        commits, leadership = channels.commits(self._settings.schema), channels.leadership(self._settings.schema)
        notifications = listen(conn, (commits, leadership), self._wakeup)
        resolver = Resolver(conn, term, self._abandon.fileno())
        distrust = self._distrust(term)
        while not self._stopping and keeper.end_reason is None:
            # The keeper sets the wake-up when the term ends, so that this wait ends too.
            notified = notifications.wait(0 if resolver.has_more else channels.POLL_SECONDS)
            if leadership in notified:
                keeper.renew_now()  # the lease was taken, or a step-down requested
            if keeper.is_trusted():
                distrust.ended()
                resolver.resolve_batch(expected=commits in notified)
            elif keeper.end_reason is None:
                # Outside the trust window: this process was frozen, or renewals are delayed. No batch is started
                # until the keeper has renewed the lease or has found that the term has ended.
                distrust.failed("the lease was not renewed in time")
                self._wakeup.wait(self._ttl / RENEWALS_PER_TTL)

    def _distrust(self, term: Term) -> Outage:
        """Returns what logs that this leader is outside its trust window."""
        node = self._node_id
        return Outage(_log, f"{node}: no batch is started", f"{node}: batches are started", node=node, epoch=term.epoch)

    def _log_campaign(self) -> None:
        """Logs that this node is a candidate, once it is connected: as the end of an outage if there was one."""
        if not self._supervisor.is_in_trouble:
            self._log_event("candidate", None, WAITING)
        self._supervisor.recovered()

    def _report(self, event: str, epoch: int | None, detail: str) -> None:
        self._log_event(event, epoch, detail)
        self._on_event(CandidateEvent(event, self._node_id, epoch, detail))

    def _log_event(self, event: str, epoch: int | None, detail: str) -> None:
        in_epoch = "" if epoch is None else f" epoch {epoch}"
        level = logging.WARNING if event in ("fenced", "lost") else logging.INFO
        fields = {"event": event, "node": self._node_id, "epoch": epoch}
        _log.log(level, "%s: %s%s: %s", self._node_id, event, in_epoch, detail, extra=fields)


def _event_of(end_reason: str) -> tuple[str, str]:
    """Returns the event and detail with which the end of a term is reported, from the keeper's `end_reason`."""
    if end_reason in ("released", Renewal.STEP_DOWN):
        return "released", end_reason
    return ("fenced" if end_reason.startswith("superseded") else "lost"), end_reason
