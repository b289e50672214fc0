"""Dispatch (rule I9): the final graph does not depend on which dispatcher dispatches which event, when or how often."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pgcoord_cli.core.events.outbox import append_completion_event
from pgcoord_cli.core.flows import executions
from pgcoord_cli.core.flows.dispatch import TRIES, Advanced, NoOp, dispatch_all, dispatch_completion
from pgcoord_cli.core.flows.dispatcher import CompletionDispatcher
from pgcoord_cli.core.flows.flow_file import FlowPlan, PlannedExecution
from pgcoord_cli.core.flows.join_policy import JoinPolicy, OnSatisfied, PolicyKind
from pgcoord_cli.errors import Fenced
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.postgres.flow_world import (
    ANY,
    ANY_CANCEL,
    Conn,
    Flow,
    Group,
    Make,
    assert_sound,
    column,
    duplicate,
    ended,
    everything,
    expected_states,
    plan,
    sessions,
    until_waiting,
    uuid_of,
    work,
)

# -- one event


@pytest.mark.parametrize("below", [0, 1, 3])
def test_i9_a_dispatch_returns_how_many_edges_it_counted(make: Make, below: int) -> None:
    names = [f"d{number}" for number in range(below)]
    flow = make(plan(" ".join(["a", *names]), " ".join(f"a>{name}" for name in names)))
    assert dispatch_completion(flow.conn, flow.end("a")) == Advanced(below)
    assert [flow.state(name) for name in names] == ["eligible"] * below
    assert flow.undispatched() == []


def test_i9_a_dispatched_or_missing_event_is_a_no_op(make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    event = flow.end("a")
    assert dispatch_completion(flow.conn, event) == Advanced(1)
    before = everything(sql)
    for nothing in (event, event + 1, 0, -1, 2**63 - 1):
        assert dispatch_completion(flow.conn, nothing) == NoOp()
    assert dispatch_all(flow.conn, []) == {}
    assert everything(sql) == before


def test_i9_a_dispatcher_begins_with_what_was_committed_before_it(make: Make, settings: Settings) -> None:
    flow = make(plan("a b c", "a>b b>c"))
    flow.end("a")
    with CompletionDispatcher(settings, pytest.fail).running():
        until(lambda: flow.state("b") == "eligible")
        flow.end("b")
        until(lambda: flow.state("c") == "eligible")


def test_i9_a_completion_of_an_unknown_execution_counts_no_edge(conn: Conn, sql: Conn) -> None:
    event = append_completion_event(conn, uuid_of(7), "success")
    assert dispatch_completion(conn, event) == Advanced(0)
    assert dispatch_completion(conn, event) == NoOp()


@pytest.mark.parametrize("outcome", ["success", "failed", "running", "no such outcome"])
def test_i18_an_event_by_hand_does_not_end_an_execution_of_others(outcome: str, make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.claim("a")
    forged = insert_by_hand(sql, flow, outcome)
    assert dispatch_completion(flow.conn, forged) == Advanced(0)
    assert (flow.states(), flow.group("b")) == ({"a": "running", "b": "blocked"}, Group("pending", running=1))
    executions.complete(flow.conn, flow.ids["a"], flow.claims["a"].lease_epoch)
    (event,) = flow.undispatched()
    assert dispatch_completion(flow.conn, event) == Advanced(1)
    assert flow.state("b") == "eligible"


def test_i18_an_event_by_hand_with_another_outcome_than_the_execution_had_counts_nothing(make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.claim("a")
    forged = insert_by_hand(sql, flow, "success")
    executions.fail(flow.conn, flow.ids["a"], flow.claims["a"].lease_epoch, "on purpose")
    (event,) = {*flow.undispatched()} - {forged}
    assert dispatch_all(flow.conn, [forged, event]) == {forged: 0, event: 1}
    assert flow.state("b") == "skipped"


def insert_by_hand(sql: Conn, flow: Flow, outcome: str) -> int:
    """Inserts a completion event of the execution `a`, as a client may; returns its id."""
    query = "INSERT INTO completion_events (execution_id, flow_id, outcome) VALUES (%s, %s, %s) RETURNING event_id"
    return int(value(sql, query, flow.ids["a"], flow.flow_id, outcome))


def test_i9_an_edge_is_counted_once_although_its_completion_is_written_repeatedly(make: Make, sql: Conn) -> None:
    flow = make(plan("a b c", "a>c b>c"))
    first = flow.end("a")
    second = duplicate(sql, first)
    assert dispatch_completion(flow.conn, second) == Advanced(1)
    third = duplicate(sql, first)
    assert dispatch_all(flow.conn, [third, first]) == {first: 0, third: 0}
    assert flow.group("c") == Group("pending", successes=1, running=1)
    assert flow.state("c") == "blocked"


def test_i9_of_two_completions_of_one_execution_in_a_dispatch_the_first_counts(make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    first = flow.end("a")
    second = duplicate(sql, first)
    sql.execute("UPDATE completion_events SET outcome = 'failed' WHERE event_id = %s", [second])
    assert dispatch_all(flow.conn, [second, first, second]) == {first: 1, second: 0}
    assert flow.group("b") == Group("satisfied", successes=1)


# -- policies


class Case(NamedTuple):
    """The outcomes of a, b and c in the order of their ends, and the verdict of their downstream after each."""

    policy: JoinPolicy
    outcomes: str
    verdicts: str


CASES = [
    Case(JoinPolicy(), "sss", "pps"),
    Case(JoinPolicy(), "ssf", "ppi"),
    Case(JoinPolicy(), "fss", "iii"),
    Case(ANY, "sff", "sss"),
    Case(ANY, "ffs", "pps"),
    Case(ANY, "fff", "ppi"),
    Case(JoinPolicy(PolicyKind.QUORUM, 2), "sfs", "pps"),
    Case(JoinPolicy(PolicyKind.QUORUM, 2), "ssf", "pss"),
    Case(JoinPolicy(PolicyKind.QUORUM, 2), "fsf", "ppi"),
    Case(JoinPolicy(PolicyKind.QUORUM, 2), "ffs", "pii"),
    Case(JoinPolicy(PolicyKind.QUORUM, 1), "ffs", "pps"),
    Case(JoinPolicy(PolicyKind.QUORUM, 3), "fss", "iii"),
]
WORDS = {"p": "pending", "s": "satisfied", "i": "impossible"}
STATES = {"p": "blocked", "s": "eligible", "i": "skipped"}


def test_i9_a_policy_is_judged_after_every_completion(make: Make) -> None:
    for policy, outcomes, verdicts in CASES:
        flow = make(plan("a b c d", "a>d b>d c>d", d=policy))
        for number, (name, outcome, verdict) in enumerate(zip("abc", outcomes, verdicts, strict=True), start=1):
            dispatch_completion(flow.conn, flow.end(name, "success" if outcome == "s" else "failed"))
            successes = outcomes[:number].count("s")
            assert flow.group("d") == Group(WORDS[verdict], successes, number - successes, 0, 3 - number)
            assert flow.state("d") == STATES[verdict]
        executions.claim(flow.conn, "another worker", limit=9)


def test_i9_an_impossible_execution_ends_as_skipped_and_the_cascade_continues(make: Make) -> None:
    flow = make(plan("bad good b c d any", "bad>b b>c c>d good>any d>any", any=ANY))
    dispatch_completion(flow.conn, flow.end("bad", "failed"))
    for name, below in (("b", "c"), ("c", "d"), ("d", "any")):
        assert (flow.state(name), flow.outcome(name)) == ("skipped", "skipped")
        assert flow.state(below) == "blocked", "one dispatch is one hop"
        assert dispatch_completion(flow.conn, flow.event(name)) == Advanced(1)
    assert flow.group("any") == Group("pending", skips=1, running=1)
    dispatch_completion(flow.conn, flow.end("good"))
    assert flow.group("any") == Group("satisfied", successes=1, skips=1)
    flow.end("any")
    flow.settle()
    assert_sound(flow)


# -- cancel_remaining


def race(*, above: str = "") -> FlowPlan:
    """Five upstreams of `goal`: `winner` will succeed, the others are in the other states."""
    edges = f"winner>goal running>goal eligible>goal blocked>goal lost>goal gate>blocked {above}"
    return plan("winner lost running gate eligible blocked goal", edges, goal=ANY_CANCEL)


def make_race(make: Make) -> Flow:
    """Creates the race and brings it to the point where `winner` can succeed."""
    flow = make(race())
    dispatch_completion(flow.conn, flow.end("lost", "failed"))
    flow.claim("gate")
    return flow


def test_i9_siblings_of_a_winner_are_cancelled_once_and_the_winner_is_not(make: Make) -> None:
    flow = make_race(make)
    assert dispatch_completion(flow.conn, flow.end("winner")) == Advanced(1)
    assert flow.states() == {
        "winner": "success", "lost": "failed", "running": "cancelled", "eligible": "cancelled",
        "blocked": "cancelled", "gate": "running", "goal": "eligible",
    }  # fmt: skip
    flow.end("gate")
    flow.settle()
    assert flow.state("blocked") == "cancelled", "and stays cancelled when its own upstream succeeds"
    flow.end("goal")
    flow.settle()
    assert flow.group("goal") == Group("satisfied", successes=1, fails=4)
    assert_sound(flow)
    assert [len(flow.events_of(name)) for name in flow.ids] == [1] * 7


def test_i9_the_worker_of_a_cancelled_sibling_is_fenced_and_its_lease_event_says_revoked(make: Make) -> None:
    flow = make_race(make)
    claim = flow.claims["running"]
    dispatch_completion(flow.conn, flow.end("winner"))
    query = "SELECT event_type FROM lease_events WHERE lease_id = %s ORDER BY event_id"
    assert column(flow.sql, query, str(claim.lease_id)) == ["acquired", "revoked"]
    before = everything(flow.sql)
    with pytest.raises(Fenced):
        executions.complete(flow.conn, claim.execution_id, claim.lease_epoch)
    assert everything(flow.sql) == before


def test_i9_a_sibling_that_succeeds_concurrently_is_not_cancelled(settings: Settings, make: Make, sql: Conn) -> None:
    flow = make(plan("a b goal", "a>goal b>goal", goal=ANY_CANCEL))
    event, claim = flow.end("a"), flow.claim("b")
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        with other.transaction():
            executions.complete(other, claim.execution_id, claim.lease_epoch)
            dispatching = pool.submit(dispatch_completion, flow.conn, event)
            until_waiting(sql, flow.conn)
        assert dispatching.result(TIMEOUT) == Advanced(1)
    assert flow.states() == {"a": "success", "b": "success", "goal": "eligible"}
    flow.settle()
    assert flow.group("goal") == Group("satisfied", successes=2)
    assert len(flow.events_of("b")) == 1


@pytest.mark.parametrize("verdict", ["pending", "impossible"])
def test_i9_siblings_of_an_unsatisfied_policy_are_not_cancelled(make: Make, verdict: str) -> None:
    policy = JoinPolicy(PolicyKind.QUORUM, 2 if verdict == "pending" else 3, OnSatisfied.CANCEL_REMAINING)
    flow = make(plan("a b c goal", "a>goal b>goal c>goal", goal=policy))
    dispatch_completion(flow.conn, flow.end("a", "failed"))
    assert flow.group("goal").state == verdict
    assert [flow.state(name) for name in "bc"] == ["eligible"] * 2


def test_i9_siblings_of_a_satisfied_policy_with_let_run_are_not_cancelled(make: Make) -> None:
    flow = make(plan("a b c goal", "a>goal b>goal c>goal", goal=ANY))
    flow.claim("b")
    dispatch_completion(flow.conn, flow.end("a"))
    assert [flow.state(name) for name in "bc"] == ["running", "eligible"]


# -- concurrent dispatchers


def test_i9_an_event_that_another_session_is_dispatching_is_skipped(settings: Settings, make: Make) -> None:
    flow = make(plan("a b c", "a>b a>c"))
    event = flow.end("a")
    with sessions(settings, 1) as (other,):
        with other.transaction(force_rollback=True):
            assert dispatch_completion(other, event) == Advanced(2)
            assert dispatch_completion(flow.conn, event) == NoOp(), "skipped without waiting"
        assert flow.undispatched() == [event]
        assert flow.states() == {"a": "success", "b": "blocked", "c": "blocked"}
        assert dispatch_completion(flow.conn, event) == Advanced(2)


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
def test_i9_two_dispatchers_with_one_downstream_wait_for_each_other_and_both_count(
    settings: Settings, make: Make, sql: Conn, ending: str
) -> None:
    flow = make(plan("a b c", "a>c b>c"))
    first, second = flow.end("a"), flow.end("b")
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN")
        assert dispatch_completion(other, first) == Advanced(1)
        dispatching = pool.submit(dispatch_completion, flow.conn, second)
        until_waiting(sql, flow.conn)
        other.execute(ending.encode())
        assert dispatching.result(TIMEOUT) == Advanced(1)
    if ending == "ROLLBACK":
        assert flow.group("c") == Group("pending", successes=1, running=1)
        assert dispatch_completion(flow.conn, first) == Advanced(1)
    assert flow.group("c") == Group("satisfied", successes=2)
    assert flow.state("c") == "eligible"


@pytest.mark.usefixtures("no_retry")
def test_i9_dispatchers_with_many_common_downstreams_never_deadlock(settings: Settings, make: Make, sql: Conn) -> None:
    """A third session locks the group that both need first, so that both continue together when it is released."""
    names = [f"d{number:02}" for number in range(40)]
    edges = [f"{upstream}>{name}" for name in names for upstream in ("a", "b")]
    policies = dict.fromkeys(names, ANY_CANCEL)
    flow = make(plan(" ".join(["a", "b", *names]), " ".join(edges))._replace(policies=policies))
    events = [flow.end("a"), flow.end("b")]
    with sessions(settings, 3) as (other, *conns), ThreadPoolExecutor(2) as pool:
        with other.transaction():
            other.execute("SELECT FROM edge_groups ORDER BY downstream_id LIMIT 1 FOR UPDATE")
            dispatching = [pool.submit(dispatch_completion, *each) for each in zip(conns, events, strict=True)]
            for conn in conns:
                until_waiting(sql, conn)
        assert [each.result(TIMEOUT) for each in dispatching] == [Advanced(40)] * 2
    assert {flow.group(name) for name in names} == {Group("satisfied", successes=2)}


@pytest.mark.parametrize(("table", "key"), [("edge_groups", "downstream_id"), ("executions", "execution_id")])
def test_i9_a_dispatch_locks_rows_in_key_order(settings: Settings, make: Make, sql: Conn, table: str, key: str) -> None:
    """Another session locks the middle row; the dispatch must hold the rows before it and none after it."""
    names = [f"d{number:02}" for number in range(21)]
    flow = make(plan(" ".join(["a", *names]), " ".join(f"a>{name}" for name in names)))
    event, keys = flow.end("a"), sorted(flow.ids[name] for name in names)
    free = f"SELECT {key} FROM {table} WHERE {key} = ANY (%s) ORDER BY {key} FOR NO KEY UPDATE SKIP LOCKED"
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        with other.transaction():
            other.execute(f"SELECT FROM {table} WHERE {key} = $1 FOR NO KEY UPDATE".encode(), [keys[10]])
            dispatching = pool.submit(dispatch_completion, flow.conn, event)
            until_waiting(sql, flow.conn)
            assert column(sql, free, keys) == keys[11:]
        assert dispatching.result(TIMEOUT) == Advanced(21)


@pytest.mark.usefixtures("no_retry")
def test_i9_dispatchers_that_make_eligible_what_the_other_cancels_never_deadlock(
    settings: Settings, make: Make, sql: Conn
) -> None:
    """A third session locks the rows that both change, so that both wait for them when it releases them."""
    edges = "one>goal_one x>goal_one two>goal_two y>goal_two one>y two>x"
    flow = make(plan("one two x y goal_one goal_two", edges, goal_one=ANY_CANCEL, goal_two=ANY_CANCEL))
    events = [flow.end("one"), flow.end("two")]
    with sessions(settings, 3) as (other, *conns), ThreadPoolExecutor(2) as pool:
        dispatching = []
        with other.transaction():
            other.execute("SELECT FROM executions WHERE name IN ('x', 'y') FOR NO KEY UPDATE")
            for conn, event in zip(conns, events, strict=True):
                conn.execute("SET deadlock_timeout = '10ms'")
                dispatching.append(pool.submit(dispatch_completion, conn, event))
                until_waiting(sql, conn)
        assert [each.result(TIMEOUT) for each in dispatching] == [Advanced(2)] * 2
    flow.settle()
    assert flow.states() == dict.fromkeys(("one", "two"), "success") | dict.fromkeys("xy", "cancelled") | dict.fromkeys(
        ("goal_one", "goal_two"), "eligible"
    )


# -- errors


def raise_on_counting(sql: Conn, sqlstate: str, times: int) -> None:
    """Makes the counting of edges fail that many times. A sequence counts them, since a rollback does not reset it."""
    sql.execute(
        f"""
        CREATE SEQUENCE tried;
        CREATE FUNCTION fail_at_first() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('pgcoord.tried') <= {times} THEN
                RAISE EXCEPTION 'on purpose' USING ERRCODE = '{sqlstate}';
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER fail_at_first AFTER UPDATE ON edges FOR EACH STATEMENT EXECUTE FUNCTION fail_at_first();
        """.encode()
    )


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "55P03"])
def test_i9_a_transient_error_is_retried_three_times(make: Make, sql: Conn, sqlstate: str) -> None:
    flow = make(plan("a b", "a>b"))
    event = flow.end("a")
    raise_on_counting(sql, sqlstate, times=TRIES - 1)
    assert dispatch_completion(flow.conn, event) == Advanced(1)
    assert value(sql, "SELECT last_value FROM tried") == TRIES == 4


@pytest.mark.parametrize(("sqlstate", "tries"), [("40P01", TRIES), ("22012", 1)])
def test_i9_a_persistent_error_is_raised_and_leaves_the_event_for_the_reconciler(
    make: Make, sql: Conn, sqlstate: str, tries: int
) -> None:
    flow = make(plan("a b", "a>b"))
    event = flow.end("a")
    raise_on_counting(sql, sqlstate, times=99)
    before = everything(sql)
    with pytest.raises(psycopg.Error) as caught:
        dispatch_completion(flow.conn, event)
    assert caught.value.sqlstate == sqlstate
    assert value(sql, "SELECT last_value FROM tried") == tries
    assert everything(sql) == before
    sql.execute("DROP TRIGGER fail_at_first ON edges")
    assert dispatch_completion(flow.conn, event) == Advanced(1)


def test_i9_a_group_that_stays_locked_times_out_and_is_counted_later(settings: Settings, make: Make, sql: Conn) -> None:
    flow = make(plan("a b c", "a>c b>c"))
    first, second = flow.end("a"), flow.end("b")
    flow.conn.execute("SET lock_timeout = '5ms'")
    with sessions(settings, 1) as (other,), other.transaction():
        assert dispatch_completion(other, first) == Advanced(1)
        with pytest.raises(psycopg.errors.LockNotAvailable):
            dispatch_completion(flow.conn, second)
        assert second in flow.undispatched()
    assert dispatch_completion(flow.conn, second) == Advanced(1)
    assert flow.group("c") == Group("satisfied", successes=2)


# -- random graphs


class Graph(NamedTuple):
    """A flow, and the outcome of each of its executions if it runs."""

    plan: FlowPlan
    outcomes: Mapping[str, str]


def policies(then: Sequence[OnSatisfied], size: int) -> st.SearchStrategy[JoinPolicy]:
    """Policies for an execution with `size` upstreams."""
    others = st.builds(
        JoinPolicy, st.sampled_from([PolicyKind.ALL_OF, PolicyKind.ANY_OF]), st.none(), st.sampled_from(then)
    )
    return others | st.builds(JoinPolicy, st.just(PolicyKind.QUORUM), st.integers(1, size), st.sampled_from(then))


@st.composite
def graphs(draw: st.DrawFn, most: int, then: Sequence[OnSatisfied]) -> Graph:
    """Graphs of executions whose upstreams are earlier executions."""
    names = [f"e{number}" for number in range(draw(st.integers(1, most)))]
    upstreams = {
        name: sorted(draw(st.sets(st.sampled_from(names[:number]), max_size=4)))
        for number, name in enumerate(names)
        if number and draw(st.booleans())
    }
    waiting = {name: found for name, found in upstreams.items() if found}
    chosen = {name: draw(policies(then, len(found))) for name, found in waiting.items() if draw(st.booleans())}
    edges = [(upstream, name) for name, found in waiting.items() for upstream in found]
    outcomes = {name: "success" if draw(st.integers(0, 2)) else "failed" for name in names}
    return Graph(FlowPlan(None, None, [PlannedExecution(name) for name in names], edges, chosen), outcomes)


orders = st.randoms(use_true_random=False)
slow_fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(number: int) -> Callable[[Any], Any]:
    """That many examples on one database, each a new flow; without shrinking, since threads are not deterministic."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    return hypothesis_settings(
        max_examples=number, deadline=None, suppress_health_check=slow_fixtures, phases=phases, database=None
    )


