-- breaking: no
-- Flows: executions, what each waits for, and the one function that carries completions a hop further.
-- The protocol: docs/architecture.md#dispatch.

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
CREATE INDEX executions_eligible ON executions (queue_position) WHERE state = 'eligible';

COMMENT ON TABLE executions IS 'Units of work. blocked waits for others; eligible waits for a worker; the last four are final.';
COMMENT ON COLUMN executions.failures IS 'How many attempts failed; at max_attempts the execution has failed.';
COMMENT ON COLUMN executions.lost_leases IS 'How many attempts ended because the worker vanished.';
COMMENT ON COLUMN executions.lease_epoch IS 'Grows with every claim; a worker that names an older one is fenced.';
COMMENT ON COLUMN executions.is_reclaimed IS 'Whether the next claim takes over from a worker that vanished.';
COMMENT ON COLUMN executions.eligible_from IS 'Before this time nobody claims it: the back-off between two attempts.';

CREATE TABLE execution_leases (
    execution_id uuid        PRIMARY KEY REFERENCES executions,
    lease_id     uuid        NOT NULL DEFAULT gen_random_uuid(),
    lease_epoch  bigint      NOT NULL,
    owner        text        NOT NULL,
    expires_at   timestamptz NOT NULL
);

CREATE INDEX execution_leases_expires_at ON execution_leases (expires_at);

COMMENT ON TABLE execution_leases IS 'Who runs which execution, and until when unless the lease is renewed.';

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

COMMENT ON TABLE edge_groups IS 'What an execution waits for: the policy over all edges into it, and how they stand.';
COMMENT ON COLUMN edge_groups.required IS 'How many upstreams have to succeed: all for all_of, one for any_of, k for quorum.';
COMMENT ON COLUMN edge_groups.fail_count IS 'Upstreams that failed or were cancelled.';
COMMENT ON COLUMN edge_groups.running_count IS 'Upstreams that have not been counted.';

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
COMMENT ON COLUMN edges.outcome IS 'What the upstream came to, once that has been counted in the group: exactly once.';

CREATE TABLE dispatch_failures (
    event_id       bigint      PRIMARY KEY REFERENCES completion_events ON DELETE CASCADE,
    attempts       integer     NOT NULL DEFAULT 1,
    last_error     text        NOT NULL,
    retry_at       timestamptz NOT NULL,
    quarantined_at timestamptz
);

COMMENT ON TABLE dispatch_failures IS 'Completion events that could not be carried on: when they are tried again, or that they are not.';

-- Rows are locked FOR NO KEY UPDATE: a row that is changed twice in a transaction has its foreign keys looked at again,
-- and that must not wait for, or be waited for by, somebody who changes no key.
--
-- The functions below look rows up by index, whatever the statistics say of tables that were empty a moment ago.

-- Ends executions: state, lease, completion event, in the caller's transaction. `ending` is one of the final states.
-- What has ended already is left alone; returns the ids of those that this call ended.
CREATE FUNCTION end_executions(ids uuid[], ending text, why text) RETURNS SETOF uuid
LANGUAGE plpgsql SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
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
         WHERE ending IN ('cancelled', 'skipped')
    )
    INSERT INTO completion_events (execution_id, flow_id, outcome, partition_key, namespace, instance_tag)
    SELECT execution_id, flow_id, ending, partition_key, namespace, instance_tag
      FROM ended
     ORDER BY execution_id
    RETURNING completion_events.execution_id;
END
$$;

-- Judges groups after their counts have changed: satisfied at `required` successes, impossible when the rest cannot
-- reach that. Makes the executions below eligible, or ends them as skipped, and cancels what need not run any more.
-- The caller holds the locks of the groups. Returns how many executions moved.
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

    -- Everything that is about to change is locked in one order, whoever else does the same.
    PERFORM FROM executions
      WHERE execution_id = ANY (satisfied || impossible || siblings) ORDER BY execution_id FOR NO KEY UPDATE;
    UPDATE executions SET state = 'eligible' WHERE execution_id = ANY (satisfied) AND state = 'blocked';
    PERFORM end_executions(
        array(SELECT execution_id FROM executions WHERE execution_id = ANY (impossible) AND state = 'blocked'),
        'skipped', 'what it waits for can no longer succeed');
    PERFORM end_executions(siblings, 'cancelled', 'enough of its siblings succeeded');
    IF satisfied IS NOT NULL THEN
        PERFORM pg_notify(current_schema() || '.executions', '');
    END IF;
    RETURN coalesce(cardinality(satisfied), 0) + coalesce(cardinality(impossible), 0);
END
$$;

-- Carries completion events one hop further, in the caller's transaction: claims them, counts each edge below them
-- once, judges the groups. Events that somebody else is at, or was, are left out of the answer: one row for each
-- event that this call claimed, with the number of edges that were counted for it.
CREATE FUNCTION dispatch_completions(ids bigint[]) RETURNS TABLE (claimed_id bigint, counted integer)
LANGUAGE plpgsql SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    claimed bigint[];
    upstreams uuid[];
    touched uuid[];
BEGIN
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

    SELECT array_agg(downstream_id) INTO touched
      FROM (SELECT downstream_id FROM edge_groups
             WHERE downstream_id IN (SELECT downstream_id FROM edges WHERE upstream_id = ANY (upstreams))
             ORDER BY downstream_id FOR NO KEY UPDATE) AS locked;

    RETURN QUERY
    WITH first_event AS (
        SELECT DISTINCT ON (execution_id) execution_id, event_id, outcome
          FROM completion_events WHERE event_id = ANY (claimed) ORDER BY execution_id, event_id
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

-- Has an attempt fail: the execution becomes eligible again after a back-off, or ends as failed when that was the last
-- one. Null when the lease of that epoch is over.
CREATE FUNCTION fail_execution(id uuid, epoch bigint, why text) RETURNS text
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    is_last boolean;
BEGIN
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

-- Takes leases away: because they have run out (expired), or because somebody says so (revoked). The executions become
-- eligible again, or end as failed when that has happened too often. The caller holds the locks of the executions.
CREATE FUNCTION end_leases(ids uuid[], event text, most_losses integer) RETURNS integer
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
    ), told AS (
        INSERT INTO lease_events (execution_id, lease_id, event_type, partition_key, namespace, instance_tag)
        SELECT execution_id, lease_id, event, partition_key, namespace, instance_tag FROM again ORDER BY execution_id
    )
    SELECT count(*) INTO lost FROM again;
    PERFORM end_executions(
        array(SELECT execution_id FROM executions WHERE execution_id = ANY (ids) AND lost_leases > most_losses),
        'failed', 'its workers vanished too often');
    IF lost > 0 THEN
        PERFORM pg_notify(current_schema() || '.executions', '');
    END IF;
    RETURN lost;
END
$$;
