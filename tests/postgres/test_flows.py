"""Creating, extending and cancelling flows: in one transaction, with every edge counted exactly once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from pgcoord_cli.core.flows import dispatch, executions, flows, reconcile
from pgcoord_cli.core.flows.dispatch import Advanced, NoOp, dispatch_completion
from pgcoord_cli.core.flows.flow_file import FlowPlan, PlannedExecution
from pgcoord_cli.core.flows.join_policy import JoinPolicy, OnSatisfied, PolicyKind, judge
from pgcoord_cli.errors import ConditionFalse, Fenced, UsageError
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, value
from tests.postgres.flow_world import (
    ANY,
    ANY_CANCEL,
    Conn,
    Group,
    Make,
    assert_sound,
    column,
    everything,
    finish,
    plan,
    sessions,
    until_waiting,
    uuid_of,
)

# -- creating


def test_a_new_flow_has_blocked_and_eligible_executions_and_no_counts(make: Make) -> None:
    quorum = JoinPolicy(PolicyKind.QUORUM, 2, OnSatisfied.CANCEL_REMAINING)
    flow = make(plan("a b c all any some", "a>all b>all a>any c>any a>some b>some c>some", any=ANY, some=quorum))
    assert flow.states() == dict.fromkeys("abc", "eligible") | dict.fromkeys(("all", "any", "some"), "blocked")
    assert [flow.group(name) for name in ("all", "any", "some")] == [
        Group("pending", running=2), Group("pending", running=2), Group("pending", running=3),
    ]  # fmt: skip
    query = "SELECT required, cancel_siblings, policy FROM edge_groups WHERE downstream_id = %s"
    rows = [flow.sql.execute(query, [flow.ids[name]]).fetchone() for name in ("all", "any", "some")]
    assert [row[:2] for row in rows if row] == [(2, False), (1, False), (2, True)]
    assert rows[2] and rows[2][2] == {"kind": "quorum", "k": 2, "on_satisfied": "cancel_remaining"}
    assert column(flow.sql, "SELECT outcome FROM edges") == [None] * 7
    assert flow.undispatched() == []


def test_executions_have_the_labels_and_partition_of_the_flow_unless_they_have_a_tag(make: Make, sql: Conn) -> None:
    flow = make(FlowPlan("ns", "blue", [PlannedExecution("a"), PlannedExecution("b", None, 3, "green")], [], {}))
    query = "SELECT namespace, instance_tag, max_attempts FROM executions ORDER BY queue_position"
    assert sql.execute(query.encode()).fetchall() == [("ns", "blue", 1), ("ns", "green", 3)]
    assert column(sql, "SELECT DISTINCT partition_key FROM executions") == [flow.flow_id.int % flows.PARTITIONS]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(plan("a b a"), id="duplicate name"),
        pytest.param(plan("a b", "a>b a>b"), id="duplicate edge"),
        pytest.param(plan("a b", "a>b", b=JoinPolicy(PolicyKind.QUORUM, 0)), id="k of 0"),
        pytest.param(FlowPlan(None, None, [PlannedExecution("a", None, 0)], [], {}), id="max_attempts of 0"),
    ],
)
def test_a_flow_is_created_completely_or_not_at_all(conn: Conn, sql: Conn, wrong: FlowPlan) -> None:
    before = everything(sql)
    with pytest.raises(psycopg.Error):
        flows.create(conn, wrong)
    assert everything(sql) == before
    assert flows.create(conn, plan("a"))


def test_a_flow_becomes_visible_as_a_whole(conn: Conn, sql: Conn) -> None:
    with conn.transaction():
        flows.create(conn, plan("a b", "a>b"))
        assert not any(everything(sql).values())
    assert value(sql, "SELECT count(*) FROM edges") == 1


def test_i7_workers_are_woken_by_a_new_flow(conn: Conn, settings: Settings) -> None:
    with psycopg.connect(settings.dsn, autocommit=True) as listener:
        listener.execute('LISTEN "pgcoord.executions"')
        flows.create(conn, plan("a"))
        assert len(list(listener.notifies(timeout=TIMEOUT, stop_after=1))) == 1


# -- new edges


def test_i9_a_new_edge_from_a_running_upstream_is_waited_for(make: Make) -> None:
    flow = make(plan("a b c", "a>c"))
    flows.add_edge(flow.conn, flow.ids["b"], flow.ids["c"])
    assert flow.group("c") == Group("pending", running=2)
    dispatch_completion(flow.conn, flow.end("a"))
    assert flow.state("c") == "blocked"
    dispatch_completion(flow.conn, flow.end("b"))
    assert (flow.state("c"), flow.group("c")) == ("eligible", Group("satisfied", successes=2))


counted_as = pytest.mark.parametrize(
    ("outcome", "group"),
    [("success", Group("pending", successes=1, running=1)), ("failed", Group("impossible", fails=1, running=1))],
)
when_dispatched = pytest.mark.parametrize("is_dispatched", [False, True], ids=["undispatched", "dispatched"])


@counted_as
@when_dispatched
def test_i9_a_new_edge_from_an_ended_upstream_is_counted_at_once_and_only_once(
    make: Make, outcome: str, group: Group, is_dispatched: bool
) -> None:
    flow = make(plan("a b c", "b>c"))
    event = flow.end("a", outcome)
    if is_dispatched:
        assert dispatch_completion(flow.conn, event) == Advanced(0)
    flows.add_edge(flow.conn, flow.ids["a"], flow.ids["c"])
    assert flow.group("c") == group
    assert dispatch_completion(flow.conn, event) == (NoOp() if is_dispatched else Advanced(0))
    assert flow.group("c") == group
    assert flow.state("c") == ("blocked" if outcome == "success" else "skipped")


def test_i9_a_new_edge_from_a_skipped_or_cancelled_upstream_is_counted_with_that_outcome(make: Make) -> None:
    flow = make(plan("bad skipped open stopped", "bad>skipped open>stopped", stopped=ANY))
    flow.end("bad", "failed")
    flow.settle()
    other = make(plan("x"))
    flows.cancel(flow.conn, other.flow_id)
    flows.add_edge(flow.conn, flow.ids["skipped"], flow.ids["stopped"])
    flows.add_edge(flow.conn, other.ids["x"], flow.ids["stopped"])
    assert flow.group("stopped") == Group("pending", fails=1, skips=1, running=1)


def test_i9_a_new_edge_that_satisfies_the_group_makes_it_eligible_and_cancels_the_rest(make: Make) -> None:
    flow = make(plan("done slow c", "slow>c", c=ANY_CANCEL))
    flow.end("done")
    flows.add_edge(flow.conn, flow.ids["done"], flow.ids["c"])
    assert flow.states() == {"done": "success", "slow": "cancelled", "c": "eligible"}
    assert flow.group("c") == Group("satisfied", successes=1, running=1)
    flow.settle()
    assert flow.group("c") == Group("satisfied", successes=1, fails=1)


def test_i9_a_new_edge_that_makes_the_group_impossible_skips_it_and_the_cascade_continues(make: Make) -> None:
    flow = make(plan("bad slow c d", "slow>c c>d"))
    flow.end("bad", "failed")
    flows.add_edge(flow.conn, flow.ids["bad"], flow.ids["c"])
    assert (flow.state("c"), flow.outcome("c")) == ("skipped", "skipped")
    flow.settle()
    assert flow.state("d") == "skipped"


def test_i9_a_new_edge_raises_what_all_of_requires_and_not_what_a_quorum_requires(make: Make) -> None:
    flow = make(plan("a b x all some", "a>all b>all a>some b>some", some=JoinPolicy(PolicyKind.QUORUM, 2)))
    for name in ("all", "some"):
        flows.add_edge(flow.conn, flow.ids["x"], flow.ids[name])
    for name in ("a", "b"):
        dispatch_completion(flow.conn, flow.end(name))
    assert (flow.state("all"), flow.state("some")) == ("blocked", "eligible")
    dispatch_completion(flow.conn, flow.end("x", "failed"))
    assert (flow.state("all"), flow.state("some")) == ("skipped", "eligible")


@pytest.mark.parametrize("outcome", ["success", "failed"])
@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
def test_i9_a_new_edge_waits_for_an_upstream_whose_end_is_uncommitted(
    settings: Settings, make: Make, sql: Conn, outcome: str, ending: str
) -> None:
    flow = make(plan("a b c", "b>c"))
    flow.claim("a")
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        flow.conn.execute("BEGIN")
        finish(flow.conn, flow.claims["a"], outcome)
        adding = pool.submit(flows.add_edge, other, flow.ids["a"], flow.ids["c"])
        until_waiting(sql, other)
        flow.conn.execute(ending.encode())
        adding.result(TIMEOUT)
    is_counted = ending == "COMMIT"
    assert flow.group("c").running == (1 if is_counted else 2)
    assert value(sql, "SELECT outcome FROM edges WHERE upstream_id = %s", flow.ids["a"]) == (
        outcome if is_counted else None
    )
    flow.settle()
    assert sum(flow.group("c")[1:]) == 2
    assert flow.group("c").running == (1 if is_counted else 2), "and is not counted again"


def test_i9_an_upstream_cannot_end_before_the_commit_of_a_new_edge_from_it(
    settings: Settings, make: Make, sql: Conn
) -> None:
    flow = make(plan("a b c", "b>c"))
    claim = flow.claim("a")
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        with other.transaction():
            flows.add_edge(other, flow.ids["a"], flow.ids["c"])
            ending = pool.submit(executions.complete, flow.conn, claim.execution_id, claim.lease_epoch)
            until_waiting(sql, flow.conn)
        ending.result(TIMEOUT)
    assert dispatch_completion(flow.conn, flow.event("a")) == Advanced(1)
    assert flow.group("c") == Group("pending", successes=1, running=1)


def test_i9_a_new_edge_waits_for_a_dispatch_into_the_same_group(settings: Settings, make: Make, sql: Conn) -> None:
    flow = make(plan("a b c d", "a>c b>c"))
    event = flow.end("a")
    flow.end("d")
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        with other.transaction():
            assert dispatch_completion(other, event) == Advanced(1)
            adding = pool.submit(flows.add_edge, flow.conn, flow.ids["d"], flow.ids["c"])
            until_waiting(sql, flow.conn)
        adding.result(TIMEOUT)
    assert flow.group("c") == Group("pending", successes=2, running=1)


def test_i9_a_new_edge_and_a_dispatch_that_cancels_its_upstream_never_deadlock(
    settings: Settings, make: Make, sql: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third session locks the edges, so that the dispatch holds only its groups when add_edge starts."""
    monkeypatch.setattr(dispatch, "TRIES", 1)
    flow = make(plan("winner loser below goal", "winner>below winner>goal loser>goal", below=ANY, goal=ANY_CANCEL))
    event = flow.end("winner")
    with sessions(settings, 3) as (other, dispatcher, grower), ThreadPoolExecutor(2) as pool:
        dispatcher.execute("SET deadlock_timeout = '10ms'")
        grower.execute("SET deadlock_timeout = '1h'")
        with other.transaction():
            other.execute("SELECT FROM edges FOR UPDATE")
            dispatching = pool.submit(dispatch_completion, dispatcher, event)
            until_waiting(sql, dispatcher)
            adding = pool.submit(flows.add_edge, grower, flow.ids["loser"], flow.ids["below"])
            until_waiting(sql, grower)
        assert dispatching.result(TIMEOUT) == Advanced(2)
        assert isinstance(adding.exception(TIMEOUT), UsageError), "the downstream is not blocked any more"


