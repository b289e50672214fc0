-- name: prepare_session
-- Sets the session's schema, timeouts (milliseconds) and isolation, if it runs in the expected backend ($4); returns the backend, the server's version, whether it is a standby, and whether the schema has a ledger.
SELECT pg_backend_pid() AS backend_pid,
       -- Behind a transaction pooler this may be another session's backend, whose settings must not change (rule I14).
       CASE WHEN pg_backend_pid() = $4::integer THEN
           set_config('search_path', quote_ident($1::text) || ', pg_temp', false)
           || set_config('statement_timeout', $2::text, false)
           || set_config('lock_timeout', $3::text, false)
           || set_config('default_transaction_isolation', 'read committed', false)
       END IS NOT NULL AS is_prepared,
       current_setting('server_version_num')::integer AS version_number,
       pg_is_in_recovery() AS in_recovery,
       to_regclass(quote_ident($1::text) || '.schema_migrations') IS NOT NULL AS has_ledger;

-- name: backend
-- The pid of the backend that runs this statement.
SELECT pg_backend_pid() AS backend_pid;

-- name: other_schemas
-- The other schemas of this database that hold a pgcoord ledger.
SELECT schemaname::text AS schema
  FROM pg_catalog.pg_tables
 WHERE tablename = 'schema_migrations' AND schemaname <> $1::text
   AND EXISTS (SELECT FROM pg_catalog.pg_tables AS lease
                WHERE lease.schemaname = pg_tables.schemaname AND lease.tablename = 'leader_lease')
 ORDER BY schemaname;

-- name: plan_once
-- Makes prepared statements use generic plans with index look-ups, whatever the statistics said when they were planned.
SELECT set_config('plan_cache_mode', 'force_generic_plan', false) AS plan_cache_mode,
       set_config('jit', 'off', false) AS jit,
       set_config('enable_seqscan', 'off', false) AS enable_seqscan,
       set_config('enable_hashjoin', 'off', false) AS enable_hashjoin,
       set_config('enable_mergejoin', 'off', false) AS enable_mergejoin;
