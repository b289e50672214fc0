"""`pgcoord reconcile`: the report of a tick, silence, failed dispatches, and the end of its loop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pgcoord_cli.core.flows import executions
from pgcoord_cli.core.flows.reconcile import QUARANTINE_AFTER
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.program_process import Lines, environment
from tests.postgres.flow_world import Conn, Flow, Make, chain, everything, plan, sessions

if TYPE_CHECKING:
    from tests.conftest import Call

KEYS = ["scanned", "reconciled", "noop", "filtered", "errors"]
NOTHING = dict.fromkeys(KEYS, 0)
RECONCILERS = ["lease-expiry", "sibling-cancel", "dependency", "orphaned-commits"]

NOW = ["--stale-threshold-ms", "0"]


@pytest.fixture
def reconcile(call: Call) -> Call:
    """Runs `pgcoord reconcile …` in this process, with a threshold of 0 ms."""
    return partial(call, "reconcile", *NOW)


@pytest.fixture
def make(settings: Settings, sql: Conn) -> Iterator[Make]:
    with sessions(settings, 1) as (conn,):
        yield lambda plan: Flow(conn, sql, plan)


def break_dispatch(sql: Conn, flow: Flow, name: str) -> None:
    """Makes every dispatch that would count an edge into that execution fail."""
    sql.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'this group is broken';
        END
        $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON edge_groups FOR EACH ROW
            WHEN (OLD.downstream_id = '{flow.ids[name]}') EXECUTE FUNCTION refuse()
        """.encode()
    )


def mend_dispatch(sql: Conn) -> None:
    sql.execute("DROP TRIGGER refuse ON edge_groups")


@pytest.fixture
def broken(make: Make, sql: Conn) -> tuple[Flow, int]:
    """Two pairs of executions, the first of each ended; and the event whose dispatch fails, that of a."""
    flow = make(plan("a b c d", "a>c b>d"))
    break_dispatch(sql, flow, "c")
    event = flow.end("a")
    flow.end("b")
    return flow, event


@pytest.fixture
def quarantined(broken: tuple[Flow, int], reconcile: Call, sql: Conn) -> tuple[Flow, int]:
    """The same, after the last attempt."""
    for _ in range(QUARANTINE_AFTER):
        assert reconcile("dependency").code == 1
        sql.execute("UPDATE dispatch_failures SET retry_at = '-infinity'")  # no pause
    return broken


# -- reports


def test_a_tick_reports_on_every_reconciler_in_json(reconcile: Call) -> None:
    document = reconcile("-o", "json").document
    assert list(document) == RECONCILERS
    assert all(list(tick) == KEYS and tick == NOTHING for tick in document.values())


def test_i9_a_tick_dispatches_what_a_crash_left_behind(reconcile: Call, make: Make, sql: Conn) -> None:
    flow = make(plan("a b c", "a>b"))
    flow.end("a")
    flow.claim("c")
    sql.execute("UPDATE execution_leases SET expires_at = '-infinity'")
    document = reconcile("-o", "json").document
    assert document["dependency"] == NOTHING | {"scanned": 1, "reconciled": 1}
    assert document["lease-expiry"] == NOTHING | {"scanned": 1, "reconciled": 1}
    assert flow.states() == {"a": "success", "b": "eligible", "c": "eligible"}


@pytest.mark.parametrize("which", RECONCILERS)
def test_one_reconciler_can_be_named(reconcile: Call, make: Make, sql: Conn, which: str) -> None:
    flow = make(plan("a b c", "a>b"))
    flow.end("a")
    flow.claim("c")
    sql.execute("UPDATE execution_leases SET expires_at = '-infinity'")
    assert list(reconcile(which, "-o", "json").document) == [which]
    assert (flow.state("b") == "eligible") == (which == "dependency")
    assert (flow.state("c") == "eligible") == (which == "lease-expiry")


def test_a_table_has_a_row_for_each_reconciler(reconcile: Call) -> None:
    assert reconcile("-o", "csv").out.splitlines() == [
        ",".join(["reconciler", *KEYS]), *(f"{name},0,0,0,0,0" for name in RECONCILERS),
    ]  # fmt: skip


