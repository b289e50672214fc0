-- name: prepare_session
-- Sets the session's schema and timeouts (milliseconds) and says what kind of server this is.
SELECT set_config('search_path', quote_ident($1::text) || ', pg_temp', false) AS search_path,
       set_config('statement_timeout', $2::text, false) AS statement_timeout,
       set_config('lock_timeout', $3::text, false) AS lock_timeout,
       current_setting('server_version_num')::integer AS version_number,
       pg_is_in_recovery() AS in_recovery,
       to_regclass(quote_ident($1::text) || '.schema_migrations') IS NOT NULL AS has_ledger;

-- name: other_schemas
-- Names the schemas of this database, other than the session's own, that hold a pgcoord ledger.
SELECT schemaname::text AS schema
  FROM pg_catalog.pg_tables
 WHERE tablename = 'schema_migrations' AND schemaname <> $1::text
   AND EXISTS (SELECT FROM pg_catalog.pg_tables AS lease
                WHERE lease.schemaname = pg_tables.schemaname AND lease.tablename = 'leader_lease')
 ORDER BY schemaname;
