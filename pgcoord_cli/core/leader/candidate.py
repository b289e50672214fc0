"""The life of one `pgcoord leader run`: stand for election, resolve while the lease is trusted, and when that is
over, because the lease ran out, another took it or a connection broke, say so and stand again with nothing kept
from before. It ends when it is told to stop, finishing the batch in hand and releasing the lease.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.database.session import command_session, open_session
from pgcoord_cli.core.leader import lease
from pgcoord_cli.core.leader.lease import Renewal, Term, read_lease, successor
from pgcoord_cli.core.leader.lease_keeper import RENEWALS_PER_TTL, LeaseKeeper, mark_leader_session
from pgcoord_cli.core.leader.resolver import Resolver
from pgcoord_cli.db.connection import translate
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, Fenced, PgcoordError
from pgcoord_cli.settings import Settings

RECONNECT_SECONDS = 1.0

STOP_SECONDS = 5.0
"""How long a stop waits for the batch in flight."""


class CandidateEvent(NamedTuple):
    """Something that happened to this candidate: standing, elected, fenced, lost, released, unreachable."""

    event: str
    node_id: str
    epoch: int | None
    detail: str


Report = Callable[[CandidateEvent], None]


def default_node_id() -> str:
    """Host and process id: unique among the candidates of a network, and of use to whoever reads it."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Candidate:
    """One candidate. `run` blocks; `stop` may be called from a signal handler or another thread."""

    def __init__(self, settings: Settings, node_id: str, ttl: float, report: Report) -> None:
        self._settings = settings
        self._node_id = node_id
        self._ttl = ttl
        self._report = report
        self._wakeup = Wakeup()
        self._abandon = Wakeup()
        self._stopping = False

    def stop(self) -> None:
        """Asks `run` to finish the batch in hand, release the lease and return."""
        self._stopping = True
        self._wakeup.set()
        # A commit that waits for a synchronous standby may last for ever, and is not cancelled (rule I16).
        timer = threading.Timer(STOP_SECONDS, self._abandon.set)
        timer.daemon = True
        timer.start()

    def run(self) -> None:
        """Stands for election and leads until stopped. Raises PgcoordError where standing makes no sense."""
        open_session(self._settings, "leader run", writes=True).close()  # says at once what is wrong with the server
        trouble: str | None = None
        while not self._stopping:
            if trouble is None:
                self._say("standing", None, "waiting to be elected")
            last_trouble, trouble = trouble, None
            began = time.monotonic()
            try:
                self._serve_one_term()
            except ConnectionFailed as error:
                trouble = error.message
            if trouble and trouble != last_trouble:
                self._say("unreachable", None, trouble)
            self._pause_until(began + RECONNECT_SECONDS)

    def _pause_until(self, moment: float) -> None:
        """Keeps attempts a moment apart, so that a server that refuses us is not asked a thousand times a second."""
        while not self._stopping and (seconds := moment - time.monotonic()) > 0:
            self._wakeup.wait(seconds)  # the keeper of the term that is over may have set it

    def _serve_one_term(self) -> None:
        keeper = LeaseKeeper(self._settings, self._node_id, self._ttl, self._wakeup)
        keeper.start()
        failure: tuple[str, str] | None = None
        try:
            term = self._await_election(keeper)
            if term:
                self._say("elected", term.epoch, f"leading from version {term.durable_version} on")
                failure = self._lead(keeper, term)
        finally:
            keeper.stop("failed" if failure else "released")
        if term:
            self._say_ending(term, *(failure or _ending(keeper.over or "")))

    def _await_election(self, keeper: LeaseKeeper) -> Term | None:
        """The term that was won, or None when stopped; raises what kept the keeper from standing."""
        while not self._stopping and keeper.term is None and keeper.over is None:
            self._wakeup.wait(channels.POLL_SECONDS)
        if isinstance(keeper.failure, PgcoordError):
            raise keeper.failure
        if keeper.over and keeper.term is None:
            raise ConnectionFailed(keeper.over)
        return keeper.term

    def _lead(self, keeper: LeaseKeeper, term: Term) -> tuple[str, str] | None:
        """Resolves until stopped or until the keeper says it is over; otherwise returns what went wrong."""
        try:
            with closing(open_session(self._patient_settings(), "leader run", writes=True)) as conn:
                mark_leader_session(conn, self._settings.schema)
                lease.require_elected_here(conn, term)
                conn.execute(sql("lease", "make_commits_durable"))
                conn.execute(sql("session", "plan_once"))
                conn.prepare_threshold = 0
                self._resolve(conn, keeper, term)
        except Fenced as error:
            return "fenced", error.message
        except ConnectionFailed as error:
            return "lost", error.message
        except psycopg.Error as error:
            return "lost", translate(error).message
        return None

    def _say_ending(self, term: Term, event: str, detail: str) -> None:
        """Tells how a term ended. A successor ends the sessions of the leader that it fences: that is no mere loss."""
        if event == "lost":
            with suppress(PgcoordError), command_session(self._settings, "leader run", writes=False) as conn:
                if read_lease(conn).epoch > term.epoch:
                    event, detail = "fenced", f"superseded by {successor(conn)}; {detail}"
        self._say(event, term.epoch, detail)

    def _patient_settings(self) -> Settings:
        """A batch may take as long as it takes: renewals go over another connection, and the fence guards its end."""
        return replace(self._settings, statement_timeout=0, lock_timeout=0)

    def _resolve(self, conn: Connection[Any], keeper: LeaseKeeper, term: Term) -> None:
        commits, leadership = channels.commits(self._settings.schema), channels.leadership(self._settings.schema)
        notifications = listen(conn, (commits, leadership), self._wakeup)
        resolver = Resolver(conn, term, self._abandon.fileno())
        while not self._stopping and keeper.over is None:
            heard = notifications.wait(0 if resolver.has_more else channels.POLL_SECONDS)
            if leadership in heard:
                keeper.look()
            if keeper.is_trusted():
                resolver.resolve_batch(expected=commits in heard)
            elif keeper.over is None:
                # Frozen, or the renewals stall: whether the lease still stands is for the keeper to find out.
                self._wakeup.wait(self._ttl / RENEWALS_PER_TTL)

    def _say(self, event: str, epoch: int | None, detail: str) -> None:
        self._report(CandidateEvent(event, self._node_id, epoch, detail))


def _ending(over: str) -> tuple[str, str]:
    """How the end of a leadership is told, from what its keeper said."""
    if over in ("released", Renewal.STEP_DOWN):
        return "released", over
    return ("fenced" if over.startswith("superseded") else "lost"), over
