"""The second part of the demonstration: a flow whose worker is killed in the middle, and that is finished all the same.

Five executions: two copies that wait for a preparation, a check that needs one of them (a quorum), and a release. The
command of one copy kills its own worker at the first attempt, as hard as a process can be killed. Nobody renews the
lease then; when it has run out, a reconciler takes it back, and another worker runs the rest. The states at the end
are what the policies say.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from uuid import UUID

from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import session
from pgcoord_cli.core.demo.reporter import Reporter
from pgcoord_cli.core.flows import flows, reconcile
from pgcoord_cli.core.flows.flow_file import FlowPlan, PlannedExecution
from pgcoord_cli.core.flows.join_policy import JoinPolicy, PolicyKind
from pgcoord_cli.errors import PgcoordError
from pgcoord_cli.settings import Settings

PLAN = FlowPlan(
    namespace="demo",
    instance_tag=None,
    executions=[
        PlannedExecution("prepare", ["true"]),
        PlannedExecution("copy-1", ["sh", "-c", "test $PGCOORD_ATTEMPT -gt 1 || kill -9 $PPID"]),
        PlannedExecution("copy-2", ["false"]),
        PlannedExecution("check", ["true"]),
        PlannedExecution("release", ["true"]),
    ],
    edges=[
        ("prepare", "copy-1"), ("prepare", "copy-2"), ("copy-1", "check"), ("copy-2", "check"), ("check", "release"),
    ],
    policies={"check": JoinPolicy(PolicyKind.QUORUM, 1)},
)  # fmt: skip

EXPECTED = {
    "prepare": "success", "copy-1": "success", "copy-2": "failed", "check": "success", "release": "success",
}  # fmt: skip

LEASE = "1s"
PATIENCE_SECONDS = 30.0


def run_flow(settings: Settings, narrator: Reporter) -> dict[str, str]:
    """Plays it; returns the states of the executions at the end."""
    narrator.step("Run a flow, and kill its worker in the middle")
    with session.command_session(settings, "demo", writes=True) as conn:
        created = flows.create(conn, PLAN)
        _work(settings, "worker-1")
        narrator.say(f"worker-1 is gone: {_states(settings, created.flow_id)}")
        expired = _take_back(settings)
        narrator.say(f"reconcile lease-expiry: {expired} lease taken back")
        _work(settings, "worker-2")
    narrator.say(f"worker-2 has done the rest: {_states(settings, created.flow_id)}")
    return _state_by_name(settings, created.flow_id)


def _work(settings: Settings, owner: str) -> None:
    """A worker process, until it ends, one way or another."""
    environment = os.environ | {"PGCOORD_DSN": settings.dsn, "PGCOORD_SCHEMA": settings.schema}
    command = [sys.executable, "-m", "pgcoord_cli", "worker", "run", "--once", "-q", "--lease", LEASE, "--owner", owner]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _take_back(settings: Settings) -> int:
    """Ticks until the lost lease has run out and was taken back."""
    with session.command_session(settings, "demo", writes=True) as conn, closing(Wakeup()) as wakeup:
        for _ in range(round(PATIENCE_SECONDS / 0.1)):
            if expired := reconcile.lease_expiry(conn, reconcile.Scope(), lambda _event, _why: None).reconciled:
                return expired
            wakeup.wait(0.1)
    raise PgcoordError("the lease of the killed worker was never taken back")


def _state_by_name(settings: Settings, flow_id: UUID) -> dict[str, str]:
    with session.command_session(settings, "demo", writes=False) as conn:
        document = flows.flow_document(conn, flow_id)
    return {execution["name"]: execution["state"] for execution in document["executions"]}


def _states(settings: Settings, flow_id: UUID) -> str:
    return ", ".join(f"{name} {state}" for name, state in _state_by_name(settings, flow_id).items())
