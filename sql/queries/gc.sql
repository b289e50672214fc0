-- name: orphan_requests
-- Marks one batch of pending requests of superseded epochs, older than a number of seconds, as orphaned while no leader holds the lease; returns how many and the last id.
WITH abandoned AS (
    SELECT request.id
      FROM commit_requests AS request
      JOIN leader_lease AS lease ON request.id > lease.queue_floor_id AND request.epoch < lease.epoch
     WHERE lease.id = 1
       -- A leader settles pending requests itself, those of earlier epochs included.
       AND NOT (lease.term_id IS NOT NULL AND lease.expires_at > clock_timestamp())
       AND request.status = 'pending' AND request.id > $1::bigint
       AND request.created_at < clock_timestamp() - make_interval(secs => $2::double precision)
     ORDER BY request.id
     LIMIT $3::integer
       FOR UPDATE OF request SKIP LOCKED
), orphaned AS (
    UPDATE commit_requests AS request
       SET status = 'orphaned', resolved_at = clock_timestamp(), reason = 'no leader resolved it in time'
      FROM abandoned
     WHERE request.id = abandoned.id
    RETURNING request.id
)
SELECT count(*) AS orphaned, coalesce(max(id), $1::bigint) AS last_id FROM orphaned;

-- name: delete_requests
-- Deletes one batch of settled requests older than a number of seconds, oldest first; returns how many and the last id.
WITH deletable AS (
    SELECT id
      FROM commit_requests
     WHERE id > $1::bigint AND status <> 'pending'
       AND resolved_at < clock_timestamp() - make_interval(secs => $2::double precision)
     ORDER BY id
     LIMIT $3::integer
       FOR UPDATE SKIP LOCKED -- rows that another session has locked are left to a later run
), deleted AS (
    DELETE FROM commit_requests USING deletable WHERE commit_requests.id = deletable.id RETURNING commit_requests.id
)
SELECT count(*) AS deleted, coalesce(max(id), $1::bigint) AS last_id FROM deleted;

-- name: count_requests
-- The number of settled requests older than a number of seconds.
SELECT count(*) AS deletable
  FROM commit_requests
 WHERE status <> 'pending'
   AND resolved_at < clock_timestamp() - make_interval(secs => $1::double precision);

-- name: oldest_request
-- The creation time of the oldest stored request.
SELECT created_at FROM commit_requests ORDER BY id LIMIT 1;

-- name: event_bound
-- How far events of an outbox may be collected: those before a time and up to a position. Must run before the deletion takes its snapshot: every transaction that this finds closed has then committed what the deletion sees.
SELECT committed_before_ms, passed_by_all FROM collection_bound($1::text, $2::double precision);

-- name: delete_lease_events
-- Deletes one batch of lease events after a position, up to the first that must stay; returns how many, the last id of the batch, and whether it is the last batch.
WITH oldest AS MATERIALIZED (
    SELECT event_id, committed_at_ms < $2::bigint AND event_id <= coalesce($4::bigint, event_id) AS is_over
      FROM lease_events
     WHERE event_id > $1::bigint
     ORDER BY event_id
     LIMIT $3::integer
), deletable AS (
    SELECT event_id, execution_id, committed_at_ms
      FROM lease_events
     WHERE event_id IN (SELECT event_id FROM oldest WHERE is_over)
       AND event_id < coalesce((SELECT min(event_id) FROM oldest WHERE NOT is_over), 9223372036854775807)
       FOR UPDATE SKIP LOCKED
), raised AS (
    -- In the same transaction: a cursor below the floor is refused as expired, so no event may go before the floor rises.
    UPDATE outbox_floors
       SET collected_through = last.event_id, execution_id = last.execution_id, committed_at_ms = last.committed_at_ms
      FROM (SELECT event_id, execution_id, committed_at_ms FROM deletable ORDER BY event_id DESC LIMIT 1) AS last
     WHERE outbox = 'lease_events' AND last.event_id > collected_through
), deleted AS (
    DELETE FROM lease_events USING deletable WHERE lease_events.event_id = deletable.event_id RETURNING 1
)
SELECT (SELECT count(*) FROM deleted) AS deleted, coalesce(max(event_id), $1::bigint) AS last_id,
       count(*) < $3::integer OR NOT bool_and(is_over) AS is_last
  FROM oldest;