@pytest.mark.parametrize("outcome", ["success", "failed"])
def test_an_edge_to_an_execution_that_is_not_blocked_is_refused(make: Make, sql: Conn, outcome: str) -> None:
    flow = make(plan("a b c x", "a>b b>c"))
    flow.end("a", outcome)
    flow.settle()
    before = everything(sql)
    for upstream, downstream in (("x", "b"), ("x", "a")):
        with pytest.raises(UsageError):
            flows.add_edge(flow.conn, flow.ids[upstream], flow.ids[downstream])
    assert everything(sql) == before


@pytest.mark.parametrize("ends", [("unknown", "b"), ("a", "unknown")])
def test_an_edge_from_or_to_a_missing_execution_is_refused(make: Make, sql: Conn, ends: tuple[str, str]) -> None:
    flow = make(plan("a b", "a>b"))
    before = everything(sql)
    with pytest.raises(UsageError):
        flows.add_edge(flow.conn, *(flow.ids.get(name, uuid_of(1)) for name in ends))
    assert everything(sql) == before


def test_an_edge_to_a_cancelled_execution_is_refused(make: Make, sql: Conn) -> None:
    flow = make(plan("a b x", "a>b"))
    flows.cancel(flow.conn, flow.flow_id)
    before = everything(sql)
    with pytest.raises(UsageError):
        flows.add_edge(flow.conn, flow.ids["x"], flow.ids["b"])
    assert everything(sql) == before


