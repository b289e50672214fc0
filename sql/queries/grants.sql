-- name: role_exists
-- Whether there is such a role.
SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1::text) AS found;

-- name: reader_grants
-- The statements that let a role look at everything but the data.
SELECT format(template, current_schema(), $1::text) AS statement
  FROM (VALUES
    (1, 'GRANT USAGE ON SCHEMA %1$I TO %2$I'),
    (2, 'GRANT SELECT ON %1$I.schema_migrations, %1$I.leader_lease, %1$I.leader_history TO %2$I'),
    (3, 'GRANT SELECT (id, request_id, epoch, read_version, status, commit_version, reason, created_at, resolved_at) '
        'ON %1$I.commit_requests TO %2$I')
  ) AS grants (position, template)
 ORDER BY position;

-- name: client_grants
-- The statements that, beside a reader's, let a role read the data and submit commit requests.
SELECT format(template, current_schema(), $1::text) AS statement
  FROM (VALUES
    (1, 'GRANT SELECT ON %1$I.kv, %1$I.commit_requests TO %2$I'),
    (2, 'GRANT INSERT (request_id, epoch, read_version, payload, reply_channel) ON %1$I.commit_requests TO %2$I')
  ) AS grants (position, template)
 ORDER BY position;

-- name: operator_grants
-- The statements that, beside a client's, let a role lead, repair and collect garbage; the schema's shape stays the owner's.
SELECT format(template, current_schema(), $1::text) AS statement
  FROM (VALUES
    (1, 'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %1$I TO %2$I'),
    (2, 'REVOKE INSERT, UPDATE, DELETE ON %1$I.schema_migrations FROM %2$I'),
    (3, 'GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA %1$I TO %2$I')
  ) AS grants (position, template)
 ORDER BY position;
