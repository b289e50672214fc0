-- name: create_schema
-- Creates the schema, unless it exists.
CREATE SCHEMA IF NOT EXISTS {schema};

-- name: choose_schema
-- Has the session create and find tables in the schema.
SET search_path = {schema}, pg_temp;

-- name: create_ledger
-- Makes the table that remembers which migrations this schema has had.
CREATE TABLE IF NOT EXISTS schema_migrations (
    version      integer     PRIMARY KEY,
    name         text        NOT NULL,
    checksum     text        NOT NULL,
    applied_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    applied_by   text        NOT NULL DEFAULT current_user,
    execution_ms integer,
    breaking     boolean     NOT NULL
);

-- name: find_ledger
-- A row if the schema has a ledger.
SELECT to_regclass(quote_ident($1::text) || '.schema_migrations')::text AS ledger
 WHERE to_regclass(quote_ident($1::text) || '.schema_migrations') IS NOT NULL;

-- name: schema_to_create
-- The statement that makes the schema, unless it is there.
SELECT format('CREATE SCHEMA %I', $1::text) AS statement
 WHERE to_regnamespace(quote_ident($1::text)) IS NULL;

-- name: read_ledger
-- Every migration that this schema has had, oldest first.
SELECT version, name, checksum, applied_at, applied_by, execution_ms, breaking
  FROM schema_migrations
 ORDER BY version;

-- name: record_migration
-- Writes the ledger row of a migration, before the migration itself runs in the same transaction.
INSERT INTO schema_migrations (version, name, checksum, breaking)
VALUES ($1::integer, $2::text, $3::text, $4::boolean);

-- name: record_duration
-- Adds how long the migration took, in milliseconds of the server's clock.
UPDATE schema_migrations
   SET execution_ms = ceil(extract(epoch FROM clock_timestamp() - applied_at) * 1000)::integer
 WHERE version = $1::integer;

-- name: try_lock
-- Takes the session lock that keeps two migration runs apart, if it is free.
SELECT pg_try_advisory_lock($1::bigint) AS locked;

-- name: wait_for_lock
-- The same, waiting for it up to the session's lock_timeout.
SELECT pg_advisory_lock($1::bigint);

-- name: unlock
-- Gives the session lock back.
SELECT pg_advisory_unlock($1::bigint) AS unlocked;
