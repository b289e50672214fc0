"""Runs a command while holding a lock: `pgcoord lock run`.

The lock is held by a dedicated connection (`core.locks.ownership`); the command runs in its own process group. Until
the command ends, one poll(2) waits for its end, for a signal to pass on to the group, and for the connection.
PostgreSQL closes the connection of a session that it terminates, which makes the socket readable at once; a heartbeat
detects a connection that no longer answers. Without the connection the lock is free, and another session may already
run the same command: the group gets SIGTERM, and SIGKILL after the grace.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from signal import SIGHUP, SIGINT, SIGTERM
from time import monotonic
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.process_group import GRACE_SECONDS, ProcessGroup
from pgcoord_cli.core.concurrency.supervisor import retry_until
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.locks.ownership import draw_fence, take_lock
from pgcoord_cli.db.connection import mapped_errors, translate
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import KeyCollision, LockLost, LockNotAcquired, PgcoordError
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.locks")

HEARTBEAT_SECONDS = 4.0
"""Seconds between two heartbeats."""

ANSWER_TIMEOUT_SECONDS = 5.0
"""How long a heartbeat may go unanswered before the connection, and with it the lock, counts as lost."""


ENDING_SIGNALS = {SIGINT, SIGTERM, SIGHUP}
"""Signals that end this process, too, when they have ended the command. Others, like SIGQUIT, would dump core."""

SHORTEST_WAIT = 0.001
"""Seconds; a wait of 0 would be none at all."""


class LockOptions(NamedTuple):
    """A command and the lock to run it under.

    `wait_seconds` is how long to wait for the lock, `grace_seconds` how long the command may take to end after SIGTERM.
    With `fence`, the command finds the lock's next fence in PGCOORD_FENCE.
    """

    name: str
    command: Sequence[str]
    wait_seconds: float = 0.0
    grace_seconds: float = GRACE_SECONDS
    fence: bool = False


class LockRun:
    """Runs one command under one lock. `signal` may be called from a signal handler."""

    def __init__(self, settings: Settings, options: LockOptions) -> None:
        self._settings = settings
        self._options = options
        self._wakeup = Wakeup()
        self._signals: list[int] = []
        self._forwarded: set[int] = set()

    def signal(self, number: int) -> None:
        """Passes a signal on to the command's process group."""
        self._signals.append(number)
        self._wakeup.set()

    def run(self, started: Callable[[], None] = lambda: None) -> int:
        """Runs the command and returns its exit code; calls `started` once the lock is held.

        The code is that of a shell, 128 plus the number of a signal that ended the command; it is the negative number
        if this process has received that signal, too, and passed it on.

        Raises LockNotAcquired, and has not run the command; LockLost, and has terminated it; PgcoordError if it cannot
        be started.
        """
        name = self._options.name
        conn, environment = self._hold()
        with closing(conn), mapped_errors():
            _log.debug("%r is held", name, extra={"lock": name})
            # Before the command starts: from here on a signal is for the command, not for this process.
            started()
            with closing(self._start(environment)) as group:
                try:
                    self._guard(conn, group)
                finally:
                    # Whatever the guard raises, the command must not outlive the lock.
                    self._end(group)
        code = group.exit_code
        assert code is not None
        # Ended together with its command, as by a Ctrl-C in a terminal.
        return code if code >= 0 or -code in self._forwarded & ENDING_SIGNALS else 128 - code

    def _hold(self) -> tuple[Connection[Any], dict[str, str]]:
        """Takes the lock; returns the connection that holds it, and the environment of the command.

        Raises the error of the first session. While it waits, later trouble is logged, and retried over a new session,
        which queues behind the others again (rule I17); at the deadline the last trouble is raised.
        """
        name, deadline = self._options.name, monotonic() + self._options.wait_seconds
        first = [self._open()]

        def attempt(recovered: Callable[[], None]) -> tuple[Connection[Any], dict[str, str]]:
            conn = first.pop() if first else self._open()
            try:
                return conn, self._take(conn, deadline - monotonic(), recovered)
            except BaseException:
                conn.close()
                raise

        if not self._options.wait_seconds:
            return attempt(lambda: None)
        outage = Outage(_log, f"{name!r} cannot be waited for", f"{name!r} is waited for", lock=name)
        return retry_until(deadline, attempt, outage, (LockNotAcquired, KeyCollision))

    def _open(self) -> Connection[Any]:
        # statement_timeout would cut short the wait for the lock, which lock_timeout bounds.
        untimed = replace(self._settings, statement_timeout=0)
        # PostgreSQL keeps 63 bytes of an application_name, and `pgcoord/` comes before this.
        return open_session(untimed, f"lock {self._options.name}"[:50], writes=True)

    def _take(self, conn: Connection[Any], seconds: float, recovered: Callable[[], None]) -> dict[str, str]:
        options = self._options
        wait_seconds = max(seconds, SHORTEST_WAIT) if options.wait_seconds else 0.0
        environment = dict(os.environ)
        with mapped_errors():
            take_lock(conn, self._settings.schema, options.name, wait_seconds, recovered)
            if options.fence:
                environment["PGCOORD_FENCE"] = str(draw_fence(conn, options.name, None).fence.number)
        return environment

    def _start(self, environment: dict[str, str]) -> ProcessGroup:
        try:
            return ProcessGroup(self._options.command, environment)
        except OSError as error:
            raise PgcoordError(f"cannot run {self._options.command[0]}: {error.strerror}") from None

    def _guard(self, conn: Connection[Any], group: ProcessGroup) -> None:
        """Waits until the command has ended. Raises LockLost when the connection is lost before that."""
        pipeline = Pipeline(conn, ANSWER_TIMEOUT_SECONDS)
        while group.exit_code is None:
            needs_check = self._wait(conn, group)
            self._pass_signals_on(group)
            # A command that has ended keeps its exit code, even if the connection is lost at the same moment.
            if group.exit_code is None and needs_check and (reason := _failure(conn, pipeline)):
                # Now and not only with the error, which is raised after the grace of the command.
                _log.warning(
                    "%r is lost: %s; terminating the command", self._options.name, reason,
                    extra={"lock": self._options.name},
                )  # fmt: skip
                raise LockLost(
                    f"lock {self._options.name!r} is lost: {reason}; the command was terminated",
                    hint="another session may hold the lock by now",
                )

    def _pass_signals_on(self, group: ProcessGroup) -> None:
        while self._signals:
            self._forwarded.add(number := self._signals.pop(0))
            group.signal(number)

    def _end(self, group: ProcessGroup) -> None:
        """Terminates the command, and kills what is left after the grace; passes signals on until then."""
        if group.exit_code is not None:
            return
        group.signal(SIGTERM)
        deadline = monotonic() + self._options.grace_seconds
        # Not group.end(grace): a second Ctrl-C, for example, has to reach the command during the grace.
        while group.exit_code is None and (seconds := deadline - monotonic()) > 0:
            group.wait(self._wakeup, seconds)
            self._pass_signals_on(group)
        group.end(0.0)

    def _wait(self, conn: Connection[Any], group: ProcessGroup) -> bool:
        """Waits for the command, a signal, the connection or the heartbeat; returns whether to check the connection."""
        poll = select.poll()
        for descriptor in (conn.fileno(), self._wakeup.fileno(), group.fileno()):
            poll.register(descriptor, select.POLLIN)
        # POLLIN also reports the end of the connection, and the FATAL message that PostgreSQL sends before it.
        ready = {descriptor for descriptor, _ in poll.poll(HEARTBEAT_SECONDS * 1000)}
        # Before the signals are passed on: one that arrives in between wakes the next poll.
        self._wakeup.clear()
        return not ready or conn.fileno() in ready


def _failure(conn: Connection[Any], pipeline: Pipeline) -> str | None:
    """Sends a heartbeat; returns why the connection is lost, or None if the server answered."""
    try:
        pipeline.fetch(sql("locks", "heartbeat"), [])
    except psycopg.Error as error:
        return translate(error).message
    return "the connection was closed" if conn.closed else None
