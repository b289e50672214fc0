-- breaking: no
-- Flows: executions, the edges between them, and the functions that dispatch completions.
-- The protocol: docs/architecture.md#dispatch; flow files, workers, reconcilers: docs/flows.md.

CREATE TABLE flows (
    flow_id      uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    namespace    text,
    instance_tag text,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    cancelled_at timestamptz
);

CREATE INDEX flows_created_at ON flows (created_at);

COMMENT ON TABLE flows IS 'Graphs of executions that were created together.';

CREATE TABLE executions (
    execution_id   uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    flow_id        uuid        REFERENCES flows,
    name           text        NOT NULL,
    queue_position bigint      GENERATED ALWAYS AS IDENTITY,
    partition_key  smallint    NOT NULL DEFAULT 0,
    namespace      text,
    instance_tag   text,
    state          text        NOT NULL
                   CHECK (state IN ('blocked', 'eligible', 'running', 'success', 'failed', 'cancelled', 'skipped')),
    command        text[],
    max_attempts   integer     NOT NULL DEFAULT 1 CHECK (max_attempts >= 1),
    failures       integer     NOT NULL DEFAULT 0,
    lost_leases    integer     NOT NULL DEFAULT 0,
    lease_epoch    bigint      NOT NULL DEFAULT 0,
    is_reclaimed   boolean     NOT NULL DEFAULT false,
    eligible_from  timestamptz NOT NULL DEFAULT '-infinity',
    reason         text,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at       timestamptz,
    CHECK ((state IN ('success', 'failed', 'cancelled', 'skipped')) = (ended_at IS NOT NULL))
) WITH (fillfactor = 70);

CREATE UNIQUE INDEX executions_name_in_flow ON executions (flow_id, name);
-- Partial: a claim reads what is eligible, however many executions are stored.
CREATE INDEX executions_eligible ON executions (queue_position) WHERE state = 'eligible';

COMMENT ON TABLE executions IS 'Units of work. blocked: waits for other executions; eligible: waits for a worker; running: leased; the other four states are final.';
COMMENT ON COLUMN executions.failures IS 'How many attempts failed; at max_attempts the execution ends as failed.';
COMMENT ON COLUMN executions.lost_leases IS 'How many attempts ended because their lease expired.';
COMMENT ON COLUMN executions.lease_epoch IS 'Grows with every claim; a renewal or completion under an older epoch is refused.';
COMMENT ON COLUMN executions.is_reclaimed IS 'Whether the last lease expired, so that the next claim is a reclaim.';
COMMENT ON COLUMN executions.eligible_from IS 'No claim before this time: the backoff between two attempts.';

CREATE TABLE execution_leases (
    execution_id uuid        PRIMARY KEY REFERENCES executions,
    lease_id     uuid        NOT NULL DEFAULT gen_random_uuid(),
    lease_epoch  bigint      NOT NULL,
    owner        text        NOT NULL,
    expires_at   timestamptz NOT NULL
);

CREATE INDEX execution_leases_expires_at ON execution_leases (expires_at);

COMMENT ON TABLE execution_leases IS 'The lease of each running execution: its owner, and when it expires unless it is renewed.';

CREATE TABLE edge_groups (
    downstream_id   uuid    PRIMARY KEY REFERENCES executions,
    flow_id         uuid    NOT NULL REFERENCES flows,
    policy          jsonb   NOT NULL,
    required        integer NOT NULL CHECK (required >= 1),
    cancel_siblings boolean NOT NULL DEFAULT false,
    state           text    NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'satisfied', 'impossible')),
    success_count   integer NOT NULL DEFAULT 0,
    fail_count      integer NOT NULL DEFAULT 0,
    skip_count      integer NOT NULL DEFAULT 0,
    running_count   integer NOT NULL DEFAULT 0,
    CHECK (running_count >= 0)
) WITH (fillfactor = 70);

