"""Cascades whose dispatcher is killed, and large ones (rule I9): the final graph follows the policies."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import count

import psycopg
import pytest

from pgcoord_cli.core.flows import executions
from pgcoord_cli.core.flows.dispatch import dispatch_all, dispatch_completion
from pgcoord_cli.core.flows.flow_file import FlowPlan, PlannedExecution
from pgcoord_cli.core.flows.join_policy import JoinPolicy, PolicyKind
from pgcoord_cli.core.flows.reconcile import Scope, dependency
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.conftest import environment
from tests.postgres.flow_world import (
    ANY,
    ANY_CANCEL,
    TABLES,
    Conn,
    Flow,
    Make,
    assert_sound,
    chain,
    column,
    everything,
    expected_states,
    mortal_session,
    plan,
    sessions,
)

HOPS = 10
KILLS = 2
"""How often the dispatcher is killed at each site of each hop."""


def tick(conn: Conn, limit: int = 1_000) -> int:
    """Runs one tick of the reconciler, without errors; returns how many events it dispatched."""
    done = dependency(conn, Scope(limit, stale_threshold_ms=0), lambda event, why: pytest.fail(f"event {event}: {why}"))
    return done.reconciled


# -- the session of a dispatch is terminated


@pytest.fixture
def crash_sites(sql: Conn) -> None:
    """Adds crash sites before and after every statement on every table, and before the commit.

    A session terminates itself at the site with the number in its setting `test.crash_at`. Each transaction counts its
    sites from 1; 0 is no site.
    """
    sql.execute(
        b"""
        CREATE FUNCTION crash_site() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            site integer := coalesce(nullif(current_setting('test.site', true), ''), '0')::integer + 1;
        BEGIN
            PERFORM set_config('test.site', site::text, true);
            IF site::text = current_setting('test.crash_at', true) THEN
                PERFORM pg_terminate_backend(pg_backend_pid(), 30000);
            END IF;
            RETURN NULL;
        END $$
        """
    )
    for table in TABLES:
        for moment in ("BEFORE", "AFTER"):
            sql.execute(f"""CREATE TRIGGER crash_{moment} {moment} INSERT OR UPDATE OR DELETE ON {table}
                            FOR EACH STATEMENT EXECUTE FUNCTION crash_site()""".encode())  # fmt: skip
    sql.execute(
        b"""CREATE CONSTRAINT TRIGGER crash_at_commit AFTER UPDATE ON completion_events DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION crash_site()"""
    )


def dies(settings: Settings, event: int, site: int) -> bool:
    """Dispatches an event in a session that is terminated at a crash site; returns whether it got that far."""
    with closing(mortal_session(settings, **{"test.crash_at": str(site)})) as mortal:
        try:
            dispatch_completion(mortal, event)
        except psycopg.OperationalError:
            return True
        return False


def hop_with_crashes(settings: Settings, flow: Flow, event: int) -> int:
    """Dispatches an event, terminated KILLS times at every crash site; returns the number of sites."""
    before = everything(flow.sql)
    for site in count(1):
        for _ in range(KILLS):
            if not dies(settings, event, site):
                return site - 1
            assert everything(flow.sql) == before, f"a crash at site {site} left a part of the hop"
    raise AssertionError


def ladder(policy: JoinPolicy) -> FlowPlan:
    """Returns a plan of ten rungs, each below the previous rung and a helper; the last needs a quorum of the rungs."""
    rungs = [f"r{number}" for number in range(HOPS + 1)]
    helpers = [f"h{number}" for number in range(1, HOPS + 1)]
    edges = [(rungs[number], rungs[number + 1]) for number in range(HOPS)]
    edges += list(zip(helpers, rungs[1:], strict=True)) + [(rung, "most") for rung in rungs]
    policies = dict.fromkeys(rungs[1:], policy) | {"most": JoinPolicy(PolicyKind.QUORUM, HOPS // 2)}
    planned = [PlannedExecution(name) for name in (*rungs[:1], *helpers, *rungs[1:], "most")]
    return FlowPlan(None, None, planned, edges, policies)


def assert_final_states(flow: Flow, outcomes: dict[str, str]) -> None:
    """Ends and reconciles the rest, and compares the states with the pure function."""
    while tick(flow.conn) or end_eligible(flow):
        pass
    if ANY_CANCEL not in flow.plan.policies.values():
        assert flow.states() == expected_states(flow.plan, outcomes)
    assert_sound(flow)


def end_eligible(flow: Flow) -> bool:
    """Ends every eligible execution as a success; returns whether there was one."""
    claims = executions.claim(flow.conn, "tester", limit=1_000)
    for claim in claims:
        executions.complete(flow.conn, claim.execution_id, claim.lease_epoch)
    return bool(claims)


@pytest.mark.usefixtures("crash_sites")
def test_i9_a_cascade_of_skips_survives_a_kill_at_every_site_of_every_hop(settings: Settings, make: Make) -> None:
    flow = make(ladder(JoinPolicy()))
    event = flow.end("r0", "failed")
    for hop in range(1, HOPS + 1):
        assert hop_with_crashes(settings, flow, event) > 10
        assert flow.state(f"r{hop}") == "skipped"
        event = flow.event(f"r{hop}")
    assert_final_states(flow, dict.fromkeys(flow.ids, "success") | {"r0": "failed"})


@pytest.mark.usefixtures("crash_sites")
def test_i9_a_cascade_that_cancels_survives_a_kill_at_every_site_of_every_hop(settings: Settings, make: Make) -> None:
    flow = make(ladder(ANY_CANCEL))
    for hop in range(1, HOPS + 1):
        event = flow.end(f"r{hop - 1}")
        assert hop_with_crashes(settings, flow, event) > 10
        assert (flow.state(f"r{hop}"), flow.outcome(f"h{hop}")) == ("eligible", "cancelled")
    assert_final_states(flow, dict.fromkeys(flow.ids, "success"))
    assert [len(flow.events_of(f"h{hop}")) for hop in range(1, HOPS + 1)] == [1] * HOPS


# -- the dispatching process is killed


GATE = 5
"""The key of the advisory lock that dispatches have to pass."""


@pytest.fixture
def gate(sql: Conn) -> None:
    """A lock that every hop takes when it has done everything except the commit."""
    sql.execute(
        f"""
        CREATE FUNCTION pass_gate() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER gate AFTER UPDATE ON completion_events DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION pass_gate()
        """.encode()
    )


WAITERS = f"""SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = {GATE} AND NOT granted
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
OTHERS = """SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'pgcoord/reconcile'"""


