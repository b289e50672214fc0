"""Workers: claim an execution, run a command for it, renew its lease meanwhile, and end it by the exit status.

**Slots.** A worker runs as many commands at once as it has slots. Each slot is a thread with its own connection. A slot
that finds no eligible execution waits for a notification, for the end of the next back-off, or for the poll interval.

**The lease** is renewed after RENEW_AFTER of its duration. The worker counts it from the answer to the claim, then from
*before* the last successful renewal was sent. If the lease has been ended, or END_AFTER of it have passed
without a renewal, the worker terminates the command's process group within the rest of the lease, because another
worker may then run the same execution.

**Connections.** A slot whose connection breaks opens another and continues. The result of a command that ended
meanwhile is reported over the new connection; the fence decides whether it still counts.

**Dispatch.** One more thread dispatches completion events (`core.flows.dispatcher`). A worker that runs `once` does not
have it: its slots dispatch before each claim.

**Stopping.** After the first request the worker claims nothing more, and ends when the running commands have ended. The
second request terminates the commands; their executions become eligible again. Results that cannot be reported at that
moment are lost, and their executions run again when their leases have expired.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from signal import strsignal
from threading import Lock, Thread
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.process_group import ProcessGroup
from pgcoord_cli.core.concurrency.supervisor import Supervisor
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.flows import executions
from pgcoord_cli.core.flows.dispatcher import CompletionDispatcher
from pgcoord_cli.core.flows.executions import Claim
from pgcoord_cli.core.flows.reconcile import dispatch_backlog
from pgcoord_cli.db.binary import float8, int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import PERMANENT_ERRORS, ConditionFalse, Fenced, PgcoordError
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.worker")

RENEW_AFTER = 1 / 3
"""The part of a lease after which it is renewed."""

ANSWER_WITHIN = 1 / 8
"""The part of a lease for which a renewal may go unanswered before its connection counts as lost."""

END_AFTER = 4 / 5
"""The part of a lease without a renewal after which the command is terminated; it has the rest to end."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds between attempts to connect."""

COULD_NOT_START = 1
"""The exit code of an execution whose command could not be started."""


class WorkEvent(NamedTuple):
    """What happened: started, succeeded, failed, retried, lost or given_back; `trouble` is an error of the worker.

    `name`, `execution_id` and `attempt` are those of the execution; `name` is `dispatch` for the dispatcher's errors,
    and empty for a slot's own.
    """

    event: str
    name: str
    execution_id: str | None
    attempt: int | None
    detail: str


class WorkerOptions(NamedTuple):
    """What a worker claims and runs.

    `command` is for executions without their own; `stdout` is the file descriptor that commands write to, None for the
    worker's own.
    """

    owner: str
    command: Sequence[str] = ()
    concurrency: int = 1
    lease_seconds: float = executions.DEFAULT_LEASE_SECONDS
    namespace: str | None = None
    instance_tag: str | None = None
    once: bool = False
    stdout: int | None = None


OnWorkEvent = Callable[[WorkEvent], None]


class ExitResult(NamedTuple):
    """How a command ended: its exit code as a shell counts it, and the reason if it failed."""

    exit_code: int
    reason: str


def exit_result(status: int) -> ExitResult:
    """Converts an exit status, or the negative number of a signal, as subprocess returns it."""
    if status >= 0:
        return ExitResult(status, f"exit status {status}")
    return ExitResult(128 - status, f"signal {-status} ({strsignal(-status)})")


class Worker:
    """Runs commands for executions. `run` blocks; `stop` may be called from a signal handler or another thread."""

    def __init__(self, settings: Settings, options: WorkerOptions, report: OnWorkEvent) -> None:
        self._group = SlotGroup()
        self._slots = [Slot(settings, options, report, self._group) for _ in range(options.concurrency)]
        self._dispatcher = (
            None
            if options.once
            else CompletionDispatcher(
                settings, lambda message: report(WorkEvent("trouble", "dispatch", None, None, message))
            )
        )
        self._settings = settings
        self._stop_requests = 0

    def stop(self) -> None:
        """Stops claiming. The second call also terminates the running commands."""
        # Only flags and writes to pipes: a signal handler may interrupt a thread that holds any lock.
        self._stop_requests += 1
        for slot in self._slots:
            slot.stop(terminate=self._stop_requests > 1)

    @property
    def lost_results(self) -> int:
        """The number of results that could not be reported before the second call of `stop`."""
        return self._group.lost_results

    def run(self) -> int:
        """Runs until stopped, or with `once` until no execution is eligible or in back-off.

        Returns the exit code of the command whose execution failed last, or 0. Raises the error of the first
        connection, and a permanent error before any slot has worked.
        """
        # Before any thread starts: a server that refuses the session is an error of the call, not of a slot.
        open_session(self._settings, "worker", writes=True).close()
        threads = [Thread(target=slot.run, name=f"slot {number}") for number, slot in enumerate(self._slots, start=1)]
        with self._dispatcher.running() if self._dispatcher else nullcontext():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._group.failure:
            raise self._group.failure
        return self._group.exit_code


