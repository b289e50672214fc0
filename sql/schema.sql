-- The sum of sql/migrations/, for readers and tests; `pgcoord migrate up` does not use it.
-- Generated: change the schema with a migration, then run: python .ci/dump_schema.py

CREATE SCHEMA pgcoord;

CREATE FUNCTION pgcoord.announce_events() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
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

CREATE FUNCTION pgcoord.collection_bound(outbox_name text, older_than double precision, OUT committed_before_ms bigint, OUT passed_by_all bigint) RETURNS record
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
BEGIN
    -- The start of a prepared transaction, or of one that this role may not see, is unknown: then nothing is collected.
    SELECT CASE WHEN coalesce(bool_or(activity.xact_start IS NULL), false) THEN 0
                ELSE (extract(epoch FROM least(min(activity.xact_start),
                                               clock_timestamp() - make_interval(secs => older_than))) * 1000)::bigint
           END
      INTO committed_before_ms
      FROM pg_locks AS held
      LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
     -- The lock that announce_events takes: two keys (objsubid 2), the oid of the outbox and 0.
     WHERE held.locktype = 'advisory' AND held.classid = outbox_name::regclass::oid AND held.objid = 0
       AND held.objsubid = 2
       AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database());
    -- The event at the lowest position stays: a tail that resumes there compares it.
    SELECT min(coalesce((passed ->> 'event_id')::bigint, last_position)) - 1
      INTO passed_by_all
      FROM subscriptions
     WHERE outbox = outbox_name;
END
$$;

CREATE FUNCTION pgcoord.commit_directly(request_id uuid, seen_epoch bigint, seen_term uuid, seen_version bigint, read_keys bytea[], read_begins bytea[], read_ends bytea[], cleared_begins bytea[], cleared_ends bytea[], cleared_keys bytea[], written_keys bytea[], written_values bytea[], reply_channel text, OUT version bigint, OUT answered_at timestamp with time zone) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $_$
DECLARE
    request bytea;
    term uuid;
    undo smallint;
BEGIN
    IF (is_list(read_keys) AND is_list(read_begins) AND is_list(read_ends) AND is_list(cleared_begins)
        AND is_list(cleared_ends) AND is_list(cleared_keys) AND is_list(written_keys) AND is_list(written_values)
        AND cardinality(read_begins) = cardinality(read_ends)
        AND cardinality(cleared_begins) = cardinality(cleared_ends)
        AND cardinality(written_keys) = cardinality(written_values)) IS NOT TRUE THEN
        RAISE EXCEPTION 'arguments must be one-dimensional, from 1, with as many ends as begins and values as keys'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    request := packed_request(read_keys, read_begins, read_ends, cleared_begins, cleared_ends,
                              cleared_keys, written_keys, written_values);
    -- A null key is left to the leader, which rejects it with a reason. A large request goes through the queue,
    -- because the leader waits while a direct commit runs. The lock excludes the leader at work (which holds it
    -- shared) and other direct commits; it saves work, and correctness does not depend on it.
    IF array_position(read_keys || read_begins || cleared_begins || cleared_keys || written_keys, NULL) IS NULL
       AND octet_length(request) <= 16000
       AND pg_try_advisory_xact_lock('commit_requests'::regclass::oid::integer, 0) THEN
        -- No read is checked: the epoch, the term and the durable version are still those of the client's snapshot, so
        -- no commit has written anything since. A lease that began under another postmaster is a copy, on a promoted
        -- standby or a restored backup, which may lack commits that clients have read.
        SELECT lease.term_id, lease.undo_part INTO term, undo
          FROM leader_lease AS lease
         WHERE lease.id = 1 AND lease.epoch = seen_epoch AND lease.term_id = seen_term
           AND lease.durable_version = seen_version AND lease.expires_at > clock_timestamp()
           AND lease.server_started_at = pg_postmaster_start_time();
    END IF;
    -- Both times of the request: the column's default for `created_at` would be evaluated after it.
    answered_at := clock_timestamp();
    IF term IS NULL THEN
        INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, reply_channel)
        VALUES ($1, seen_epoch, seen_term, seen_version, request, $13);
        PERFORM pg_notify(current_schema() || '.commits', '');
        RETURN;
    END IF;

    version := seen_version + 1;
    -- A client's session commits asynchronously; this commit is acknowledged, and must survive a crash (rule I3).
    -- pgcoord.durable holds the level that the session had before.
    PERFORM set_config('synchronous_commit', coalesce(nullif(current_setting('pgcoord.durable', true), ''), 'on'), true),
            -- Ends a session that leaves this transaction idle for 1 s, so that it cannot block other commits: from the
            -- update below until it ends, the transaction holds the lock on the lease row.
            set_config('idle_in_transaction_session_timeout', '1s', true);
    INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, status, commit_version,
                                 created_at, resolved_at)
    VALUES ($1, seen_epoch, seen_term, seen_version, request, 'committed', version, answered_at, answered_at);
    PERFORM write_data(cleared_begins, cleared_ends, cleared_keys, written_keys, written_values, seen_version, undo);
    -- The fence: of two transactions that follow the same durable version, only one finds it here. Last, so that the
    -- lease row is locked for the commit only.
    UPDATE leader_lease AS lease
       SET durable_version = version
     WHERE lease.id = 1 AND lease.epoch = seen_epoch AND lease.term_id = term
       AND lease.durable_version = seen_version AND lease.expires_at > clock_timestamp()
       AND lease.undo_part IS NOT DISTINCT FROM undo;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the term of epoch % has ended', seen_epoch USING ERRCODE = 'PC001';
    END IF;
    PERFORM pg_notify(current_schema() || '.data', '');