def run_with_dispatchers(
    dispatchers: Sequence[Conn], flow: Flow, outcomes: Mapping[str, str], order: random.Random
) -> None:
    """Runs a flow to its end: rounds of executions that end in random order and of concurrent dispatches.

    Each event is dispatched by several dispatchers, some events are dispatched again later, and some completions are
    written twice.
    """
    done: list[int] = []
    with ThreadPoolExecutor(len(dispatchers)) as pool:
        while events := work(flow, outcomes, order):
            events += [duplicate(flow.sql, event) for event in events if order.random() < 0.1]
            shares = [order.sample(events + done[-9:], len(events + done[-9:])) for _ in dispatchers]
            for _ in pool.map(dispatch_each, dispatchers, shares, timeout=TIMEOUT):
                pass
            done += events


def dispatch_each(conn: Conn, events: Sequence[int]) -> None:
    for event in events:
        dispatch_completion(conn, event)


def assert_matches_the_model(settings: Settings, flow: Flow, graph: Graph, order: random.Random) -> None:
    with sessions(settings, 4) as dispatchers:
        run_with_dispatchers(dispatchers, flow, graph.outcomes, order)
    assert flow.states() == expected_states(graph.plan, graph.outcomes)
    assert_sound(flow)


LET_RUN, EITHER = [OnSatisfied.LET_RUN], list(OnSatisfied)