class SlotGroup:
    """What the slots of one worker share. With `once`, an idle slot waits for what another's command makes eligible."""

    def __init__(self) -> None:
        self.has_worked = False
        """Whether a slot has looked for work with success: from then on no trouble ends the worker (rule I17)."""
        self.failure: PgcoordError | None = None
        """The error that ends the worker."""
        self.exit_code = 0
        """Of the command whose execution failed last."""
        self.lost_results = 0
        """Commands that have ended, and whose results the server has not got."""
        self.outage = Outage(_log, "interrupted", "working")
        """Shared, so that a lost server is not logged once by each slot."""
        self._wakeups: list[Wakeup] = []
        self._mutex = Lock()
        self._busy = 0

    def join(self, wakeup: Wakeup) -> None:
        """Adds a slot, which `wakeup` wakes."""
        self._wakeups.append(wakeup)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts the calling slot as busy within the block."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._mutex:
            self._busy += change

    def is_idle(self) -> bool:
        """Returns whether no slot is busy; if so, wakes all slots, so that each finds that out and ends."""
        with self._mutex:
            is_idle = self._busy == 0
        if is_idle:
            self._wake_all()
        return is_idle

    def fail(self, failure: PgcoordError) -> None:
        """Ends all slots, each after its running command."""
        self.failure = failure
        self._wake_all()

    def _wake_all(self) -> None:
        for wakeup in self._wakeups:
            wakeup.set()