def test_quiet_prints_only_when_something_was_done(reconcile: Call, make: Make) -> None:
    assert reconcile("-q") == (0, "", "")
    make(plan("a b", "a>b")).end("a")
    answer = reconcile("-q")
    assert (answer.code, answer.err) == (0, "")
    assert "dependency" in answer.out


def test_i12_a_young_event_is_not_dispatched(call: Call, make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    assert call("reconcile", "dependency", "--stale-threshold-ms", "3600000", "-o", "json").document == {
        "dependency": NOTHING
    }
    assert flow.state("b") == "blocked"


def test_filters_leave_out_other_events_and_count_them(reconcile: Call, make: Make) -> None:
    mine = make(plan("a b", "a>b", namespace="mine", tag="v1"))
    others = [make(plan("a b", "a>b", namespace="mine", tag="v2")), make(plan("a b", "a>b"))]
    for flow in (mine, *others):
        flow.end("a")
    document = reconcile("dependency", "--namespace", "mine", "--instance-tag", "v1", "-o", "json").document
    assert document == {"dependency": NOTHING | {"scanned": 1, "reconciled": 1, "filtered": 2}}
    assert [flow.state("b") for flow in (mine, *others)] == ["eligible", "blocked", "blocked"]


def test_the_batch_limit_bounds_a_tick_and_drain_repeats_until_nothing_is_left(reconcile: Call, make: Make) -> None:
    flow = make(plan("a b c"))
    for name in ("a", "b", "c"):
        flow.end(name)
    limited = "dependency", "--batch-limit", "1", "-o", "json"
    assert reconcile(*limited).document["dependency"]["reconciled"] == 1
    assert reconcile(*limited, "--drain").document["dependency"] == NOTHING | {"scanned": 2, "reconciled": 2}


def test_drain_dispatches_a_cascade_to_its_end(reconcile: Call, make: Make) -> None:
    flow = make(chain(5))
    flow.end("n0", "failed")
    assert reconcile("--drain", "-o", "json").document["dependency"]["reconciled"] == 6
    assert set(flow.states().values()) == {"failed", "skipped"}
    assert flow.undispatched() == []


# -- failed dispatches


def test_a_failing_event_is_reported_and_the_others_are_dispatched(reconcile: Call, broken: tuple[Flow, int]) -> None:
    flow, event = broken
    answer = reconcile("-o", "json")
    assert answer.code == 1
    assert answer.document["dependency"] == NOTHING | {"scanned": 2, "reconciled": 1, "errors": 1}
    assert f"event {event}: this group is broken (attempt 1)" in answer.err
    assert flow.states() == {"a": "success", "b": "success", "c": "blocked", "d": "eligible"}


def test_errors_are_reported_under_quiet_too(reconcile: Call, broken: tuple[Flow, int]) -> None:
    answer = reconcile("-q")
    assert (answer.code, "this group is broken" in answer.err) == (1, True)


def test_drain_ends_although_an_event_fails(reconcile: Call, broken: tuple[Flow, int]) -> None:
    flow, _ = broken
    answer = reconcile("--drain", "-o", "json")
    assert (answer.code, answer.document["dependency"]["errors"]) == (1, 1)
    assert flow.state("d") == "eligible"


def test_nothing_is_quarantined_at_first(reconcile: Call, broken: tuple[Flow, int]) -> None:
    assert reconcile("dependency").code == 1
    assert reconcile("--list-quarantined", "-o", "json").document == []
    assert reconcile("--list-quarantined") == (0, "", "no event is quarantined\n")


def test_an_event_that_keeps_failing_is_quarantined_and_listed(reconcile: Call, quarantined: tuple[Flow, int]) -> None:
    flow, event = quarantined
    assert reconcile("-q") == (0, "", "")
    (row,) = reconcile("--list-quarantined", "-o", "json").document
    assert (row["event_id"], row["execution_id"], row["flow_id"]) == (event, str(flow.ids["a"]), str(flow.flow_id))
    assert (row["outcome"], row["attempts"], row["last_error"]) == ("success", QUARANTINE_AFTER, "this group is broken")


@pytest.mark.parametrize("by_id", [False, True], ids=["all", "by id"])
def test_a_quarantined_event_is_retried_on_request(
    reconcile: Call, quarantined: tuple[Flow, int], sql: Conn, by_id: bool
) -> None:
    flow, event = quarantined
    mend_dispatch(sql)
    assert reconcile("--retry", str(event + 1), "-o", "json").document == {"retried": 0}
    assert reconcile("dependency", "-o", "json").document["dependency"] == NOTHING
    assert reconcile("--retry", str(event) if by_id else "all", "-o", "json").document == {"retried": 1}
    assert flow.state("c") == "blocked"  # only requested
    assert reconcile("dependency", "-o", "json").document["dependency"]["reconciled"] == 1
    assert flow.state("c") == "eligible"


@pytest.mark.parametrize("word", ["some", "-1", "1.5", "", str(2**63)])
def test_retry_takes_an_id_or_all(reconcile: Call, word: str) -> None:
    assert "neither an event id nor all" in reconcile(f"--retry={word}", "-o", "json").refusal


@pytest.mark.parametrize("words", [["nobody"], ["--batch-limit", "0"], ["--stale-threshold-ms", "-1"],
                                   ["--loop", "--interval", "0s"], ["--interval", "soon"]])  # fmt: skip
def test_invalid_options_are_refused(offline: Call, words: list[str]) -> None:
    assert offline("reconcile", *words, "-o", "json").refusal


# -- the loop


@contextmanager
def loop(settings: Settings, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], Lines]]:
    """A process of `pgcoord reconcile --loop -o json`, and its lines."""
    with subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", "reconcile", "--loop", "-o", "json", *NOW, *words],
        env=environment(settings.dsn), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        lines = Lines(process.stdout)
        try:
            yield process, lines
        finally:
            process.kill()
            lines.close()


