-- name: enqueue
-- Puts new commit requests into the queue and wakes the leader.
WITH enqueued AS (
    INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, reply_channel)
    SELECT request.request_id, request.epoch, request.term_id, request.read_version, request.payload, $6::text
      FROM unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::bigint[], $5::bytea[])
           AS request (request_id, epoch, term_id, read_version, payload)
)
SELECT pg_notify($7::text, '') IS NOT NULL AS announced, clock_timestamp() AS enqueued_at;

-- name: enqueue_again
-- Puts commit requests into the queue unless they are there already, and wakes the leader.
WITH enqueued AS (
    INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, reply_channel)
    SELECT request.request_id, request.epoch, request.term_id, request.read_version, request.payload, $6::text
      FROM unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::bigint[], $5::bytea[])
           AS request (request_id, epoch, term_id, read_version, payload)
    ON CONFLICT (request_id) DO NOTHING
)
SELECT pg_notify($7::text, '') IS NOT NULL AS announced, clock_timestamp() AS enqueued_at;

-- name: commit_directly
-- Commits a request by itself, if nobody else is committing, and gives its version; otherwise puts it into the queue.
SELECT version, answered_at
  FROM commit_directly($1::uuid, $2::bigint, $3::uuid, $4::bigint, $5::bytea[], $6::bytea[], $7::bytea[], $8::bytea[],
                    $9::bytea[], $10::bytea[], $11::bytea[], $12::bytea[], $13::text);

-- name: block_direct_commits
-- Waits for a direct commit in progress, at most for the timeout $1, and blocks further ones. The timeout is for this wait only.
SELECT pg_advisory_lock_shared('commit_requests'::regclass::oid::integer, 0) IS NOT NULL AS is_locked_out,
       set_config('lock_timeout', '0', true) AS lock_timeout
  FROM set_config('lock_timeout', $1::text, true);

-- name: admit_direct_commits
-- Lets clients make direct commits again.
SELECT pg_advisory_unlock_shared('commit_requests'::regclass::oid::integer, 0) AS is_unlocked;

-- name: claim
-- The pending requests above the queue floor, oldest first, with the server's clock, up to the payload that reaches $3 bytes; of each payload $4 bytes. read_limit is the last version that could be read under the request's term; null: it is the present term, $5.
SELECT id, CASE WHEN term_id = $5::uuid THEN NULL
                WHEN term_id IS NULL THEN 0 -- read before the first election, when there was nothing but version 0
                -- A term that this database does not know, or whose later versions it does not have, was led on another
                -- copy of it: a primary that failed before a standby had everything, or the original of a backup.
                ELSE coalesce((SELECT history.last_version FROM leader_history AS history
                                WHERE history.term_id = oldest.term_id), -1)
            END AS read_limit,
       read_version, substring(payload FOR $4::integer) AS payload, clock_timestamp() AS claimed_at
  FROM (SELECT id, term_id, read_version, payload, least(octet_length(payload), $4::integer) AS bytes,
               sum(least(octet_length(payload), $4::integer)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS bytes_so_far
          FROM commit_requests
         WHERE id > $1::bigint AND status = 'pending'
         ORDER BY id
         LIMIT $2::integer) AS oldest
 WHERE bytes_so_far - bytes < $3::bigint
 ORDER BY id;

-- name: queue_writers
-- The last request id that was drawn, and the transactions that may still bring an earlier one to light.
SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('commit_requests', 'id')::regclass), 0) AS last_id,
       (SELECT coalesce(array_agg(DISTINCT virtualtransaction), '{}')
          FROM pg_locks
         WHERE locktype = 'relation' AND relation = 'commit_requests'::regclass
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()) AS writers;

-- name: stored_values
-- What is stored under keys whose new value depends on it.
SELECT key, value FROM kv WHERE key = ANY ($1::bytea[]);

-- name: write_data
-- Removes half-open ranges (an end of null means to the last key), removes keys, and then writes keys.
SELECT write_data($1::bytea[], $2::bytea[], $3::bytea[], $4::bytea[], $5::bytea[]);

-- name: settle
-- Settles a batch under the fence: statuses, durable version, floors, wake-ups.
SELECT settle_commits($1::bigint, $2::uuid, $3::bigint, $4::bigint, $5::bigint, $6::bigint, $7::bigint,
                      $8::bigint[], $9::text[], $10::bigint[], $11::text[]);

-- name: window_commits
-- The committed requests above an id and a version, in version order: what a conflict window is made of.
SELECT id, commit_version, payload, resolved_at
  FROM commit_requests
 WHERE id > $1::bigint AND commit_version > $2::bigint AND status = 'committed'
 ORDER BY commit_version;

-- name: ask
-- Of these requests, those that are settled and, if asked for ($2), those that are pending, with the epoch of the same snapshot; and whether commits are to be confirmed by standbys.
SELECT lease.epoch, request.request_id, request.status, request.commit_version, request.reason,
       current_setting('synchronous_standby_names') <> '' AS needs_barrier
  FROM leader_lease AS lease
  LEFT JOIN commit_requests AS request
    ON request.request_id = ANY ($1::uuid[]) AND (request.status <> 'pending' OR $2::boolean)
 WHERE lease.id = 1;

-- name: barrier
-- Commits a message in the log at the level that acknowledged commits have: once it returns, all that was visible before is as safe as it is.
SELECT set_config('synchronous_commit',
                  CASE current_setting('pgcoord.durable', true) WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
                  true) AS level,
       pg_logical_emit_message(true, 'pgcoord', '')::text AS message;

-- name: queue_state
-- How many requests wait, and for how many seconds the oldest has.
SELECT count(*) AS pending,
       extract(epoch FROM clock_timestamp() - min(created_at))::double precision AS oldest_pending_seconds
  FROM commit_requests
 WHERE status = 'pending' AND id > (SELECT queue_floor_id FROM leader_lease WHERE id = 1);

-- name: list
-- Requests, newest first, without their payloads.
SELECT id, request_id, status, commit_version, read_version, epoch, reason, created_at, resolved_at
  FROM commit_requests
 WHERE ($1::text IS NULL OR status = $1::text)
 ORDER BY id DESC
 LIMIT $2::integer;

-- name: show
-- One request by the id that its client made.
SELECT id, request_id, status, commit_version, read_version, epoch, reason, created_at, resolved_at
  FROM commit_requests
 WHERE request_id = $1::uuid;

-- name: payload
-- What one request read and asked to have written.
SELECT payload FROM commit_requests WHERE request_id = $1::uuid;

-- name: commits_between
-- The commits that are still stored with versions above the first and up to the second, in version order.
SELECT request_id, commit_version, payload
  FROM commit_requests
 WHERE status = 'committed' AND commit_version > $1::bigint AND commit_version <= $2::bigint
 ORDER BY commit_version;

-- name: version_before
-- The last version that was committed before a request of the same leader's batches was settled.
SELECT coalesce(max(earlier.commit_version), 0) AS version
  FROM commit_requests AS earlier, commit_requests AS request
 WHERE request.request_id = $1::uuid AND earlier.status = 'committed'
   AND earlier.resolved_at <= request.resolved_at;
