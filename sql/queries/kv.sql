-- name: read_keys
-- Single keys, with the epoch, the term and the durable version of the same snapshot (rule I4).
SELECT lease.epoch, lease.last_term_id, lease.durable_version, kv.key, kv.value
  FROM leader_lease AS lease
  LEFT JOIN kv ON kv.key = ANY ($1::bytea[])
 WHERE lease.id = 1;

-- name: read_version
-- The epoch and the durable version of one snapshot.
SELECT epoch, durable_version FROM leader_lease WHERE id = 1;

-- name: read_snapshot
-- Single keys ($1) and half-open ranges, each with at most row_limit keys from its begin or, backwards, from its end, of one snapshot; part 0 holds the single keys, part n the n-th range.
SELECT lease.epoch, lease.last_term_id, lease.durable_version, found.part, found.key, found.value
  FROM leader_lease AS lease
  LEFT JOIN LATERAL (
        SELECT 0::bigint AS part, kv.key, kv.value
          FROM kv
         WHERE kv.key = ANY ($1::bytea[])
        UNION ALL
        SELECT wanted.part, forward.key, forward.value
          FROM unnest($2::bytea[], $3::bytea[], $4::bigint[], $5::boolean[]) WITH ORDINALITY
               AS wanted (range_begin, range_end, row_limit, backwards, part),
               LATERAL (SELECT kv.key, kv.value
                          FROM kv
                         WHERE kv.key >= wanted.range_begin AND kv.key < wanted.range_end
                         ORDER BY kv.key
                         LIMIT wanted.row_limit) AS forward
         WHERE NOT wanted.backwards
        UNION ALL
        SELECT wanted.part, backward.key, backward.value
          FROM unnest($2::bytea[], $3::bytea[], $4::bigint[], $5::boolean[]) WITH ORDINALITY
               AS wanted (range_begin, range_end, row_limit, backwards, part),
               LATERAL (SELECT kv.key, kv.value
                          FROM kv
                         WHERE kv.key >= wanted.range_begin AND kv.key < wanted.range_end
                         ORDER BY kv.key DESC
                         LIMIT wanted.row_limit) AS backward
         WHERE wanted.backwards
       ) AS found ON true
 WHERE lease.id = 1;

-- name: read_range
-- The first $3 keys of a half-open range, in key order.
SELECT key, value
  FROM kv
 WHERE key >= $1::bytea AND key < $2::bytea
 ORDER BY key
 LIMIT $3::bigint;

-- name: read_range_reverse
-- The last $3 keys of a half-open range, in reverse key order.
SELECT key, value
  FROM kv
 WHERE key >= $1::bytea AND key < $2::bytea
 ORDER BY key DESC
 LIMIT $3::bigint;

-- name: commit_asynchronously
-- Makes the commits of this session return before the WAL flush: a lost pending request was never acknowledged. pgcoord.durable keeps the level for those that must be durable.
SELECT set_config('pgcoord.durable', coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false) AS durable,
       set_config('synchronous_commit', 'off', false) AS synchronous_commit;
