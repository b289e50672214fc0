-- breaking: no
-- Two outboxes, and what keeps their tails from missing an event. The protocol: docs/architecture.md#outboxes.

CREATE TABLE lease_events (
    event_id        bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    execution_id    text    NOT NULL,
    lease_id        text,
    event_type      text    NOT NULL,
    occurred_at_ms  bigint  NOT NULL DEFAULT (extract(epoch FROM clock_timestamp()) * 1000)::bigint,
    partition_key   integer NOT NULL DEFAULT 0,
    namespace       text,
    instance_tag    text,
    committed_at_ms bigint  NOT NULL DEFAULT (extract(epoch FROM clock_timestamp()) * 1000)::bigint
);

COMMENT ON TABLE lease_events IS 'Outbox: what happened to the leases of executions. Insert without event_id.';
COMMENT ON COLUMN lease_events.committed_at_ms IS 'The server''s clock at the insert, shortly before the commit.';
COMMENT ON COLUMN lease_events.event_type IS 'acquired, renewed, expired, reclaimed or revoked; a tail passes on any other.';

CREATE TABLE completion_events (
    event_id         bigint   GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    partition_key    smallint NOT NULL DEFAULT 0,
    execution_id     uuid     NOT NULL,
    flow_id          uuid,
    outcome          text     NOT NULL,
    namespace        text,
    instance_tag     text,
    occurred_at_ms   bigint   NOT NULL DEFAULT (extract(epoch FROM clock_timestamp()) * 1000)::bigint,
    committed_at_ms  bigint   NOT NULL DEFAULT (extract(epoch FROM clock_timestamp()) * 1000)::bigint,
    dispatched_at_ms bigint
);

CREATE INDEX completion_events_undispatched ON completion_events (event_id) WHERE dispatched_at_ms IS NULL;

COMMENT ON TABLE completion_events IS 'Outbox: executions that ended. Insert without event_id.';
COMMENT ON COLUMN completion_events.committed_at_ms IS 'The server''s clock at the insert, shortly before the commit.';
COMMENT ON COLUMN completion_events.dispatched_at_ms IS 'When the event was carried into the graph; null: not yet.';

CREATE TABLE outbox_floors (
    outbox            text   PRIMARY KEY,
    collected_through bigint NOT NULL DEFAULT 0
);

COMMENT ON TABLE outbox_floors IS 'Up to which event garbage collection has deleted from each outbox.';

INSERT INTO outbox_floors (outbox) VALUES ('lease_events'), ('completion_events');

-- Until when writers wake the tails of an outbox, in microseconds since 1970. A sequence lies outside of all
-- transactions; a tail that is going to wait sets it a few seconds ahead, so that one that was killed costs no more.
CREATE UNLOGGED SEQUENCE lease_events_wake_until;
CREATE UNLOGGED SEQUENCE completion_events_wake_until;

GRANT SELECT ON SEQUENCE lease_events_wake_until, completion_events_wake_until TO PUBLIC;

-- Before a statement draws its first id: announces the writer by a shared lock that ends with its transaction, and
-- wakes the tails at the commit if any waits. In this order: the lock, the look whether one waits, the id.
CREATE FUNCTION announce_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- It never is null, but PERFORM would be a query, which costs several times what an expression does.
    IF pg_catalog.pg_advisory_xact_lock_shared(TG_RELID::integer, 0) IS NULL THEN
        RETURN NULL;
    END IF;
    IF pg_catalog.current_setting('pgcoord.notify', true) IS DISTINCT FROM 'off'
       AND pg_catalog.to_timestamp(
               pg_catalog.pg_sequence_last_value((TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME || '_wake_until')::regclass)
               / 1000000.0::double precision
           ) > pg_catalog.clock_timestamp() THEN
        PERFORM pg_catalog.pg_notify(TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME, '');
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER announce BEFORE INSERT ON lease_events FOR EACH STATEMENT EXECUTE FUNCTION announce_events();
CREATE TRIGGER announce BEFORE INSERT ON completion_events FOR EACH STATEMENT EXECUTE FUNCTION announce_events();

-- Where session_replication_role is replica as well: without the lock, a tail would step over those events. (The
-- workers of logical replication fire no triggers of this kind: an outbox cannot be what they write to.)
ALTER TABLE lease_events ENABLE ALWAYS TRIGGER announce;
ALTER TABLE completion_events ENABLE ALWAYS TRIGGER announce;
