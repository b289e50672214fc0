-- breaking: no
-- The data, the queue of commit requests over it, and the one function that settles a batch of them.

CREATE TABLE kv (
    key   bytea PRIMARY KEY CHECK (octet_length(key) <= 2600),
    value bytea NOT NULL CHECK (octet_length(value) <= 100000)
) WITH (fillfactor = 80);

COMMENT ON TABLE kv IS 'The committed data. Written only under the fence: by the leader, and by commit_directly.';

-- Removes ranges (an end of null means to the last key), then keys, and then writes keys.
CREATE FUNCTION write_data(
    cleared_begins bytea[], cleared_ends bytea[], cleared_keys bytea[], written_keys bytea[], written_values bytea[]
) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF cardinality(cleared_begins) > 0 THEN
        -- The ranges that have no end are one, from the smallest begin on.
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
) WITH (fillfactor = 45);

COMMENT ON TABLE commit_requests IS 'The queue of transactions that ask to be committed, and what became of each.';
COMMENT ON COLUMN commit_requests.request_id IS 'Made by the client; a request applies at most once.';
COMMENT ON COLUMN commit_requests.epoch IS 'The leadership that the client saw in the snapshot it read in.';
COMMENT ON COLUMN commit_requests.term_id IS 'leader_lease.last_term_id in that snapshot; null: no leader had ever been elected.';
COMMENT ON COLUMN commit_requests.read_version IS 'The durable version of the snapshot that the client read in.';
COMMENT ON COLUMN commit_requests.payload IS 'Read ranges and mutations; docs/wire-format.md.';

-- Settles a batch: statuses, the durable version and the wake-ups, in the caller's transaction, under the fence.
-- The fence comes last, so that the lease row is locked only while the transaction commits and a renewal never
-- waits for a long batch. SQLSTATE PC001: this leadership is over. PC002: a request of the batch was settled by
-- somebody else since it was claimed. PC003: somebody else has committed since. Each undoes the whole transaction.
CREATE FUNCTION settle_commits(
    leader_epoch bigint, leader_term uuid, version_before bigint, version_after bigint,
    new_conflict_floor bigint, new_window_start_id bigint, new_queue_floor_id bigint,
    ids bigint[], statuses text[], versions bigint[], reasons text[]
) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
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
       AND durable_version = version_before AND expires_at > clock_timestamp()
       AND server_started_at = pg_postmaster_start_time();
    IF NOT FOUND THEN
        PERFORM FROM leader_lease
          WHERE id = 1 AND epoch = leader_epoch AND term_id = leader_term
            AND durable_version > version_before AND expires_at > clock_timestamp()
            AND server_started_at = pg_postmaster_start_time();
        IF FOUND THEN
            RAISE EXCEPTION 'version % is not the last one any more', version_before USING ERRCODE = 'PC003';
        END IF;
        RAISE EXCEPTION 'the leadership of epoch % is over', leader_epoch USING ERRCODE = 'PC001';
    END IF;
    IF version_after > version_before THEN
        PERFORM pg_notify(current_schema() || '.data', '');
    END IF;
END
$$;
