"""Flows under test: made in a line, moved by hand one execution at a time, and looked at whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest

from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.flows import dispatch, executions, flows
from pgcoord_cli.core.flows.dispatch import dispatch_all
from pgcoord_cli.core.flows.executions import Claim
from pgcoord_cli.core.flows.flow_file import FlowPlan, PlannedExecution
from pgcoord_cli.core.flows.join_policy import JoinPolicy, JoinVerdict, OnSatisfied, PolicyKind, judge
from pgcoord_cli.settings import Settings
from tests.asking import until, value

Conn = psycopg.Connection[Any]
Make = Callable[[FlowPlan], "Flow"]

ANY = JoinPolicy(PolicyKind.ANY_OF)
ANY_CANCEL = JoinPolicy(PolicyKind.ANY_OF, None, OnSatisfied.CANCEL_REMAINING)
FINAL = {"success", "failed", "cancelled", "skipped"}


def column(sql: Conn, text: str, *parameters: object) -> list[Any]:
    """The first column that a query gives."""
    return [row[0] for row in sql.execute(text.encode(), parameters)]


def until_waiting(sql: Conn, conn: Conn, work: Future[Any] | None = None) -> None:
    """Returns when that session waits for a lock that somebody else holds; or when `work` is done without."""
    query = "SELECT cardinality(pg_blocking_pids(%s))"
    until(lambda: value(sql, query, conn.info.backend_pid) or (work and work.done()))


@contextmanager
def sessions(settings: Settings, number: int) -> Iterator[list[Conn]]:
    """As many sessions as workers and dispatchers have them."""
    if not number:
        yield []
        return
    with command_session(settings, "test", writes=True) as first, sessions(settings, number - 1) as rest:
        yield [first, *rest]


def mortal_session(settings: Settings, **variables: str) -> Conn:
    """A session that may be cut off, with variables of its own."""
    options = " ".join(f"-c {name}={text}" for name, text in ({"search_path": settings.schema} | variables).items())
    return psycopg.connect(settings.dsn, autocommit=True, cursor_factory=psycopg.RawCursor, options=options)


# -- fixtures, which the folders that use them name in their conftest


@pytest.fixture
def conn(settings: Settings) -> Iterator[Conn]:
    """A session as workers and dispatchers have it."""
    with sessions(settings, 1) as (one,):
        yield one


@pytest.fixture
def make(conn: Conn, sql: Conn) -> Make:
    """Creates a flow over that session."""
    return lambda plan: Flow(conn, sql, plan)


@pytest.fixture
def no_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a deadlock show itself, which would otherwise be tried again."""
    monkeypatch.setattr(dispatch, "TRIES", 1)


# -- plans


def plan(
    names: str,
    edges: str = "",
    *,
    namespace: str | None = None,
    tag: str | None = None,
    max_attempts: int = 1,
    **policies: JoinPolicy,
) -> FlowPlan:
    """`plan("a b c", "a>c b>c", c=ANY)`."""
    ends = [tuple(edge.split(">")) for edge in edges.split()]
    planned = [PlannedExecution(name, ["true"], max_attempts) for name in names.split()]
    return FlowPlan(namespace, tag, planned, [(start, end) for start, end in ends], policies)  # fmt: skip


def chain(hops: int) -> FlowPlan:
    """Executions n0, n1, … of which each waits for the one before."""
    names = [f"n{number}" for number in range(hops + 1)]
    return plan(" ".join(names), " ".join(f"{one}>{other}" for one, other in pairwise(names)))


def expected_states(plan: FlowPlan, outcomes: Mapping[str, str]) -> dict[str, str]:
    """What a flow without cancel_remaining comes to, as a pure function; `outcomes` of those that get to run.

    A plan's executions stand after those that they wait for.
    """
    upstreams = plan.upstreams()
    states: dict[str, str] = {}
    for execution in plan.executions:
        waits_for = [states[name] for name in upstreams.get(execution.name, [])]
        successes = waits_for.count("success")
        required = plan.policies.get(execution.name, JoinPolicy()).required(len(waits_for))
        verdict = judge(required, len(waits_for), successes, len(waits_for) - successes)
        may_run = not waits_for or verdict == JoinVerdict.SATISFIED
        states[execution.name] = outcomes[execution.name] if may_run else "skipped"
    return states


# -- flows that exist


class Group(NamedTuple):
    """How an edge group stands."""

    state: str
    successes: int = 0
    fails: int = 0
    skips: int = 0
    running: int = 0


