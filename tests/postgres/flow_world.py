"""Flows for tests: created from one line, advanced one execution at a time, and compared as a whole with a model."""

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
    """Returns the first column of a query."""
    return [row[0] for row in sql.execute(text.encode(), parameters)]


def until_waiting(sql: Conn, conn: Conn, work: Future[Any] | None = None) -> None:
    """Waits until a session waits for a lock of another, or until `work` is done without waiting."""
    query = "SELECT cardinality(pg_blocking_pids(%s))"
    until(lambda: value(sql, query, conn.info.backend_pid) or (work and work.done()))


@contextmanager
def sessions(settings: Settings, number: int) -> Iterator[list[Conn]]:
    """Opens that many sessions like those of workers and dispatchers."""
    if not number:
        yield []
        return
    with command_session(settings, "test", writes=True) as first, sessions(settings, number - 1) as rest:
        yield [first, *rest]


def mortal_session(settings: Settings, **variables: str) -> Conn:
    """Opens a session that the test may terminate, with its own settings."""
    options = " ".join(f"-c {name}={text}" for name, text in ({"search_path": settings.schema} | variables).items())
    return psycopg.connect(settings.dsn, autocommit=True, cursor_factory=psycopg.RawCursor, options=options)


# -- fixtures, which the conftest of each folder that uses them imports


@pytest.fixture
def conn(settings: Settings) -> Iterator[Conn]:
    """A session like those of workers and dispatchers."""
    with sessions(settings, 1) as (one,):
        yield one


@pytest.fixture
def make(conn: Conn, sql: Conn) -> Make:
    """Creates flows over that session."""
    return lambda plan: Flow(conn, sql, plan)


