"""Roles on a database where PUBLIC may execute no function: each does its work with what `migrate grant` gives it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier

from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Call, StartLeader

FLOW = 'executions:\n  - {name: build, command: ["true"]}\n  - {name: test, command: ["true"]}\n'


@pytest.fixture
def hardened(empty_settings: Settings) -> Iterator[Settings]:
    """A migrated database whose owner has taken EXECUTE from PUBLIC beforehand."""
    with psycopg.connect(empty_settings.dsn, autocommit=True) as conn:
        conn.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
        upgrade(empty_settings)
        yield empty_settings


@pytest.fixture
def roles(hardened: Settings, call: Call) -> dict[str, Settings]:
    """The settings of a reader, a client and an operator."""
    names = {kind: f"{kind}_{uuid.uuid4().hex[:8]}" for kind in ("reader", "client", "operator")}
    with psycopg.connect(hardened.dsn, autocommit=True) as conn:
        for name in names.values():
            conn.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
    words = [word for kind, name in names.items() for word in (f"--{kind}", name)]
    assert call("migrate", "grant", *words, PGCOORD_DSN=hardened.dsn).code == 0
    return {kind: replace(hardened, dsn=make_conninfo(hardened.dsn, user=name)) for kind, name in names.items()}


def test_i15_each_role_works_where_public_may_execute_nothing(
    roles: dict[str, Settings], call: Call, start_leader: StartLeader, place: Path
) -> None:
    def ask(kind: str, *words: str, code: int = 0) -> Any:
        answer = call(*words, "-o", "json", PGCOORD_DSN=roles[kind].dsn)
        assert answer.code == code, (kind, words, answer)
        return answer.document

    leader = start_leader("one", settings=roles["operator"])
    leader.wait_for("elected epoch")
    ask("client", "kv", "set", "key", "value")
    ask("client", "kv", "add", "number", "1")
    assert ask("client", "kv", "get", "key")["value"] == "value"
    assert [row["status"] for row in ask("reader", "commit", "list")] == ["committed"] * 2
    assert ask("reader", "leader", "status")["leader"]["held"] is True
    for outbox in ("lease-events", "completion-events", "commit-requests"):
        ask("reader", "gc", outbox, "--dry-run")
    file = place / "flow.yaml"
    file.write_text(FLOW)
    flow_id = ask("operator", "flow", "create", str(file))["flow_id"]
    assert call("worker", "run", "--once", "-q", PGCOORD_DSN=roles["operator"].dsn).code == 0
    ask("operator", "reconcile", "all")
    assert {row["state"] for row in ask("reader", "flow", "show", flow_id)["executions"]} == {"success"}
    ask("operator", "flow", "cancel", flow_id)
    ask("operator", "gc", "all")
    with psycopg.connect(roles["client"].dsn, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO pgcoord.completion_events (execution_id, outcome) VALUES (gen_random_uuid(), 'success')"
        )
    with acquire_leadership(roles["client"].dsn, "name") as owner:
        owner.checkpoint.save(1)
    tail = call("tail", "completion", "--from-start", "--no-follow", "-o", "jsonl", PGCOORD_DSN=roles["reader"].dsn)
    assert (tail.code, len(tail.out.splitlines())) == (0, 3)
    assert call("lock", "run", "job", "--", "true", PGCOORD_DSN=roles["client"].dsn).code == 0
    ask("operator", "leader", "step-down")
    assert leader.end() == 0