class Slot:
    """Runs one command at a time."""

    def __init__(self, settings: Settings, options: WorkerOptions, report: OnWorkEvent, group: SlotGroup) -> None:
        self._settings = settings
        self._options = options
        self._report = report
        self._group = group
        self._wakeup = Wakeup()
        group.join(self._wakeup)
        self._is_done = False
        self._supervisor = Supervisor(
            self._wakeup, self._is_over, self._on_trouble, outage=group.outage, last=LONGEST_PAUSE
        )
        self._stopping = False
        self._terminating = False

    def stop(self, *, terminate: bool) -> None:
        """Makes `run` return after the running command, which is terminated if `terminate`."""
        self._stopping = True
        self._terminating = terminate
        self._wakeup.set()

    def run(self) -> None:
        """Claims and runs executions until stopped, and reconnects after each loss of the connection."""
        self._supervisor.run(self._attempt)

    def _attempt(self) -> str | None:
        """Works over one connection; returns the message of the error that ended it, "" if it ends the worker."""
        try:
            with closing(open_session(self._settings, "worker", writes=True)) as conn, mapped_errors():
                self._work(conn)
        except PgcoordError as error:
            # A permanent error ends the worker only before any slot has worked: later, a right may be granted again.
            if isinstance(error, PERMANENT_ERRORS) and not self._group.has_worked:
                self._group.fail(error)
                return ""
            return error.reason
        self._is_done = True
        return None

    def _on_trouble(self, trouble: str) -> None:
        self._report(WorkEvent("trouble", "", None, None, trouble))

    def _is_over(self) -> bool:
        return self._is_done or self._stopping or self._group.failure is not None

    def _work(self, conn: Connection[Any]) -> None:
        conn.execute(sql("session", "plan_once"))
        # LISTEN before the first claim: what becomes eligible after it is notified, what was before is claimed.
        notifications = listen(conn, [channels.executions(self._settings.schema)], self._wakeup)
        options = self._options
        while not self._is_over():
            # Busy while it claims, too: a slot that has claimed but not yet started must keep the others waiting.
            with self._group.busy():
                has_run = self._work_once(conn)
            self._group.has_worked = True
            self._supervisor.recovered()
            if has_run:
                continue
            # Nothing notifies when a back-off ends, so the slot waits until then itself.
            next_in = executions.seconds_to_next(conn, options.namespace, options.instance_tag)
            # Not yet while another slot is busy: its command may make executions eligible.
            if options.once and next_in is None and self._group.is_idle():
                return
            # At most the poll interval: NOTIFY only wakes (rule I7).
            notifications.wait(min(channels.POLL_SECONDS, next_in or channels.POLL_SECONDS))

    def _work_once(self, conn: Connection[Any]) -> bool:
        """Claims one execution and runs its command; returns False if none is eligible."""
        options = self._options
        if options.once:
            # No dispatcher runs beside, and what the last command made eligible shall be claimed now.
            dispatch_backlog(conn)
        claims = executions.claim(
            conn, options.owner, options.lease_seconds, namespace=options.namespace, instance_tag=options.instance_tag
        )
        if claims:
            self._execute(claims[0], time.monotonic(), conn)
        return bool(claims)

    def _execute(self, claim: Claim, claimed_at: float, conn: Connection[Any]) -> None:
        command = claim.command or self._options.command
        if not command:
            reason = "no command: the flow file has none for this execution, and the worker was started without -- CMD"
            self._report_result(claim, ExitResult(COULD_NOT_START, reason), conn)
            return
        try:
            group = ProcessGroup(command, os.environ | execution_environment(claim), self._options.stdout)
        except OSError as error:
            reason = f"cannot run {command[0]!r}: {error.strerror or error}"
            self._report_result(claim, ExitResult(COULD_NOT_START, reason), conn)
            return
        self._report_claim("started", claim, command[0])
        with closing(group):
            is_leased = self._keep_lease(claim, claimed_at, group)
        # Without the lease the result is not this worker's to report; the fence would refuse it.
        if is_leased:
            self._report_result(claim, exit_result(group.exit_code or 0), conn)

    def _keep_lease(self, claim: Claim, trusted_from: float, group: ProcessGroup) -> bool:
        """Renews the lease until the command has ended; returns False if the lease or the worker ended first.

        The command has been terminated then. `trusted_from` is the monotonic time from which the lease counts.
        """
        seconds = self._options.lease_seconds
        with closing(ExecutionLeaseKeeper(self._settings, claim, seconds)) as keeper:
            while group.exit_code is None:
                group.wait(self._wakeup, seconds * RENEW_AFTER)
                if self._terminating:
                    # First the command, then the lease: another worker may claim as soon as it is revoked.
                    group.end()
                    keeper.give_back()
                    self._report_claim("given_back", claim, "the worker was stopped; the command was terminated")
                    return False
                # Before it is sent: the server counts the new expiry from when it receives it, which is later.
                sent_at = time.monotonic()
                if keeper.renew():
                    trusted_from = sent_at
                elif keeper.is_over or time.monotonic() - trusted_from > seconds * END_AFTER:
                    # Within the rest of the lease, before another worker can claim the execution.
                    group.end(seconds * (1 - END_AFTER))
                    self._report_claim("lost", claim, f"{keeper.error}; the command was terminated")
                    return False
        return True

    def _report_result(self, claim: Claim, result: ExitResult, conn: Connection[Any]) -> None:
        """Ends the execution by the result; reconnects and repeats until the server has confirmed it.

        A request to terminate ends that, too: the result is lost then, and the lease expires.
        """
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        with ExitStack() as opened:
            while True:
                try:
                    with mapped_errors():
                        self._end_execution(claim, result, conn)
                    self._group.outage.ended(source=claim.lease_id)
                    return
                except (Fenced, ConditionFalse) as error:
                    # Also if an earlier attempt succeeded and only its answer was lost: the execution has ended then.
                    self._group.outage.ended(source=claim.lease_id)
                    self._report_claim("lost", claim, error.message)
                    return
                except PgcoordError as error:
                    self._group.outage.failed(error.reason, source=claim.lease_id, **_fields(claim))
                    self._report(_event("trouble", claim, error.message))
                    self._wakeup.wait(0.0 if self._terminating else backoff.next_pause())
                    if self._terminating:
                        self._group.lost_results += 1
                        self._report_claim(
                            "lost", claim, f"the result, {result.reason}, is not reported: {error.message}"
                        )
                        return
                    # A failure here shows again at the next attempt, which reports it.
                    with suppress(PgcoordError):
                        conn = opened.enter_context(closing(open_session(self._settings, "worker", writes=True)))

    def _end_execution(self, claim: Claim, result: ExitResult, conn: Connection[Any]) -> None:
        if not result.exit_code:
            executions.complete(conn, claim.execution_id, claim.lease_epoch)
            self._report_claim("succeeded", claim, "")
        elif executions.fail(conn, claim.execution_id, claim.lease_epoch, result.reason) == "eligible":
            self._report_claim("retried", claim, result.reason)
        else:
            # Only of an execution that has failed: a retried attempt may still succeed.
            self._group.exit_code = result.exit_code
            self._report_claim("failed", claim, result.reason)

    def _report_claim(self, event: str, claim: Claim, detail: str) -> None:
        level = logging.WARNING if event in ("failed", "lost") else logging.INFO
        attempt = f" attempt {claim.attempt}" if claim.attempt > 1 else ""
        line = ": ".join(filter(None, [f"{claim.name}{attempt}", event.replace("_", " "), detail]))
        _log.log(level, "%s", line, extra=_fields(claim) | {"event": event})
        self._report(_event(event, claim, detail))


