"""`pgcoord worker run` as a process: what it runs, how commands end, lost connections, kills and signals."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.flows import executions, flows
from pgcoord_cli.core.flows.flow_file import FlowPlan, PlannedExecution
from pgcoord_cli.core.flows.reconcile import Scope, lease_expiry
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.program_process import ProgramProcess, starter
from tests.faults.tail_process import terminate
from tests.postgres.flow_world import Conn, Flow, column, everything

if TYPE_CHECKING:
    from tests.conftest import StartLeader

WORKER = "pgcoord/worker"

StartWorker = Callable[..., ProgramProcess]


@pytest.fixture
def start(settings: Settings) -> Iterator[StartWorker]:
    """Starts workers on the test's database; their commands write to the workers' stdout."""
    with starter(ProgramProcess, ["worker", "run"], lambda: settings) as start:
        yield start


Make = Callable[..., Flow]


@pytest.fixture
def make(conn: Conn, sql: Conn) -> Make:
    """Creates a flow of commands, each a line for sh, the words of a program, or None: `make("a>b", a="true")`."""

    def make(
        edges: str = "", *, attempts: int = 1, namespace: str | None = None, **commands: str | list[str] | None
    ) -> Flow:
        planned = [
            PlannedExecution(name, ["sh", "-c", command] if isinstance(command, str) else command, attempts)
            for name, command in commands.items()
        ]
        pairs = [(edge.split(">")[0], edge.split(">")[1]) for edge in edges.split()]
        return Flow(conn, sql, FlowPlan(namespace, None, planned, pairs, {}))

    return make


class Watch:
    """A FIFO that commands hold open, which shows whether any of their processes is left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def until_started(self) -> list[int]:
        """Waits for the process ids that a command writes into it; returns them."""
        self._poll(select.POLLIN)
        return [int(word) for word in os.read(self._fd, 4096).split()]

    def until_all_gone(self) -> None:
        """Waits until no process holds it open; here a process closes it only by ending."""
        self._poll(0)  # POLLHUP is reported without being asked for

    def _poll(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._fd, events)
        assert poll.poll(TIMEOUT * 1000), "the event did not happen"

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    watching = Watch(tmp_path / "watch")
    yield watching
    watching.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO that a command reads (`wait_at`) until the test opens it (`open_gate`)."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def open_gate(gate: Path) -> None:
    """Waits for the command that reads the gate, and ends it."""

    def is_read() -> bool:
        try:
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # no process reads it yet
            return False
        return True

    until(is_read)


def wait_at(gate: Path) -> list[str]:
    """Returns a command that runs until the gate is opened, at most 60 s in case its worker is killed."""
    return ["timeout", "60", "cat", str(gate)]


def parent_and_child(watch: Watch, *, ignores_term: bool = False) -> str:
    """Returns a command that starts a child and waits for it. Run again, it ends at once with success."""
    trap = "trap '' TERM;" if ignores_term else ""
    once = f"mkdir {watch.path}.started 2>&- || exit 0"
    return f"{once}; {trap} exec 3> {watch.path}; sleep 60 & echo $$ $! >&3; wait"


def lease_events(flow: Flow, name: str) -> list[str]:
    query = "SELECT event_type FROM lease_events WHERE execution_id = %s ORDER BY event_id"
    return column(flow.sql, query, str(flow.ids[name]))


def reason(flow: Flow, name: str) -> str:
    return str(value(flow.sql, "SELECT reason FROM executions WHERE execution_id = %s", flow.ids[name]))


def end_expired_lease(conn: Conn) -> None:
    """Waits until the only lease has expired, and ends it, as `pgcoord reconcile lease-expiry` does."""
    until(lambda: lease_expiry(conn, Scope(), lambda _event, _why: None).reconciled)


def until_dispatching(sql: Conn) -> None:
    """Waits until a dispatcher tails the completion events: later ones are dispatched."""
    until(lambda: value(sql, "SELECT pg_sequence_last_value('pgcoord.completion_events_wake_until')") is not None)


# -- what it runs


def test_a_command_gets_its_execution_in_the_environment(start: StartWorker, make: Make) -> None:
    flow = make(own="env | grep ^PGCOORD_ | grep -v DSN | sort")
    code, stdout, _ = start("--once").ended()
    lease_id = value(flow.sql, "SELECT lease_id FROM lease_events")
    assert (code, "".join(stdout).splitlines()) == (0, [
        "PGCOORD_ATTEMPT=1",
        f"PGCOORD_EXECUTION_ID={flow.ids['own']}",
        "PGCOORD_EXECUTION_NAME=own",
        f"PGCOORD_FLOW_ID={flow.flow_id}",
        "PGCOORD_LEASE_EPOCH=1",
        f"PGCOORD_LEASE_ID={lease_id}",
    ])  # fmt: skip