def ticks(lines: Lines) -> Iterator[dict[str, Any]]:
    for line in iter(lines.next, None):
        yield json.loads(line)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, -signal.SIGINT)])
def test_a_loop_ends_on_a_signal_in_the_middle_of_its_interval(
    settings: Settings, number: signal.Signals, code: int
) -> None:
    with loop(settings, "--interval", "1h") as (process, lines):
        assert list(next(ticks(lines))) == RECONCILERS
        process.send_signal(number)
        assert process.wait(TIMEOUT) == code


def test_a_loop_ticks_repeatedly(settings: Settings, make: Make) -> None:
    with loop(settings, "--interval", "10ms") as (process, lines):
        next(ticks(lines))
        flow = make(plan("a b", "a>b"))
        flow.end("a")
        assert any(tick["dependency"]["reconciled"] for tick in ticks(lines))
        assert flow.state("b") == "eligible"
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def test_i17_a_loop_survives_a_lost_connection(settings: Settings, make: Make, sql: Conn) -> None:
    """A tick waits for a lock, and its session is terminated meanwhile; the next tick has a new session."""
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    waiting = """SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/reconcile'
                    AND datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"""
    with sessions(settings, 1) as (other,), ExitStack() as stack:
        with other.transaction():
            other.execute("LOCK TABLE edge_groups IN ACCESS EXCLUSIVE MODE")
            process, lines = stack.enter_context(loop(settings, "--interval", "10ms"))
            until(lambda: sql.execute(waiting).fetchone())
            assert value(sql, f"SELECT pg_terminate_backend(({waiting}))")
        assert any(tick["dependency"]["reconciled"] for tick in ticks(lines))
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def test_listing_changes_nothing(reconcile: Call, quarantined: tuple[Flow, int], sql: Conn) -> None:
    before = everything(sql)
    reconcile("--list-quarantined")
    assert everything(sql) == before


def test_an_execution_with_a_valid_lease_is_not_changed(reconcile: Call, make: Make) -> None:
    flow = make(plan("a"))
    claim = flow.claim("a")
    assert reconcile("lease-expiry", "-o", "json").document["lease-expiry"] == NOTHING
    executions.complete(flow.conn, claim.execution_id, claim.lease_epoch)
