-- name: read_lease
-- The lease: its holder, expiry by the server's clock, durable version and floors.
SELECT epoch, term_id, leader_addr, durable_version, conflict_floor, window_start_id, queue_floor_id,
       acquired_at, renewed_at, expires_at,
       term_id IS NOT NULL AND expires_at > clock_timestamp() AS held,
       greatest(extract(epoch FROM expires_at - clock_timestamp()), 0)::double precision AS expires_in_seconds
  FROM leader_lease
 WHERE id = 1;

-- name: is_held
-- Whether a leader holds an unexpired lease, by the server's clock.
SELECT term_id IS NOT NULL AND expires_at > clock_timestamp() AS held
  FROM leader_lease
 WHERE id = 1;

-- name: wait_for_leader_lock
-- Takes the leader lock, waiting for at most the session's lock_timeout; PostgreSQL releases it when the leader's session ends.
SELECT pg_advisory_lock($1::bigint);

-- name: try_leader_lock
-- Takes the leader lock if it is free; never waits.
SELECT pg_try_advisory_lock($1::bigint) AS locked;

-- name: terminate_idle_leader_sessions
-- Terminates the sessions of a leader whose lease has expired, if they are idle: those of a frozen or unreachable process could hold their locks without limit. Never a session that may be committing (rule I16).
SELECT locks.pid, pg_terminate_backend(locks.pid) AS terminated
  FROM pg_locks AS locks
  JOIN pg_stat_activity AS activity USING (pid)
 WHERE locks.locktype = 'advisory' AND locks.objsubid = 1 AND locks.granted AND locks.pid <> pg_backend_pid()
   AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND locks.classid::bigint = ($1::bigint >> 32) & 4294967295
   AND locks.objid::bigint = $1::bigint & 4294967295
   -- Terminating a commit that waits for a synchronous standby would make it visible although no standby has it.
   AND activity.wait_event = 'ClientRead'
   AND EXISTS (SELECT FROM leader_lease WHERE id = 1 AND expires_at <= clock_timestamp());

-- name: share_session_lock
-- Marks this session as the leader's by a shared lock, so that a successor can terminate it; false if another session holds the lock exclusively.
SELECT pg_try_advisory_lock_shared($1::bigint) AS is_marked;

-- name: is_elected_here
-- Whether a term was elected on this server, and not on another copy of the database.
SELECT EXISTS (SELECT FROM leader_lease
                WHERE id = 1 AND term_id = $1::uuid AND server_started_at = pg_postmaster_start_time()) AS is_here;

-- name: terminate_idle_direct_commits
-- Terminates sessions that block the lease row by a direct commit in an open transaction, if they are idle or sleep. Never a session that may be committing (rule I16).
SELECT locks.pid, pg_terminate_backend(locks.pid) AS terminated
  FROM pg_locks AS locks
  JOIN pg_stat_activity AS activity USING (pid)
 WHERE locks.locktype = 'advisory' AND locks.objsubid = 2 AND locks.mode = 'ExclusiveLock' AND locks.granted
   AND locks.pid <> pg_backend_pid()
   AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND locks.classid = 'commit_requests'::regclass::oid AND locks.objid = 0
   AND activity.wait_event IN ('ClientRead', 'PgSleep');

-- name: lease_holders
-- The sessions that lock or update the lease row, oldest transaction first, and whether each waits for a synchronous standby; null if this role may not see that.
SELECT activity.pid, activity.application_name AS application, activity.usename::text AS role,
       activity.wait_event = 'SyncRep' AS waits_for_standby,
       extract(epoch FROM clock_timestamp() - activity.xact_start)::double precision AS seconds
  FROM pg_locks AS locks
  JOIN pg_stat_activity AS activity USING (pid)
 WHERE locks.locktype = 'relation' AND locks.relation = 'leader_lease'::regclass
   AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND locks.mode IN ('RowShareLock', 'RowExclusiveLock') AND locks.granted AND locks.pid <> pg_backend_pid()
 GROUP BY activity.pid, activity.application_name, activity.usename, activity.wait_event, activity.xact_start
 ORDER BY activity.xact_start NULLS LAST, activity.pid;

-- name: waits_for_standby
-- For how many seconds the longest waiting commit of pgcoord has waited for a synchronous standby, among the sessions that this role may see; the standbys' setting; and how many sessions of pgcoord this role may not see.
SELECT max(extract(epoch FROM clock_timestamp() - state_change))
           FILTER (WHERE wait_event = 'SyncRep')::double precision AS seconds,
       current_setting('synchronous_standby_names') AS standbys,
       count(*) FILTER (WHERE backend_start IS NULL) AS hidden_sessions
  FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'pgcoord/%';

-- name: make_commits_durable
-- Makes the commits of this session wait for the WAL flush if its default does not; a stronger default stays.
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';

-- name: lock_lease
-- Locks the lease row, so that the next statement of the transaction sees its last state; makes the transaction durable and confirmed by synchronous standbys.
SELECT CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')
            THEN set_config('synchronous_commit', 'on', true) END AS synchronous_commit
  FROM leader_lease
 WHERE id = 1
   FOR UPDATE;

