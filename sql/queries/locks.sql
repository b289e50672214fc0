-- name: lock_holder
-- The session that holds the advisory lock of a 64-bit key; client address and start of its transaction or session are null if this role may not see them.
SELECT activity.pid,
       activity.application_name AS application,
       CASE WHEN activity.backend_start IS NOT NULL THEN coalesce(activity.client_addr::text, 'local') END AS client,
       coalesce(activity.xact_start, activity.backend_start) AS since
  FROM pg_locks AS held
  JOIN pg_stat_activity AS activity USING (pid)
 WHERE held.locktype = 'advisory' AND held.objsubid = 1 AND held.granted
   AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND held.classid::bigint = ($1::bigint >> 32) & 4294967295
   AND held.objid::bigint = $1::bigint & 4294967295
 ORDER BY activity.backend_start
 LIMIT 1;

-- name: name_key
-- Records the name of a lock key, unless the key has one. It waits for no disk and no standby: a crash that loses the name ends the lock too.
WITH quick AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
INSERT INTO lock_names (lock_key, lock_name)
SELECT $1::bigint, $2::text FROM quick
ON CONFLICT (lock_key) DO NOTHING;

-- name: name_of_key
-- The name of a lock key.
SELECT lock_name FROM lock_names WHERE lock_key = $1::bigint;

-- name: try_lock
-- Takes a session-level advisory lock if it is free; never waits.
SELECT pg_try_advisory_lock($1::bigint) AS is_taken;

-- name: unlock
-- Releases a session-level advisory lock.
SELECT pg_advisory_unlock($1::bigint) AS is_released;

-- name: wait_for_lock
-- Takes a session-level advisory lock, waiting in PostgreSQL's queue for at most the session's lock_timeout.
SELECT pg_advisory_lock($1::bigint) IS NOT NULL AS is_taken;

-- name: set_lock_timeout
-- Sets the session's lock_timeout, in milliseconds.
SELECT set_config('lock_timeout', $1::text, false) AS lock_timeout;

-- name: check_client
-- Has the server check once a second, while a statement runs, whether the client is still connected.
SELECT set_config('client_connection_check_interval', '1s', false) AS client_connection_check_interval;

-- name: heartbeat
-- Checks that the session answers.
SELECT true AS alive;

-- name: list
-- The sessions that hold or wait for the locks named in this schema; holders first.
SELECT names.lock_name AS name, NOT held.granted AS is_waiting, activity.pid,
       activity.application_name AS application,
       CASE WHEN activity.backend_start IS NOT NULL THEN coalesce(activity.client_addr::text, 'local') END AS client,
       coalesce(held.waitstart, activity.backend_start) AS since
  FROM pg_locks AS held
  JOIN lock_names AS names
    ON held.classid::bigint = (names.lock_key >> 32) & 4294967295 AND held.objid::bigint = names.lock_key & 4294967295
  LEFT JOIN pg_stat_activity AS activity USING (pid)
 WHERE held.locktype = 'advisory' AND held.objsubid = 1
   AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 ORDER BY names.lock_name, held.granted DESC, held.waitstart;

-- name: end_session
-- Terminates another session, unless it waits for a synchronous standby: that would show its commit unreplicated.
SELECT pg_terminate_backend(pid) AS is_ended
  FROM pg_stat_activity
 WHERE pid = $1::integer AND wait_event IS DISTINCT FROM 'SyncRep';