COMMENT ON TABLE edge_groups IS 'The edges into one execution: their join policy and the counts of their outcomes.';
COMMENT ON COLUMN edge_groups.required IS 'How many upstream executions have to succeed: all for all_of, one for any_of, k for quorum.';
COMMENT ON COLUMN edge_groups.fail_count IS 'Upstream executions that failed or were cancelled.';
COMMENT ON COLUMN edge_groups.running_count IS 'Upstream executions whose outcome has not been counted yet.';

CREATE TABLE edges (
    edge_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    flow_id       uuid NOT NULL REFERENCES flows,
    upstream_id   uuid NOT NULL REFERENCES executions,
    downstream_id uuid NOT NULL REFERENCES edge_groups,
    outcome       text,
    UNIQUE (upstream_id, downstream_id)
) WITH (fillfactor = 70);

CREATE INDEX edges_downstream ON edges (downstream_id);

COMMENT ON TABLE edges IS 'The downstream execution waits for the upstream one.';
COMMENT ON COLUMN edges.outcome IS 'The outcome of the upstream execution, set when it is counted in the group, once; null: not counted yet.';

CREATE TABLE dispatch_failures (
    event_id       bigint      PRIMARY KEY REFERENCES completion_events ON DELETE CASCADE,
    attempts       integer     NOT NULL DEFAULT 1,
    last_error     text        NOT NULL,
    retry_at       timestamptz NOT NULL,
    quarantined_at timestamptz
);

COMMENT ON TABLE dispatch_failures IS 'Completion events whose dispatch failed: the last error, when it is retried, and since when it is quarantined.';

-- Common to the functions below:
--
-- Search path: each pins that of the migration, so that a caller's search_path cannot substitute other tables.
--
-- Row locks are FOR NO KEY UPDATE. A row that is updated twice in a transaction has its foreign keys checked again,
-- with FOR KEY SHARE on the row that they refer to: that must not conflict with a session that changes no key.
--
-- Lock order: completion events by event_id, then edge groups by downstream_id, then executions by execution_id. Two
-- sessions that move parts of the same graph therefore wait for each other at most, and never deadlock.
--
-- Plans: `SET enable_...` makes them look rows up by index, whatever the statistics of recently filled tables suggest.

-- Ends executions, in the caller's transaction: state, lease, completion event. `ending` is one of the final states.
-- Executions that have ended already are not changed. Returns the ids of those that this call ended.
CREATE FUNCTION end_executions(ids uuid[], ending text, why text) RETURNS SETOF uuid
LANGUAGE plpgsql SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    -- The completion event is part of the same statement: an execution cannot end without one (rule I9).
    RETURN QUERY
    WITH ended AS (
        UPDATE executions
           SET state = ending, ended_at = clock_timestamp(), reason = why
         WHERE execution_id = ANY (ids) AND ended_at IS NULL
        RETURNING executions.execution_id, flow_id, partition_key, namespace, instance_tag
    ), released AS (
        DELETE FROM execution_leases USING ended WHERE execution_leases.execution_id = ended.execution_id
        RETURNING execution_leases.execution_id, lease_id
    ), revoked AS (
        INSERT INTO lease_events (execution_id, lease_id, event_type, partition_key, namespace, instance_tag)
        SELECT ended.execution_id, released.lease_id, 'revoked', ended.partition_key, ended.namespace, ended.instance_tag
          FROM released JOIN ended USING (execution_id)
         WHERE ending IN ('cancelled', 'skipped') -- otherwise its owner reported the end
    )
    INSERT INTO completion_events (execution_id, flow_id, outcome, partition_key, namespace, instance_tag)
    SELECT execution_id, flow_id, ending, partition_key, namespace, instance_tag
      FROM ended
     ORDER BY execution_id
    RETURNING completion_events.execution_id;
END
$$;

-- Applies the join policies of edge groups whose counts have changed: a group is satisfied at `required` successes,
-- and impossible when the upstream executions that are left cannot reach that number. Makes the downstream execution
-- of a satisfied group eligible, ends that of an impossible one as skipped, and, where the policy says so, cancels
-- the siblings that are not needed any more. The caller holds the locks of the groups. Returns how many groups were
-- decided.
CREATE FUNCTION judge_groups(ids uuid[]) RETURNS integer LANGUAGE plpgsql SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    satisfied uuid[];
    impossible uuid[];
    siblings uuid[];
