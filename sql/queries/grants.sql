-- name: role_exists
-- Whether a role exists.
SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1::text) AS found;

-- name: reader_grants
-- The GRANT statements of a reader: everything but the data and the payloads, events included.
SELECT format(template, current_schema(), $1::text) AS statement
  FROM (VALUES
    (1, 'GRANT USAGE ON SCHEMA %1$I TO %2$I'),
    (2, 'GRANT SELECT ON %1$I.schema_migrations, %1$I.leader_lease, %1$I.leader_history TO %2$I'),
    (3, 'GRANT SELECT (id, request_id, epoch, term_id, read_version, status, commit_version, reason, created_at, '
        'resolved_at) ON %1$I.commit_requests TO %2$I'),
    (4, 'GRANT SELECT ON %1$I.lease_events, %1$I.completion_events, %1$I.outbox_floors, %1$I.subscriptions TO %2$I'),
    (5, 'GRANT SELECT ON %1$I.flows, %1$I.executions, %1$I.execution_leases, %1$I.edge_groups, %1$I.edges, '
        '%1$I.dispatch_failures, %1$I.lock_names TO %2$I'),
    (6, 'GRANT UPDATE ON SEQUENCE %1$I.lease_events_wake_until, %1$I.completion_events_wake_until TO %2$I'),
    (7, 'GRANT EXECUTE ON FUNCTION %1$I.collection_bound TO %2$I')
  ) AS grants (position, template)
 ORDER BY position;

-- name: client_grants
-- The GRANT statements of a client, beyond a reader's: read the data, submit commit requests, insert events, own subscriptions.
SELECT format(template, current_schema(), $1::text) AS statement
  FROM (VALUES
    (1, 'GRANT SELECT ON %1$I.kv, %1$I.kv_undo, %1$I.kv_undo_floor, %1$I.commit_requests TO %2$I'),
    (2, 'GRANT INSERT (request_id, epoch, term_id, read_version, payload, reply_channel) ON %1$I.commit_requests TO %2$I'),
    (3, 'GRANT INSERT (execution_id, lease_id, event_type, occurred_at_ms, partition_key, namespace, instance_tag) '
        'ON %1$I.lease_events TO %2$I'),
    (4, 'GRANT INSERT (partition_key, execution_id, flow_id, outcome, namespace, instance_tag, occurred_at_ms) '
        'ON %1$I.completion_events TO %2$I'),
    (5, 'GRANT SELECT (event_id) ON %1$I.lease_events, %1$I.completion_events TO %2$I'),
    (6, 'GRANT INSERT (subscription_name, outbox, fence, fence_id, filters), UPDATE ON %1$I.subscriptions TO %2$I'),
    (7, 'GRANT INSERT ON %1$I.lock_names TO %2$I'),
    (8, 'GRANT EXECUTE ON FUNCTION %1$I.commit_directly TO %2$I')
  ) AS grants (position, template)
 ORDER BY position;

-- name: operator_grants
-- The GRANT statements of an operator, beyond a client's: lead, reconcile, collect garbage; not to change the schema.
SELECT format(template, current_schema(), $1::text) AS statement
  FROM (VALUES
    (1, 'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %1$I TO %2$I'),
    (2, 'REVOKE INSERT, UPDATE, DELETE ON %1$I.schema_migrations FROM %2$I'),
    (3, 'GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA %1$I TO %2$I'),
    -- Where ALTER DEFAULT PRIVILEGES has taken EXECUTE from PUBLIC, no role has it unless it is granted.
    (4, 'GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA %1$I TO %2$I'),
    (5, 'GRANT TRUNCATE ON %1$I.kv_undo_0, %1$I.kv_undo_1 TO %2$I')
  ) AS grants (position, template)
 ORDER BY position;
