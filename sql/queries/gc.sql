-- name: orphan_requests
-- Marks pending requests of superseded epochs, older than a number of seconds, as orphaned: nobody will resolve them.
WITH abandoned AS (
    SELECT request.id
      FROM commit_requests AS request
      JOIN leader_lease AS lease ON request.id > lease.queue_floor_id AND request.epoch < lease.epoch
     WHERE lease.id = 1 AND NOT (lease.term_id IS NOT NULL AND lease.expires_at > clock_timestamp())
       AND request.status = 'pending'
       AND request.created_at < clock_timestamp() - make_interval(secs => $1::double precision)
       FOR UPDATE OF request SKIP LOCKED
)
UPDATE commit_requests AS request
   SET status = 'orphaned', resolved_at = clock_timestamp(), reason = 'no leader resolved it in time'
  FROM abandoned
 WHERE request.id = abandoned.id;

-- name: delete_requests
-- Deletes one batch of settled requests older than a number of seconds, oldest first; says how many and the last id.
WITH doomed AS (
    SELECT id
      FROM commit_requests
     WHERE id > $1::bigint AND status <> 'pending'
       AND resolved_at < clock_timestamp() - make_interval(secs => $2::double precision)
     ORDER BY id
     LIMIT $3::integer
       FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM commit_requests USING doomed WHERE commit_requests.id = doomed.id RETURNING commit_requests.id
)
SELECT count(*) AS deleted, coalesce(max(id), $1::bigint) AS last_id FROM deleted;

-- name: count_requests
-- How many settled requests are older than a number of seconds.
SELECT count(*) AS deletable
  FROM commit_requests
 WHERE status <> 'pending'
   AND resolved_at < clock_timestamp() - make_interval(secs => $1::double precision);

-- name: oldest_request
-- When the oldest request that is still stored was made.
SELECT created_at FROM commit_requests ORDER BY id LIMIT 1;
