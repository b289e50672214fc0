-- name: read_lease
-- Who leads, until when by the server's clock, and how far the committed data has got.
SELECT epoch, term_id, leader_addr, durable_version, conflict_floor, window_start_id, queue_floor_id,
       acquired_at, renewed_at, expires_at,
       term_id IS NOT NULL AND expires_at > clock_timestamp() AS held,
       greatest(extract(epoch FROM expires_at - clock_timestamp()), 0)::double precision AS expires_in_seconds
  FROM leader_lease
 WHERE id = 1;

-- name: wait_for_election_lock
-- Waits, up to the session's lock_timeout, for the lock that a living leader holds.
SELECT pg_advisory_lock($1::bigint);

-- name: try_election_lock
-- Takes the same lock if it is free.
SELECT pg_try_advisory_lock($1::bigint) AS locked;

-- name: terminate_holders
-- Ends the sessions that hold the lock that a leader's sessions share, if its lease ran out while it was frozen or cut off.
SELECT pid, pg_terminate_backend(pid) AS terminated
  FROM pg_locks
 WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND pid <> pg_backend_pid()
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND classid::bigint = ($1::bigint >> 32) & 4294967295
   AND objid::bigint = $1::bigint & 4294967295
   AND EXISTS (SELECT FROM leader_lease WHERE id = 1 AND expires_at <= clock_timestamp());

-- name: share_session_lock
-- Marks this session as one of the leader's, so that whoever takes over can end it, and whoever commits alone sees that there is one.
SELECT pg_advisory_lock_shared($1::bigint), pg_advisory_lock_shared('leader_lease'::regclass::oid::integer, 0);

-- name: end_lone_commits
-- Ends the sessions that are committing alone: that takes a moment, so that one that holds up the lease is stuck.
SELECT pid, pg_terminate_backend(pid) AS terminated
  FROM pg_locks
 WHERE locktype = 'advisory' AND objsubid = 2 AND mode = 'ExclusiveLock' AND granted AND pid <> pg_backend_pid()
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND classid = 'commit_requests'::regclass::oid AND objid = 0;

-- name: make_commits_durable
-- Has this session's commits wait for the disk where its default would not; any stronger default stays.
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';

-- name: lock_lease
-- Waits until nobody else is changing the lease, so that the next statement of the transaction sees what they left.
SELECT FROM leader_lease WHERE id = 1 FOR UPDATE;

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
           leader_addr = $1::text,
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
RETURNING step_down_epoch IS NOT DISTINCT FROM epoch AS asked_to_step_down;

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
SELECT durable_version, pg_notify($4::text, '') IS NOT NULL AS announced FROM released;

-- name: successor
-- Who holds the lease now: for a fenced leader to say who fenced it.
SELECT epoch, leader_addr FROM leader_lease WHERE id = 1;
