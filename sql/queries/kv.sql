-- name: read_keys
-- Single keys, with the epoch, the term and the durable version of the same snapshot (rule I4).
SELECT lease.epoch, lease.last_term_id, lease.durable_version, kv.key, kv.value
  FROM leader_lease AS lease
  LEFT JOIN kv ON kv.key = ANY ($1::bytea[])
 WHERE lease.id = 1;

-- name: read_keys_at
-- Single keys ($1) as they were at versions ($2; null: now), as read_at reads them; part is minus the place of a key.
SELECT lease.epoch, lease.last_term_id, lease.durable_version,
       CASE WHEN $3::uuid IS NULL OR $3::uuid = lease.last_term_id THEN lease.durable_version
            ELSE coalesce((SELECT last_version FROM leader_history WHERE term_id = $3::uuid), -1) END AS readable_to,
       (SELECT floor FROM kv_undo_floor WHERE id = 1) AS readable_from,
       -wanted.place AS part, NULL::bytea AS key, CASE WHEN past.is_found THEN past.value ELSE kv.value END AS value
  FROM leader_lease AS lease
  LEFT JOIN unnest($1::bytea[], $2::bigint[]) WITH ORDINALITY AS wanted (key, version, place) ON true
  LEFT JOIN LATERAL (
        SELECT true AS is_found, kv_undo.value
          FROM kv_undo
         WHERE kv_undo.key = wanted.key AND kv_undo.valid_through >= wanted.version
         ORDER BY kv_undo.valid_through
         LIMIT 1) AS past
    ON wanted.version < lease.durable_version -- if equal, nothing has been replaced since
  LEFT JOIN kv ON kv.key = wanted.key AND past.is_found IS NULL
 WHERE lease.id = 1;

-- name: read_at
-- Single keys ($1) and half-open ranges as they were at versions ($2, $7; null: now), with the state of the same snapshot. part: minus the place of a key; twice the place of a range for its rows now, and one more for the values that replaced rows had (null: absent) as far as those rows reach. readable_to: the highest version that can have been read here under the term $8; readable_from: the lowest of which every replaced value is kept (null: none is).
SELECT lease.epoch, lease.last_term_id, lease.durable_version,
       CASE WHEN $8::uuid IS NULL OR $8::uuid = lease.last_term_id THEN lease.durable_version
            ELSE coalesce((SELECT last_version FROM leader_history WHERE term_id = $8::uuid), -1) END AS readable_to,
       (SELECT floor FROM kv_undo_floor WHERE id = 1) AS readable_from,
       found.part, found.key, found.value
  FROM leader_lease AS lease
  LEFT JOIN LATERAL (
        SELECT -wanted.place AS part, NULL::bytea AS key, CASE WHEN past.is_found THEN past.value ELSE kv.value END AS value
          FROM unnest($1::bytea[], $2::bigint[]) WITH ORDINALITY AS wanted (key, version, place)
          LEFT JOIN LATERAL (
                SELECT true AS is_found, kv_undo.value
                  FROM kv_undo
                 WHERE kv_undo.key = wanted.key AND kv_undo.valid_through >= wanted.version
                 ORDER BY kv_undo.valid_through
                 LIMIT 1) AS past
            ON wanted.version < lease.durable_version -- if equal, nothing has been replaced since
          LEFT JOIN kv ON kv.key = wanted.key AND past.is_found IS NULL
        UNION ALL
        SELECT 2 * wanted.place + ranged.is_past, ranged.key, ranged.value
          FROM unnest($3::bytea[], $4::bytea[], $5::bigint[], $6::boolean[], $7::bigint[]) WITH ORDINALITY
               AS wanted (range_begin, range_end, row_limit, backwards, version, place),
               LATERAL (
                WITH page AS MATERIALIZED (
                    (SELECT kv.key, kv.value
                       FROM kv
                      WHERE NOT wanted.backwards AND kv.key >= wanted.range_begin AND kv.key < wanted.range_end
                      ORDER BY kv.key
                      LIMIT wanted.row_limit)
                    UNION ALL
                    (SELECT kv.key, kv.value
                       FROM kv
                      WHERE wanted.backwards AND kv.key >= wanted.range_begin AND kv.key < wanted.range_end
                      ORDER BY kv.key DESC
                      LIMIT wanted.row_limit)
                ), edge AS MATERIALIZED (
                    -- Where the limit cut the rows off. Beyond it, the replaced values are not needed either.
                    SELECT CASE WHEN wanted.backwards THEN (SELECT page.key FROM page ORDER BY page.key LIMIT 1)
                                ELSE (SELECT page.key FROM page ORDER BY page.key DESC LIMIT 1) END AS key
                     WHERE (SELECT count(*) FROM page) = wanted.row_limit
                )
                SELECT 0 AS is_past, page.key, page.value FROM page
                UNION ALL
                (SELECT DISTINCT ON (kv_undo.key) 1, kv_undo.key, kv_undo.value
                   FROM kv_undo
                  WHERE wanted.version < lease.durable_version AND kv_undo.valid_through >= wanted.version
                    AND kv_undo.key >= CASE WHEN wanted.backwards THEN coalesce((SELECT key FROM edge), wanted.range_begin)
                                            ELSE wanted.range_begin END
                    AND kv_undo.key < CASE WHEN wanted.backwards THEN wanted.range_end
                                           ELSE coalesce((SELECT key FROM edge) || E'\\x00'::bytea, wanted.range_end) END
                  ORDER BY kv_undo.key, kv_undo.valid_through)
               ) AS ranged
       ) AS found ON true
 WHERE lease.id = 1;

-- name: version_at
-- The first durable version at or above a version ($1) at which a snapshot could be read; with the state as of read_at.
SELECT lease.epoch, lease.last_term_id, lease.durable_version,
       (SELECT floor FROM kv_undo_floor WHERE id = 1) AS readable_from,
       coalesce((SELECT valid_through FROM kv_undo WHERE key IS NULL AND valid_through >= $1::bigint
                  ORDER BY key, valid_through LIMIT 1), lease.durable_version) AS version -- the order of the index
  FROM leader_lease AS lease
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

-- name: watched_range
-- A half-open range, with the durable version of the same snapshot; without its keys if that version is $3.
SELECT lease.durable_version, watched.key, watched.value
  FROM leader_lease AS lease
  LEFT JOIN LATERAL (
        SELECT kv.key, kv.value
          FROM kv
         WHERE kv.key >= $1::bytea AND kv.key < $2::bytea AND lease.durable_version <> $3::bigint
         -- Keeps the condition on the version here, where it is checked before the range is read, not after.
        OFFSET 0
       ) AS watched ON true
 WHERE lease.id = 1;

-- name: commit_asynchronously
-- Makes the commits of this session return before the WAL flush: a lost pending request was never acknowledged. pgcoord.durable keeps the level for those that must be durable.
SELECT set_config('pgcoord.durable', coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false) AS durable,
       set_config('synchronous_commit', 'off', false) AS synchronous_commit;
