"""The second part of the demonstration: a flow that is finished although its worker is killed.

The flow has five executions: two copies that depend on a preparation, a check that needs one of them (a quorum), and a
release. At its first attempt, the command of one copy kills its own worker with SIGKILL. The lease is then no longer
renewed; once it has expired, a reconciler takes the execution back, and another worker runs the rest. The final states
follow from the policies.
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
"""Duration of the worker's lease, after which the killed worker's execution can be taken back."""

TIMEOUT_SECONDS = 30.0


def run_flow(settings: Settings, reporter: Reporter) -> dict[str, str]:
    """Runs the flow; returns the final states of the executions by name. Raises PgcoordError."""
    reporter.step("Run a flow, and kill its worker in the middle")
    with session.command_session(settings, "demo", writes=True) as conn:
        created = flows.create(conn, PLAN)
        _work(settings, "worker-1")
        reporter.detail(f"worker-1 was killed: {_states(settings, created.flow_id)}")
        expired = _take_back(settings)
        reporter.detail(f"reconcile lease-expiry: {expired} lease taken back")
        _work(settings, "worker-2")
    reporter.detail(f"worker-2 has run the rest: {_states(settings, created.flow_id)}")
    return _state_by_name(settings, created.flow_id)


def _work(settings: Settings, owner: str) -> None:
    """Runs a worker process until it ends or is killed."""
    environment = os.environ | {"PGCOORD_DSN": settings.dsn, "PGCOORD_SCHEMA": settings.schema}
    command = [sys.executable, "-m", "pgcoord_cli", "worker", "run", "--once", "-q", "--lease", LEASE, "--owner", owner]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _take_back(settings: Settings) -> int:
    """Runs the reconciler until it has taken back the expired lease; returns how many. Raises PgcoordError."""
    with session.command_session(settings, "demo", writes=True) as conn, closing(Wakeup()) as wakeup:
        for _ in range(round(TIMEOUT_SECONDS / 0.1)):
            if expired := reconcile.lease_expiry(conn, reconcile.Scope(), lambda _event, _why: None).reconciled:
                return expired
            wakeup.wait(0.1)
    raise PgcoordError(f"the lease of the killed worker was not taken back within {TIMEOUT_SECONDS:g}s")


def _state_by_name(settings: Settings, flow_id: UUID) -> dict[str, str]:
    with session.command_session(settings, "demo", writes=False) as conn:
        document = flows.flow_document(conn, flow_id)
    return {execution["name"]: execution["state"] for execution in document["executions"]}


def _states(settings: Settings, flow_id: UUID) -> str:
    return ", ".join(f"{name} {state}" for name, state in _state_by_name(settings, flow_id).items())