def test_a_duplicate_edge_is_refused(make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    before = everything(sql)
    with pytest.raises(UsageError):
        flows.add_edge(flow.conn, flow.ids["a"], flow.ids["b"])
    assert everything(sql) == before


# -- cancelling


def test_cancel_ends_the_unfinished_executions_of_the_flow_and_no_others(make: Make, sql: Conn) -> None:
    flow, bystander = make(plan("done running waiting blocked", "running>blocked")), make(plan("x"))
    flow.end("done")
    claim = flow.claim("running")
    assert flows.cancel(flow.conn, flow.flow_id) == 3
    assert flow.states() == {"done": "success"} | dict.fromkeys(("running", "waiting", "blocked"), "cancelled")
    assert bystander.states() == {"x": "eligible"}
    with pytest.raises(Fenced):
        executions.complete(flow.conn, claim.execution_id, claim.lease_epoch)
    query = "SELECT event_type FROM lease_events WHERE execution_id = %s ORDER BY event_id"
    assert column(sql, query, str(claim.execution_id)) == ["acquired", "revoked"]
    assert value(sql, "SELECT cancelled_at IS NOT NULL FROM flows WHERE flow_id = %s", flow.flow_id)
    flow.settle()
    assert_sound(flow)


def test_a_second_cancel_cancels_nothing_and_keeps_the_time(make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    assert flows.cancel(flow.conn, flow.flow_id) == 2
    before = everything(sql)
    assert flows.cancel(flow.conn, flow.flow_id) == 0
    assert everything(sql) == before


def test_a_missing_flow_cannot_be_cancelled_or_shown(conn: Conn) -> None:
    for verb in (flows.cancel, flows.flow_document):
        with pytest.raises(ConditionFalse, match="there is no flow"):
            verb(conn, uuid4())


def test_an_execution_whose_completion_is_uncommitted_is_not_cancelled(
    settings: Settings, make: Make, sql: Conn
) -> None:
    flow = make(plan("a b"))
    claim = flow.claim("a")
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        with other.transaction():
            executions.complete(other, claim.execution_id, claim.lease_epoch)
            cancelling = pool.submit(flows.cancel, flow.conn, flow.flow_id)
            until_waiting(sql, flow.conn)
        assert cancelling.result(TIMEOUT) == 1
    assert flow.states() == {"a": "success", "b": "cancelled"}
    flow.settle()
    assert_sound(flow)


# -- documents


def test_a_flows_document_has_its_executions_in_order_and_its_edges_by_name(make: Make) -> None:
    flow = make(plan("b a c", "b>c a>c", namespace="ns", c=ANY))
    flow.claim("b")
    dispatch_completion(flow.conn, flow.end("a", "failed"))
    document = flows.flow_document(flow.conn, flow.flow_id)
    assert (document["flow_id"], document["namespace"], document["cancelled_at"]) == (flow.flow_id, "ns", None)
    shown = [(row["name"], row["state"], row["owner"], row["reason"]) for row in document["executions"]]
    assert shown == [
        ("b", "running", "tester", None),
        ("a", "failed", None, "on purpose"),
        ("c", "blocked", None, None),
    ]
    assert document["executions"][2]["policy"] == {"kind": "any_of", "on_satisfied": "let_run"}
    assert document["edges"] == [
        {"upstream": "b", "downstream": "c", "outcome": None},
        {"upstream": "a", "downstream": "c", "outcome": "failed"},
    ]


def test_flows_are_listed_newest_first_by_namespace_up_to_a_limit(make: Make) -> None:
    made = [make(plan("a b", "a>b", namespace=namespace)) for namespace in ("ns", "other", "ns")]
    made[0].end("a", "failed")
    made[0].settle()

    def listed(namespace: str | None, limit: int) -> list[Any]:
        return [row["flow_id"] for row in flows.list_flows(made[0].conn, namespace, limit)]

    assert listed(None, 20) == [flow.flow_id for flow in reversed(made)]
    assert listed("ns", 20) == [made[2].flow_id, made[0].flow_id]
    assert listed("ns", 1) == [made[2].flow_id]
    assert listed("nowhere", 20) == []
    counts = [(row["executions"], row["unfinished"], row["failed"]) for row in flows.list_flows(made[0].conn, None, 20)]
    assert counts == [(2, 2, 0), (2, 2, 0), (2, 0, 1)]


# -- the same rule in the database and in Python


def test_i9_the_database_judges_like_the_pure_function(make: Make, sql: Conn) -> None:
    """Every combination of outcomes of up to four upstreams."""
    flow = make(plan("a b", "a>b"))
    most = range(5)
    for required, successes, others, running in product(most[1:], most, most, most):
        size = successes + others + running
        if not required <= size <= 4:
            continue
        sql.execute("UPDATE executions SET state = 'blocked', ended_at = NULL WHERE name = 'b'")
        sql.execute(
            """UPDATE edge_groups SET state = 'pending', required = %s, success_count = %s, fail_count = %s,
                      skip_count = %s, running_count = %s""",
            [required, successes, others // 2, others - others // 2, running],
        )
        sql.execute("SELECT judge_groups(array_agg(downstream_id)) FROM edge_groups")
        verdict = judge(required, size, successes, others)
        assert flow.group("b").state == verdict
        assert flow.state("b") == {"satisfied": "eligible", "impossible": "skipped", "pending": "blocked"}[verdict]


def test_reconcilers_do_not_change_a_new_flow(make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.claim("a")
    before = everything(sql)
    for tick in reconcile.RECONCILERS.values():
        assert tick(flow.conn, reconcile.Scope(stale_threshold_ms=0), lambda *_: None) == reconcile.Tick()
    assert everything(sql) == before
