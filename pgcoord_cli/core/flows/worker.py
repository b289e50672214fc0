"""Workers: claim an execution, run a command for it, keep the lease while it runs, and end it by its exit status.

**Slots.** A worker runs as many commands at once as it has slots; each slot is a thread with a connection of its own.
A slot without work waits for the notification that something became eligible, for the next back-off to end, or for
the poll interval.

**The lease** is prolonged at a third of its time. Its end is reckoned from before the last renewal was sent. When it
is lost, or four fifths of it have gone by without a renewal, the command's whole process group is ended within the
last fifth, since another worker may then start the same; the execution is no longer this worker's business.

**Connections.** A slot whose connection breaks opens another and goes on; a command that has ended meanwhile is
reported as soon as there is one, and the fence says whether that still counts.

**Dispatch.** One more thread follows the completion events and carries each on (`core.flows.dispatcher`).

**Stopping.** The first request ends the claiming, and the worker ends when the commands in hand have. The second one
ends those commands, and their executions are given back for others to run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from threading import Lock, Thread
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.process_group import ProcessGroup
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.flows import executions
from pgcoord_cli.core.flows.dispatcher import CompletionDispatcher
from pgcoord_cli.core.flows.executions import Claim
from pgcoord_cli.core.flows.reconcile import Scope, dependency
from pgcoord_cli.db.binary import float8, int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import FINAL, ConditionFalse, ConnectionFailed, Fenced, PgcoordError
from pgcoord_cli.settings import Settings

RENEW_AFTER = 1 / 3
ANSWER_WITHIN = 1 / 8
END_AFTER = 4 / 5
"""Parts of a lease: until it is renewed, for a renewal to be answered, until the command is ended without one."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds between attempts to connect."""


class WorkEvent(NamedTuple):
    """Something that happened to a claim: started, succeeded, failed, retried, lost, given_back; or `trouble`."""

    event: str
    name: str
    execution_id: str | None
    attempt: int | None
    detail: str


class WorkerOptions(NamedTuple):
    """What a worker does. `command` is for executions that have none of their own; `stdout` is where commands write."""

    owner: str
    command: Sequence[str] = ()
    concurrency: int = 1
    lease_seconds: float = executions.DEFAULT_LEASE_SECONDS
    namespace: str | None = None
    instance_tag: str | None = None
    once: bool = False
    stdout: int | None = None


Report = Callable[[WorkEvent], None]


class ExitResult(NamedTuple):
    """How a command ended: as a shell would say it, and in words."""

    exit_code: int
    trouble: str


COULD_NOT_START = 1


def ending(status: int) -> ExitResult:
    """From the exit status, or from the signal as a negative number. Pure."""
    return ExitResult(128 - status, f"signal {-status}") if status < 0 else ExitResult(status, f"exit status {status}")


class Worker:
    """Runs commands for executions. `run` blocks; `stop` may be called from a signal handler or another thread."""

    def __init__(self, settings: Settings, order: WorkerOptions, report: Report) -> None:
        self._company = SlotGroup()
        self._slots = [Slot(settings, order, report, self._company) for _ in range(order.concurrency)]
        self._follower = (
            None
            if order.once
            else CompletionDispatcher(
                settings, lambda trouble: report(WorkEvent("trouble", "dispatch", None, None, trouble))
            )
        )
        self._settings = settings
        self._stop_requests = 0

    def stop(self) -> None:
        """First: claims nothing more. Again: ends the commands in hand too."""
        self._stop_requests += 1
        for slot in self._slots:
            slot.stop(at_once=self._stop_requests > 1)

    def run(self) -> int:
        """Works until stopped; with `once`, until nothing is eligible. Raises what is wrong with the server.

        Returns the exit code of the command that failed an execution for good, the last one if several did; else 0.
        """
        open_session(self._settings, "worker", writes=True).close()
        threads = [Thread(target=slot.run, name=f"slot {number}") for number, slot in enumerate(self._slots, start=1)]
        with self._follower.running() if self._follower else nullcontext():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._company.failure:
            raise self._company.failure
        return self._company.exit_code


