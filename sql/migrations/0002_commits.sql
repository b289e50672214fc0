-- breaking: no
-- The data, the queue of commit requests, and the functions that write the one and settle the other.
-- The protocol: docs/architecture.md#commits.

CREATE TABLE kv (
    key   bytea PRIMARY KEY CHECK (octet_length(key) <= 2600),
    value bytea NOT NULL CHECK (octet_length(value) <= 100000)
) WITH (fillfactor = 80); -- room for HOT updates of values

COMMENT ON TABLE kv IS 'The committed data. Written only under the fence: by the leader, and by commit_directly.';

-- Deletes half-open ranges (an end of null means past the last key), then keys, then inserts or updates keys. The
-- caller checks the fence in the same transaction. The search path is pinned, since the caller's may name other
-- tables `kv`.
CREATE FUNCTION write_data(
    cleared_begins bytea[], cleared_ends bytea[], cleared_keys bytea[], written_keys bytea[], written_values bytea[]
) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF cardinality(cleared_begins) > 0 THEN
        -- Ranges without an end are together one range, from the smallest of their begins.
        DELETE FROM kv
         WHERE key >= (SELECT cleared.begin_key
                         FROM unnest(cleared_begins, cleared_ends) AS cleared (begin_key, end_key)
                        WHERE cleared.end_key IS NULL
                        ORDER BY cleared.begin_key
                        LIMIT 1);
        DELETE FROM kv
         USING unnest(cleared_begins, cleared_ends) AS cleared (begin_key, end_key)
         WHERE kv.key >= cleared.begin_key AND kv.key < cleared.end_key;
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

CREATE TABLE commit_requests (
    id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request_id     uuid        NOT NULL UNIQUE,
    epoch          bigint      NOT NULL,
    term_id        uuid,
    read_version   bigint      NOT NULL,
    payload        bytea       NOT NULL,
    reply_channel  text,
    status         text        NOT NULL DEFAULT 'pending'
                   CHECK (status IN ('pending', 'committed', 'conflict', 'too_old', 'rejected', 'orphaned')),
    commit_version bigint,
    reason         text,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    resolved_at    timestamptz,
    CHECK ((status = 'committed') = (commit_version IS NOT NULL)),
    CHECK ((status = 'pending') = (resolved_at IS NULL))
) WITH (fillfactor = 45); -- each row is updated once, when it is settled: that update stays in the page

COMMENT ON TABLE commit_requests IS 'The queue of commit requests, and the outcome of each.';
COMMENT ON COLUMN commit_requests.request_id IS 'Made by the client; a request applies at most once.';
COMMENT ON COLUMN commit_requests.epoch IS 'leader_lease.epoch in the snapshot that the client read in.';
COMMENT ON COLUMN commit_requests.term_id IS 'leader_lease.last_term_id in that snapshot; null: no leader had been elected yet.';
COMMENT ON COLUMN commit_requests.read_version IS 'leader_lease.durable_version in that snapshot.';
COMMENT ON COLUMN commit_requests.payload IS 'Read ranges and mutations; docs/wire-format.md.';
COMMENT ON COLUMN commit_requests.status IS 'pending, or the outcome, which is final: committed, conflict, too_old, rejected, orphaned.';
COMMENT ON COLUMN commit_requests.reason IS 'Why a request was rejected or orphaned.';

-- Settles a batch in the caller's transaction: statuses, durable version, floors and notifications, under the fence.
-- Each of these errors rolls back the whole transaction, the data of the batch included: SQLSTATE PC001: the term has
-- ended. PC002: a request of the batch was settled by another session after it was claimed. PC003: a direct commit
-- has advanced the durable version since `version_before`.
CREATE FUNCTION settle_commits(
    leader_epoch bigint, leader_term uuid, version_before bigint, version_after bigint,
    new_conflict_floor bigint, new_window_start_id bigint, new_queue_floor_id bigint,
    ids bigint[], statuses text[], versions bigint[], reasons text[]
) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
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