-- name: delete_completion_events
-- Deletes one batch of completion events likewise; an undispatched event must stay.
WITH oldest AS MATERIALIZED (
    SELECT event_id,
           committed_at_ms < $2::bigint AND event_id <= coalesce($4::bigint, event_id) AND dispatched_at_ms IS NOT NULL AS is_over
      FROM completion_events
     WHERE event_id > $1::bigint
     ORDER BY event_id
     LIMIT $3::integer
), deletable AS (
    SELECT event_id, execution_id, committed_at_ms
      FROM completion_events
     WHERE event_id IN (SELECT event_id FROM oldest WHERE is_over)
       AND event_id < coalesce((SELECT min(event_id) FROM oldest WHERE NOT is_over), 9223372036854775807)
       FOR UPDATE SKIP LOCKED
), raised AS (
    -- In the same transaction: a cursor below the floor is refused as expired, so no event may go before the floor rises.
    UPDATE outbox_floors
       SET collected_through = last.event_id, execution_id = last.execution_id, committed_at_ms = last.committed_at_ms
      FROM (SELECT event_id, execution_id, committed_at_ms FROM deletable ORDER BY event_id DESC LIMIT 1) AS last
     WHERE outbox = 'completion_events' AND last.event_id > collected_through
), deleted AS (
    DELETE FROM completion_events USING deletable WHERE completion_events.event_id = deletable.event_id RETURNING 1
)
SELECT (SELECT count(*) FROM deleted) AS deleted, coalesce(max(event_id), $1::bigint) AS last_id,
       count(*) < $3::integer OR NOT bool_and(is_over) AS is_last
  FROM oldest;

-- name: oldest_event
-- The insertion time of the oldest stored event, and the subscription with the lowest position.
SELECT (SELECT to_timestamp(committed_at_ms / 1000.0) FROM {outbox} ORDER BY event_id LIMIT 1) AS oldest_kept,
       (SELECT subscription_name FROM subscriptions
         WHERE outbox = {outbox_name} AND last_position < (SELECT max(event_id) FROM {outbox})
         ORDER BY last_position LIMIT 1) AS furthest_behind;

-- name: count_lease_events
-- The number of lease events before the first that must stay.
SELECT count(*) AS deletable
  FROM lease_events
 WHERE event_id < coalesce((SELECT min(event_id)
                              FROM lease_events, collection_bound('lease_events', $1::double precision)
                             WHERE committed_at_ms >= committed_before_ms OR event_id > passed_by_all),
                           9223372036854775807);

-- name: count_completion_events
-- The number of completion events before the first that must stay.
SELECT count(*) AS deletable
  FROM completion_events
 WHERE event_id < coalesce((SELECT min(event_id)
                              FROM completion_events, collection_bound('completion_events', $1::double precision)
                             WHERE committed_at_ms >= committed_before_ms OR event_id > passed_by_all
                                OR dispatched_at_ms IS NULL),
                           9223372036854775807);

-- name: blocking_writers
-- The open transactions that keep events of an outbox older than a number of seconds, if there are such events: pid (null: a prepared transaction), application, role, and since when (null: this role may not see that).
SELECT held.pid, activity.application_name AS application, activity.usename::text AS role, activity.xact_start AS since,
       current_user::text AS own_role
  FROM pg_locks AS held
  LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
 WHERE held.locktype = 'advisory' AND held.classid = {outbox_name}::regclass::oid AND held.objid = 0 AND held.objsubid = 2
   AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND (activity.xact_start IS NULL OR activity.xact_start < clock_timestamp() - make_interval(secs => $1::double precision))
   AND (SELECT to_timestamp(committed_at_ms / 1000.0) FROM {outbox} ORDER BY event_id LIMIT 1)
       < clock_timestamp() - make_interval(secs => $1::double precision)
 ORDER BY since NULLS FIRST, held.pid;
