-- breaking: no
-- Direct commits: commits without the leader, when no other commit is in progress.
-- The protocol: docs/architecture.md#direct-commits.

-- MessagePack encoding of a request, as docs/wire-format.md describes it: a binary or nil, the header of an array,
-- and the whole request. Literals are written E'...', whose meaning does not depend on standard_conforming_strings of
-- the caller's session.
--
-- A body that begins with RETURN is parsed here, under the search path of the migration: what it refers to is fixed,
-- and calls are inlined, which `SET search_path` would prevent.
CREATE FUNCTION packed_binary(item bytea) RETURNS bytea LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN item IS NULL THEN E'\\xc0'::bytea
                WHEN octet_length(item) < 256 THEN E'\\xc4'::bytea || substr(int4send(octet_length(item)), 4) || item
                WHEN octet_length(item) < 65536 THEN E'\\xc5'::bytea || substr(int4send(octet_length(item)), 3) || item
                ELSE E'\\xc6'::bytea || int4send(octet_length(item)) || item END;

CREATE FUNCTION packed_head(length integer) RETURNS bytea LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN length < 16 THEN set_byte(E'\\x00'::bytea, 0, 144 + length)
                WHEN length < 65536 THEN E'\\xdc'::bytea || substr(int4send(length), 3)
                ELSE E'\\xdd'::bytea || int4send(length) END;

CREATE FUNCTION packed_request(
    read_keys bytea[], read_begins bytea[], read_ends bytea[], cleared_begins bytea[], cleared_ends bytea[],
    cleared_keys bytea[], written_keys bytea[], written_values bytea[]
) RETURNS bytea LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path FROM CURRENT AS $$
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

-- Whether an array has one dimension and starts at subscript 1: only then do subscripts and unnest visit the same
-- items.
CREATE FUNCTION is_list(items bytea[]) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN cardinality(items) = 0 OR (array_ndims(items) = 1 AND array_lower(items, 1) = 1);

-- Commits a request in the caller's transaction if no other commit is in progress and none has happened since it read;
-- returns its version then. Otherwise inserts the request into the queue, and returns a null version. `answered_at` is
-- the server's clock at that decision. SQLSTATE PC001: the term ended meanwhile; the transaction is rolled back.
--
-- SECURITY DEFINER: a client may not write the data itself. The search path is pinned for that reason, the arguments
-- are checked, and the stored payload is encoded from the very keys and values that are written, never taken from the
-- caller.
CREATE FUNCTION commit_directly(
    request_id uuid, seen_epoch bigint, seen_term uuid, seen_version bigint,
    read_keys bytea[], read_begins bytea[], read_ends bytea[], cleared_begins bytea[], cleared_ends bytea[],
    cleared_keys bytea[], written_keys bytea[], written_values bytea[], reply_channel text,
    OUT version bigint, OUT answered_at timestamptz
) LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
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
$$;

-- `migrate grant --client` grants it; see docs/architecture.md#direct-commits.
REVOKE ALL ON FUNCTION commit_directly FROM PUBLIC;
