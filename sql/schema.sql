-- The sum of sql/migrations/, for people to read and for tests to compare; `pgcoord migrate up` does not use it.
-- Generated: change the schema with a migration, then run: python .ci/dump_schema.py

CREATE SCHEMA pgcoord;

CREATE FUNCTION pgcoord.announce_events() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    PERFORM pg_catalog.pg_advisory_xact_lock_shared(TG_RELID::integer, 0);
    IF pg_catalog.current_setting('pgcoord.notify', true) IS DISTINCT FROM 'off'
       AND pg_catalog.pg_sequence_last_value((TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME || '_asleep')::regclass)
           IS DISTINCT FROM
           pg_catalog.pg_sequence_last_value((TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME || '_awake')::regclass) THEN
        PERFORM pg_catalog.pg_notify(TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME, '');
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION pgcoord.settle_commits(leader_epoch bigint, leader_term uuid, version_before bigint, version_after bigint, new_conflict_floor bigint, new_window_start_id bigint, new_queue_floor_id bigint, ids bigint[], statuses text[], versions bigint[], reasons text[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
DECLARE
    settled bigint;
BEGIN
    WITH settlement AS (
        UPDATE commit_requests AS request
           SET status = outcome.status, commit_version = outcome.version, reason = outcome.reason,
               resolved_at = clock_timestamp()
          FROM unnest(ids, statuses, versions, reasons) AS outcome (id, status, version, reason)
         WHERE request.id = outcome.id AND request.status = 'pending'
        RETURNING request.reply_channel
    ), wake_up AS (
        SELECT pg_notify(waiting.reply_channel, '')
          FROM (SELECT DISTINCT reply_channel FROM settlement
                 WHERE octet_length(reply_channel) BETWEEN 1 AND 63) AS waiting -- pg_notify refuses any other
    )
    SELECT (SELECT count(*) FROM settlement) + 0 * (SELECT count(*) FROM wake_up) INTO settled;
    IF settled <> cardinality(ids) THEN
        RAISE EXCEPTION 'only % of % claimed requests were still pending', settled, cardinality(ids)
            USING ERRCODE = 'PC002';
    END IF;

    UPDATE leader_lease
       SET durable_version = version_after, conflict_floor = new_conflict_floor,
           window_start_id = new_window_start_id, queue_floor_id = new_queue_floor_id
     WHERE id = 1 AND epoch = leader_epoch AND term_id = leader_term
       AND durable_version = version_before AND expires_at > clock_timestamp();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the leadership of epoch % is over', leader_epoch USING ERRCODE = 'PC001';
    END IF;
    IF version_after > version_before THEN
        PERFORM pg_notify(current_schema() || '.data', '');
    END IF;
END
$$;

CREATE TABLE pgcoord.commit_requests (
    id bigint NOT NULL,
    request_id uuid NOT NULL,
    epoch bigint NOT NULL,
    read_version bigint NOT NULL,
    payload bytea NOT NULL,
    reply_channel text,
    status text DEFAULT 'pending'::text NOT NULL,
    commit_version bigint,
    reason text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    resolved_at timestamp with time zone,
    CONSTRAINT commit_requests_check CHECK (((status = 'committed'::text) = (commit_version IS NOT NULL))),
    CONSTRAINT commit_requests_check1 CHECK (((status = 'pending'::text) = (resolved_at IS NULL))),
    CONSTRAINT commit_requests_status_check CHECK ((status = ANY (ARRAY['pending'::text, 'committed'::text, 'conflict'::text, 'too_old'::text, 'rejected'::text, 'orphaned'::text])))
)
WITH (fillfactor='45');

COMMENT ON TABLE pgcoord.commit_requests IS 'The queue of transactions that ask to be committed, and what became of each.';

COMMENT ON COLUMN pgcoord.commit_requests.request_id IS 'Made by the client; a request applies at most once.';

COMMENT ON COLUMN pgcoord.commit_requests.epoch IS 'The leadership that the client saw in the snapshot it read in.';

COMMENT ON COLUMN pgcoord.commit_requests.read_version IS 'The durable version of the snapshot that the client read in.';

COMMENT ON COLUMN pgcoord.commit_requests.payload IS 'Read ranges and mutations; docs/wire-format.md.';

ALTER TABLE pgcoord.commit_requests ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME pgcoord.commit_requests_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE pgcoord.completion_events (
    event_id bigint NOT NULL,
    partition_key smallint DEFAULT 0 NOT NULL,
    execution_id uuid NOT NULL,
    flow_id uuid,
    outcome text NOT NULL,
    namespace text,
    instance_tag text,
    occurred_at_ms bigint DEFAULT ((EXTRACT(epoch FROM clock_timestamp()) * (1000)::numeric))::bigint NOT NULL,
    committed_at_ms bigint DEFAULT ((EXTRACT(epoch FROM clock_timestamp()) * (1000)::numeric))::bigint NOT NULL,
    dispatched_at_ms bigint
);

COMMENT ON TABLE pgcoord.completion_events IS 'Outbox: executions that ended. Insert without event_id.';

COMMENT ON COLUMN pgcoord.completion_events.committed_at_ms IS 'The server''s clock at the insert, shortly before the commit.';

COMMENT ON COLUMN pgcoord.completion_events.dispatched_at_ms IS 'When the event was carried into the graph; null: not yet.';

CREATE UNLOGGED SEQUENCE pgcoord.completion_events_asleep
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

CREATE UNLOGGED SEQUENCE pgcoord.completion_events_awake
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

ALTER TABLE pgcoord.completion_events ALTER COLUMN event_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME pgcoord.completion_events_event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE pgcoord.kv (
    key bytea NOT NULL,
    value bytea NOT NULL
)
WITH (fillfactor='80');

COMMENT ON TABLE pgcoord.kv IS 'The committed data. Only the leader writes here.';

CREATE TABLE pgcoord.leader_history (
    epoch bigint NOT NULL,
    term_id uuid NOT NULL,
    leader_addr text NOT NULL,
    acquired_at timestamp with time zone NOT NULL,
    ended_at timestamp with time zone,
    end_reason text,
    first_version bigint NOT NULL,
    last_version bigint
);

COMMENT ON TABLE pgcoord.leader_history IS 'Every leadership: who, when, how it ended, which versions it committed.';

COMMENT ON COLUMN pgcoord.leader_history.first_version IS 'The version that its first commit got, or would have got.';

CREATE TABLE pgcoord.leader_lease (
    id integer DEFAULT 1 NOT NULL,
    epoch bigint DEFAULT 0 NOT NULL,
    term_id uuid,
    leader_addr text,
    durable_version bigint DEFAULT 0 NOT NULL,
    conflict_floor bigint DEFAULT 0 NOT NULL,
    window_start_id bigint DEFAULT 0 NOT NULL,
    queue_floor_id bigint DEFAULT 0 NOT NULL,
    acquired_at timestamp with time zone,
    renewed_at timestamp with time zone,
    expires_at timestamp with time zone,
    step_down_epoch bigint,
    CONSTRAINT leader_lease_check CHECK ((conflict_floor <= durable_version)),
    CONSTRAINT leader_lease_id_check CHECK ((id = 1))
)
WITH (fillfactor='10', autovacuum_vacuum_threshold='200', autovacuum_vacuum_scale_factor='0');

COMMENT ON TABLE pgcoord.leader_lease IS 'Who leads, until when, and how far the committed data has got. Always one row.';

COMMENT ON COLUMN pgcoord.leader_lease.term_id IS 'Random name of this leadership; null when the lease was released.';

COMMENT ON COLUMN pgcoord.leader_lease.durable_version IS 'Version of the last committed transaction; 0 on a new database.';

COMMENT ON COLUMN pgcoord.leader_lease.conflict_floor IS 'A request that read below this version is too_old, for ever.';

COMMENT ON COLUMN pgcoord.leader_lease.window_start_id IS 'Every commit above conflict_floor has a request id above this.';

COMMENT ON COLUMN pgcoord.leader_lease.queue_floor_id IS 'No request at or below this id is pending, now or later.';

COMMENT ON COLUMN pgcoord.leader_lease.step_down_epoch IS 'The epoch whose leader has been asked to step down.';

CREATE TABLE pgcoord.lease_events (
    event_id bigint NOT NULL,
    execution_id text NOT NULL,
    lease_id text,
    event_type text NOT NULL,
    occurred_at_ms bigint DEFAULT ((EXTRACT(epoch FROM clock_timestamp()) * (1000)::numeric))::bigint NOT NULL,
    partition_key integer DEFAULT 0 NOT NULL,
    namespace text,
    instance_tag text,
    committed_at_ms bigint DEFAULT ((EXTRACT(epoch FROM clock_timestamp()) * (1000)::numeric))::bigint NOT NULL
);

COMMENT ON TABLE pgcoord.lease_events IS 'Outbox: what happened to the leases of executions. Insert without event_id.';

COMMENT ON COLUMN pgcoord.lease_events.event_type IS 'acquired, renewed, expired, reclaimed or revoked; a tail passes on any other.';

COMMENT ON COLUMN pgcoord.lease_events.committed_at_ms IS 'The server''s clock at the insert, shortly before the commit.';

CREATE UNLOGGED SEQUENCE pgcoord.lease_events_asleep
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

CREATE UNLOGGED SEQUENCE pgcoord.lease_events_awake
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

ALTER TABLE pgcoord.lease_events ALTER COLUMN event_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME pgcoord.lease_events_event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE pgcoord.outbox_floors (
    outbox text NOT NULL,
    collected_through bigint DEFAULT 0 NOT NULL
);

COMMENT ON TABLE pgcoord.outbox_floors IS 'Up to which event garbage collection has deleted from each outbox.';

CREATE TABLE pgcoord.schema_migrations (
    version integer NOT NULL,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    applied_by text DEFAULT CURRENT_USER NOT NULL,
    execution_ms integer,
    breaking boolean NOT NULL
);

CREATE TABLE pgcoord.subscriptions (
    subscription_name text NOT NULL,
    outbox text,
    last_position bigint,
    fence bigint DEFAULT 0 NOT NULL,
    updated_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

COMMENT ON TABLE pgcoord.subscriptions IS 'The checkpoint of each subscription; whoever holds its lock moves it forward.';

COMMENT ON COLUMN pgcoord.subscriptions.outbox IS 'The table whose event ids the position counts; null: positions of another kind.';

COMMENT ON COLUMN pgcoord.subscriptions.last_position IS 'The last event that was dealt with; null: it has not been said where to begin.';

COMMENT ON COLUMN pgcoord.subscriptions.fence IS 'Grows with every acquisition of the lock; an older owner''s saves are refused.';

ALTER TABLE ONLY pgcoord.commit_requests
    ADD CONSTRAINT commit_requests_pkey PRIMARY KEY (id);

ALTER TABLE ONLY pgcoord.commit_requests
    ADD CONSTRAINT commit_requests_request_id_key UNIQUE (request_id);

ALTER TABLE ONLY pgcoord.completion_events
    ADD CONSTRAINT completion_events_pkey PRIMARY KEY (event_id);

ALTER TABLE ONLY pgcoord.kv
    ADD CONSTRAINT kv_pkey PRIMARY KEY (key);

ALTER TABLE ONLY pgcoord.leader_history
    ADD CONSTRAINT leader_history_pkey PRIMARY KEY (term_id);

ALTER TABLE ONLY pgcoord.leader_lease
    ADD CONSTRAINT leader_lease_pkey PRIMARY KEY (id);

ALTER TABLE ONLY pgcoord.lease_events
    ADD CONSTRAINT lease_events_pkey PRIMARY KEY (event_id);

ALTER TABLE ONLY pgcoord.outbox_floors
    ADD CONSTRAINT outbox_floors_pkey PRIMARY KEY (outbox);

ALTER TABLE ONLY pgcoord.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (version);

ALTER TABLE ONLY pgcoord.subscriptions
    ADD CONSTRAINT subscriptions_pkey PRIMARY KEY (subscription_name);

CREATE INDEX completion_events_undispatched ON pgcoord.completion_events USING btree (event_id) WHERE (dispatched_at_ms IS NULL);

CREATE INDEX leader_history_acquired_at ON pgcoord.leader_history USING btree (acquired_at);

CREATE TRIGGER announce BEFORE INSERT ON pgcoord.completion_events FOR EACH STATEMENT EXECUTE FUNCTION pgcoord.announce_events();

ALTER TABLE pgcoord.completion_events ENABLE ALWAYS TRIGGER announce;

CREATE TRIGGER announce BEFORE INSERT ON pgcoord.lease_events FOR EACH STATEMENT EXECUTE FUNCTION pgcoord.announce_events();

ALTER TABLE pgcoord.lease_events ENABLE ALWAYS TRIGGER announce;