@pytest.fixture
def no_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the retry, so that a deadlock fails the test."""
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
    """Returns a plan, for example `plan("a b c", "a>c b>c", c=ANY)`."""
    ends = [tuple(edge.split(">")) for edge in edges.split()]
    planned = [PlannedExecution(name, ["true"], max_attempts) for name in names.split()]
    return FlowPlan(namespace, tag, planned, [(start, end) for start, end in ends], policies)  # fmt: skip


def chain(hops: int) -> FlowPlan:
    """Returns a plan of executions n0, n1, …, each downstream of the previous one."""
    names = [f"n{number}" for number in range(hops + 1)]
    return plan(" ".join(names), " ".join(f"{one}>{other}" for one, other in pairwise(names)))


def expected_states(plan: FlowPlan, outcomes: Mapping[str, str]) -> dict[str, str]:
    """Returns the final states of a flow without cancel_remaining; `outcomes` are those of the executions that run.

    Pure. In a plan every execution comes after its upstreams.
    """
    upstreams = plan.upstreams()
    states: dict[str, str] = {}
    for execution in plan.executions:
        ended = [states[name] for name in upstreams.get(execution.name, [])]
        successes = ended.count("success")
        required = plan.policies.get(execution.name, JoinPolicy()).required(len(ended))
        verdict = judge(required, len(ended), successes, len(ended) - successes)
        may_run = not ended or verdict == JoinVerdict.SATISFIED
        states[execution.name] = outcomes[execution.name] if may_run else "skipped"
    return states


# -- flows in the database


class Group(NamedTuple):
    """State and counts of an edge group."""

    state: str
    successes: int = 0
    fails: int = 0
    skips: int = 0
    running: int = 0


class Flow:
    """A flow, and the claims of its executions."""

    def __init__(self, conn: Conn, sql: Conn, plan: FlowPlan) -> None:
        self.conn = conn
        self.sql = sql
        self.plan = plan
        self.flow_id, self.ids = flows.create(conn, plan)
        self.claims: dict[str, Claim] = {}

    def states(self) -> dict[str, str]:
        """Returns the state of each execution by name."""
        query = "SELECT name, state FROM executions WHERE flow_id = %s ORDER BY queue_position"
        return dict(self.sql.execute(query, [self.flow_id]).fetchall())

    def state(self, name: str) -> str:
        return self.states()[name]

    def group(self, name: str) -> Group:
        """Returns the edge group of an execution."""
        query = """SELECT state, success_count, fail_count, skip_count, running_count
                     FROM edge_groups WHERE downstream_id = %s"""
        row = self.sql.execute(query, [self.ids[name]]).fetchone()
        assert row
        return Group(*row)

    def claim(self, name: str) -> Claim:
        """Claims executions, the oldest first, until this one is claimed; returns its claim."""
        while name not in self.claims:
            (claim,) = executions.claim(self.conn, "tester")
            self.claims[claim.name] = claim
        return self.claims[name]

    def end(self, name: str, outcome: str = "success") -> int:
        """Claims and ends an execution; returns the id of its completion event."""
        claim = self.claim(name)
        finish(self.conn, claim, outcome)
        return self.event(name)

    def event(self, name: str) -> int:
        """Returns the id of the only completion event of an execution."""
        (event_id,) = self.events_of(name)
        return event_id

    def events_of(self, name: str) -> list[int]:
        """Returns the ids of all completion events of an execution; more than one is an error."""
        query = "SELECT event_id FROM completion_events WHERE execution_id = %s ORDER BY event_id"
        return column(self.sql, query, self.ids[name])

    def outcome(self, name: str) -> str:
        """Returns the outcome in the completion event of an execution."""
        return str(value(self.sql, "SELECT outcome FROM completion_events WHERE execution_id = %s", self.ids[name]))

    def undispatched(self) -> list[int]:
        query = "SELECT event_id FROM completion_events WHERE flow_id = %s AND dispatched_at_ms IS NULL ORDER BY 1"
        return column(self.sql, query, self.flow_id)

    def settle(self) -> None:
        """Dispatches until no event is undispatched."""
        while events := self.undispatched():
            dispatch_all(self.conn, events)


def finish(conn: Conn, claim: Claim, outcome: str) -> None:
    """Ends a claimed execution with an outcome."""
    if outcome == "success":
        executions.complete(conn, claim.execution_id, claim.lease_epoch)
    else:
        executions.fail(conn, claim.execution_id, claim.lease_epoch, "on purpose")


def ended(flow: Flow, outcomes: Mapping[str, str], order: random.Random) -> None:
    """Runs a flow to its end with one worker and one dispatcher, in random order."""
    while events := flow.undispatched() or work(flow, outcomes, order):
        order.shuffle(events)
        for event in events:
            dispatch_all(flow.conn, [event])


def work(flow: Flow, outcomes: Mapping[str, str], order: random.Random) -> list[int]:
    """Claims every eligible execution and ends at least one in random order; returns the events to dispatch."""
    flow.claims |= {claim.name: claim for claim in executions.claim(flow.conn, "tester", limit=1_000)}
    states = flow.states()
    held = sorted(name for name in flow.claims if states[name] == "running")
    for name in order.sample(held, order.randint(min(1, len(held)), len(held))):
        finish(flow.conn, flow.claims[name], outcomes[name])
    return flow.undispatched()


# -- invariants of every flow


TABLES = ("flows", "executions", "execution_leases", "edge_groups", "edges", "completion_events", "lease_events",
          "dispatch_failures")  # fmt: skip


def everything(sql: Conn) -> dict[str, list[str]]:
    """Returns every row of every table of flows, as text."""
    return {table: column(sql, f"SELECT {table}::text FROM {table} ORDER BY 1") for table in TABLES}


def assert_sound(flow: Flow) -> None:
    """Checks rule I9 for a flow that has ended: each edge was counted once, and the counts agree, for every policy."""
    states = flow.states()
    assert set(states.values()) <= FINAL
    assert flow.undispatched() == []
    query = """SELECT name, outcome FROM completion_events JOIN executions USING (execution_id)
                WHERE completion_events.flow_id = %s ORDER BY event_id"""
    events = flow.sql.execute(query, [flow.flow_id]).fetchall()
    assert {*events} == {*states.items()}, "every end has an event with its outcome"
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
    """Checks that the counts are those of the edges, and that state and execution follow the policy."""
    successes, skips = outcomes.count("success"), outcomes.count("skipped")
    required = flow.plan.policies.get(name, JoinPolicy()).required(len(outcomes))
    verdict = judge(required, len(outcomes), successes, len(outcomes) - successes)
    fails = len(outcomes) - successes - skips
    assert flow.group(name) == Group(verdict.value, successes, fails, skips, 0)
    allowed = {"success", "failed"} if verdict == JoinVerdict.SATISFIED else {"skipped"}
    assert state in allowed | {"cancelled"}


def duplicate(sql: Conn, event: int) -> int:
    """Writes a completion event again, as a service may after an unknown outcome; returns the new event's id."""
    query = """INSERT INTO completion_events (execution_id, flow_id, outcome)
               SELECT execution_id, flow_id, outcome FROM completion_events WHERE event_id = %s RETURNING event_id"""
    return int(value(sql, query, event))


def uuid_of(number: int) -> UUID:
    """Returns the UUID with that number, which no row has."""
    return UUID(int=number)
