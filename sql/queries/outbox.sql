-- name: append_lease_event
-- Writes one lease event in the caller's transaction; a null time is the server's clock.
INSERT INTO lease_events (execution_id, lease_id, event_type, partition_key, namespace, instance_tag, occurred_at_ms)
VALUES ($1::text, $2::text, $3::text, $4::integer, $5::text, $6::text,
        coalesce($7::bigint, (extract(epoch FROM clock_timestamp()) * 1000)::bigint))
RETURNING event_id;

-- name: append_completion_event
-- Writes one completion event in the caller's transaction; a null time is the server's clock.
INSERT INTO completion_events (execution_id, flow_id, outcome, partition_key, namespace, instance_tag, occurred_at_ms)
VALUES ($1::uuid, $2::uuid, $3::text, $4::smallint, $5::text, $6::text,
        coalesce($7::bigint, (extract(epoch FROM clock_timestamp()) * 1000)::bigint))
RETURNING event_id;
