-- name: lease_events
-- The lease events after a position, in order.
SELECT event_id, execution_id, lease_id, event_type, occurred_at_ms, partition_key, namespace, instance_tag,
       committed_at_ms
  FROM lease_events
 WHERE event_id > $1::bigint
 ORDER BY event_id
 LIMIT $2::integer;

-- name: completion_events
-- The completion events after a position, in order.
SELECT event_id, execution_id::text AS execution_id, flow_id::text AS flow_id, outcome, occurred_at_ms, partition_key,
       namespace, instance_tag, committed_at_ms
  FROM completion_events
 WHERE event_id > $1::bigint
 ORDER BY event_id
 LIMIT $2::integer;

-- name: open_transactions
-- The virtual ids of the open transactions that hold the lock of an outbox's writers, and may still commit events.
SELECT coalesce(array_agg(virtualtransaction), '{}') AS open_transactions
  FROM pg_locks
 WHERE locktype = 'advisory' AND classid = ($1::text)::regclass::oid AND objid = 0 AND objsubid = 2
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database());

-- name: request_wakeups
-- Requests that transactions that write to the outbox notify its tails, for a number of seconds from now.
-- Without a durable commit: a tail must not wait for a synchronous standby, and a request that is lost is renewed.
WITH quick AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
SELECT setval(($1::text || '_wake_until')::regclass,
              (extract(epoch FROM clock_timestamp()) * 1000000)::bigint + $2::integer * 1000000) AS wake_until
  FROM quick;

-- name: cancel_wakeups
-- Cancels a wakeup request unless another tail has made a later one, which the value would show.
WITH quick AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
SELECT setval(($1::text || '_wake_until')::regclass, 1) AS wake_until
  FROM quick
 WHERE pg_sequence_last_value(($1::text || '_wake_until')::regclass) = $2::bigint;

-- name: bounds
-- The highest visible id of an event, and the id up to which garbage collection has deleted.
SELECT greatest((SELECT max(event_id) FROM {outbox}), collected_through) AS head, collected_through
  FROM outbox_floors
 WHERE outbox = {outbox_name};

-- name: place
-- The bounds of an outbox, the last id drawn, and the identity of the event of an id: as stored, or as noted when it was collected. A null id: no identity.
SELECT greatest((SELECT max(event_id) FROM {outbox}), floors.collected_through) AS head, floors.collected_through,
       coalesce(pg_sequence_last_value(pg_get_serial_sequence({outbox_name}, 'event_id')::regclass), 0) AS drawn_through,
       CASE WHEN event.event_id IS NULL AND floors.collected_through = $1::bigint THEN floors.execution_id
            ELSE event.execution_id::text END AS execution_id,
       CASE WHEN event.event_id IS NULL AND floors.collected_through = $1::bigint THEN floors.committed_at_ms
            ELSE event.committed_at_ms END AS committed_at_ms
  FROM outbox_floors AS floors
  LEFT JOIN {outbox} AS event ON event.event_id = $1::bigint
 WHERE floors.outbox = {outbox_name};

-- name: last_passed
-- The last event up to a position, or the last one collected if none of these is stored.
SELECT event_id, execution_id, committed_at_ms
  FROM ((SELECT event_id, execution_id::text, committed_at_ms
           FROM {outbox} WHERE event_id <= $1::bigint ORDER BY event_id DESC LIMIT 1)
        UNION ALL
        SELECT collected_through, execution_id, committed_at_ms
          FROM outbox_floors
         WHERE outbox = {outbox_name} AND collected_through <= $1::bigint AND execution_id IS NOT NULL) AS passed
 ORDER BY event_id DESC
 LIMIT 1;

-- name: resume_after_loss
-- The id of the last event before the first one inserted after a time in milliseconds since 1970; the floor, if there is none.
SELECT greatest((SELECT max(event_id) FROM {outbox}
                  WHERE event_id < coalesce((SELECT event_id FROM {outbox} WHERE committed_at_ms > $1::bigint
                                              ORDER BY event_id LIMIT 1), 9223372036854775807)),
                collected_through) AS event_id
  FROM outbox_floors
 WHERE outbox = {outbox_name};

-- name: blocking_transactions
-- The open transactions that may still commit events of an outbox: session or prepared transaction, and since when.
SELECT held.pid, coalesce(activity.application_name, prepared.gid) AS application,
       coalesce(activity.xact_start, prepared.prepared) AS since
  FROM pg_locks AS held
  LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
  LEFT JOIN pg_locks AS own
    ON held.pid IS NULL AND own.pid IS NULL AND own.locktype = 'transactionid' AND own.mode = 'ExclusiveLock'
   AND own.virtualtransaction = held.virtualtransaction
  LEFT JOIN pg_prepared_xacts AS prepared ON prepared.transaction = own.transactionid
 WHERE held.locktype = 'advisory' AND held.classid = ($1::text)::regclass::oid AND held.objid = 0
   AND held.objsubid = 2
   AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 ORDER BY since NULLS LAST;

-- name: gaps
-- The ranges of ids between two positions that no visible event has.
SELECT previous + 1 AS first_id, event_id - 1 AS last_id
  FROM (SELECT event_id, lag(event_id, 1, $1::bigint) OVER (ORDER BY event_id) AS previous
          FROM (SELECT event_id FROM {outbox} WHERE event_id > $1::bigint AND event_id <= $2::bigint
                 UNION ALL SELECT $2::bigint + 1) AS seen) AS pairs
 WHERE event_id > previous + 1
 ORDER BY first_id;

-- name: first_at
-- The first event inserted at or after a time in milliseconds since 1970; a negative number counts back from now.
SELECT event_id
  FROM {outbox}
 WHERE committed_at_ms >= $1::bigint
       + CASE WHEN $1::bigint < 0 THEN (extract(epoch FROM clock_timestamp()) * 1000)::bigint ELSE 0 END
 ORDER BY event_id
 LIMIT 1;

-- name: count
-- The number of events after a position.
SELECT count(*) AS events FROM {outbox} WHERE event_id > $1::bigint;