@given(graph=graphs(12, LET_RUN), order=orders)
@examples(60)
def test_i9_one_dispatcher_brings_every_graph_to_the_state_of_the_model(
    make: Make, graph: Graph, order: random.Random
) -> None:
    flow = make(graph.plan)
    ended(flow, graph.outcomes, order)
    assert flow.states() == expected_states(graph.plan, graph.outcomes)
    assert_sound(flow)


@pytest.mark.usefixtures("no_retry")
@given(graph=graphs(30, LET_RUN), order=orders)
@examples(25)
def test_i9_four_dispatchers_bring_every_graph_to_the_state_of_the_model(
    settings: Settings, make: Make, graph: Graph, order: random.Random
) -> None:
    assert_matches_the_model(settings, make(graph.plan), graph, order)


@pytest.mark.usefixtures("no_retry")
@pytest.mark.slow
@given(graph=graphs(200, LET_RUN), order=orders)
@examples(100)
def test_i9_four_dispatchers_bring_every_large_graph_to_the_state_of_the_model(
    settings: Settings, make: Make, graph: Graph, order: random.Random
) -> None:
    assert_matches_the_model(settings, make(graph.plan), graph, order)


def assert_cancellations_are_justified(flow: Flow) -> None:
    """Checks that each cancelled execution is an upstream of a satisfied group with cancel_remaining."""
    cancelled = {name for name, state in flow.states().items() if state == "cancelled"}
    reasons = {
        upstream
        for name, upstreams in flow.plan.upstreams().items()
        if flow.group(name).state == "satisfied"
        and flow.plan.policies.get(name, JoinPolicy()).on_satisfied == OnSatisfied.CANCEL_REMAINING
        for upstream in upstreams
    }
    assert cancelled <= reasons


@pytest.mark.usefixtures("no_retry")
@given(graph=graphs(30, EITHER), order=orders)
@examples(25)
def test_i9_with_cancellation_every_edge_is_counted_once_and_every_policy_is_obeyed(
    settings: Settings, make: Make, graph: Graph, order: random.Random
) -> None:
    flow = make(graph.plan)
    with sessions(settings, 4) as dispatchers:
        run_with_dispatchers(dispatchers, flow, graph.outcomes, order)
    assert_sound(flow)
    assert_cancellations_are_justified(flow)