class Flow:
    """A flow, and the claims that are held on its executions."""

    def __init__(self, conn: Conn, sql: Conn, plan: FlowPlan) -> None:
        self.conn = conn
        self.sql = sql
        self.plan = plan
        self.flow_id, self.ids = flows.create(conn, plan)
        self.claims: dict[str, Claim] = {}

    def states(self) -> dict[str, str]:
        """By name."""
        query = "SELECT name, state FROM executions WHERE flow_id = %s ORDER BY queue_position"
        return dict(self.sql.execute(query, [self.flow_id]).fetchall())

    def state(self, name: str) -> str:
        return self.states()[name]

    def group(self, name: str) -> Group:
        """What that one waits for."""
        query = """SELECT state, success_count, fail_count, skip_count, running_count
                     FROM edge_groups WHERE downstream_id = %s"""
        row = self.sql.execute(query, [self.ids[name]]).fetchone()
        assert row
        return Group(*row)

    def claim(self, name: str) -> Claim:
        """Claims the oldest until it is that one's turn."""
        while name not in self.claims:
            (claim,) = executions.claim(self.conn, "tester")
            self.claims[claim.name] = claim
        return self.claims[name]

    def end(self, name: str, outcome: str = "success") -> int:
        """Has that one run and end; the id of its completion event."""
        claim = self.claim(name)
        finish(self.conn, claim, outcome)
        return self.event(name)

    def event(self, name: str) -> int:
        """The completion event of that one."""
        (event_id,) = self.events_of(name)
        return event_id

    def events_of(self, name: str) -> list[int]:
        """All its completion events; there should never be two."""
        query = "SELECT event_id FROM completion_events WHERE execution_id = %s ORDER BY event_id"
        return column(self.sql, query, self.ids[name])

    def outcome(self, name: str) -> str:
        """What the completion event of that one says."""
        return str(value(self.sql, "SELECT outcome FROM completion_events WHERE execution_id = %s", self.ids[name]))

    def undispatched(self) -> list[int]:
        query = "SELECT event_id FROM completion_events WHERE flow_id = %s AND dispatched_at_ms IS NULL ORDER BY 1"
        return column(self.sql, query, self.flow_id)

    def settle(self) -> None:
        """Dispatches until nothing is left to dispatch."""
        while events := self.undispatched():
            dispatch_all(self.conn, events)


def finish(conn: Conn, claim: Claim, outcome: str) -> None:
    """Reports that a claimed execution ended."""
    if outcome == "success":
        executions.complete(conn, claim.execution_id, claim.lease_epoch)
    else:
        executions.fail(conn, claim.execution_id, claim.lease_epoch, "on purpose")


def ended(flow: Flow, outcomes: Mapping[str, str], order: random.Random) -> None:
    """Has one worker and one dispatcher bring a flow to its end, in random order."""
    while events := flow.undispatched() or work(flow, outcomes, order):
        order.shuffle(events)
        for event in events:
            dispatch_all(flow.conn, [event])


def work(flow: Flow, outcomes: Mapping[str, str], order: random.Random) -> list[int]:
    """Claims everything there is, and ends some of it in random order, at least one; the events to dispatch."""
    flow.claims |= {claim.name: claim for claim in executions.claim(flow.conn, "tester", limit=1_000)}
    states = flow.states()
    held = sorted(name for name in flow.claims if states[name] == "running")
    for name in order.sample(held, order.randint(min(1, len(held)), len(held))):
        finish(flow.conn, flow.claims[name], outcomes[name])
    return flow.undispatched()


# -- what holds for every flow


TABLES = ("flows", "executions", "execution_leases", "edge_groups", "edges", "completion_events", "lease_events",
          "dispatch_failures")  # fmt: skip


def everything(sql: Conn) -> dict[str, list[str]]:
    """Every row of every table that has to do with flows."""
    return {table: column(sql, f"SELECT {table}::text FROM {table} ORDER BY 1") for table in TABLES}


def assert_sound(flow: Flow) -> None:
    """I9, of a flow that has come to its end: whatever the policies, each edge was counted once and counts agree."""
    states = flow.states()
    assert set(states.values()) <= FINAL
    assert flow.undispatched() == []
    query = """SELECT name, outcome FROM completion_events JOIN executions USING (execution_id)
                WHERE completion_events.flow_id = %s ORDER BY event_id"""
    told = flow.sql.execute(query, [flow.flow_id]).fetchall()
    assert {*told} == {*states.items()}, "every end is told, as what it was"
    edges = flow.sql.execute("SELECT downstream_id, upstream_id, outcome FROM edges WHERE flow_id = %s", [flow.flow_id])
    names = {execution_id: name for name, execution_id in flow.ids.items()}
    counted: dict[str, list[str]] = {}
    for downstream_id, upstream_id, outcome in edges:
        assert outcome == states[names[upstream_id]]
        counted.setdefault(names[downstream_id], []).append(outcome)
    assert {name: len(upstreams) for name, upstreams in flow.plan.upstreams().items()} == {
        name: len(outcomes) for name, outcomes in counted.items()
    }
    for name, outcomes in counted.items():
        assert_group(flow, name, outcomes, states[name])


def assert_group(flow: Flow, name: str, outcomes: list[str], state: str) -> None:
    """The counts are those of the edges, the verdict is that of the policy, and it was obeyed."""
    successes, skips = outcomes.count("success"), outcomes.count("skipped")
    required = flow.plan.policies.get(name, JoinPolicy()).required(len(outcomes))
    verdict = judge(required, len(outcomes), successes, len(outcomes) - successes)
    fails = len(outcomes) - successes - skips
    assert flow.group(name) == Group(verdict.value, successes, fails, skips, 0)
    allowed = {"success", "failed"} if verdict == JoinVerdict.SATISFIED else {"skipped"}
    assert state in allowed | {"cancelled"}


def duplicate(sql: Conn, event: int) -> int:
    """Writes the same completion once more, as a service might that is not sure that it did; the new event's id."""
    query = """INSERT INTO completion_events (execution_id, flow_id, outcome)
               SELECT execution_id, flow_id, outcome FROM completion_events WHERE event_id = %s RETURNING event_id"""
    return int(value(sql, query, event))


def uuid_of(number: int) -> UUID:
    """An id that belongs to nothing."""
    return UUID(int=number)
