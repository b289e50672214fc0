"""`pgcoord worker run` as a process: what it runs, how it ends that, and what happens when it is cut off or killed."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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
    """Starts workers on the test's database; what their commands print comes out of their stdout."""
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
    """A FIFO that commands hold open, and so whether any of them is still there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def until_started(self) -> list[int]:
        """The process ids that were written into it."""
        self._poll(select.POLLIN)
        return [int(word) for word in os.read(self._fd, 4096).split()]

    def until_all_gone(self) -> None:
        """Returns when nobody holds it open any more, which only the end of a process does here."""
        self._poll(0)  # a hang-up is always told

    def _poll(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._fd, events)
        assert poll.poll(TIMEOUT * 1000), "it never came to that"

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    watching = Watch(tmp_path / "watch")
    yield watching
    watching.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO that a command reads (`passage`) until somebody opens it (`open_gate`)."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def open_gate(gate: Path) -> None:
    """Lets the command go that reads it, once it does."""

    def is_read() -> bool:
        try:
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads it yet
            return False
        return True

    until(is_read)


def passage(gate: Path) -> list[str]:
    """A command that runs until its gate is opened; not for ever, should its worker be killed."""
    return ["timeout", "60", "cat", str(gate)]


def household(watch: Watch, *, stubborn: bool = False) -> str:
    """A command that starts another one, both of which stay. The second time it ends at once, with success."""
    deafness = "trap '' TERM;" if stubborn else ""
    once = f"mkdir {watch.path}.was-here 2>&- || exit 0"
    return f"{once}; {deafness} exec 3> {watch.path}; sleep 60 & echo $$ $! >&3; wait"


def lease_events(flow: Flow, name: str) -> list[str]:
    query = "SELECT event_type FROM lease_events WHERE execution_id = %s ORDER BY event_id"
    return column(flow.sql, query, str(flow.ids[name]))


def reason(flow: Flow, name: str) -> str:
    return str(value(flow.sql, "SELECT reason FROM executions WHERE execution_id = %s", flow.ids[name]))


def take_back(conn: Conn) -> None:
    """Waits until the one lease has run out, and ends it, as `pgcoord reconcile lease-expiry` does."""
    until(lambda: lease_expiry(conn, Scope(), lambda _event, _why: None).reconciled)


def until_followed(sql: Conn) -> None:
    """Returns when somebody follows the completion events: those that come from now on are carried on."""
    until(lambda: value(sql, "SELECT pg_sequence_last_value('pgcoord.completion_events_wake_until')") is not None)


# -- what it runs


def test_a_command_is_told_about_its_execution(start: StartWorker, make: Make) -> None:
    flow = make(own="env | grep ^PGCOORD_ | grep -v DSN | sort")
    code, told, _ = start("--once").ended()
    lease_id = value(flow.sql, "SELECT lease_id FROM lease_events")
    assert (code, "".join(told).splitlines()) == (0, [
        "PGCOORD_ATTEMPT=1",
        f"PGCOORD_EXECUTION_ID={flow.ids['own']}",
        "PGCOORD_EXECUTION_NAME=own",
        f"PGCOORD_FLOW_ID={flow.flow_id}",
        "PGCOORD_LEASE_EPOCH=1",
        f"PGCOORD_LEASE_ID={lease_id}",
    ])  # fmt: skip


def test_the_command_of_the_call_is_for_executions_without_their_own(start: StartWorker, make: Make) -> None:
    flow = make("own>bare", own="echo own", bare=None)
    ended = start("--once", "-q", "--", "sh", "-c", "echo called for $PGCOORD_EXECUTION_NAME").ended()
    assert ended == (0, ["own\n", "called for bare\n"], "")
    assert flow.states() == {"own": "success", "bare": "success"}


def test_under_json_what_the_commands_print_keeps_out_of_the_events(start: StartWorker, make: Make) -> None:
    make("own>below", own="echo hello", below="true")
    code, told, said = start("--once", "-o", "json").ended()
    assert code == 0
    assert [json.loads(line)["event"] for line in told] == ["started", "succeeded"] * 2
    assert said == "hello\n"


def test_a_command_that_a_signal_ended_fails_with_its_number(start: StartWorker, make: Make) -> None:
    flow = make("own>below", own="kill -KILL $$", below="true")
    code, _, _ = start("--once").ended()
    assert code == 128 + signal.SIGKILL, "as a shell says it"
    assert reason(flow, "own") == "signal 9"


def test_the_exit_status_decides_and_an_attempt_is_repeated_after_its_back_off(start: StartWorker, make: Make) -> None:
    flow = make("flaky>after", attempts=2, flaky="test $PGCOORD_ATTEMPT -gt 1", bad="exit 3", after="true")
    code, _, said = start("--once").ended()
    assert code == 3, "what failed for good is passed on, what was retried is not"
    assert flow.states() == {"flaky": "success", "bad": "failed", "after": "success"}
    assert reason(flow, "bad") == "exit status 3"
    assert "flaky: retried: exit status 1" in said
    assert "bad attempt 2: failed: exit status 3" in said
    assert lease_events(flow, "flaky").count("acquired") == 2


def test_what_cannot_be_started_fails_with_a_reason(start: StartWorker, make: Make) -> None:
    flow = make("missing>below", missing=["/nowhere/program"], bare=None, below="true")
    code, _, _ = start("--once").ended()
    assert code == 1
    assert flow.states() == {"missing": "failed", "bare": "failed", "below": "skipped"}
    assert "/nowhere/program" in reason(flow, "missing")
    assert "there is no command" in reason(flow, "bare")


def test_two_slots_run_two_commands_at_once(start: StartWorker, make: Make, tmp_path: Path) -> None:
    for name in ("there", "back"):
        os.mkfifo(tmp_path / name)
    # Each waits for the other one: opening a FIFO does.
    commands = {"a": "echo x > there; cat back", "b": "cat there; echo y > back"}
    flow = make(**{name: f"cd {tmp_path}; timeout 60 sh -c '{command}'" for name, command in commands.items()})
    assert start("--once", "-q", "--concurrency", "2").ended()[:2] == (0, ["x\n", "y\n"])
    assert flow.states() == {"a": "success", "b": "success"}


def test_a_slot_that_found_nothing_takes_up_what_another_one_sets_off(
    start: StartWorker, make: Make, sql: Conn, gate: Path, tmp_path: Path
) -> None:
    for name in ("there", "back"):
        os.mkfifo(tmp_path / name)
    # Each waits for the other one: opening a FIFO does.
    together = {"b": "echo x > there; cat back", "c": "cat there; echo y > back"}
    commands = {name: f"cd {tmp_path}; timeout 60 sh -c '{command}'" for name, command in together.items()}
    flow = make("a>b a>c", a=" ".join(passage(gate)), **commands)
    worker = start("--once", "-q", "--concurrency", "2")
    found_nothing = "state = 'idle' AND strpos(query, 'min(eligible_from)') > 0"
    until(lambda: value(sql, f"SELECT count(*) FROM pg_stat_activity WHERE {found_nothing}"))
    open_gate(gate)
    assert worker.ended()[:2] == (0, ["x\n", "y\n"])
    assert set(flow.states().values()) == {"success"}


def test_only_its_namespace_is_touched(start: StartWorker, make: Make) -> None:
    mine, other = make(a="true", namespace="mine"), make(a="true", namespace="other")
    assert start("--once", "--namespace", "mine").ended()[0] == 0
    assert (mine.state("a"), other.state("a")) == ("success", "eligible")


def test_a_worker_runs_more_commands_than_it_may_open_files(start: StartWorker, make: Make) -> None:
    names = [f"n{number}" for number in range(60)]
    flow = make(**dict.fromkeys(names, "true"))
    worker = start("--once", "-q")
    resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE, (64, 64))
    assert worker.ended()[0] == 0
    assert set(flow.states().values()) == {"success"}


# -- who is lost


def test_i9_a_killed_workers_flow_is_finished_by_another(start: StartWorker, make: Make, conn: Conn) -> None:
    flow = make("a>b b>c", a="true", b="test $PGCOORD_ATTEMPT -gt 1 || kill -9 $PPID", c="true")
    assert start("--once", "--lease", "1s").ended()[0] == -signal.SIGKILL
    assert flow.states() == {"a": "success", "b": "running", "c": "blocked"}
    take_back(conn)
    assert start("--once").ended()[0] == 0
    assert flow.states() == {"a": "success", "b": "success", "c": "success"}
    assert lease_events(flow, "b") == ["acquired", "expired", "reclaimed", *lease_events(flow, "b")[3:]]


@pytest.mark.parametrize("stubborn", [False, True], ids=["on TERM", "on KILL"])
def test_a_revoked_lease_ends_everything_that_the_command_started(
    start: StartWorker, make: Make, watch: Watch, conn: Conn, stubborn: bool
) -> None:
    flow = make("a>b", a=household(watch, stubborn=stubborn), b="true")
    worker = start("--once", "--lease", "1s")
    assert len(watch.until_started()) == 2
    executions.revoke(conn, flow.ids["a"])
    worker.said("a: lost")
    watch.until_all_gone()
    # What was taken away is claimed again, by this very worker, which goes on.
    assert worker.ended()[0] == 0
    assert flow.states() == {"a": "success", "b": "success"}


def test_a_cancelled_flow_ends_its_commands(start: StartWorker, make: Make, watch: Watch, conn: Conn) -> None:
    flow = make("a>b", a=household(watch), b="true")
    worker = start("--once", "--lease", "1s")
    watch.until_started()
    flows.cancel(conn, flow.flow_id)
    worker.said("a: lost")
    watch.until_all_gone()
    assert worker.ended()[0] == 0
    assert flow.states() == {"a": "cancelled", "b": "cancelled"}


@pytest.mark.parametrize("ends_meanwhile", [False, True], ids=["command runs", "command ended"])
def test_i9_a_worker_that_slept_past_its_lease_changes_nothing(
    start: StartWorker, make: Make, watch: Watch, gate: Path, conn: Conn, ends_meanwhile: bool
) -> None:
    flow = make(a=f"exec 3> {watch.path}; echo $$ >&3; exec timeout 60 cat {gate}")
    worker = start("--once", "--lease", "1s")
    watch.until_started()
    worker.freeze()
    take_back(conn)
    (claim,) = executions.claim(conn, "other", 60)
    assert (claim.lease_epoch, claim.attempt) == (2, 2)
    before = everything(flow.sql)
    if ends_meanwhile:
        open_gate(gate)
        watch.until_all_gone()
    worker.signal(signal.SIGCONT)
    worker.said("a: lost")
    watch.until_all_gone()
    assert worker.ended()[0] == 0
    assert everything(flow.sql) == before
    executions.complete(conn, claim.execution_id, claim.lease_epoch)


# -- lost connections


def cut_off_in_the_middle(start: StartWorker, flow: Flow, gate: Path) -> None:
    """Runs a worker that loses its connection while the command of `a`, which reads the gate, runs."""
    worker = start("--once")
    worker.said("a: started")
    assert terminate(flow.sql, WORKER) == 1
    open_gate(gate)
    worker.said("a: succeeded")
    assert worker.ended()[0] == 0


def test_an_end_is_reported_although_the_connection_was_cut_meanwhile(
    start: StartWorker, make: Make, gate: Path
) -> None:
    flow = make(a=passage(gate), b="true")
    cut_off_in_the_middle(start, flow, gate)
    assert flow.states() == {"a": "success", "b": "success"}
    assert (lease_events(flow, "a").count("acquired"), len(flow.events_of("a"))) == (1, 1)


def test_what_is_below_is_run_although_the_connection_was_cut_meanwhile(
    start: StartWorker, make: Make, gate: Path
) -> None:
    flow = make("a>b", a=passage(gate), b="true")
    cut_off_in_the_middle(start, flow, gate)
    assert flow.states() == {"a": "success", "b": "success"}


def test_a_lease_is_kept_although_the_connection_for_it_was_cut(
    start: StartWorker, make: Make, gate: Path, sql: Conn
) -> None:
    flow = make(a=passage(gate))
    worker = start("--once", "--lease", "6s")
    until(lambda: "renewed" in lease_events(flow, "a"))
    assert terminate(sql, WORKER) == 2  # the slot's, and the one that renews
    renewals = len(lease_events(flow, "a"))
    until(lambda: len(lease_events(flow, "a")) > renewals)
    open_gate(gate)
    code, _, said = worker.ended()
    assert (code, flow.state("a")) == (0, "success")
    assert "a: lost" not in said
    assert lease_events(flow, "a").count("acquired") == 1


# -- stopping


def test_the_first_signal_lets_the_command_in_hand_end(start: StartWorker, make: Make, gate: Path) -> None:
    flow = make(a=passage(gate), b="true")
    worker = start("--lease", "60s")
    worker.said("a: started")
    worker.signal(signal.SIGTERM)
    until(lambda: "renewed" in lease_events(flow, "a"))  # the signal woke the slot, long before its time
    open_gate(gate)
    assert worker.ended()[0] == 143
    assert flow.states() == {"a": "success", "b": "eligible"}


def test_i19_the_second_signal_ends_the_command_and_gives_its_execution_back(
    start: StartWorker, make: Make, watch: Watch
) -> None:
    flow = make(a=household(watch), b="true")
    worker = start("--lease", "60s")
    watch.until_started()
    worker.signal(signal.SIGTERM)
    until(lambda: "renewed" in lease_events(flow, "a"))
    worker.signal(signal.SIGTERM)
    worker.said("a: given back")
    watch.until_all_gone()
    assert worker.ended()[0] == 143
    assert flow.states() == {"a": "eligible", "b": "eligible"}
    assert lease_events(flow, "a")[-1] == "revoked"
    assert value(flow.sql, "SELECT count(*) FROM execution_leases") == 0


def test_ctrl_c_of_an_idle_worker_ends_it(start: StartWorker, sql: Conn) -> None:
    worker = start()
    until_followed(sql)
    assert worker.end(signal.SIGINT)[0] == 130


# -- dispatch beside the work


def test_a_worker_that_stays_carries_completions_on(start: StartWorker, make: Make, sql: Conn) -> None:
    worker = start()
    until_followed(sql)
    flow = make("a>b b>c", a="true", b="true", c="true")
    worker.said("c: succeeded")
    until(lambda: not flow.undispatched())
    assert worker.end(signal.SIGTERM)[0] == 143


def test_a_leader_with_dispatch_carries_completions_on(start_leader: StartLeader, make: Make, sql: Conn) -> None:
    start_leader("A", "--with", "dispatch").wait_for("elected epoch")
    until_followed(sql)
    flow = make("a>b", a="true", b="true")
    flow.end("a")
    until(lambda: flow.state("b") == "eligible")
    flow.end("b")
    until(lambda: not flow.undispatched())