@contextmanager
def reconciler(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """`pgcoord reconcile dependency --drain` in its own process, which is killed at the end of the block."""
    words = ["reconcile", "dependency", "--drain", "--stale-threshold-ms", "0", "--batch-limit", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", *words], env=environment(settings),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT)


@pytest.mark.usefixtures("gate")
@pytest.mark.parametrize("is_session_lost", [False, True], ids=["the hop commits", "the hop is lost"])
def test_i9_a_reconciler_killed_in_every_hop_is_replaced_by_the_next(
    settings: Settings, make: Make, sql: Conn, is_session_lost: bool
) -> None:
    """Kills the process before the commit. The server commits, or first detects that the client is gone."""
    flow = make(chain(4))
    flow.end("n0", "failed")
    for hop in range(1, 5):
        with closing(mortal_session(settings)) as keeper:
            keeper.execute("SELECT pg_advisory_lock($1)", [GATE])
            with reconciler(settings):
                until(lambda: column(sql, WAITERS))
            if is_session_lost:
                sql.execute(f"SELECT pg_terminate_backend(pid) FROM ({WAITERS}) AS waiter".encode())
        until(lambda: not value(sql, OTHERS))
        if is_session_lost:
            assert flow.state(f"n{hop}") == "blocked"
            assert tick(flow.conn, 1) == 1
        assert flow.state(f"n{hop}") == "skipped"
    assert_final_states(flow, {"n0": "failed"})


# -- large graphs


def timed(what: str, verb: Callable[[], object]) -> None:
    """Runs `work` and prints how long it took, without asserting anything about it."""
    begun = time.monotonic()
    verb()
    print(f"{what}: {time.monotonic() - begun:.2f} s")


def end_everything(flow: Flow, outcome: str = "success") -> None:
    """Ends every eligible execution in one transaction."""
    verb = executions.complete if outcome == "success" else executions.fail
    with flow.conn.transaction():
        for claim in executions.claim(flow.conn, "tester", limit=100_000):
            verb(flow.conn, claim.execution_id, claim.lease_epoch)


def drain(conn: Conn) -> int:
    """Ticks until nothing is left; returns how many ticks dispatched something."""
    return next(number for number in count() if not tick(conn))


@contextmanager
def many(settings: Settings, number: int = 4) -> Iterator[Callable[[Callable[[Conn], object]], None]]:
    """Yields a function that runs something in four sessions at once."""
    with sessions(settings, number) as conns, ThreadPoolExecutor(number) as pool:

        def at_once(work: Callable[[Conn], object]) -> None:
            for _ in pool.map(work, conns):
                pass

        yield at_once


def dispatch_shuffled(conn: Conn, events: list[int]) -> None:
    """Dispatches each event in its own transaction, in random order."""
    for event in random.sample(events, len(events)):
        dispatch_completion(conn, event)


@pytest.mark.slow
@pytest.mark.usefixtures("no_retry")
@pytest.mark.parametrize("policy", [JoinPolicy(), ANY, ANY_CANCEL], ids=["all_of", "any_of", "cancel_remaining"])
def test_i9_a_downstream_of_a_thousand_upstreams(settings: Settings, make: Make, policy: JoinPolicy) -> None:
    names = [f"u{number}" for number in range(1_000)]
    flow = make(plan(" ".join([*names, "d"]), " ".join(f"{name}>d" for name in names), d=policy))
    end_everything(flow)
    events = flow.undispatched()
    with many(settings) as at_once:
        timed("1,000 upstreams, one by one, 4 at once", lambda: at_once(partial(dispatch_shuffled, events=events)))
    end_everything(flow)
    flow.settle()
    assert flow.state("d") == "success"
    assert_sound(flow)


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["success", "failed"])
def test_i9_an_upstream_of_ten_thousand_downstreams(make: Make, outcome: str) -> None:
    names = [f"d{number}" for number in range(10_000)]
    flow = make(plan(" ".join(["u", *names]), " ".join(f"u>{name}" for name in names)))
    event = flow.end("u", outcome)
    timed("10,000 downstreams", lambda: dispatch_all(flow.conn, [event]))
    below = "eligible" if outcome == "success" else "skipped"
    assert flow.states() == {"u": outcome} | dict.fromkeys(names, below)
    query = "SELECT count(*) FROM edge_groups WHERE state <> 'pending' AND running_count = 0"
    assert value(flow.sql, query) == 10_000
    assert value(flow.sql, "SELECT count(*) FROM edges WHERE outcome = %s", outcome) == 10_000


@pytest.mark.slow
def test_i9_a_chain_of_a_thousand_needs_one_tick_for_each_hop(make: Make) -> None:
    flow = make(chain(1_000))
    flow.end("n0", "failed")
    timed("a chain of 1,000, a tick a hop", lambda: drain_exactly(flow.conn, 1_001))
    assert flow.states() == expected_states(flow.plan, {"n0": "failed"})
    assert_sound(flow)


def drain_exactly(conn: Conn, ticks: int) -> None:
    assert drain(conn) == ticks


def lattice(size: int, policy: JoinPolicy) -> FlowPlan:
    """Returns a square plan in which each execution has its upper and its left neighbour upstream."""
    cells = [(row, column) for row in range(size) for column in range(size)]
    names = {cell: f"c{cell[0]}_{cell[1]}" for cell in cells}
    edges = [
        (names[row - down, column - right], names[row, column])
        for row, column in cells
        for down, right in ((1, 0), (0, 1))
        if (row - down, column - right) in names
    ]
    policies = {name: policy for (row, column), name in names.items() if row or column}
    return FlowPlan(None, None, [PlannedExecution(name) for name in names.values()], edges, policies)


@pytest.mark.slow
@pytest.mark.usefixtures("no_retry")
@pytest.mark.parametrize("outcome", ["success", "failed"])
@pytest.mark.parametrize("policy", [JoinPolicy(), ANY, ANY_CANCEL], ids=["all_of", "any_of", "cancel_remaining"])
def test_i9_a_lattice_with_four_dispatchers(settings: Settings, make: Make, policy: JoinPolicy, outcome: str) -> None:
    flow = make(lattice(20, policy))
    outcomes = dict.fromkeys(flow.ids, outcome)

    def run() -> None:
        with many(settings) as at_once:
            end_everything(flow, outcome)
            while events := flow.undispatched():
                at_once(partial(dispatch_shuffled, events=events))
                end_everything(flow, outcome)

    timed(f"a lattice of 20 × 20, 4 at once, {outcome}", run)
    if policy != ANY_CANCEL:
        assert flow.states() == expected_states(flow.plan, outcomes)
    assert_sound(flow)
