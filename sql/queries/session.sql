-- name: prepare_session
-- Pins the session's schema, timeouts (milliseconds) and every setting that its meaning or its life depends on, if it runs in the expected backend ($4); returns the backend, the server's version, whether it is a standby, whether the schema has a ledger, and its former name if it was renamed.
SELECT pg_catalog.pg_backend_pid() AS backend_pid,
       -- Names and operators are qualified: the search path is still the one of the role, the database or PGOPTIONS.
       -- Behind a transaction pooler this may be another session's backend, whose settings must not change (rule I14).
       CASE WHEN pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) $4::integer THEN
           (SELECT pg_catalog.count(pg_catalog.set_config(pinned.name, pinned.value, false))
              FROM (VALUES
                ('search_path', pg_catalog.concat(pg_catalog.quote_ident($1::pg_catalog.text), ', pg_temp')),
                ('statement_timeout', $2::pg_catalog.text),
                ('lock_timeout', $3::pg_catalog.text),
                -- Sessions that hold a lock, lead or wait are idle for as long as that lasts.
                ('idle_session_timeout', '0'),
                ('idle_in_transaction_session_timeout', '0'),
                ('transaction_timeout', '0'), -- since PostgreSQL 17
                ('default_transaction_isolation', 'read committed'),
                ('default_transaction_read_only', 'off'),
                ('default_transaction_deferrable', 'off'),
                -- How values are written and read.
                ('client_encoding', 'UTF8'),
                ('DateStyle', 'ISO, MDY'),
                ('IntervalStyle', 'postgres'),
                ('TimeZone', 'UTC'),
                ('bytea_output', 'hex'),
                ('extra_float_digits', '1'),
                ('array_nulls', 'on'),
                ('standard_conforming_strings', 'on'),
                ('backslash_quote', 'safe_encoding'),
                ('quote_all_identifiers', 'off'),
                ('transform_null_equals', 'off'),
                -- A policy that might hide rows is an error that names the table, instead of rows that seem to be gone.
                ('row_security', 'off'),
                -- A warning may say that a commit was not replicated (rule I16).
                ('client_min_messages', 'notice'),
                ('plpgsql.extra_errors', 'none'),
                ('pgcoord.notify', 'on'), -- unset in nearly every session
                -- Plans.
                ('plan_cache_mode', 'auto'),
                ('max_parallel_workers_per_gather', '0'),
                ('jit', 'off'),
                ('enable_seqscan', 'on'),
                ('enable_indexscan', 'on'),
                ('enable_indexonlyscan', 'on'),
                ('enable_bitmapscan', 'on'),
                ('enable_nestloop', 'on'),
                ('enable_hashjoin', 'on'),
                ('enable_mergejoin', 'on'),
                ('enable_sort', 'on'),
                ('enable_hashagg', 'on'),
                ('enable_material', 'on'),
                ('enable_memoize', 'on'),
                ('from_collapse_limit', '8'),
                ('join_collapse_limit', '8'),
                -- May be set by superusers only. With any other value foreign keys do not cascade.
                ('session_replication_role', 'origin')
              ) AS pinned (name, value)
             -- Settings that this server does not have (null), or that have the value already, are not set.
             WHERE pg_catalog.current_setting(pinned.name, true) OPERATOR(pg_catalog.<>) pinned.value
               AND (pinned.name OPERATOR(pg_catalog.<>) 'session_replication_role'
                    OR pg_catalog.has_parameter_privilege(pinned.name, 'SET')))
       END IS NOT NULL AS is_prepared,
       pg_catalog.current_setting('server_version_num')::integer AS version_number,
       pg_catalog.pg_is_in_recovery() AS in_recovery,
       pg_catalog.to_regclass(pg_catalog.concat(pg_catalog.quote_ident($1::pg_catalog.text), '.schema_migrations'))
           IS NOT NULL AS has_ledger,
       -- The search path that a migration gave to this trigger function: the old name after ALTER SCHEMA RENAME.
       (SELECT pg_catalog.btrim(pinned.name, '"')
          FROM pg_catalog.pg_proc AS function
          JOIN pg_catalog.pg_namespace AS schema ON schema.oid OPERATOR(pg_catalog.=) function.pronamespace
         CROSS JOIN LATERAL pg_catalog.unnest(function.proconfig) AS configured (setting)
         CROSS JOIN LATERAL pg_catalog.substring(configured.setting, '^search_path=("[^"]*"|[^,]*)') AS pinned (name)
         WHERE function.proname OPERATOR(pg_catalog.=) 'announce_events'
           AND schema.nspname OPERATOR(pg_catalog.=) $1::pg_catalog.text::pg_catalog.name
           AND pg_catalog.btrim(pinned.name, '"') OPERATOR(pg_catalog.<>) $1::pg_catalog.text) AS renamed_from;

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