def _event(event: str, claim: Claim, detail: str) -> WorkEvent:
    return WorkEvent(event, claim.name, str(claim.execution_id), claim.attempt, detail)


def _fields(claim: Claim) -> dict[str, Any]:
    """Returns the fields of log records about an execution."""
    return {"execution": str(claim.execution_id), "execution_name": claim.name, "attempt": claim.attempt}


class ExecutionLeaseKeeper:
    """Renews one lease over its own connection, which it opens for the first renewal and after each loss.

    The slot's connection is not used: a renewal that is not answered must not delay the report of the result.
    """

    def __init__(self, settings: Settings, claim: Claim, seconds: float) -> None:
        self._settings = settings
        self._claim = claim
        self._seconds = seconds
        self._conn: Connection[Any] | None = None
        self._pipeline: Pipeline | None = None
        self.is_over = False
        """Whether the server has answered that the lease of this epoch has ended."""
        self.error = ""
        """Why the last renewal failed."""

    def renew(self) -> bool:
        """Renews the lease; returns False if that failed. Later calls may succeed unless the lease `is_over`."""
        values = [self._claim.execution_id.bytes, int8(self._claim.lease_epoch), float8(self._seconds)]
        try:
            with mapped_errors():
                self.is_over = not self._open().fetch(sql("executions", "renew"), values)
        except PgcoordError as error:
            self.error = f"the lease could not be renewed: {error.message}"
            _log.debug("%s: %s", self._claim.name, self.error, extra=_fields(self._claim))
            # A late answer on this connection must not be taken for that of the next renewal.
            self.close()
            return False
        if self.is_over:
            self.error = "the lease has ended: it expired, was revoked, or the execution was cancelled"
        return not self.is_over

    def _open(self) -> Pipeline:
        if self._conn is None or self._pipeline is None:
            self._conn = open_session(self._settings, "worker", writes=True)
            # A fraction of the lease, so that a second attempt fits in before END_AFTER.
            self._pipeline = Pipeline(self._conn, self._seconds * ANSWER_WITHIN)
        return self._pipeline

    def give_back(self) -> None:
        """Revokes the lease, so that the execution becomes eligible again; if that fails, the lease expires."""
        with suppress(PgcoordError, psycopg.Error):
            self._open()
            if self._conn:
                executions.revoke(self._conn, self._claim.execution_id, self._claim.lease_epoch)

    def close(self) -> None:
        """Closes the connection."""
        if self._conn:
            self._conn.close()
            self._conn = self._pipeline = None


def execution_environment(claim: Claim) -> dict[str, str]:
    """Returns the environment variables that tell a command about its execution."""
    return {
        "PGCOORD_EXECUTION_ID": str(claim.execution_id),
        "PGCOORD_LEASE_ID": str(claim.lease_id),
        "PGCOORD_LEASE_EPOCH": str(claim.lease_epoch),
        "PGCOORD_FLOW_ID": str(claim.flow_id or ""),
        "PGCOORD_EXECUTION_NAME": claim.name,
        "PGCOORD_ATTEMPT": str(claim.attempt),
    }
