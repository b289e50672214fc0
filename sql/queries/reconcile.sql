-- name: undispatched
-- The oldest undispatched completion events older than a number of milliseconds, without those that back off or are quarantined.
SELECT event.event_id
  FROM completion_events AS event
  LEFT JOIN dispatch_failures AS failure USING (event_id)
 WHERE event.dispatched_at_ms IS NULL
   AND event.committed_at_ms <= (extract(epoch FROM clock_timestamp()) * 1000)::bigint - $1::bigint
   AND ($3::text IS NULL OR event.namespace = $3::text) AND ($4::text IS NULL OR event.instance_tag = $4::text)
   AND (failure.event_id IS NULL OR (failure.quarantined_at IS NULL AND failure.retry_at <= clock_timestamp()))
 ORDER BY event.event_id
 LIMIT $2::integer;

-- name: count_filtered
-- The number of stale undispatched events that the filters leave out, up to a limit.
SELECT count(*) AS filtered
  FROM (SELECT FROM completion_events AS event
         WHERE event.dispatched_at_ms IS NULL
           AND event.committed_at_ms <= (extract(epoch FROM clock_timestamp()) * 1000)::bigint - $1::bigint
           AND NOT (($3::text IS NULL OR event.namespace IS NOT DISTINCT FROM $3::text)
                    AND ($4::text IS NULL OR event.instance_tag IS NOT DISTINCT FROM $4::text))
         LIMIT $2::integer) AS left_out;

-- name: note_failure
-- Records a failed dispatch: the next attempt comes after a pause that doubles, and after a number of attempts none does.
INSERT INTO dispatch_failures AS failure (event_id, last_error, retry_at)
VALUES ($1::bigint, $2::text, clock_timestamp() + interval '1 second')
ON CONFLICT (event_id) DO UPDATE
   SET attempts = failure.attempts + 1, last_error = excluded.last_error,
       retry_at = clock_timestamp() + least(interval '1 second' * 2 ^ least(failure.attempts, 20), interval '1 hour'),
       quarantined_at = CASE WHEN failure.attempts + 1 >= $3::integer THEN clock_timestamp() END
RETURNING attempts, quarantined_at IS NOT NULL AS is_quarantined;

-- name: quarantined
-- The quarantined events, which no reconciler dispatches.
SELECT event_id, event.execution_id, event.flow_id, event.outcome, attempts, last_error, quarantined_at
  FROM dispatch_failures
  JOIN completion_events AS event USING (event_id)
 WHERE quarantined_at IS NOT NULL
 ORDER BY event_id;

-- name: retry
-- Releases one event from quarantine, or all of them.
DELETE FROM dispatch_failures
 WHERE quarantined_at IS NOT NULL AND ($1::bigint IS NULL OR event_id = $1::bigint);

-- name: expire_leases
-- Ends execution leases that have expired; returns how many it found and ended.
WITH lost AS MATERIALIZED (
    SELECT execution.execution_id
      FROM executions AS execution
      JOIN execution_leases AS lease USING (execution_id)
     WHERE lease.expires_at < clock_timestamp() AND execution.state = 'running'
       AND ($2::text IS NULL OR execution.namespace = $2::text)
       AND ($3::text IS NULL OR execution.instance_tag = $3::text)
     ORDER BY execution.execution_id
     LIMIT $1::integer
       FOR NO KEY UPDATE OF execution, lease SKIP LOCKED
)
SELECT cardinality(ARRAY(SELECT execution_id FROM lost)) AS scanned,
       end_leases(ARRAY(SELECT execution_id FROM lost), 'expired', $4::integer) AS expired;

-- name: cancel_siblings
-- Cancels executions whose group is satisfied and cancels its siblings; returns how many it found and cancelled.
WITH needless AS MATERIALIZED (
    SELECT execution.execution_id
      FROM executions AS execution
     WHERE execution.ended_at IS NULL
       AND ($2::text IS NULL OR execution.namespace = $2::text)
       AND ($3::text IS NULL OR execution.instance_tag = $3::text)
       AND EXISTS (SELECT FROM edges JOIN edge_groups USING (downstream_id)
                    WHERE edges.upstream_id = execution.execution_id AND edge_groups.state = 'satisfied'
                      AND edge_groups.cancel_siblings)
     ORDER BY execution.execution_id
     LIMIT $1::integer
       FOR NO KEY UPDATE OF execution SKIP LOCKED
)
SELECT cardinality(ARRAY(SELECT execution_id FROM needless)) AS scanned,
       (SELECT count(*) FROM end_executions(
           ARRAY(SELECT execution_id FROM needless), 'cancelled', 'enough of its siblings succeeded')) AS cancelled;
