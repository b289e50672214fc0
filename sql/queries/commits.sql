-- name: enqueue
-- Inserts new commit requests into the queue and notifies the leader.
WITH enqueued AS (
    INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, reply_channel)
    SELECT request.request_id, request.epoch, request.term_id, request.read_version, request.payload, $6::text
      FROM unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::bigint[], $5::bytea[])
           AS request (request_id, epoch, term_id, read_version, payload)
)
SELECT pg_notify($7::text, '') IS NOT NULL AS announced, clock_timestamp() AS enqueued_at;

-- name: enqueue_again
-- Inserts commit requests into the queue unless their ids are stored already, and notifies the leader.
WITH enqueued AS (
    INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, reply_channel)
    SELECT request.request_id, request.epoch, request.term_id, request.read_version, request.payload, $6::text
      FROM unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::bigint[], $5::bytea[])
           AS request (request_id, epoch, term_id, read_version, payload)
    ON CONFLICT (request_id) DO NOTHING -- a request applies at most once (rule I3)
)
SELECT pg_notify($7::text, '') IS NOT NULL AS announced, clock_timestamp() AS enqueued_at;

-- name: commit_directly
-- Commits a request directly if no other commit is in progress, and returns its version; otherwise inserts it into the queue and returns null.
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
-- The pending requests above the queue floor $1, oldest first, until their payloads reach $3 bytes, each cut to $4 bytes. read_limit: the highest version that can have been read under the request's term; null: its term is the present one, $5.
SELECT id, CASE WHEN term_id = $5::uuid THEN NULL
                WHEN term_id IS NULL THEN 0 -- read before the first election, when only version 0 existed
                -- A term that this history lacks (-1), or of which it lacks later versions, was led on another copy of the
                -- database: a primary that failed before its standby had received all, or the original of a backup.
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
-- The last request id that was drawn, and the open transactions that may still commit a request with a lower id.
SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('commit_requests', 'id')::regclass), 0) AS last_id,
       (SELECT coalesce(array_agg(DISTINCT virtualtransaction), '{}')
          FROM pg_locks
         WHERE locktype = 'relation' AND relation = 'commit_requests'::regclass
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()) AS writers;

-- name: stored_values
-- The stored values of keys; for mutations whose result depends on them.
SELECT key, value FROM kv WHERE key = ANY ($1::bytea[]);

-- name: write_data
-- Deletes half-open ranges (an end of null means past the last key), deletes keys, then inserts or updates keys; keeps the values that version $6 had.
SELECT write_data($1::bytea[], $2::bytea[], $3::bytea[], $4::bytea[], $5::bytea[], $6::bigint, undo_part)
  FROM leader_lease
 WHERE id = 1;

-- name: keep_undo
-- Empties the older part of the replaced values from time to time; returns the right that is missing, an empty text if it did, null if it is not time to.
SELECT keep_undo($1::bigint, $2::uuid) AS missing;

-- name: settle
-- Settles a batch under the fence: statuses, durable version, floors, notifications; SQLSTATE PC001 to PC003 when it must not.
SELECT settle_commits($1::bigint, $2::uuid, $3::bigint, $4::bigint, $5::bigint, $6::bigint, $7::bigint,
                      $8::bigint[], $9::text[], $10::bigint[], $11::text[]);

-- name: window_commits
-- The committed requests above an id and a version, in version order, for the conflict window.
SELECT id, commit_version, payload, resolved_at
  FROM commit_requests
 WHERE id > $1::bigint AND commit_version > $2::bigint AND status = 'committed'
 ORDER BY commit_version;

-- name: ask
-- The settled ones of these requests, and with $2 the pending ones, beside the epoch of the same snapshot (rule I3); and whether a commit has to be confirmed by standbys.
SELECT lease.epoch, request.request_id, request.status, request.commit_version, request.reason,
       current_setting('synchronous_standby_names') <> '' AS needs_barrier
  FROM leader_lease AS lease
  LEFT JOIN commit_requests AS request
    ON request.request_id = ANY ($1::uuid[]) AND (request.status <> 'pending' OR $2::boolean)
 WHERE lease.id = 1;

-- name: needs_barrier
-- Whether commits on this server are to be confirmed by standbys; on a standby, what is visible has been confirmed by it.
SELECT current_setting('synchronous_standby_names') <> '' AND NOT pg_is_in_recovery() AS needs_barrier;

-- name: barrier
-- Writes a message to the WAL and commits it as durably as an acknowledged commit: when it returns, every commit that was visible before is as durable (rule I16).
SELECT set_config('synchronous_commit',
                  CASE current_setting('pgcoord.durable', true) WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
                  true) AS level,
       pg_logical_emit_message(true, 'pgcoord', '')::text AS message;

-- name: queue_state
-- The number of pending requests, and the age of the oldest in seconds.
SELECT count(*) AS pending,
       extract(epoch FROM clock_timestamp() - min(created_at))::double precision AS oldest_pending_seconds
  FROM commit_requests
 WHERE status = 'pending'
   -- Above the floor: the count does not read the settled history.
   AND id > (SELECT queue_floor_id FROM leader_lease WHERE id = 1);

-- name: list
-- Requests of one status or of all, newest first, without their payloads.
SELECT id, request_id, status, commit_version, read_version, epoch, reason, created_at, resolved_at
  FROM commit_requests
 WHERE ($1::text IS NULL OR status = $1::text)
 ORDER BY id DESC
 LIMIT $2::integer;

-- name: show
-- One request by its request id, without its payload.
SELECT id, request_id, status, commit_version, read_version, epoch, reason, created_at, resolved_at
  FROM commit_requests
 WHERE request_id = $1::uuid;

-- name: payload
-- The payload of one request: its reads and mutations.
SELECT payload FROM commit_requests WHERE request_id = $1::uuid;

-- name: requests_before
-- Requests with ids below $1, newest first; the payloads of those that were committed above version $3.
SELECT request_id, commit_version, id, CASE WHEN commit_version > $3::bigint THEN payload END AS payload
  FROM commit_requests
 WHERE id < $1::bigint
 ORDER BY id DESC
 LIMIT $2::integer;

-- name: requests_after
-- Requests with ids above $1, oldest first; the payloads of those that were committed above version $3 before request $4 was settled. is_later: enqueued only after that.
SELECT other.request_id, other.commit_version, other.id, other.created_at > request.resolved_at AS is_later,
       CASE WHEN other.commit_version > $3::bigint AND other.resolved_at <= request.resolved_at
            THEN other.payload END AS payload
  FROM (SELECT resolved_at FROM commit_requests WHERE id = $4::bigint) AS request
 CROSS JOIN commit_requests AS other
 WHERE other.id > $1::bigint
 ORDER BY other.id
 LIMIT $2::integer;

-- name: newest_requests
-- Requests with ids below $1, newest first; the payloads of commits and conflicts. is_wanted: enqueued in the last $3 seconds (null: any).
SELECT id, status, read_version, commit_version, created_at,
       ($3::double precision IS NULL OR created_at >= clock_timestamp() - make_interval(secs => $3::double precision)) AS is_wanted,
       CASE WHEN status IN ('committed', 'conflict') THEN payload END AS payload
  FROM commit_requests
 WHERE id < $1::bigint
 ORDER BY id DESC
 LIMIT $2::integer;
