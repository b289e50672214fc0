-- name: read_lease
-- Who leads, until when by the server's clock, and how far the committed data has got.
SELECT epoch, term_id, leader_addr, durable_version, conflict_floor, window_start_id, queue_floor_id,
       acquired_at, renewed_at, expires_at,
       term_id IS NOT NULL AND expires_at > clock_timestamp() AS held,
       greatest(extract(epoch FROM expires_at - clock_timestamp()), 0)::double precision AS expires_in_seconds
  FROM leader_lease
 WHERE id = 1;

-- name: wait_for_leader_lock
-- Waits, up to the session's lock_timeout, for the lock that a living leader holds.
SELECT pg_advisory_lock($1::bigint);

-- name: try_leader_lock
-- Takes the same lock if it is free.
SELECT pg_try_advisory_lock($1::bigint) AS locked;

-- name: terminate_idle_leader_sessions
-- Ends sessions of a leader whose lease has run out, if they wait for their client: one that is frozen or cut off may hold locks for ever. Never a session that may be committing.
SELECT locks.pid, pg_terminate_backend(locks.pid) AS terminated
  FROM pg_locks AS locks
  JOIN pg_stat_activity AS activity USING (pid)
 WHERE locks.locktype = 'advisory' AND locks.objsubid = 1 AND locks.granted AND locks.pid <> pg_backend_pid()
   AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND locks.classid::bigint = ($1::bigint >> 32) & 4294967295
   AND locks.objid::bigint = $1::bigint & 4294967295
   -- A commit that waits for a synchronous standby would become visible, and be acknowledged, without its copy.
   AND activity.wait_event = 'ClientRead'
   AND EXISTS (SELECT FROM leader_lease WHERE id = 1 AND expires_at <= clock_timestamp());

-- name: share_session_lock
-- Marks this session as one of the leader's, so that a successor can end it. False: another session keeps the lock to itself; the leader does without.
SELECT pg_try_advisory_lock_shared($1::bigint) AS is_marked;

-- name: is_elected_here
-- Whether this server is the one on which a term was elected, and not a copy of it.
SELECT EXISTS (SELECT FROM leader_lease
                WHERE id = 1 AND term_id = $1::uuid AND server_started_at = pg_postmaster_start_time()) AS is_here;

-- name: terminate_idle_direct_commits
-- Ends sessions that hold up the lease with a direct commit in a transaction of their own, if they wait for their client or sleep. Never a session that may be committing.
SELECT locks.pid, pg_terminate_backend(locks.pid) AS terminated
  FROM pg_locks AS locks
  JOIN pg_stat_activity AS activity USING (pid)
 WHERE locks.locktype = 'advisory' AND locks.objsubid = 2 AND locks.mode = 'ExclusiveLock' AND locks.granted
   AND locks.pid <> pg_backend_pid()
   AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND locks.classid = 'commit_requests'::regclass::oid AND locks.objid = 0
   AND activity.wait_event IN ('ClientRead', 'PgSleep');

-- name: lease_holders
-- The sessions that have the lease row locked or are changing it, longest first, and whether each waits for a synchronous standby; null: this role may not see that.
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
-- For how many seconds the longest commit of ours has been waiting for a synchronous standby, as far as this role may see, and for which standbys.
SELECT max(extract(epoch FROM clock_timestamp() - state_change))::double precision AS seconds,
       current_setting('synchronous_standby_names') AS standbys
  FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'pgcoord/%' AND wait_event = 'SyncRep';

-- name: make_commits_durable
-- Has this session's commits wait for the disk where its default would not; any stronger default stays.
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';

-- name: lock_lease
-- Waits until nobody else is changing the lease, so that the next statement of the transaction sees what they left; the transaction will be durable, and confirmed by synchronous standbys.
SELECT CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')
            THEN set_config('synchronous_commit', 'on', true) END AS synchronous_commit
  FROM leader_lease
 WHERE id = 1
   FOR UPDATE;

-- name: take_over
-- Begins a new leadership: next epoch, new term, closing the one before. No row: the lease is held and unexpired, and the lock is not ours.
WITH previous AS (
    SELECT *, clock_timestamp() AS moment, gen_random_uuid() AS new_term_id FROM leader_lease WHERE id = 1 FOR UPDATE
), closed AS (
    UPDATE leader_history AS history
       SET ended_at = previous.moment, last_version = previous.durable_version,
           end_reason = CASE WHEN previous.expires_at <= previous.moment THEN 'expired' ELSE 'lost' END
      FROM previous
     WHERE history.term_id = previous.term_id AND history.ended_at IS NULL
       AND ($3::boolean OR previous.expires_at <= previous.moment)
), taken AS (
    UPDATE leader_lease AS lease
       SET epoch = previous.epoch + 1, term_id = previous.new_term_id, last_term_id = previous.new_term_id,
           leader_addr = $1::text, server_started_at = pg_postmaster_start_time(),
           acquired_at = previous.moment, renewed_at = previous.moment,
           expires_at = previous.moment + make_interval(secs => $2::double precision)
      FROM previous
     WHERE lease.id = previous.id
       AND ($3::boolean OR previous.term_id IS NULL OR previous.expires_at <= previous.moment)
    RETURNING lease.*
), opened AS (
    INSERT INTO leader_history (epoch, term_id, leader_addr, acquired_at, first_version)
    SELECT epoch, term_id, leader_addr, acquired_at, durable_version + 1 FROM taken
)
SELECT epoch, term_id, durable_version, conflict_floor, window_start_id, queue_floor_id,
       pg_notify($4::text, epoch::text) IS NOT NULL AS announced
  FROM taken;

-- name: renew
-- Extends the lease by its time to live, if it is still this leadership's and has not run out.
UPDATE leader_lease
   SET renewed_at = clock_timestamp(),
       expires_at = clock_timestamp() + make_interval(secs => $3::double precision)
 WHERE id = 1 AND epoch = $1::bigint AND term_id = $2::uuid AND expires_at > clock_timestamp()
RETURNING step_down_epoch IS NOT DISTINCT FROM epoch AS asked_to_step_down,
          -- A renewal that a crash loses does no harm, and one must not wait for a standby with the row locked.
          set_config('synchronous_commit', 'off', true) AS synchronous_commit;

-- name: ask_to_step_down
-- Asks the leader of the present epoch to finish its batch, release the lease and stand behind the others.
UPDATE leader_lease
   SET step_down_epoch = epoch
 WHERE id = 1 AND term_id IS NOT NULL AND expires_at > clock_timestamp()
RETURNING epoch, leader_addr, pg_notify($1::text, '') IS NOT NULL AS announced;

-- name: raise_floors
-- Notes floors that have risen without a batch. No row: this leadership is over.
UPDATE leader_lease
   SET conflict_floor = $3::bigint, window_start_id = $4::bigint, queue_floor_id = $5::bigint
 WHERE id = 1 AND epoch = $1::bigint AND term_id = $2::uuid AND expires_at > clock_timestamp()
RETURNING durable_version;

-- name: history
-- Leaderships that were not over before so many seconds ago (null: all), newest first.
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
-- Ends this leadership cleanly, so that nobody has to wait for it to run out.
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
       set_config('synchronous_commit', 'off', true) AS synchronous_commit -- lost in a crash, the lease just runs out
  FROM released;

-- name: successor
-- Who holds the lease now: for a fenced leader to say who fenced it.
SELECT epoch, leader_addr FROM leader_lease WHERE id = 1;