def test_the_worker_command_runs_for_executions_without_their_own(start: StartWorker, make: Make) -> None:
    flow = make("own>bare", own="echo own", bare=None)
    ended = start("--once", "-q", "--", "sh", "-c", "echo called for $PGCOORD_EXECUTION_NAME").ended()
    assert ended == (0, ["own\n", "called for bare\n"], "")
    assert flow.states() == {"own": "success", "bare": "success"}


def test_with_json_the_output_of_commands_is_separate_from_the_events(start: StartWorker, make: Make) -> None:
    make("own>below", own="echo hello", below="true")
    code, stdout, stderr = start("--once", "-o", "json", "-q").ended()
    assert code == 0
    assert [json.loads(line)["event"] for line in stdout] == ["started", "succeeded"] * 2
    assert stderr == "hello\n"


def test_a_command_killed_by_a_signal_fails_with_that_signal(start: StartWorker, make: Make) -> None:
    flow = make("own>below", own="kill -KILL $$", below="true")
    code, _, _ = start("--once").ended()
    assert code == 128 + signal.SIGKILL, "as in a shell"
    assert reason(flow, "own") == "signal 9 (Killed)"


def test_a_failed_attempt_is_repeated_after_its_back_off_and_the_last_one_fails_the_execution(
    start: StartWorker, make: Make
) -> None:
    flow = make("flaky>after", attempts=2, flaky="test $PGCOORD_ATTEMPT -gt 1", bad="exit 3", after="true")
    code, _, stderr = start("--once").ended()
    assert code == 3, "the code of the failed execution, not of the retried one"
    assert flow.states() == {"flaky": "success", "bad": "failed", "after": "success"}
    assert reason(flow, "bad") == "exit status 3"
    assert "flaky: retried: exit status 1" in stderr
    assert "bad attempt 2: failed: exit status 3" in stderr
    assert lease_events(flow, "flaky").count("acquired") == 2


def test_a_command_that_cannot_be_started_fails_with_the_reason(start: StartWorker, make: Make) -> None:
    flow = make("missing>below", missing=["/nowhere/program"], bare=None, below="true")
    code, _, _ = start("--once").ended()
    assert code == 1
    assert flow.states() == {"missing": "failed", "bare": "failed", "below": "skipped"}
    assert reason(flow, "missing") == "cannot run '/nowhere/program': No such file or directory"
    assert reason(flow, "bare").startswith("no command: ")


def test_two_slots_run_two_commands_at_once(start: StartWorker, make: Make, tmp_path: Path) -> None:
    for name in ("there", "back"):
        os.mkfifo(tmp_path / name)
    # Each waits for the other: opening a FIFO blocks until the other end is opened.
    commands = {"a": "echo x > there; cat back", "b": "cat there; echo y > back"}
    flow = make(**{name: f"cd {tmp_path}; timeout 60 sh -c '{command}'" for name, command in commands.items()})
    assert start("--once", "-q", "--concurrency", "2").ended()[:2] == (0, ["x\n", "y\n"])
    assert flow.states() == {"a": "success", "b": "success"}


def test_an_idle_slot_claims_what_another_slots_command_makes_eligible(
    start: StartWorker, make: Make, sql: Conn, gate: Path, tmp_path: Path
) -> None:
    for name in ("there", "back"):
        os.mkfifo(tmp_path / name)
    # Each waits for the other: opening a FIFO blocks until the other end is opened.
    together = {"b": "echo x > there; cat back", "c": "cat there; echo y > back"}
    commands = {name: f"cd {tmp_path}; timeout 60 sh -c '{command}'" for name, command in together.items()}
    flow = make("a>b a>c", a=" ".join(wait_at(gate)), **commands)
    worker = start("--once", "-q", "--concurrency", "2")
    found_nothing = "state = 'idle' AND strpos(query, 'min(eligible_from)') > 0"
    until(lambda: value(sql, f"SELECT count(*) FROM pg_stat_activity WHERE {found_nothing}"))
    open_gate(gate)
    assert worker.ended()[:2] == (0, ["x\n", "y\n"])
    assert set(flow.states().values()) == {"success"}


