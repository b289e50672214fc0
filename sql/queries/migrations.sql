-- name: create_schema
-- Creates the schema, unless it exists.
CREATE SCHEMA IF NOT EXISTS {schema};

-- name: choose_schema
-- Sets the session's search path to the schema.
SET search_path = {schema}, pg_temp;

-- name: create_ledger
-- Creates the ledger, the table of the migrations that were applied to the schema, unless it exists.
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
-- Returns a row if the schema has a ledger.
SELECT to_regclass(quote_ident($1::text) || '.schema_migrations')::text AS ledger
 WHERE to_regclass(quote_ident($1::text) || '.schema_migrations') IS NOT NULL;

-- name: schema_to_create
-- Returns the CREATE SCHEMA statement for a schema that does not exist.
SELECT format('CREATE SCHEMA %I', $1::text) AS statement
 WHERE to_regnamespace(quote_ident($1::text)) IS NULL;

-- name: lacking_right
-- The right that this role lacks to create the schema, or to create tables in it: what is wrong, the owner that can grant it, and the statement. No row if it lacks none.
SELECT format('role %I may not create schema %I: it lacks CREATE on database %I', current_user, $1::text, datname),
       pg_get_userbyid(datdba),
       format('GRANT CREATE ON DATABASE %I TO %I', datname, current_user)
  FROM pg_database
 WHERE datname = current_database() AND NOT has_database_privilege(oid, 'CREATE')
   AND to_regnamespace(quote_ident($1::text)) IS NULL
UNION ALL
SELECT format('role %I may not create tables in schema %I, which belongs to %I: it lacks CREATE on the schema',
              current_user, nspname, pg_get_userbyid(nspowner)),
       pg_get_userbyid(nspowner),
       format('GRANT USAGE, CREATE ON SCHEMA %I TO %I', nspname, current_user)
  FROM pg_namespace
 WHERE nspname = $1::text::name AND NOT has_schema_privilege(oid, 'CREATE');

-- name: not_owner
-- What is wrong and what to do, if the ledger belongs to a role whose rights this role does not have; only the owner can migrate further.
SELECT format('role %I may not migrate schema %I, whose tables belong to %I', current_user, $1::text,
              pg_get_userbyid(relowner)),
       format('run it as %I, or as a superuser: GRANT %I TO %I', pg_get_userbyid(relowner), pg_get_userbyid(relowner),
              current_user)
  FROM pg_class
 WHERE oid = to_regclass(quote_ident($1::text) || '.schema_migrations')
   AND NOT pg_has_role(relowner, 'USAGE');

-- name: read_ledger
-- The migrations that were applied to the schema, oldest first.
SELECT version, name, checksum, applied_at, applied_by, execution_ms, breaking
  FROM schema_migrations
 ORDER BY version;

-- name: record_migration
-- Inserts the ledger row of a migration; the migration runs after it, in the same transaction.
INSERT INTO schema_migrations (version, name, checksum, breaking)
VALUES ($1::integer, $2::text, $3::text, $4::boolean);

-- name: record_duration
-- Sets the duration of a migration, in milliseconds by the server's clock.
UPDATE schema_migrations
   SET execution_ms = ceil(extract(epoch FROM clock_timestamp() - applied_at) * 1000)::integer
 WHERE version = $1::integer;

-- name: try_lock
-- Takes the session-level lock of migration runs if it is free; never waits.
SELECT pg_try_advisory_lock($1::bigint) AS locked;

-- name: wait_for_lock
-- Takes the session-level lock of migration runs, waiting for at most the session's lock_timeout.
SELECT pg_advisory_lock($1::bigint);

-- name: unlock
-- Releases the session-level lock of migration runs.
SELECT pg_advisory_unlock($1::bigint) AS unlocked;