class SlotGroup:
    """The slots of one worker. With `once`, what one of them ends may be what another waits for."""

    def __init__(self) -> None:
        self.failure: PgcoordError | None = None
        """What ends the whole worker."""
        self.exit_code = 0
        """Of the last command that failed an execution for good."""
        self._wakeups: list[Wakeup] = []
        self._mutex = Lock()
        self._busy = 0

    def join(self, wakeup: Wakeup) -> None:
        """One more slot, and how to wake it."""
        self._wakeups.append(wakeup)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the block, a slot looks for work, or has some."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._mutex:
            self._busy += change

    def is_done(self) -> bool:
        """To be asked by a slot that found nothing: whether nobody else has any work either. The others hear of it."""
        with self._mutex:
            is_done = self._busy == 0
        if is_done:
            self._wake_all()
        return is_done

    def fail(self, failure: PgcoordError) -> None:
        """Ends all slots, each after the command in hand."""
        self.failure = failure
        self._wake_all()

    def _wake_all(self) -> None:
        for wakeup in self._wakeups:
            wakeup.set()


class Slot:
    """One command at a time."""

    def __init__(self, settings: Settings, order: WorkerOptions, report: Report, company: SlotGroup) -> None:
        self._settings = settings
        self._order = order
        self._report = report
        self._company = company
        self._wakeup = Wakeup()
        company.join(self._wakeup)
        self._stopping = False
        self._stopping_at_once = False

    def stop(self, *, at_once: bool) -> None:
        """Asks `run` to return after the command in hand, or to end that too."""
        self._stopping = True
        self._stopping_at_once = at_once
        self._wakeup.set()

    def run(self) -> None:
        """Claims and runs until stopped, over one connection after the other."""
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while not self._is_over():
            try:
                with closing(open_session(self._settings, "worker", writes=True)) as conn, mapped_errors():
                    backoff.reset()
                    self._work(conn)
                    return
            except FINAL as error:
                self._company.fail(error)
            except PgcoordError as error:
                self._report(WorkEvent("trouble", "", None, None, error.message))
                self._wakeup.wait(backoff.next_pause())

    def _is_over(self) -> bool:
        return self._stopping or self._company.failure is not None

    def _work(self, conn: Connection[Any]) -> None:
        conn.execute(sql("session", "plan_once"))
        notifications = listen(conn, [channels.executions(self._settings.schema)], self._wakeup)
        order = self._order
        while not self._is_over():
            with self._company.at_work():
                is_something_done = self._work_once(conn)
            if is_something_done:
                continue
            next_in = executions.seconds_to_next(conn, order.namespace, order.instance_tag)
            if order.once and next_in is None and self._company.is_done():
                return
            notifications.wait(min(channels.POLL_SECONDS, next_in or channels.POLL_SECONDS))

    def _work_once(self, conn: Connection[Any]) -> bool:
        """Claims one execution and carries it out; False when there is none."""
        order = self._order
        if order.once:
            dispatch_everything(conn)
        claims = executions.claim(
            conn, order.owner, order.lease_seconds, namespace=order.namespace, instance_tag=order.instance_tag
        )
        if claims:
            self._carry_out(claims[0], time.monotonic(), conn)
        return bool(claims)

    def _carry_out(self, claim: Claim, claimed_at: float, conn: Connection[Any]) -> None:
        command = claim.command or self._order.command
        try:
            if not command:
                raise FileNotFoundError("there is no command: neither in the flow file nor in the call")
            group = ProcessGroup(command, os.environ | environment(claim), self._order.stdout)
        except OSError as error:
            self._end(claim, ExitResult(COULD_NOT_START, f"cannot start: {error}"), conn)
            return
        self._say("started", claim, command[0])
        with closing(group):
            is_mine = self._keep_lease(claim, claimed_at, group)
        if is_mine:
            self._end(claim, ending(group.exit_code or 0), conn)

    def _keep_lease(self, claim: Claim, trusted_from: float, group: ProcessGroup) -> bool:
        """Renews the lease until the command has ended; False when the lease is over, and the command with it."""
        seconds = self._order.lease_seconds
        with closing(ExecutionLeaseKeeper(self._settings, claim, seconds)) as keeper:
            while group.exit_code is None:
                group.wait(self._wakeup, seconds * RENEW_AFTER)
                if self._stopping_at_once:
                    group.end()
                    keeper.give_back()
                    self._say("given_back", claim, "stopped")
                    return False
                sent_at = time.monotonic()
                if keeper.renew():
                    trusted_from = sent_at
                elif keeper.is_over or time.monotonic() - trusted_from > seconds * END_AFTER:
                    group.end(seconds * (1 - END_AFTER))
                    self._say("lost", claim, "the lease is over; the command was ended")
                    return False
        return True

    def _end(self, claim: Claim, ending: ExitResult, conn: Connection[Any]) -> None:
        """Reports how the command ended, over a new connection if need be, until it is known to have arrived."""
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        with ExitStack() as opened:
            while True:
                try:
                    with mapped_errors():
                        self._report_end(claim, ending, conn)
                    return
                except (Fenced, ConditionFalse) as error:
                    self._say("lost", claim, error.message)
                    return
                except ConnectionFailed as error:
                    self._report(
                        WorkEvent("trouble", claim.name, str(claim.execution_id), claim.attempt, error.message)
                    )
                    self._wakeup.wait(backoff.next_pause())
                    with suppress(PgcoordError):
                        conn = opened.enter_context(closing(open_session(self._settings, "worker", writes=True)))

    def _report_end(self, claim: Claim, ending: ExitResult, conn: Connection[Any]) -> None:
        if not ending.exit_code:
            executions.complete(conn, claim.execution_id, claim.lease_epoch)
            self._say("succeeded", claim, "")
        elif executions.fail(conn, claim.execution_id, claim.lease_epoch, ending.trouble) == "eligible":
            self._say("retried", claim, ending.trouble)
        else:
            self._company.exit_code = ending.exit_code
            self._say("failed", claim, ending.trouble)

    def _say(self, event: str, claim: Claim, detail: str) -> None:
        self._report(WorkEvent(event, claim.name, str(claim.execution_id), claim.attempt, detail))


