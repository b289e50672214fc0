-- name: read_keys
-- Single keys, with the epoch and the durable version of the very snapshot they are read in.
SELECT lease.epoch, lease.durable_version, kv.key, kv.value
  FROM leader_lease AS lease
  LEFT JOIN kv ON kv.key = ANY ($1::bytea[])
 WHERE lease.id = 1;

-- name: read_version
-- The epoch and the durable version of this snapshot.
SELECT epoch, durable_version FROM leader_lease WHERE id = 1;

-- name: read_range
-- The first keys of a half-open range, in key order; an end of null means to the last key.
SELECT key, value
  FROM kv
 WHERE key >= $1::bytea AND ($2::bytea IS NULL OR key < $2::bytea)
 ORDER BY key
 LIMIT $3::bigint;

-- name: read_range_reverse
-- The last keys of a half-open range, in reverse key order; an end of null means from the last key.
SELECT key, value
  FROM kv
 WHERE key >= $1::bytea AND ($2::bytea IS NULL OR key < $2::bytea)
 ORDER BY key DESC
 LIMIT $3::bigint;