def test_a_worker_claims_only_from_its_namespace(start: StartWorker, make: Make) -> None:
    mine, other = make(a="true", namespace="mine"), make(a="true", namespace="other")
    assert start("--once", "--namespace", "mine").ended()[0] == 0
    assert (mine.state("a"), other.state("a")) == ("success", "eligible")


def test_a_worker_runs_more_commands_than_its_limit_of_open_files(start: StartWorker, make: Make) -> None:
    names = [f"n{number}" for number in range(60)]
    flow = make(**dict.fromkeys(names, "true"))
    worker = start("--once", "-q")
    resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE, (64, 64))
    assert worker.ended()[0] == 0
    assert set(flow.states().values()) == {"success"}


# -- lost workers and leases


def test_i9_the_flow_of_a_killed_worker_is_finished_by_another(start: StartWorker, make: Make, conn: Conn) -> None:
    flow = make("a>b b>c", a="true", b="test $PGCOORD_ATTEMPT -gt 1 || kill -9 $PPID", c="true")
    assert start("--once", "--lease", "1s").ended()[0] == -signal.SIGKILL
    assert flow.states() == {"a": "success", "b": "running", "c": "blocked"}
    end_expired_lease(conn)
    assert start("--once").ended()[0] == 0
    assert flow.states() == {"a": "success", "b": "success", "c": "success"}
    assert lease_events(flow, "b") == ["acquired", "expired", "reclaimed", *lease_events(flow, "b")[3:]]


@pytest.mark.parametrize("ignores_term", [False, True], ids=["on TERM", "on KILL"])
def test_a_revoked_lease_terminates_the_command_and_its_descendants(
    start: StartWorker, make: Make, watch: Watch, conn: Conn, ignores_term: bool
) -> None:
    flow = make("a>b", a=parent_and_child(watch, ignores_term=ignores_term), b="true")
    worker = start("--once", "--lease", "1s")
    assert len(watch.until_started()) == 2
    executions.revoke(conn, flow.ids["a"])
    worker.message("a: lost")
    watch.until_all_gone()
    # The same worker claims the revoked execution again.
    assert worker.ended()[0] == 0
    assert flow.states() == {"a": "success", "b": "success"}


def test_a_cancelled_flow_terminates_its_commands(start: StartWorker, make: Make, watch: Watch, conn: Conn) -> None:
    flow = make("a>b", a=parent_and_child(watch), b="true")
    worker = start("--once", "--lease", "1s")
    watch.until_started()
    flows.cancel(conn, flow.flow_id)
    worker.message("a: lost")
    watch.until_all_gone()
    assert worker.ended()[0] == 0
    assert flow.states() == {"a": "cancelled", "b": "cancelled"}


@pytest.mark.parametrize("ends_meanwhile", [False, True], ids=["command runs", "command ended"])
def test_i9_a_worker_frozen_past_its_lease_changes_nothing(
    start: StartWorker, make: Make, watch: Watch, gate: Path, conn: Conn, ends_meanwhile: bool
) -> None:
    flow = make(a=f"exec 3> {watch.path}; echo $$ >&3; exec timeout 60 cat {gate}")
    worker = start("--once", "--lease", "1s")
    watch.until_started()
    worker.freeze()
    end_expired_lease(conn)
    (claim,) = executions.claim(conn, "other", 60)
    assert (claim.lease_epoch, claim.attempt) == (2, 2)
    before = everything(flow.sql)
    if ends_meanwhile:
        open_gate(gate)
        watch.until_all_gone()
    worker.signal(signal.SIGCONT)
    worker.message("a: lost")
    watch.until_all_gone()
    assert worker.ended()[0] == 0
    assert everything(flow.sql) == before
    executions.complete(conn, claim.execution_id, claim.lease_epoch)


# -- lost connections


def lose_connection_during_a(start: StartWorker, flow: Flow, gate: Path) -> None:
    """Runs a worker whose connection is terminated while the command of `a` waits at the gate."""
    worker = start("--once")
    worker.message("a: started")
    assert terminate(flow.sql, WORKER) == 1
    open_gate(gate)
    worker.message("a: succeeded")
    assert worker.ended()[0] == 0


def test_a_result_is_reported_after_the_connection_was_lost(start: StartWorker, make: Make, gate: Path) -> None:
    flow = make(a=wait_at(gate), b="true")
    lose_connection_during_a(start, flow, gate)
    assert flow.states() == {"a": "success", "b": "success"}
    assert (lease_events(flow, "a").count("acquired"), len(flow.events_of("a"))) == (1, 1)