class ExecutionLeaseKeeper:
    """Renews one lease over a connection of its own, which it opens when it first needs it and after each loss."""

    def __init__(self, settings: Settings, claim: Claim, seconds: float) -> None:
        self._settings = settings
        self._claim = claim
        self._seconds = seconds
        self._conn: Connection[Any] | None = None
        self._pipeline: Pipeline | None = None
        self.is_over = False
        """Whether the lease has been taken away."""

    def renew(self) -> bool:
        """Prolongs the lease; False when that did not work this time, or, when it `is_over`, never will."""
        values = [self._claim.execution_id.bytes, int8(self._claim.lease_epoch), float8(self._seconds)]
        try:
            with mapped_errors():
                self.is_over = not self._open().fetch(sql("executions", "renew"), values)
        except PgcoordError:
            self.close()
            return False
        return not self.is_over

    def _open(self) -> Pipeline:
        if self._conn is None or self._pipeline is None:
            self._conn = open_session(self._settings, "worker", writes=True)
            self._pipeline = Pipeline(self._conn, self._seconds * ANSWER_WITHIN)
        return self._pipeline

    def give_back(self) -> None:
        """Has another worker run the execution; where that fails, the lease runs out by itself."""
        with suppress(PgcoordError, psycopg.Error):
            self._open()
            if self._conn:
                executions.revoke(self._conn, self._claim.execution_id, self._claim.lease_epoch)

    def close(self) -> None:
        """Ends the connection."""
        if self._conn:
            self._conn.close()
            self._conn = self._pipeline = None


def environment(claim: Claim) -> dict[str, str]:
    """What a command is told about its execution."""
    return {
        "PGCOORD_EXECUTION_ID": str(claim.execution_id),
        "PGCOORD_LEASE_ID": str(claim.lease_id),
        "PGCOORD_LEASE_EPOCH": str(claim.lease_epoch),
        "PGCOORD_FLOW_ID": str(claim.flow_id or ""),
        "PGCOORD_EXECUTION_NAME": claim.name,
        "PGCOORD_ATTEMPT": str(claim.attempt),
    }


def dispatch_everything(conn: Connection[Any]) -> None:
    """Carries on whatever nobody has, at once, until nothing is left."""
    while dependency(conn, Scope(stale_threshold_ms=0), lambda _event, _why: None).reconciled:
        pass