END
$_$;

CREATE FUNCTION pgcoord.dispatch_completions(ids bigint[]) RETURNS TABLE(claimed_id bigint, counted integer)
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
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

CREATE FUNCTION pgcoord.end_executions(ids uuid[], ending text, why text) RETURNS SETOF uuid
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
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

CREATE FUNCTION pgcoord.end_leases(ids uuid[], event text, max_lost_leases integer) RETURNS integer
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
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

CREATE FUNCTION pgcoord.fail_execution(id uuid, epoch bigint, why text) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
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

CREATE FUNCTION pgcoord.follow_truncation() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
BEGIN
    UPDATE outbox_floors
       SET collected_through = coalesce(
               pg_sequence_last_value(pg_get_serial_sequence(TG_TABLE_NAME, 'event_id')::regclass), 0),
           execution_id = NULL, committed_at_ms = NULL
     WHERE outbox = TG_TABLE_NAME;
    RETURN NULL;
END
$$;

CREATE FUNCTION pgcoord.is_list(items bytea[]) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN ((cardinality(items) = 0) OR ((array_ndims(items) = 1) AND (array_lower(items, 1) = 1)));

CREATE FUNCTION pgcoord.judge_groups(ids uuid[]) RETURNS integer
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
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

CREATE FUNCTION pgcoord.keep_undo(leader_epoch bigint, leader_term uuid) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    SET synchronous_commit TO 'off'
    SET lock_timeout TO '50ms'
    AS $$
DECLARE
    lease record;
    kept record;
    is_off boolean;
    filled_bytes bigint;
BEGIN
    SELECT * INTO lease FROM leader_lease WHERE id = 1 AND epoch = leader_epoch AND term_id = leader_term;
    SELECT * INTO kept FROM kv_undo_floor;
    is_off := lease.undo_part IS NULL;
    filled_bytes := pg_relation_size(CASE lease.undo_part WHEN 0 THEN 'kv_undo_0' ELSE 'kv_undo_1' END::regclass);
    IF lease.id IS NULL THEN
        RETURN NULL;
    ELSIF kept.id IS NULL AND NOT is_off THEN
        INSERT INTO kv_undo_floor (floor, next_floor) VALUES (lease.durable_version, lease.durable_version)
        ON CONFLICT DO NOTHING;
        RETURN NULL;
    ELSIF kept.changed_at > clock_timestamp() - interval '10 s'
          OR NOT is_off AND filled_bytes < 2000000 THEN
        RETURN NULL;
    END IF;
    BEGIN
        IF is_off OR lease.undo_part = 1 THEN
            TRUNCATE kv_undo_0;
        END IF;
        IF is_off OR lease.undo_part = 0 THEN
            TRUNCATE kv_undo_1;
        END IF;
        UPDATE leader_lease
           SET undo_part = CASE undo_part WHEN 0 THEN 1 ELSE 0 END
         WHERE id = 1 AND epoch = leader_epoch AND term_id = leader_term
        RETURNING durable_version INTO lease.durable_version;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'the term of epoch % has ended', leader_epoch USING ERRCODE = 'PC001';
        END IF;
        UPDATE kv_undo_floor
           SET floor = CASE WHEN is_off THEN lease.durable_version ELSE next_floor END,
               next_floor = lease.durable_version, changed_at = clock_timestamp();
    EXCEPTION WHEN lock_not_available OR insufficient_privilege THEN
        -- A session reads the table for long, pg_dump for one. The next attempt comes ten seconds later. Past a gigabyte no
        -- values are kept: then a transaction that reads again after a commit is too old, until the table can be emptied.
        IF filled_bytes > 1000000000 THEN
            UPDATE leader_lease SET undo_part = NULL WHERE id = 1 AND epoch = leader_epoch AND term_id = leader_term;
            UPDATE kv_undo_floor SET floor = 9223372036854775807;
        END IF;
        UPDATE kv_undo_floor SET changed_at = clock_timestamp();
        RETURN CASE SQLSTATE WHEN '42501' THEN SQLERRM END;
    END;
    RETURN '';
END
$$;

