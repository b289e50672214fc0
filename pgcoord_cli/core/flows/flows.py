"""Flows: graphs of executions that wait for each other.

A flow is made whole, in one transaction: its executions, an edge group for each that waits for something, and the
edges. What waits for nothing is eligible at once. From then on completions move it along (`core.flows.dispatch`).

**New edges** may be added below executions of a flow that is already under way. The upstream is locked against ending
meanwhile; if it has ended before, its outcome is counted in the same transaction, since its completion event may have
been dispatched long ago. A dispatch counts only edges without an outcome, so nothing is ever counted twice.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection
from psycopg.rows import dict_row

from pgcoord_cli.core.events.outbox import OUTCOMES
from pgcoord_cli.core.flows.flow_file import FlowPlan
from pgcoord_cli.core.flows.join_policy import JoinPolicy, OnSatisfied
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConditionFalse, UsageError

PARTITIONS = 16
"""A flow's executions and events share a partition key below this."""


class Created(NamedTuple):
    """A new flow, and the ids of its executions by name."""

    flow_id: UUID
    executions: dict[str, UUID]


def create(conn: Connection[Any], plan: FlowPlan) -> Created:
    """Writes a flow, all of it or nothing."""
    upstreams = plan.upstreams()
    with conn.transaction():
        (flow_id,) = conn.execute(sql("flows", "insert_flow"), [plan.namespace, plan.instance_tag]).fetchall()[0]
        records = [
            {
                "name": execution.name,
                "partition_key": flow_id.int % PARTITIONS,
                "namespace": plan.namespace,
                "instance_tag": execution.instance_tag or plan.instance_tag,
                "state": "blocked" if execution.name in upstreams else "eligible",
                "command": execution.command,
                "max_attempts": execution.max_attempts,
            }
            for execution in plan.executions
        ]
        rows = conn.execute(sql("flows", "insert_executions"), [flow_id, json.dumps(records)])
        ids = {name: execution_id for execution_id, name in rows}
        if plan.edges:
            _connect(conn, flow_id, plan, ids)
        conn.execute(sql("flows", "announce"))
    return Created(flow_id, ids)


def _connect(conn: Connection[Any], flow_id: UUID, plan: FlowPlan, ids: dict[str, UUID]) -> None:
    groups = []
    for name, waited_for in plan.upstreams().items():
        policy = plan.policies.get(name, JoinPolicy())
        groups.append(
            {
                "downstream_id": str(ids[name]),
                "policy": policy.as_record(),
                "required": policy.required(len(waited_for)),
                "cancel_siblings": policy.on_satisfied == OnSatisfied.CANCEL_REMAINING,
                "size": len(waited_for),
            }
        )
    conn.execute(sql("flows", "insert_groups"), [flow_id, json.dumps(groups)])
    ends = [ids[upstream] for upstream, _ in plan.edges], [ids[downstream] for _, downstream in plan.edges]
    conn.execute(sql("flows", "insert_edges"), [flow_id, *ends])


def add_edge(conn: Connection[Any], upstream_id: UUID, downstream_id: UUID) -> UUID:
    """Has one more execution waited for by one that waits already; counts it at once if it has ended.

    UsageError when there is no such execution, or the downstream is not waiting any more. Whoever adds edges sees to
    it that they do not close a circle.
    """
    with conn.transaction():
        # In the order in which a dispatch takes its locks: the group, then executions by their ids.
        group = conn.execute(sql("flows", "lock_group"), [downstream_id]).fetchone()
        states = dict(conn.execute(sql("flows", "hold_ends"), [[upstream_id, downstream_id]]).fetchall())
        if group is None or upstream_id not in states or states[downstream_id] != "blocked":
            raise UsageError("the upstream does not exist, or the downstream waits for nothing (any more)")
        outcome = states[upstream_id] if states[upstream_id] in OUTCOMES else None
        edge = conn.execute(sql("flows", "insert_edge"), [upstream_id, downstream_id, outcome]).fetchone()
        if edge is None:
            raise UsageError("there is such an edge already")
        conn.execute(sql("flows", "count_new_edge"), [downstream_id, outcome])
        conn.execute(sql("flows", "judge"), [downstream_id])
    return UUID(str(edge[0]))


def cancel(conn: Connection[Any], flow_id: UUID) -> int:
    """Ends what has not ended; returns how many executions that were. ConditionFalse: there is no such flow."""
    is_found, cancelled = conn.execute(sql("flows", "cancel"), [flow_id]).fetchone() or (False, 0)
    if not is_found:
        raise _missing(flow_id)
    return int(cancelled)


def flow_document(conn: Connection[Any], flow_id: UUID) -> dict[str, Any]:
    """A flow with its executions and edges. ConditionFalse: there is no such flow."""
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")  # one snapshot of all of it
        cursor = conn.cursor(row_factory=dict_row)
        flow = cursor.execute(sql("flows", "show"), [flow_id]).fetchone()
        executions = cursor.execute(sql("flows", "executions"), [flow_id]).fetchall()
        edges = cursor.execute(sql("flows", "edges"), [flow_id]).fetchall()
    if flow is None:
        raise _missing(flow_id)
    return {**flow, "executions": executions, "edges": edges}


def list_flows(conn: Connection[Any], namespace: str | None, limit: int) -> list[dict[str, Any]]:
    """Flows, newest first, with how many of their executions are unfinished or failed."""
    return conn.cursor(row_factory=dict_row).execute(sql("flows", "list"), [namespace, limit]).fetchall()


def _missing(flow_id: UUID) -> ConditionFalse:
    return ConditionFalse(f"there is no flow {flow_id}", hint="see: pgcoord flow list")
