-- breaking: no
-- The two outboxes, and the locks and sequences that keep their tails from missing an event.
-- The protocol: docs/architecture.md#outboxes; for those who write events: docs/tails.md#writing-events.

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

COMMENT ON TABLE lease_events IS 'Outbox: changes of the leases of executions. Insert without event_id.';
COMMENT ON COLUMN lease_events.committed_at_ms IS 'The server''s clock at the insert, shortly before the commit.';
COMMENT ON COLUMN lease_events.event_type IS 'acquired, renewed, expired, reclaimed or revoked; a tail delivers any other too, with a warning.';

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
COMMENT ON COLUMN completion_events.dispatched_at_ms IS 'When the event was dispatched: counted at the edges below its execution; null: not yet.';

CREATE TABLE outbox_floors (
    outbox            text   PRIMARY KEY,
    collected_through bigint NOT NULL DEFAULT 0,
    execution_id      text,
    committed_at_ms   bigint
);

COMMENT ON TABLE outbox_floors IS 'The last event that garbage collection has deleted from each outbox: its id and identity; null: unknown.';

INSERT INTO outbox_floors (outbox) VALUES ('lease_events'), ('completion_events');

-- Until when writers notify the tails of an outbox, in microseconds since 1970 (server clock). A sequence, because
-- its value changes outside of transactions, without row locks. A tail that is about to wait sets it a few seconds
-- ahead and renews it, so that after a tail was killed writers notify in vain for a few seconds only. Logged: a standby
-- that is promoted before its next restartpoint may lack the first page of an unlogged sequence, and every insert into
-- the outbox would fail there.
CREATE SEQUENCE lease_events_wake_until;
CREATE SEQUENCE completion_events_wake_until;

-- The trigger reads them with the rights of the role that inserts.
GRANT SELECT ON SEQUENCE lease_events_wake_until, completion_events_wake_until TO PUBLIC;

-- Runs before a statement draws its first event id: takes the writer's lock of the outbox, shared, until the
-- transaction ends, and notifies the tails at the commit if one is waiting. The order is binding: a lock that was
-- taken after the id would leave a gap without a holder, which a tail would step over.
--
-- The search path is pinned: with that of the inserting session, an operator of some other schema could match better
-- than PostgreSQL's own and run with the rights of the role that inserts.
CREATE FUNCTION announce_events() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    holder text;
BEGIN
    -- Writers share the lock, so it is free unless a session took it exclusively by number, as any role can that may
    -- connect to the database (docs/security.md). In a condition the call is evaluated as an expression; PERFORM would run
    -- a query, which costs several times as much.
    IF NOT pg_try_advisory_xact_lock_shared(TG_RELID::integer, 0) THEN
        SELECT string_agg(format('pid %s (%s, role %s)', held.pid, activity.application_name, activity.usename), ', ')
          INTO holder
          FROM pg_locks AS held
          LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
         WHERE held.locktype = 'advisory' AND held.classid = TG_RELID AND held.objid = 0 AND held.objsubid = 2
           AND held.mode = 'ExclusiveLock' AND held.granted
           AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database());
        holder := format('the lock of the writers of %s is held by %s', TG_TABLE_NAME,
                         coalesce(holder, 'another session'));
        RAISE WARNING USING MESSAGE = 'waiting: ' || holder;
        BEGIN
            PERFORM pg_advisory_xact_lock_shared(TG_RELID::integer, 0);
        EXCEPTION WHEN lock_not_available THEN
            RAISE lock_not_available USING
                MESSAGE = holder,
                HINT = 'pg_terminate_backend ends that session; it needs the rights of pg_signal_backend.';
        END;
    END IF;
    -- pgcoord.notify = off is for transactions that will be prepared: PostgreSQL does not prepare one that has
    -- notified.
    IF current_setting('pgcoord.notify', true) IS DISTINCT FROM 'off'
       AND to_timestamp(pg_sequence_last_value((TG_TABLE_NAME || '_wake_until')::regclass)
                        / 1000000.0::double precision) > clock_timestamp() THEN
        PERFORM pg_notify(TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME, '');
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER announce BEFORE INSERT ON lease_events FOR EACH STATEMENT EXECUTE FUNCTION announce_events();
CREATE TRIGGER announce BEFORE INSERT ON completion_events FOR EACH STATEMENT EXECUTE FUNCTION announce_events();

-- ALWAYS: they fire under session_replication_role = replica as well, where a tail would otherwise step over the
-- events. Apply workers of logical replication fire no statement triggers, so they must not write to an outbox.
ALTER TABLE lease_events ENABLE ALWAYS TRIGGER announce;
ALTER TABLE completion_events ENABLE ALWAYS TRIGGER announce;

-- A tail compares a position with the last id that has been drawn.
GRANT SELECT ON SEQUENCE lease_events_event_id_seq, completion_events_event_id_seq TO PUBLIC;

-- Everything up to the last id is gone after TRUNCATE. With RESTART IDENTITY no id has been drawn by then: the floor
-- falls to 0, since new events would otherwise come below it, and tails would not deliver them.
CREATE FUNCTION follow_truncation() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE outbox_floors
       SET collected_through = coalesce(
               pg_sequence_last_value(pg_get_serial_sequence(TG_TABLE_NAME, 'event_id')::regclass), 0),
           execution_id = NULL, committed_at_ms = NULL
     WHERE outbox = TG_TABLE_NAME;
    RETURN NULL;
END
$$;

CREATE TRIGGER follow_truncation AFTER TRUNCATE ON lease_events
    FOR EACH STATEMENT EXECUTE FUNCTION follow_truncation();
CREATE TRIGGER follow_truncation AFTER TRUNCATE ON completion_events
    FOR EACH STATEMENT EXECUTE FUNCTION follow_truncation();
