"""Flows: graphs of executions that depend on each other.

A flow is created in one transaction: its executions, an edge group for each execution that has upstreams, and the
edges. An execution without upstreams is eligible at once; afterwards completions move the others
(`core.flows.dispatch`).

**New edges** may be added above blocked executions of a running flow. `add_edge` locks the upstream so that it cannot
end meanwhile. If it has ended before, the same transaction counts its outcome, since its completion event may already
have been dispatched. A dispatch counts only edges without an outcome, so no edge is counted twice.
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
"""Partition keys are 0 to PARTITIONS - 1; all executions and events of a flow have the same one."""


class CreatedFlow(NamedTuple):
    """The id of a new flow, and the ids of its executions by name."""

    flow_id: UUID
    executions: dict[str, UUID]


def create(conn: Connection[Any], plan: FlowPlan) -> CreatedFlow:
    """Creates a flow from a plan in one transaction; returns the ids."""
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
            _insert_edges(conn, flow_id, plan, ids)
        # Sent at the commit, when the workers that it wakes can see the executions.
        conn.execute(sql("flows", "announce"))
    return CreatedFlow(flow_id, ids)


def _insert_edges(conn: Connection[Any], flow_id: UUID, plan: FlowPlan, ids: dict[str, UUID]) -> None:
    groups = []
    for name, upstreams in plan.upstreams().items():
        policy = plan.policies.get(name, JoinPolicy())
        groups.append(
            {
                "downstream_id": str(ids[name]),
                "policy": policy.as_record(),
                "required": policy.required(len(upstreams)),
                "cancel_siblings": policy.on_satisfied == OnSatisfied.CANCEL_REMAINING,
                "size": len(upstreams),
            }
        )
    conn.execute(sql("flows", "insert_groups"), [flow_id, json.dumps(groups)])
    ends = [ids[upstream] for upstream, _ in plan.edges], [ids[downstream] for _, downstream in plan.edges]
    conn.execute(sql("flows", "insert_edges"), [flow_id, *ends])


def add_edge(conn: Connection[Any], upstream_id: UUID, downstream_id: UUID) -> UUID:
    """Makes a blocked execution depend on one more upstream; returns the id of the new edge.

    If the upstream has ended, its outcome is counted at once. Raises UsageError if an execution does not exist, the
    downstream is not blocked, or there is such an edge. Does not check for cycles: the caller must not add one.
    """
    with conn.transaction():
        # In the lock order of a dispatch, so that the two cannot deadlock: the group, then executions by id.
        group = conn.execute(sql("flows", "lock_group"), [downstream_id]).fetchone()
        states = dict(conn.execute(sql("flows", "hold_ends"), [[upstream_id, downstream_id]]).fetchall())
        if group is None or upstream_id not in states or states[downstream_id] != "blocked":
            raise UsageError(
                f"cannot add an edge from {upstream_id} to {downstream_id}: the upstream does not exist, "
                "or the downstream is not blocked"
            )
        outcome = states[upstream_id] if states[upstream_id] in OUTCOMES else None
        edge = conn.execute(sql("flows", "insert_edge"), [upstream_id, downstream_id, outcome]).fetchone()
        if edge is None:
            raise UsageError(f"there is already an edge from {upstream_id} to {downstream_id}")
        conn.execute(sql("flows", "count_new_edge"), [downstream_id, outcome])
        # The new edge may have made the group satisfied or impossible, and perhaps no later event judges it.
        conn.execute(sql("flows", "judge"), [downstream_id])
    return UUID(str(edge[0]))


def cancel(conn: Connection[Any], flow_id: UUID) -> int:
    """Cancels the executions of a flow that have not ended; returns how many.

    Raises ConditionFalse if there is no such flow.
    """
    is_found, cancelled = conn.execute(sql("flows", "cancel"), [flow_id]).fetchone() or (False, 0)
    if not is_found:
        raise _missing(flow_id)
    return int(cancelled)


def flow_document(conn: Connection[Any], flow_id: UUID) -> dict[str, Any]:
    """Returns a flow with its executions and edges. Raises ConditionFalse if there is no such flow."""
    with conn.transaction():
        # One snapshot for the three statements, so that states and edge outcomes match.
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor = conn.cursor(row_factory=dict_row)
        flow = cursor.execute(sql("flows", "show"), [flow_id]).fetchone()
        executions = cursor.execute(sql("flows", "executions"), [flow_id]).fetchall()
        edges = cursor.execute(sql("flows", "edges"), [flow_id]).fetchall()
    if flow is None:
        raise _missing(flow_id)
    return {**flow, "executions": executions, "edges": edges}


def list_flows(conn: Connection[Any], namespace: str | None, limit: int) -> list[dict[str, Any]]:
    """Returns at most `limit` flows, newest first, with the counts of their executions."""
    return conn.cursor(row_factory=dict_row).execute(sql("flows", "list"), [namespace, limit]).fetchall()


def _missing(flow_id: UUID) -> ConditionFalse:
    return ConditionFalse(f"there is no flow {flow_id}", hint="see: pgcoord flow list")
