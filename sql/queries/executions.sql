-- name: claim
-- Leases the oldest eligible executions to a worker for a number of seconds.
WITH chosen AS (
    SELECT execution_id
      FROM executions
     WHERE state = 'eligible' AND eligible_from <= clock_timestamp()
       AND ($4::text IS NULL OR namespace = $4::text) AND ($5::text IS NULL OR instance_tag = $5::text)
     ORDER BY queue_position
     LIMIT $3::integer
       FOR NO KEY UPDATE SKIP LOCKED
), started AS (
    UPDATE executions AS execution
       SET state = 'running', lease_epoch = lease_epoch + 1
      FROM chosen
     WHERE execution.execution_id = chosen.execution_id
    RETURNING execution.*
), leased AS (
    INSERT INTO execution_leases (execution_id, lease_epoch, owner, expires_at)
    SELECT execution_id, lease_epoch, $1::text, clock_timestamp() + make_interval(secs => $2::double precision)
      FROM started
    RETURNING execution_id, lease_id, expires_at
), announced AS (
    INSERT INTO lease_events (execution_id, lease_id, event_type, partition_key, namespace, instance_tag)
    SELECT execution_id, lease_id, CASE WHEN is_reclaimed THEN 'reclaimed' ELSE 'acquired' END, partition_key,
           namespace, instance_tag
      FROM started JOIN leased USING (execution_id)
     ORDER BY queue_position
)
SELECT execution_id, lease_id, lease_epoch, flow_id, name, command, failures + lost_leases + 1 AS attempt, expires_at
  FROM started JOIN leased USING (execution_id)
 ORDER BY queue_position;

-- name: renew
-- Renews a lease from now on, if its epoch is still the given one.
WITH renewed AS (
    UPDATE execution_leases
       SET expires_at = clock_timestamp() + make_interval(secs => $3::double precision)
     WHERE execution_id = $1::uuid AND lease_epoch = $2::bigint
    RETURNING execution_id, lease_id, expires_at
), announced AS (
    INSERT INTO lease_events (execution_id, lease_id, event_type, partition_key, namespace, instance_tag)
    SELECT execution_id, lease_id, 'renewed', partition_key, namespace, instance_tag
      FROM renewed JOIN executions USING (execution_id)
)
SELECT expires_at FROM renewed;

-- name: complete
-- Ends an execution as a success, if its lease epoch is still the given one.
WITH mine AS MATERIALIZED (
    SELECT execution_id
      FROM executions
     WHERE execution_id = $1::uuid AND lease_epoch = $2::bigint AND state = 'running'
       FOR NO KEY UPDATE
)
SELECT count(*) AS ended FROM end_executions(ARRAY(SELECT execution_id FROM mine), 'success', NULL);

-- name: fail
-- Ends an attempt as a failure, if the lease epoch is still the given one; returns the execution's new state.
SELECT fail_execution($1::uuid, $2::bigint, $3::text) AS state;

-- name: revoke
-- Revokes the lease of a running execution, of one epoch only if given, and makes the execution eligible again.
WITH locked AS MATERIALIZED (
    SELECT execution_id
      FROM executions
     WHERE execution_id = $1::uuid AND state = 'running' AND lease_epoch = coalesce($2::bigint, lease_epoch)
       FOR NO KEY UPDATE
)
SELECT end_leases(ARRAY(SELECT execution_id FROM locked), 'revoked', 2147483647) AS revoked;

-- name: show
-- One execution with its lease.
SELECT execution.execution_id, execution.flow_id, execution.name, execution.state, execution.partition_key,
       execution.namespace, execution.instance_tag, execution.command, execution.max_attempts, execution.failures,
       execution.lost_leases, execution.reason, execution.created_at, execution.ended_at, execution.lease_epoch,
       lease.lease_id, lease.owner, lease.expires_at
  FROM executions AS execution
  LEFT JOIN execution_leases AS lease USING (execution_id)
 WHERE execution.execution_id = $1::uuid;

-- name: next_eligible
-- The seconds until the next execution leaves its back-off; null if none is in back-off.
SELECT extract(epoch FROM min(eligible_from) - clock_timestamp())::double precision AS seconds
  FROM executions
 WHERE state = 'eligible' AND eligible_from > clock_timestamp()
   AND ($1::text IS NULL OR namespace = $1::text) AND ($2::text IS NULL OR instance_tag = $2::text);