def test_a_downstream_runs_after_the_connection_was_lost(start: StartWorker, make: Make, gate: Path) -> None:
    flow = make("a>b", a=wait_at(gate), b="true")
    lose_connection_during_a(start, flow, gate)
    assert flow.states() == {"a": "success", "b": "success"}


def test_a_lease_is_renewed_after_its_connection_was_lost(
    start: StartWorker, make: Make, gate: Path, sql: Conn
) -> None:
    flow = make(a=wait_at(gate))
    worker = start("--once", "--lease", "6s")
    until(lambda: "renewed" in lease_events(flow, "a"))
    assert terminate(sql, WORKER) == 2  # the slot's connection and the lease keeper's
    renewals = len(lease_events(flow, "a"))
    until(lambda: len(lease_events(flow, "a")) > renewals)
    open_gate(gate)
    code, _, stderr = worker.ended()
    assert (code, flow.state("a")) == (0, "success")
    assert "a: lost" not in stderr
    assert lease_events(flow, "a").count("acquired") == 1


# -- stopping


def test_after_the_first_signal_the_running_command_ends_by_itself(start: StartWorker, make: Make, gate: Path) -> None:
    flow = make(a=wait_at(gate), b="true")
    worker = start("--lease", "60s")
    worker.message("a: started")
    worker.signal(signal.SIGTERM)
    until(lambda: "renewed" in lease_events(flow, "a"))  # the signal wakes the slot, which renews early
    open_gate(gate)
    assert worker.ended()[0] == 0
    assert flow.states() == {"a": "success", "b": "eligible"}


def test_i19_the_second_signal_terminates_the_command_and_releases_its_execution(
    start: StartWorker, make: Make, watch: Watch
) -> None:
    flow = make(a=parent_and_child(watch), b="true")
    worker = start("--lease", "60s")
    watch.until_started()
    worker.signal(signal.SIGTERM)
    until(lambda: "renewed" in lease_events(flow, "a"))
    worker.signal(signal.SIGTERM)
    worker.message("a: given back")
    watch.until_all_gone()
    assert worker.ended()[0] == 0
    assert flow.states() == {"a": "eligible", "b": "eligible"}
    assert lease_events(flow, "a")[-1] == "revoked"
    assert value(flow.sql, "SELECT count(*) FROM execution_leases") == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGINT, -signal.SIGINT)])
def test_i17_the_second_signal_ends_a_worker_that_cannot_report_a_result(
    number: signal.Signals, code: int, own_settings: Settings, own_server: EmbeddedServer, gate: Path, watch: Watch
) -> None:
    """The first one does not: the server may come back."""
    with (
        psycopg.connect(own_settings.dsn, autocommit=True, options="-c search_path=pgcoord") as sql,
        command_session(own_settings, "test", writes=True) as conn,
        starter(ProgramProcess, ["worker", "run"], lambda: own_settings) as start,
    ):
        command = f"echo $$ > {watch.path}; cat {gate}"
        Flow(conn, sql, FlowPlan(None, None, [PlannedExecution("a", ["sh", "-c", command], 1)], [], {}))
        worker = start("--lease", "1h", "-v")
        watch.until_started()
        own_server.stop("immediate")
        open_gate(gate)
        worker.message("interrupted: ")
        worker.signal(number)
        for _ in range(2):
            worker.message("interrupted: ")  # it tries again
        worker.signal(number)
        worker.message("a: lost: the result, exit status 0, is not reported: ")
        assert worker.ended()[0] == code


def test_sigint_ends_an_idle_worker(start: StartWorker, sql: Conn) -> None:
    worker = start()
    until_dispatching(sql)
    assert worker.end(signal.SIGINT)[0] == -signal.SIGINT


# -- dispatch


def test_a_worker_dispatches_completions(start: StartWorker, make: Make, sql: Conn) -> None:
    worker = start()
    until_dispatching(sql)
    flow = make("a>b b>c", a="true", b="true", c="true")
    worker.message("c: succeeded")
    until(lambda: not flow.undispatched())
    assert worker.end(signal.SIGTERM)[0] == 0


def test_a_leader_with_dispatch_dispatches_completions(start_leader: StartLeader, make: Make, sql: Conn) -> None:
    start_leader("A", "--with", "dispatch").wait_for("elected epoch")
    until_dispatching(sql)
    flow = make("a>b", a="true", b="true")
    flow.end("a")
    until(lambda: flow.state("b") == "eligible")
    flow.end("b")
    until(lambda: not flow.undispatched())