-- name: take_over
-- Begins a new term with the next epoch and closes the one before. No row: the lease has not expired, and the caller does not hold the leader lock ($3).
WITH previous AS (
    SELECT *, clock_timestamp() AS moment, gen_random_uuid() AS new_term_id,
           concat((SELECT system_identifier FROM pg_control_system()), '/',
                  substring(pg_walfile_name(pg_current_wal_insert_lsn()) FOR 8)) AS new_wal_history
      FROM leader_lease
     WHERE id = 1
       FOR UPDATE
), closed AS (
    UPDATE leader_history AS history
       SET ended_at = previous.moment, last_version = previous.durable_version,
           end_reason = CASE WHEN previous.expires_at <= previous.moment THEN 'expired' ELSE 'lost' END
      FROM previous
     WHERE history.term_id = previous.term_id AND history.ended_at IS NULL
       AND (($3::boolean AND previous.holds_lock) OR previous.expires_at <= previous.moment)
), taken AS (
    UPDATE leader_lease AS lease
       SET epoch = previous.epoch + 1, term_id = previous.new_term_id, last_term_id = previous.new_term_id,
           leader_addr = $1::text, holds_lock = $3::boolean, server_started_at = pg_postmaster_start_time(),
           wal_history = previous.new_wal_history, acquired_at = previous.moment, renewed_at = previous.moment,
           expires_at = previous.moment + make_interval(secs => $2::double precision)
      FROM previous
     WHERE lease.id = previous.id
       -- The lock shows the end of a leader's session only if that leader held it. A leader that took an expired lease while
       -- a frozen one kept the lock does not hold it until `renew` has recorded that it does.
       AND (($3::boolean AND previous.holds_lock) OR previous.term_id IS NULL OR previous.expires_at <= previous.moment)
    RETURNING lease.*
), opened AS (
    INSERT INTO leader_history (epoch, term_id, leader_addr, acquired_at, first_version)
    SELECT epoch, term_id, leader_addr, acquired_at, durable_version + 1 FROM taken
), revived AS (
    -- A promoted standby or a restored copy may lack the settlement of a request that it has as pending, and the client may
    -- have been told that it was not committed. It must not be committed here (rule I3): its client runs it again.
    UPDATE commit_requests AS request
       SET status = 'too_old', resolved_at = clock_timestamp(), reason = 'enqueued before a failover or a restore'
      FROM taken, previous
     WHERE request.status = 'pending' AND request.id > previous.queue_floor_id
       AND previous.wal_history <> previous.new_wal_history
), readable AS (
    -- After a crash nothing is left of the replaced values, and of this row, until now.
    INSERT INTO kv_undo_floor (floor, next_floor)
    SELECT durable_version, durable_version FROM taken
    ON CONFLICT DO NOTHING
)
SELECT epoch, term_id, durable_version, conflict_floor, window_start_id, queue_floor_id,
       pg_notify($4::text, epoch::text) IS NOT NULL AS announced
  FROM taken;

-- name: renew
-- Extends the lease by its time to live ($3, seconds), and notes whether its leader has got the leader lock ($4). No row: the lease has expired or another term has begun.
UPDATE leader_lease
   SET renewed_at = clock_timestamp(),
       expires_at = clock_timestamp() + make_interval(secs => $3::double precision), holds_lock = $4::boolean
 WHERE id = 1 AND epoch = $1::bigint AND term_id = $2::uuid AND expires_at > clock_timestamp()
RETURNING step_down_epoch IS NOT DISTINCT FROM epoch AS asked_to_step_down,
          -- A renewal that a crash loses does no harm, but one that waited for a standby would keep the row locked.
          set_config('synchronous_commit', 'off', true) AS synchronous_commit;

-- name: ask_to_step_down
-- Asks the leader of the present epoch to finish its batch and release the lease. No row: there is no leader.
UPDATE leader_lease
   SET step_down_epoch = epoch
 WHERE id = 1 AND term_id IS NOT NULL AND expires_at > clock_timestamp()
RETURNING epoch, leader_addr, pg_notify($1::text, '') IS NOT NULL AS announced;

-- name: raise_floors
-- Stores floors that have risen without a batch. No row: the lease has expired or another term has begun.
UPDATE leader_lease
   SET conflict_floor = $3::bigint, window_start_id = $4::bigint, queue_floor_id = $5::bigint
 WHERE id = 1 AND epoch = $1::bigint AND term_id = $2::uuid AND expires_at > clock_timestamp()
RETURNING durable_version;

-- name: history
-- The terms that have not ended, or ended at most $1 seconds ago (null: all), newest first.
SELECT epoch, leader_addr, acquired_at, ended_at, end_reason, first_version,
       coalesce(history.last_version, CASE WHEN lease.term_id = history.term_id THEN lease.durable_version END)
           AS last_version
  FROM leader_history AS history
 CROSS JOIN (SELECT term_id, durable_version FROM leader_lease WHERE id = 1) AS lease
 WHERE $1::double precision IS NULL OR ended_at IS NULL
    OR ended_at >= clock_timestamp() - make_interval(secs => $1::double precision)
 ORDER BY acquired_at DESC
 LIMIT $2::integer;

-- name: release
-- Ends a term and releases its lease, so that candidates need not wait for the expiry. No row: another term has begun.
WITH released AS (
    UPDATE leader_lease
       SET term_id = NULL, leader_addr = NULL, expires_at = clock_timestamp()
     WHERE id = 1 AND epoch = $1::bigint AND term_id = $2::uuid
    RETURNING durable_version
), closed AS (
    UPDATE leader_history AS history
       SET ended_at = clock_timestamp(), end_reason = $3::text, last_version = released.durable_version
      FROM released
     WHERE history.term_id = $2::uuid AND history.ended_at IS NULL
)
SELECT durable_version, pg_notify($4::text, '') IS NOT NULL AS announced,
       set_config('synchronous_commit', 'off', true) AS synchronous_commit -- if a crash loses it, the lease expires
  FROM released;

-- name: successor
-- The present epoch and leader, for the message of a leader that was fenced.
SELECT epoch, leader_addr FROM leader_lease WHERE id = 1;
