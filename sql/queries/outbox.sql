-- name: append_lease_event
-- Inserts a lease event in the caller's transaction; a null time means the server's clock.
INSERT INTO {schema}.lease_events (execution_id, lease_id, event_type, partition_key, namespace, instance_tag,
                                   occurred_at_ms)
VALUES ($1::pg_catalog.text, $2::pg_catalog.text, $3::pg_catalog.text, $4::integer, $5::pg_catalog.text,
        $6::pg_catalog.text,
        coalesce($7::bigint, (extract(epoch FROM pg_catalog.clock_timestamp()) OPERATOR(pg_catalog.*) 1000)::bigint))
RETURNING event_id;

-- name: append_completion_event
-- Inserts a completion event in the caller's transaction; a null time means the server's clock.
INSERT INTO {schema}.completion_events (execution_id, flow_id, outcome, partition_key, namespace, instance_tag,
                                        occurred_at_ms)
VALUES ($1::pg_catalog.uuid, $2::pg_catalog.uuid, $3::pg_catalog.text, $4::smallint, $5::pg_catalog.text,
        $6::pg_catalog.text,
        coalesce($7::bigint, (extract(epoch FROM pg_catalog.clock_timestamp()) OPERATOR(pg_catalog.*) 1000)::bigint))
RETURNING event_id;
