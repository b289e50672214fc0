-- name: prepare_session
-- Sets the session's schema, timeouts (milliseconds) and isolation, unless it runs in another backend ($4) than it was told; says in which, and what kind of server this is.
SELECT pg_backend_pid() AS backend_pid,
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
-- The backend that runs this statement.
SELECT pg_backend_pid() AS backend_pid;

-- name: other_schemas
-- Names the schemas of this database, other than the session's own, that hold a pgcoord ledger.
SELECT schemaname::text AS schema
  FROM pg_catalog.pg_tables
 WHERE tablename = 'schema_migrations' AND schemaname <> $1::text
   AND EXISTS (SELECT FROM pg_catalog.pg_tables AS lease
                WHERE lease.schemaname = pg_tables.schemaname AND lease.tablename = 'leader_lease')
 ORDER BY schemaname;

-- name: commit_lazily
-- Has this session's commits not wait for the disk; what they would have waited for is kept for those that must.
SELECT set_config('pgcoord.durable', coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false) AS durable,
       set_config('synchronous_commit', 'off', false) AS synchronous_commit;

-- name: plan_once
-- Has prepared statements planned once and for look-ups by index, whatever the tables held at that moment.
SELECT set_config('plan_cache_mode', 'force_generic_plan', false) AS plan_cache_mode,
       set_config('jit', 'off', false) AS jit,
       set_config('enable_seqscan', 'off', false) AS enable_seqscan,
       set_config('enable_hashjoin', 'off', false) AS enable_hashjoin,
       set_config('enable_mergejoin', 'off', false) AS enable_mergejoin;