BEGIN
    WITH judged AS (
        UPDATE edge_groups
           SET state = CASE WHEN success_count >= required THEN 'satisfied' ELSE 'impossible' END
         WHERE downstream_id = ANY (ids) AND state = 'pending'
           AND (success_count >= required OR success_count + running_count < required)
        RETURNING downstream_id, state, cancel_siblings
    ), needless AS (
        SELECT DISTINCT edges.upstream_id
          FROM judged JOIN edges USING (downstream_id) JOIN executions ON execution_id = edges.upstream_id
         WHERE judged.state = 'satisfied' AND judged.cancel_siblings AND executions.ended_at IS NULL
    )
    SELECT (SELECT array_agg(downstream_id) FROM judged WHERE state = 'satisfied'),
           (SELECT array_agg(downstream_id) FROM judged WHERE state = 'impossible'),
           (SELECT array_agg(upstream_id) FROM needless)
      INTO satisfied, impossible, siblings;

    -- Locks every execution that is about to change in key order, before the first update: see the lock order above.
    PERFORM FROM executions
      WHERE execution_id = ANY (satisfied || impossible || siblings) ORDER BY execution_id FOR NO KEY UPDATE;
    UPDATE executions SET state = 'eligible' WHERE execution_id = ANY (satisfied) AND state = 'blocked';
    PERFORM end_executions(
        array(SELECT execution_id FROM executions WHERE execution_id = ANY (impossible) AND state = 'blocked'),
        'skipped', 'its join policy can no longer be satisfied');
    PERFORM end_executions(siblings, 'cancelled', 'enough of its siblings succeeded');
    IF satisfied IS NOT NULL THEN
        PERFORM pg_notify(current_schema() || '.executions', '');
    END IF;
    RETURN coalesce(cardinality(satisfied), 0) + coalesce(cardinality(impossible), 0);
END
$$;

-- Dispatches completion events, in the caller's transaction: claims them, counts each edge below their executions once,
-- and applies the join policies. Returns a row for each event that this call claimed, with the number of edges that it
-- counted. Events that another session has claimed, or is claiming, are left out. Claim and counts commit together: a
-- crash rolls back both, and the event is still undispatched (rule I9).
CREATE FUNCTION dispatch_completions(ids bigint[]) RETURNS TABLE (claimed_id bigint, counted integer)
LANGUAGE plpgsql SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    claimed bigint[];
    upstreams uuid[];
    touched uuid[];
BEGIN
    -- SKIP LOCKED: another dispatcher has the event in hand; waiting for it would only show that it is done.
    WITH mine AS (
        SELECT event_id FROM completion_events
         WHERE event_id = ANY (ids) AND dispatched_at_ms IS NULL
         ORDER BY event_id FOR NO KEY UPDATE SKIP LOCKED
    ), marked AS (
        UPDATE completion_events AS event
           SET dispatched_at_ms = (extract(epoch FROM clock_timestamp()) * 1000)::bigint
          FROM mine WHERE event.event_id = mine.event_id
        RETURNING event.event_id, event.execution_id
    )
    SELECT array_agg(marked.event_id), array_agg(marked.execution_id) INTO claimed, upstreams FROM marked;
    IF claimed IS NULL THEN
        RETURN;
    END IF;
    DELETE FROM dispatch_failures WHERE event_id = ANY (claimed);

    -- Locks the groups in key order before any edge is counted: concurrent completions of the same group wait here.
    SELECT array_agg(downstream_id) INTO touched
      FROM (SELECT downstream_id FROM edge_groups
             WHERE downstream_id IN (SELECT downstream_id FROM edges WHERE upstream_id = ANY (upstreams))
             ORDER BY downstream_id FOR NO KEY UPDATE) AS locked;

    -- Only edges without an outcome are updated, so that a second event of the same execution counts nothing. Of
    -- several events of one execution in this call, the first one counts. An event whose execution has not ended with
    -- that outcome counts nothing: clients may insert events, but not finish the executions of others (rule I18).
    RETURN QUERY
    WITH first_event AS (
        SELECT DISTINCT ON (event.execution_id) event.execution_id, event.event_id, event.outcome
          FROM completion_events AS event
          JOIN executions AS upstream
            ON upstream.execution_id = event.execution_id AND upstream.state = event.outcome
           AND upstream.ended_at IS NOT NULL
         WHERE event.event_id = ANY (claimed)
         ORDER BY event.execution_id, event.event_id
    ), settled AS (
        UPDATE edges
           SET outcome = first_event.outcome
          FROM first_event
         WHERE edges.upstream_id = first_event.execution_id AND edges.outcome IS NULL
        RETURNING edges.downstream_id, edges.outcome, first_event.event_id
    ), totals AS (
        SELECT downstream_id, count(*) AS number,
               count(*) FILTER (WHERE outcome = 'success') AS successes,
               count(*) FILTER (WHERE outcome = 'skipped') AS skips
          FROM settled GROUP BY downstream_id
    ), advanced AS (
        UPDATE edge_groups
           SET success_count = success_count + successes, skip_count = skip_count + skips,
               fail_count = fail_count + number - successes - skips, running_count = running_count - number
          FROM totals
         WHERE edge_groups.downstream_id = totals.downstream_id
    )
    SELECT mine.event_id, (SELECT count(*)::integer FROM settled WHERE settled.event_id = mine.event_id)
      FROM unnest(claimed) AS mine (event_id);
    PERFORM judge_groups(touched);
