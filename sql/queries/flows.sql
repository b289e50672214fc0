-- name: insert_flow
-- Inserts a flow.
INSERT INTO flows (namespace, instance_tag) VALUES ($1::text, $2::text) RETURNING flow_id;

-- name: insert_executions
-- Inserts executions of a flow, from a JSON array of objects.
INSERT INTO executions (flow_id, name, partition_key, namespace, instance_tag, state, command, max_attempts)
SELECT $1::uuid, name, partition_key, namespace, instance_tag, state, command, max_attempts
  FROM jsonb_to_recordset($2::jsonb) AS execution (
       name text, partition_key smallint, namespace text, instance_tag text, state text, command text[],
       max_attempts integer)
RETURNING execution_id, name;

-- name: insert_groups
-- Inserts the edge groups of a flow, from a JSON array of objects.
INSERT INTO edge_groups (downstream_id, flow_id, policy, required, cancel_siblings, running_count)
SELECT downstream_id, $1::uuid, policy, required, cancel_siblings, size
  FROM jsonb_to_recordset($2::jsonb) AS edge_group (
       downstream_id uuid, policy jsonb, required integer, cancel_siblings boolean, size integer);

-- name: insert_edges
-- Inserts the edges of a flow, from an array of upstreams and an array of downstreams.
INSERT INTO edges (flow_id, upstream_id, downstream_id)
SELECT $1::uuid, upstream_id, downstream_id
  FROM unnest($2::uuid[], $3::uuid[]) AS edge (upstream_id, downstream_id);

-- name: announce
-- Wakes the workers: executions may have become eligible.
SELECT pg_notify(current_schema() || '.executions', '') AS announced;

-- name: lock_group
-- Locks the edge group of an execution, if it is still pending.
SELECT downstream_id FROM edge_groups WHERE downstream_id = $1::uuid AND state = 'pending' FOR NO KEY UPDATE;

-- name: hold_ends
-- The states of the executions that a new edge joins; locks them, so that neither ends before this transaction does.
SELECT execution_id, state FROM executions WHERE execution_id = ANY ($1::uuid[]) ORDER BY execution_id FOR SHARE;

-- name: insert_edge
-- Inserts an edge unless it exists; the outcome is that of an upstream that has already ended.
INSERT INTO edges (flow_id, upstream_id, downstream_id, outcome)
SELECT flow_id, $1::uuid, $2::uuid, $3::text FROM edge_groups WHERE downstream_id = $2::uuid
ON CONFLICT (upstream_id, downstream_id) DO NOTHING
RETURNING edge_id;

-- name: count_new_edge
-- Counts a new edge in its group, under its outcome if the upstream has ended; all_of requires one success more.
UPDATE edge_groups
   SET running_count = running_count + ($2::text IS NULL)::integer,
       success_count = success_count + ($2::text IS NOT DISTINCT FROM 'success')::integer,
       skip_count = skip_count + ($2::text IS NOT DISTINCT FROM 'skipped')::integer,
       fail_count = fail_count + ($2::text IS NOT NULL AND $2::text NOT IN ('success', 'skipped'))::integer,
       required = required + (policy ->> 'kind' = 'all_of')::integer
 WHERE downstream_id = $1::uuid;

-- name: judge
-- Judges one group after its counts have changed.
SELECT judge_groups(ARRAY[$1::uuid]) AS moved;

-- name: dispatch
-- Claims undispatched completion events and counts the edges below them; one row for each event that this call claimed.
SELECT claimed_id, counted FROM dispatch_completions($1::bigint[]);

-- name: show
-- One flow.
SELECT flow_id, namespace, instance_tag, created_at, cancelled_at FROM flows WHERE flow_id = $1::uuid;

-- name: executions
-- The executions of a flow in the order of their creation, with join policy and lease owner.
SELECT execution.execution_id, execution.name, execution.state, execution.command, execution.max_attempts,
       execution.failures, execution.lost_leases, execution.reason, execution.created_at, execution.ended_at,
       lease.owner, edge_group.policy
  FROM executions AS execution
  LEFT JOIN execution_leases AS lease USING (execution_id)
  LEFT JOIN edge_groups AS edge_group ON edge_group.downstream_id = execution.execution_id
 WHERE execution.flow_id = $1::uuid
 ORDER BY execution.queue_position;

-- name: edges
-- The edges of a flow, by the names of upstream and downstream.
SELECT upstream.name AS upstream, downstream.name AS downstream, edges.outcome
  FROM edges
  JOIN executions AS upstream ON upstream.execution_id = edges.upstream_id
  JOIN executions AS downstream ON downstream.execution_id = edges.downstream_id
 WHERE edges.flow_id = $1::uuid
 ORDER BY downstream.queue_position, upstream.queue_position;

-- name: list
-- Flows, newest first, with the number of their executions, of the unfinished and of the failed ones.
SELECT flow_id, namespace, instance_tag, created_at,
       (SELECT count(*) FROM executions WHERE executions.flow_id = flows.flow_id) AS executions,
       (SELECT count(*) FROM executions WHERE executions.flow_id = flows.flow_id AND ended_at IS NULL) AS unfinished,
       (SELECT count(*) FROM executions WHERE executions.flow_id = flows.flow_id AND state = 'failed') AS failed
  FROM flows
 WHERE ($1::text IS NULL OR namespace = $1::text)
 ORDER BY created_at DESC, flow_id
 LIMIT $2::integer;

-- name: cancel
-- Cancels the executions of a flow that have not ended.
WITH cancelled AS (
    UPDATE flows SET cancelled_at = coalesce(cancelled_at, clock_timestamp()) WHERE flow_id = $1::uuid RETURNING flow_id
), locked AS MATERIALIZED (
    SELECT execution_id FROM executions
     WHERE flow_id = (SELECT flow_id FROM cancelled) AND ended_at IS NULL
     ORDER BY execution_id FOR NO KEY UPDATE
)
SELECT EXISTS (SELECT FROM cancelled) AS is_found,
       (SELECT count(*) FROM end_executions(ARRAY(SELECT execution_id FROM locked), 'cancelled', 'the flow was cancelled'))
       AS cancelled;
