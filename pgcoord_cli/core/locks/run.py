"""Running a command while holding a lock: `pgcoord lock run`.

The lock is held by a connection of its own (`core.locks.ownership`), the command runs in a process group of its own. Until
the command ends, three things are waited for at once: its end, a signal to pass on to the group, and the connection.
PostgreSQL closes a connection whose session it ends, which shows at once; one that has fallen silent is found by a
heartbeat. Without the connection there is no lock, and another may be starting the same command: so the group is asked
to end, and after a grace killed.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from signal import SIGTERM
from time import monotonic
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.process_group import GRACE_SECONDS, ProcessGroup
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.locks.ownership import draw_fence, take_lock
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import LockLost, PgcoordError
from pgcoord_cli.settings import Settings

HEARTBEAT_SECONDS = 4.0
PATIENCE_SECONDS = 5.0
"""A connection that fell silent is found within the sum of these."""


class LockOptions(NamedTuple):
    """What to run under which lock."""

    name: str
    command: Sequence[str]
    wait_seconds: float = 0.0
    grace_seconds: float = GRACE_SECONDS
    fence: bool = False


class LockRun:
    """One command under one lock. `signal` may be called from a signal handler."""

    def __init__(self, settings: Settings, order: LockOptions) -> None:
        self._settings = settings
        self._order = order
        self._wakeup = Wakeup()
        self._signals: list[int] = []

    def signal(self, number: int) -> None:
        """Passes a signal on to the command's process group."""
        self._signals.append(number)
        self._wakeup.set()

    def run(self, started: Callable[[], None] = lambda: None) -> int:
        """Runs the command and returns its exit code as a shell counts it; `started` is called once it has the lock.

        LockNotAcquired: it was not run. LockLost: it was ended. PgcoordError: it could not be started.
        """
        order = self._order
        patient = replace(self._settings, statement_timeout=0)
        with closing(open_session(patient, f"lock {order.name}"[:50], writes=True)) as conn, mapped_errors():
            take_lock(conn, self._settings.schema, order.name, order.wait_seconds)
            environment = dict(os.environ)
            if order.fence:
                environment["PGCOORD_FENCE"] = str(draw_fence(conn, order.name, None)[0])
            started()
            with closing(self._start(environment)) as group:
                try:
                    self._guard(conn, group)
                finally:
                    self._end(group)
        code = group.exit_code
        assert code is not None
        return code if code >= 0 else 128 - code

    def _start(self, environment: dict[str, str]) -> ProcessGroup:
        try:
            return ProcessGroup(self._order.command, environment)
        except OSError as error:
            raise PgcoordError(f"cannot run {self._order.command[0]}: {error.strerror}") from None

    def _guard(self, conn: Connection[Any], group: ProcessGroup) -> None:
        """Returns when the command has ended; LockLost when the connection has."""
        pipeline = Pipeline(conn, PATIENCE_SECONDS)
        while group.exit_code is None:
            is_connection_stirring = self._wait(conn, group)
            self._pass_signals_on(group)
            if group.exit_code is None and not _is_alive(conn, pipeline, is_connection_stirring):
                raise LockLost(
                    f"the connection that held {self._order.name!r} is gone; the command was ended",
                    hint="another may hold the lock by now",
                )

    def _pass_signals_on(self, group: ProcessGroup) -> None:
        while self._signals:
            group.signal(self._signals.pop(0))

    def _end(self, group: ProcessGroup) -> None:
        """Asks the command to end, and kills what is left after the grace; signals are passed on until then."""
        if group.exit_code is not None:
            return
        group.signal(SIGTERM)
        deadline = monotonic() + self._order.grace_seconds
        while group.exit_code is None and (seconds := deadline - monotonic()) > 0:
            group.wait(self._wakeup, seconds)
            self._pass_signals_on(group)
        group.end(0.0)

    def _wait(self, conn: Connection[Any], group: ProcessGroup) -> bool:
        """Until something stirs, or for a heartbeat; whether it was the connection or the heartbeat."""
        poll = select.poll()
        for descriptor in (conn.fileno(), self._wakeup.fileno(), group.fileno()):
            poll.register(descriptor, select.POLLIN)
        stirred = {descriptor for descriptor, _ in poll.poll(HEARTBEAT_SECONDS * 1000)}
        self._wakeup.clear()
        return not stirred or conn.fileno() in stirred


def _is_alive(conn: Connection[Any], pipeline: Pipeline, is_to_be_asked: bool) -> bool:
    if not is_to_be_asked:
        return True
    with suppress(psycopg.Error):
        pipeline.fetch(sql("locks", "heartbeat"), [])
        return not conn.closed
    return False