END
$$;

-- Ends an attempt as failed. Returns the new state: eligible, with a backoff of 1 s that doubles up to 10 min, or
-- failed after the last attempt. Returns null, and changes nothing, unless the lease of `epoch` still holds.
CREATE FUNCTION fail_execution(id uuid, epoch bigint, why text) RETURNS text
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    is_last boolean;
BEGIN
    -- The fence: an execution that was claimed again has a higher lease epoch.
    UPDATE executions
       SET failures = failures + 1, is_reclaimed = false
     WHERE execution_id = id AND lease_epoch = epoch AND state = 'running'
    RETURNING failures >= max_attempts INTO is_last;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF is_last THEN
        PERFORM end_executions(ARRAY[id], 'failed', why);
        RETURN 'failed';
    END IF;
    UPDATE executions
       SET state = 'eligible', reason = why,
           eligible_from = clock_timestamp() + least(interval '1 second' * 2 ^ least(failures - 1, 20), interval '10 minutes')
     WHERE execution_id = id;
    DELETE FROM execution_leases WHERE execution_id = id;
    RETURN 'eligible';
END
$$;

-- Ends leases: `event` is expired or revoked. The executions become eligible again, or end as failed after more than
-- `max_lost_leases` expired leases. The caller has checked that the leases may be ended, and holds the locks of the
-- executions. Returns how many leases ended.
CREATE FUNCTION end_leases(ids uuid[], event text, max_lost_leases integer) RETURNS integer
LANGUAGE plpgsql SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    lost integer;
BEGIN
    WITH freed AS (
        DELETE FROM execution_leases WHERE execution_id = ANY (ids) RETURNING execution_id, lease_id
    ), again AS (
        UPDATE executions
           SET state = 'eligible', is_reclaimed = (event = 'expired'),
               lost_leases = lost_leases + (event = 'expired')::integer
          FROM freed
         WHERE executions.execution_id = freed.execution_id AND state = 'running'
        RETURNING executions.execution_id, freed.lease_id, partition_key, namespace, instance_tag
    ), announced AS (
        INSERT INTO lease_events (execution_id, lease_id, event_type, partition_key, namespace, instance_tag)
        SELECT execution_id, lease_id, event, partition_key, namespace, instance_tag FROM again ORDER BY execution_id
    )
    SELECT count(*) INTO lost FROM again;
    PERFORM end_executions(
        array(SELECT execution_id FROM executions WHERE execution_id = ANY (ids) AND lost_leases > max_lost_leases),
        'failed', 'its lease expired too often');
    IF lost > 0 THEN
        PERFORM pg_notify(current_schema() || '.executions', '');
    END IF;
    RETURN lost;
END
$$;
