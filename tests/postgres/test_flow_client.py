"""Flows from a program: the graph and its executions over one connection, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from pgcoord_cli import (
    ConditionFalse,
    ConnectionFailed,
    CreatedFlow,
    Fenced,
    Flows,
    SchemaMissing,
    UsageError,
    open_flows,
)
from pgcoord_cli.settings import Settings
from tests.asking import value
from tests.postgres.commit_scenarios import Sql

FLOW = """
executions:
  - {name: build, max_attempts: 2}
  - name: release
edges:
  - {from: build, to: release}
"""


@pytest.fixture
def flows(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flows]:
    monkeypatch.setenv("PGCOORD_DSN", settings.dsn)
    with open_flows() as opened:
        yield opened


def states(flows: Flows, created: CreatedFlow) -> dict[str, str]:
    document = flows.show(created.flow_id)
    return {execution["name"]: execution["state"] for execution in document["executions"]}


def test_a_program_creates_a_flow_and_works_for_it(flows: Flows, sql: Sql) -> None:
    created = flows.create(FLOW)
    assert states(flows, created) == {"build": "eligible", "release": "blocked"}
    (claim,) = flows.claim("worker", 60, limit=5)
    assert (claim.execution_id, claim.name, claim.attempt) == (created.executions["build"], "build", 1)
    assert flows.claim("another") == []
    assert flows.renew(claim, 600) > claim.expires_at
    flows.complete(claim)
    assert states(flows, created) == {"build": "success", "release": "blocked"}
    assert value(sql, "SELECT outcome FROM completion_events WHERE execution_id = %s", claim.execution_id) == "success"


def test_a_failed_attempt_is_followed_by_the_next_as_long_as_there_are_any(flows: Flows, sql: Sql) -> None:
    created = flows.create(FLOW)
    (first,) = flows.claim("worker")
    assert flows.fail(first, "no space left") == "eligible"
    sql.execute("UPDATE executions SET eligible_from = '-infinity'")
    (second,) = flows.claim("worker")
    assert (second.attempt, second.lease_epoch > first.lease_epoch) == (2, True)
    with pytest.raises(Fenced):
        flows.complete(first)
    assert flows.fail(second) == "failed"
    assert states(flows, created)["build"] == "failed"


def test_a_flow_is_cancelled_as_a_whole(flows: Flows) -> None:
    created = flows.create(FLOW)
    assert flows.cancel(created.flow_id) == 2
    assert set(states(flows, created).values()) == {"cancelled"}
    assert flows.cancel(created.flow_id) == 0


def test_what_cannot_be_is_refused(flows: Flows, empty_settings: Settings) -> None:
    with pytest.raises(UsageError, match=r"^flow:1: "):
        flows.create("executions: build")
    for call in (flows.show, flows.cancel):
        with pytest.raises(ConditionFalse):
            call(uuid4())
    with pytest.raises(UsageError, match="schema: "):
        open_flows(schema="a.b")
    with pytest.raises(SchemaMissing):
        open_flows(empty_settings.dsn)
    flows.close()
    with pytest.raises(ConnectionFailed):
        flows.claim("worker")