CREATE FUNCTION pgcoord.packed_binary(item bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN (item IS NULL) THEN '\xc0'::bytea WHEN (octet_length(item) < 256) THEN (('\xc4'::bytea || substr(int4send(octet_length(item)), 4)) || item) WHEN (octet_length(item) < 65536) THEN (('\xc5'::bytea || substr(int4send(octet_length(item)), 3)) || item) ELSE (('\xc6'::bytea || int4send(octet_length(item))) || item) END;

CREATE FUNCTION pgcoord.packed_head(length integer) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN (length < 16) THEN set_byte('\x00'::bytea, 0, (144 + length)) WHEN (length < 65536) THEN ('\xdc'::bytea || substr(int4send(length), 3)) ELSE ('\xdd'::bytea || int4send(length)) END;

CREATE FUNCTION pgcoord.packed_request(read_keys bytea[], read_begins bytea[], read_ends bytea[], cleared_begins bytea[], cleared_ends bytea[], cleared_keys bytea[], written_keys bytea[], written_values bytea[]) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
DECLARE
    packed bytea := E'\\x0294'::bytea || packed_head(cardinality(read_keys));
BEGIN
    FOR i IN 1 .. cardinality(read_keys) LOOP
        packed := packed || packed_binary(read_keys[i]);
    END LOOP;
    packed := packed || packed_head(cardinality(read_begins));
    FOR i IN 1 .. cardinality(read_begins) LOOP
        packed := packed || E'\\x92'::bytea || packed_binary(read_begins[i]) || packed_binary(read_ends[i]);
    END LOOP;
    packed := packed || E'\\x90'::bytea
        || packed_head(cardinality(cleared_begins) + cardinality(cleared_keys) + cardinality(written_keys));
    FOR i IN 1 .. cardinality(cleared_begins) LOOP
        packed := packed || E'\\x9302'::bytea || packed_binary(cleared_begins[i]) || packed_binary(cleared_ends[i]);
    END LOOP;
    FOR i IN 1 .. cardinality(cleared_keys) LOOP
        packed := packed || E'\\x9301'::bytea || packed_binary(cleared_keys[i]) || E'\\xc0'::bytea;
    END LOOP;
    FOR i IN 1 .. cardinality(written_keys) LOOP
        packed := packed || E'\\x9300'::bytea || packed_binary(written_keys[i]) || packed_binary(written_values[i]);
    END LOOP;
    RETURN packed;
END
$$;

CREATE FUNCTION pgcoord.settle_commits(leader_epoch bigint, leader_term uuid, version_before bigint, version_after bigint, new_conflict_floor bigint, new_window_start_id bigint, new_queue_floor_id bigint, ids bigint[], statuses text[], versions bigint[], reasons text[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
DECLARE
    settled bigint;
BEGIN
    -- Only pending requests change: one that another session has settled keeps its outcome, and is counted as missing
    -- below.
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
                 -- pg_notify raises an error for any other length; one bad channel must not fail the batch.
                 WHERE octet_length(reply_channel) BETWEEN 1 AND 63) AS waiting
    )
    SELECT (SELECT count(*) FROM settlement) + 0 * (SELECT count(*) FROM wake_up) INTO settled;
    IF settled <> cardinality(ids) THEN
        RAISE EXCEPTION 'only % of % claimed requests were still pending', settled, cardinality(ids)
            USING ERRCODE = 'PC002';
    END IF;

    -- The fence check, and the only lock on the lease row. It is the last write of the transaction, so that the row is
    -- locked only while the transaction commits, and a renewal never waits for the writes of a long batch. The start of
    -- the postmaster is compared because a promoted standby or a restored copy holds the same epoch and term.
    UPDATE leader_lease
       SET durable_version = version_after, conflict_floor = new_conflict_floor,
           window_start_id = new_window_start_id, queue_floor_id = new_queue_floor_id
     WHERE id = 1 AND epoch = leader_epoch AND term_id = leader_term
       AND durable_version = version_before AND expires_at > clock_timestamp()
       AND server_started_at = pg_postmaster_start_time();
    IF NOT FOUND THEN
        -- Distinguishes a direct commit of the same term, after which the batch is resolved again, from the end of the term.
        PERFORM FROM leader_lease
          WHERE id = 1 AND epoch = leader_epoch AND term_id = leader_term
            AND durable_version > version_before AND expires_at > clock_timestamp()
            AND server_started_at = pg_postmaster_start_time();
        IF FOUND THEN
            RAISE EXCEPTION 'version % is no longer the durable version', version_before USING ERRCODE = 'PC003';
        END IF;
        RAISE EXCEPTION 'the term of epoch % has ended', leader_epoch USING ERRCODE = 'PC001';
    END IF;
    IF version_after > version_before THEN
        -- Wakes the watches of clients; delivered by PostgreSQL when the transaction commits.
        PERFORM pg_notify(current_schema() || '.data', '');
    END IF;
END
$$;

CREATE FUNCTION pgcoord.write_data(cleared_begins bytea[], cleared_ends bytea[], cleared_keys bytea[], written_keys bytea[], written_values bytea[], version_before bigint, undo_part smallint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pgcoord', 'pg_temp'
    AS $$
BEGIN
    IF undo_part IS NOT NULL THEN
        INSERT INTO kv_undo (undo_part, key, valid_through, value)
        SELECT write_data.undo_part, touched.key, version_before, kv.value
          FROM unnest(array_append(cleared_keys || written_keys, NULL)) AS touched (key)
          LEFT JOIN kv ON kv.key = touched.key;
    END IF;
    IF cardinality(cleared_begins) > 0 THEN
        -- A key of both a range and the list above gets two rows with the same value, which does no harm.
        WITH deleted AS (
            DELETE FROM kv
             USING unnest(cleared_begins, cleared_ends) AS cleared (begin_key, end_key)
             WHERE kv.key >= cleared.begin_key AND kv.key < cleared.end_key
            RETURNING kv.key, kv.value
        )
        INSERT INTO kv_undo (undo_part, key, valid_through, value)
        SELECT write_data.undo_part, key, version_before, value FROM deleted WHERE write_data.undo_part IS NOT NULL;
        -- Ranges without an end are together one range, from the smallest of their begins.
        WITH deleted AS (
            DELETE FROM kv
             WHERE key >= (SELECT cleared.begin_key
                             FROM unnest(cleared_begins, cleared_ends) AS cleared (begin_key, end_key)
                            WHERE cleared.end_key IS NULL
                            ORDER BY cleared.begin_key
                            LIMIT 1)
            RETURNING key, value
        )
        INSERT INTO kv_undo (undo_part, key, valid_through, value)
        SELECT write_data.undo_part, key, version_before, value FROM deleted WHERE write_data.undo_part IS NOT NULL;
    END IF;
    IF cardinality(cleared_keys) > 0 THEN
        DELETE FROM kv WHERE key = ANY (cleared_keys);
    END IF;
    IF cardinality(written_keys) > 0 THEN
        INSERT INTO kv (key, value)
        SELECT written.key, written.value FROM unnest(written_keys, written_values) AS written (key, value)
        ON CONFLICT (key) DO UPDATE SET value = excluded.value;
    END IF;
END
$$;

CREATE TABLE pgcoord.commit_requests (
    id bigint NOT NULL,
    request_id uuid NOT NULL,
    epoch bigint NOT NULL,
    term_id uuid,
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

COMMENT ON TABLE pgcoord.commit_requests IS 'The queue of commit requests, and the outcome of each.';

COMMENT ON COLUMN pgcoord.commit_requests.request_id IS 'Made by the client; a request applies at most once.';

COMMENT ON COLUMN pgcoord.commit_requests.epoch IS 'leader_lease.epoch in the snapshot that the client read in.';

COMMENT ON COLUMN pgcoord.commit_requests.term_id IS 'leader_lease.last_term_id in that snapshot; null: no leader had been elected yet.';

COMMENT ON COLUMN pgcoord.commit_requests.read_version IS 'leader_lease.durable_version in that snapshot.';

COMMENT ON COLUMN pgcoord.commit_requests.payload IS 'Read ranges and mutations; docs/wire-format.md.';

COMMENT ON COLUMN pgcoord.commit_requests.status IS 'pending, or the outcome, which is final: committed, conflict, too_old, rejected, orphaned.';

COMMENT ON COLUMN pgcoord.commit_requests.reason IS 'Why a request was rejected or orphaned.';

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

COMMENT ON COLUMN pgcoord.completion_events.dispatched_at_ms IS 'When the event was dispatched: counted at the edges below its execution; null: not yet.';

ALTER TABLE pgcoord.completion_events ALTER COLUMN event_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME pgcoord.completion_events_event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE SEQUENCE pgcoord.completion_events_wake_until
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

CREATE TABLE pgcoord.dispatch_failures (
    event_id bigint NOT NULL,
    attempts integer DEFAULT 1 NOT NULL,
    last_error text NOT NULL,
    retry_at timestamp with time zone NOT NULL,
    quarantined_at timestamp with time zone
);

COMMENT ON TABLE pgcoord.dispatch_failures IS 'Completion events whose dispatch failed: the last error, when it is retried, and since when it is quarantined.';

CREATE TABLE pgcoord.edge_groups (
    downstream_id uuid NOT NULL,
    flow_id uuid NOT NULL,
    policy jsonb NOT NULL,
    required integer NOT NULL,
    cancel_siblings boolean DEFAULT false NOT NULL,
    state text DEFAULT 'pending'::text NOT NULL,
    success_count integer DEFAULT 0 NOT NULL,
    fail_count integer DEFAULT 0 NOT NULL,
    skip_count integer DEFAULT 0 NOT NULL,
    running_count integer DEFAULT 0 NOT NULL,
    CONSTRAINT edge_groups_required_check CHECK ((required >= 1)),
    CONSTRAINT edge_groups_running_count_check CHECK ((running_count >= 0)),
    CONSTRAINT edge_groups_state_check CHECK ((state = ANY (ARRAY['pending'::text, 'satisfied'::text, 'impossible'::text])))
)
WITH (fillfactor='70');

COMMENT ON TABLE pgcoord.edge_groups IS 'The edges into one execution: their join policy and the counts of their outcomes.';

COMMENT ON COLUMN pgcoord.edge_groups.required IS 'How many upstream executions have to succeed: all for all_of, one for any_of, k for quorum.';

COMMENT ON COLUMN pgcoord.edge_groups.fail_count IS 'Upstream executions that failed or were cancelled.';

COMMENT ON COLUMN pgcoord.edge_groups.running_count IS 'Upstream executions whose outcome has not been counted yet.';

CREATE TABLE pgcoord.edges (
    edge_id uuid DEFAULT gen_random_uuid() NOT NULL,
    flow_id uuid NOT NULL,
    upstream_id uuid NOT NULL,
    downstream_id uuid NOT NULL,
    outcome text
)
WITH (fillfactor='70');

COMMENT ON TABLE pgcoord.edges IS 'The downstream execution waits for the upstream one.';

COMMENT ON COLUMN pgcoord.edges.outcome IS 'The outcome of the upstream execution, set when it is counted in the group, once; null: not counted yet.';

CREATE TABLE pgcoord.execution_leases (
    execution_id uuid NOT NULL,
    lease_id uuid DEFAULT gen_random_uuid() NOT NULL,
    lease_epoch bigint NOT NULL,
    owner text NOT NULL,
    expires_at timestamp with time zone NOT NULL
);

COMMENT ON TABLE pgcoord.execution_leases IS 'The lease of each running execution: its owner, and when it expires unless it is renewed.';

CREATE TABLE pgcoord.executions (
    execution_id uuid DEFAULT gen_random_uuid() NOT NULL,
    flow_id uuid,
    name text NOT NULL,
    queue_position bigint NOT NULL,
    partition_key smallint DEFAULT 0 NOT NULL,
    namespace text,
    instance_tag text,
    state text NOT NULL,
    command text[],
    max_attempts integer DEFAULT 1 NOT NULL,
    failures integer DEFAULT 0 NOT NULL,
    lost_leases integer DEFAULT 0 NOT NULL,
    lease_epoch bigint DEFAULT 0 NOT NULL,
    is_reclaimed boolean DEFAULT false NOT NULL,
    eligible_from timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    reason text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    ended_at timestamp with time zone,
    CONSTRAINT executions_check CHECK (((state = ANY (ARRAY['success'::text, 'failed'::text, 'cancelled'::text, 'skipped'::text])) = (ended_at IS NOT NULL))),
    CONSTRAINT executions_max_attempts_check CHECK ((max_attempts >= 1)),
    CONSTRAINT executions_state_check CHECK ((state = ANY (ARRAY['blocked'::text, 'eligible'::text, 'running'::text, 'success'::text, 'failed'::text, 'cancelled'::text, 'skipped'::text])))
)
WITH (fillfactor='70');

COMMENT ON TABLE pgcoord.executions IS 'Units of work. blocked: waits for other executions; eligible: waits for a worker; running: leased; the other four states are final.';

COMMENT ON COLUMN pgcoord.executions.failures IS 'How many attempts failed; at max_attempts the execution ends as failed.';

COMMENT ON COLUMN pgcoord.executions.lost_leases IS 'How many attempts ended because their lease expired.';

COMMENT ON COLUMN pgcoord.executions.lease_epoch IS 'Grows with every claim; a renewal or completion under an older epoch is refused.';

COMMENT ON COLUMN pgcoord.executions.is_reclaimed IS 'Whether the last lease expired, so that the next claim is a reclaim.';

COMMENT ON COLUMN pgcoord.executions.eligible_from IS 'No claim before this time: the backoff between two attempts.';

ALTER TABLE pgcoord.executions ALTER COLUMN queue_position ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME pgcoord.executions_queue_position_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE pgcoord.flows (
    flow_id uuid DEFAULT gen_random_uuid() NOT NULL,
    namespace text,
    instance_tag text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    cancelled_at timestamp with time zone
);

COMMENT ON TABLE pgcoord.flows IS 'Graphs of executions that were created together.';

CREATE TABLE pgcoord.kv (
    key bytea NOT NULL,
    value bytea NOT NULL,
    CONSTRAINT kv_key_check CHECK ((octet_length(key) <= 2600)),
    CONSTRAINT kv_value_check CHECK ((octet_length(value) <= 100000))
)
WITH (fillfactor='80');

COMMENT ON TABLE pgcoord.kv IS 'The committed data. Written only under the fence: by the leader, and by commit_directly.';

CREATE TABLE pgcoord.kv_undo (
    undo_part smallint,
    key bytea,
    valid_through bigint,
    value bytea,
    CONSTRAINT kv_undo_key_check CHECK ((octet_length(key) <= 2600))
)
PARTITION BY LIST (undo_part);

COMMENT ON TABLE pgcoord.kv_undo IS 'Values of kv that commits of the last seconds have replaced.';

COMMENT ON COLUMN pgcoord.kv_undo.key IS 'Null in one row of each commit transaction, which marks that valid_through was a durable version.';

COMMENT ON COLUMN pgcoord.kv_undo.valid_through IS 'The last durable version at which the key had this value.';

COMMENT ON COLUMN pgcoord.kv_undo.value IS 'Null: the key was absent.';

CREATE UNLOGGED TABLE pgcoord.kv_undo_0 (
    undo_part smallint,
    key bytea,
    valid_through bigint,
    value bytea,
    CONSTRAINT kv_undo_key_check CHECK ((octet_length(key) <= 2600))
)
WITH (autovacuum_enabled=off);

CREATE UNLOGGED TABLE pgcoord.kv_undo_1 (
    undo_part smallint,
    key bytea,
    valid_through bigint,
    value bytea,
    CONSTRAINT kv_undo_key_check CHECK ((octet_length(key) <= 2600))
)
WITH (autovacuum_enabled=off);

CREATE UNLOGGED TABLE pgcoord.kv_undo_floor (
    id integer DEFAULT 1 NOT NULL,
    floor bigint NOT NULL,
    next_floor bigint NOT NULL,
    changed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT kv_undo_floor_id_check CHECK ((id = 1))
);

COMMENT ON TABLE pgcoord.kv_undo_floor IS 'From which version on kv_undo has every replaced value. One row, or none: no earlier version is readable.';

COMMENT ON COLUMN pgcoord.kv_undo_floor.next_floor IS 'The durable version when the partition that is filled now was begun; the next floor.';

COMMENT ON COLUMN pgcoord.kv_undo_floor.changed_at IS 'When the partitions took turns last, or tried to.';

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

COMMENT ON TABLE pgcoord.leader_history IS 'Every term: its leader, when and why it ended, and the versions that it committed.';

COMMENT ON COLUMN pgcoord.leader_history.end_reason IS 'expired, lost, or what the leader stated when it released the lease; null: not ended.';

COMMENT ON COLUMN pgcoord.leader_history.first_version IS 'The version of the first commit of the term, or that it would have had.';

COMMENT ON COLUMN pgcoord.leader_history.last_version IS 'The durable version at the end of the term; null: not ended. A request that read a later version under this term is too_old.';

CREATE TABLE pgcoord.leader_lease (
    id integer DEFAULT 1 NOT NULL,
    epoch bigint DEFAULT 0 NOT NULL,
    term_id uuid,
    last_term_id uuid,
    leader_addr text,
    holds_lock boolean DEFAULT false NOT NULL,
    server_started_at timestamp with time zone,
    wal_history text,
    durable_version bigint DEFAULT 0 NOT NULL,
    conflict_floor bigint DEFAULT 0 NOT NULL,
    window_start_id bigint DEFAULT 0 NOT NULL,
    queue_floor_id bigint DEFAULT 0 NOT NULL,
    acquired_at timestamp with time zone,
    renewed_at timestamp with time zone,
    expires_at timestamp with time zone,
    step_down_epoch bigint,
    undo_part smallint DEFAULT 0,
    CONSTRAINT leader_lease_check CHECK ((conflict_floor <= durable_version)),
    CONSTRAINT leader_lease_id_check CHECK ((id = 1))
)
WITH (fillfactor='10', autovacuum_vacuum_threshold='200', autovacuum_vacuum_scale_factor='0');

COMMENT ON TABLE pgcoord.leader_lease IS 'The lease: leader, epoch, term, expiry, and the durable version. Always one row.';

COMMENT ON COLUMN pgcoord.leader_lease.epoch IS 'Number of the term that began last; each takeover adds one.';

COMMENT ON COLUMN pgcoord.leader_lease.term_id IS 'Random id of the present term; null when the lease was released.';

COMMENT ON COLUMN pgcoord.leader_lease.last_term_id IS 'Id of the term that began last, kept when the lease is released: clients read under it.';

COMMENT ON COLUMN pgcoord.leader_lease.holds_lock IS 'Whether the leader has the leader lock: only then does the end of its session free the lease.';

COMMENT ON COLUMN pgcoord.leader_lease.server_started_at IS 'Start time of the postmaster on which the term began; on a promoted standby or a restored copy it differs, and the lease is void.';

COMMENT ON COLUMN pgcoord.leader_lease.wal_history IS 'System identifier and timeline of the server on which the term began; they differ after a promotion or a restore.';

COMMENT ON COLUMN pgcoord.leader_lease.durable_version IS 'Version of the last committed transaction; 0 on a new database.';

COMMENT ON COLUMN pgcoord.leader_lease.conflict_floor IS 'A request whose read version is below this is always too_old.';

COMMENT ON COLUMN pgcoord.leader_lease.window_start_id IS 'Every commit with a version above conflict_floor has a request id above this.';

COMMENT ON COLUMN pgcoord.leader_lease.queue_floor_id IS 'No request with an id up to this is pending, or can become so.';

COMMENT ON COLUMN pgcoord.leader_lease.step_down_epoch IS 'The epoch whose leader has been asked to step down; null: none has.';

COMMENT ON COLUMN pgcoord.leader_lease.undo_part IS 'The partition of kv_undo that replaced values go to; null: they are not kept.';

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

COMMENT ON TABLE pgcoord.lease_events IS 'Outbox: changes of the leases of executions. Insert without event_id.';

COMMENT ON COLUMN pgcoord.lease_events.event_type IS 'acquired, renewed, expired, reclaimed or revoked; a tail delivers any other too, with a warning.';

COMMENT ON COLUMN pgcoord.lease_events.committed_at_ms IS 'The server''s clock at the insert, shortly before the commit.';

ALTER TABLE pgcoord.lease_events ALTER COLUMN event_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME pgcoord.lease_events_event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE SEQUENCE pgcoord.lease_events_wake_until
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

CREATE TABLE pgcoord.lock_names (
    lock_key bigint NOT NULL,
    lock_name text NOT NULL,
    CONSTRAINT name_has_1_to_200_characters CHECK (((char_length(lock_name) >= 1) AND (char_length(lock_name) <= 200)))
);

COMMENT ON TABLE pgcoord.lock_names IS 'The name that each advisory lock key belongs to: for lists, and to refuse a second name with the same key.';

CREATE TABLE pgcoord.outbox_floors (
    outbox text NOT NULL,
    collected_through bigint DEFAULT 0 NOT NULL,
    execution_id text,
    committed_at_ms bigint
);

COMMENT ON TABLE pgcoord.outbox_floors IS 'The last event that garbage collection has deleted from each outbox: its id and identity; null: unknown.';

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
    fence_id uuid,
    passed jsonb,
    filters jsonb,
    updated_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT fence_is_not_negative CHECK ((fence >= 0)),
    CONSTRAINT filters_are_an_object CHECK ((jsonb_typeof(filters) = 'object'::text)),
    CONSTRAINT name_has_1_to_200_characters CHECK (((char_length(subscription_name) >= 1) AND (char_length(subscription_name) <= 200))),
    CONSTRAINT outbox_exists CHECK ((outbox = ANY (ARRAY['lease_events'::text, 'completion_events'::text]))),
    CONSTRAINT passed_identifies_an_event CHECK (((passed IS NULL) OR (((jsonb_typeof((passed -> 'event_id'::text)) = 'number'::text) AND ((passed ->> 'event_id'::text) ~ '^[0-9]{1,19}$'::text) AND (jsonb_typeof((passed -> 'execution_id'::text)) = 'string'::text) AND (jsonb_typeof((passed -> 'committed_at_ms'::text)) = 'number'::text) AND ((passed ->> 'committed_at_ms'::text) ~ '^-?[0-9]{1,19}$'::text) AND (((passed ->> 'event_id'::text))::numeric <= ('9223372036854775807'::bigint)::numeric)) IS TRUE))),
    CONSTRAINT position_in_an_outbox_is_not_negative CHECK (((outbox IS NULL) OR (last_position >= 0))),
    CONSTRAINT updated_at_is_a_date CHECK (((EXTRACT(epoch FROM updated_at) >= (0)::numeric) AND (EXTRACT(epoch FROM updated_at) <= ('253402300799'::bigint)::numeric)))
);

COMMENT ON TABLE pgcoord.subscriptions IS 'The checkpoint of each subscription; only the owner of its lock moves it, and a save moves it forward only.';

COMMENT ON COLUMN pgcoord.subscriptions.outbox IS 'The table whose event ids the position refers to; null: positions of the application''s own.';

COMMENT ON COLUMN pgcoord.subscriptions.last_position IS 'The id of the last event that was processed; null: no position has been saved.';

COMMENT ON COLUMN pgcoord.subscriptions.fence IS 'Grows with every acquisition of the lock; a save under an older fence is refused.';

COMMENT ON COLUMN pgcoord.subscriptions.fence_id IS 'Random id, drawn with each fence: after a failover that lost data, the number alone can occur twice.';

COMMENT ON COLUMN pgcoord.subscriptions.passed IS 'The last event that was passed: event_id, execution_id, committed_at_ms. Tells whether the position belongs to this history of the outbox; null: unknown.';

COMMENT ON COLUMN pgcoord.subscriptions.filters IS 'The filters of the tail that began the subscription.';

ALTER TABLE ONLY pgcoord.kv_undo ATTACH PARTITION pgcoord.kv_undo_0 FOR VALUES IN ('0');

ALTER TABLE ONLY pgcoord.kv_undo ATTACH PARTITION pgcoord.kv_undo_1 FOR VALUES IN ('1');

ALTER TABLE ONLY pgcoord.commit_requests
    ADD CONSTRAINT commit_requests_pkey PRIMARY KEY (id);

ALTER TABLE ONLY pgcoord.commit_requests
    ADD CONSTRAINT commit_requests_request_id_key UNIQUE (request_id);

ALTER TABLE ONLY pgcoord.completion_events
    ADD CONSTRAINT completion_events_pkey PRIMARY KEY (event_id);

ALTER TABLE ONLY pgcoord.dispatch_failures
    ADD CONSTRAINT dispatch_failures_pkey PRIMARY KEY (event_id);

ALTER TABLE ONLY pgcoord.edge_groups
    ADD CONSTRAINT edge_groups_pkey PRIMARY KEY (downstream_id);

ALTER TABLE ONLY pgcoord.edges
    ADD CONSTRAINT edges_pkey PRIMARY KEY (edge_id);

ALTER TABLE ONLY pgcoord.edges
    ADD CONSTRAINT edges_upstream_id_downstream_id_key UNIQUE (upstream_id, downstream_id);

ALTER TABLE ONLY pgcoord.execution_leases
    ADD CONSTRAINT execution_leases_pkey PRIMARY KEY (execution_id);

ALTER TABLE ONLY pgcoord.executions
    ADD CONSTRAINT executions_pkey PRIMARY KEY (execution_id);

ALTER TABLE ONLY pgcoord.flows
    ADD CONSTRAINT flows_pkey PRIMARY KEY (flow_id);

ALTER TABLE ONLY pgcoord.kv
    ADD CONSTRAINT kv_pkey PRIMARY KEY (key);

ALTER TABLE ONLY pgcoord.kv_undo_floor
    ADD CONSTRAINT kv_undo_floor_pkey PRIMARY KEY (id);

ALTER TABLE ONLY pgcoord.leader_history
    ADD CONSTRAINT leader_history_pkey PRIMARY KEY (term_id);

ALTER TABLE ONLY pgcoord.leader_lease
    ADD CONSTRAINT leader_lease_pkey PRIMARY KEY (id);

ALTER TABLE ONLY pgcoord.lease_events
    ADD CONSTRAINT lease_events_pkey PRIMARY KEY (event_id);

ALTER TABLE ONLY pgcoord.lock_names
    ADD CONSTRAINT lock_names_pkey PRIMARY KEY (lock_key);

ALTER TABLE ONLY pgcoord.outbox_floors
    ADD CONSTRAINT outbox_floors_pkey PRIMARY KEY (outbox);

ALTER TABLE ONLY pgcoord.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (version);

ALTER TABLE ONLY pgcoord.subscriptions
    ADD CONSTRAINT subscriptions_pkey PRIMARY KEY (subscription_name);

CREATE INDEX completion_events_undispatched ON pgcoord.completion_events USING btree (event_id) WHERE (dispatched_at_ms IS NULL);

CREATE INDEX edges_downstream ON pgcoord.edges USING btree (downstream_id);

CREATE INDEX execution_leases_expires_at ON pgcoord.execution_leases USING btree (expires_at);

CREATE INDEX executions_eligible ON pgcoord.executions USING btree (queue_position) WHERE (state = 'eligible'::text);

CREATE UNIQUE INDEX executions_name_in_flow ON pgcoord.executions USING btree (flow_id, name);

CREATE INDEX flows_created_at ON pgcoord.flows USING btree (created_at);

CREATE INDEX kv_undo_key ON ONLY pgcoord.kv_undo USING btree (key, valid_through);

CREATE INDEX kv_undo_0_key_valid_through_idx ON pgcoord.kv_undo_0 USING btree (key, valid_through);

CREATE INDEX kv_undo_1_key_valid_through_idx ON pgcoord.kv_undo_1 USING btree (key, valid_through);

CREATE INDEX leader_history_acquired_at ON pgcoord.leader_history USING btree (acquired_at);

ALTER INDEX pgcoord.kv_undo_key ATTACH PARTITION pgcoord.kv_undo_0_key_valid_through_idx;

ALTER INDEX pgcoord.kv_undo_key ATTACH PARTITION pgcoord.kv_undo_1_key_valid_through_idx;

CREATE TRIGGER announce BEFORE INSERT ON pgcoord.completion_events FOR EACH STATEMENT EXECUTE FUNCTION pgcoord.announce_events();

ALTER TABLE pgcoord.completion_events ENABLE ALWAYS TRIGGER announce;

CREATE TRIGGER announce BEFORE INSERT ON pgcoord.lease_events FOR EACH STATEMENT EXECUTE FUNCTION pgcoord.announce_events();

ALTER TABLE pgcoord.lease_events ENABLE ALWAYS TRIGGER announce;

CREATE TRIGGER follow_truncation AFTER TRUNCATE ON pgcoord.completion_events FOR EACH STATEMENT EXECUTE FUNCTION pgcoord.follow_truncation();

CREATE TRIGGER follow_truncation AFTER TRUNCATE ON pgcoord.lease_events FOR EACH STATEMENT EXECUTE FUNCTION pgcoord.follow_truncation();

ALTER TABLE ONLY pgcoord.dispatch_failures
    ADD CONSTRAINT dispatch_failures_event_id_fkey FOREIGN KEY (event_id) REFERENCES pgcoord.completion_events(event_id) ON DELETE CASCADE;

ALTER TABLE ONLY pgcoord.edge_groups
    ADD CONSTRAINT edge_groups_downstream_id_fkey FOREIGN KEY (downstream_id) REFERENCES pgcoord.executions(execution_id);

ALTER TABLE ONLY pgcoord.edge_groups
    ADD CONSTRAINT edge_groups_flow_id_fkey FOREIGN KEY (flow_id) REFERENCES pgcoord.flows(flow_id);

ALTER TABLE ONLY pgcoord.edges
    ADD CONSTRAINT edges_downstream_id_fkey FOREIGN KEY (downstream_id) REFERENCES pgcoord.edge_groups(downstream_id);

ALTER TABLE ONLY pgcoord.edges
    ADD CONSTRAINT edges_flow_id_fkey FOREIGN KEY (flow_id) REFERENCES pgcoord.flows(flow_id);

ALTER TABLE ONLY pgcoord.edges
    ADD CONSTRAINT edges_upstream_id_fkey FOREIGN KEY (upstream_id) REFERENCES pgcoord.executions(execution_id);

ALTER TABLE ONLY pgcoord.execution_leases
    ADD CONSTRAINT execution_leases_execution_id_fkey FOREIGN KEY (execution_id) REFERENCES pgcoord.executions(execution_id);

ALTER TABLE ONLY pgcoord.executions
    ADD CONSTRAINT executions_flow_id_fkey FOREIGN KEY (flow_id) REFERENCES pgcoord.flows(flow_id);
