-- breaking: no
-- The data, the queue of commit requests, and the functions that write the one and settle the other.
-- The protocol: docs/architecture.md#commits.

CREATE TABLE kv (
    key   bytea PRIMARY KEY CHECK (octet_length(key) <= 2600),
    value bytea NOT NULL CHECK (octet_length(value) <= 100000)
) WITH (fillfactor = 80); -- room for HOT updates of values

COMMENT ON TABLE kv IS 'The committed data. Written only under the fence: by the leader, and by commit_directly.';

-- Replaced values, for later reads of a transaction, which see the version of its first read. The protocol:
-- docs/architecture.md#reading-at-a-version. Two partitions take turns: while one is filled, the other keeps older values,
-- until they are of no use any more and TRUNCATE empties it (keep_undo), which an old snapshot does not delay as it delays
-- vacuum. Unlogged, since nothing of it is needed after a crash.
CREATE TABLE kv_undo (
    undo_part     smallint,
    key           bytea  CHECK (octet_length(key) <= 2600),
    valid_through bigint,
    value         bytea
) PARTITION BY LIST (undo_part);

CREATE UNLOGGED TABLE kv_undo_0 PARTITION OF kv_undo FOR VALUES IN (0) WITH (autovacuum_enabled = off);
CREATE UNLOGGED TABLE kv_undo_1 PARTITION OF kv_undo FOR VALUES IN (1) WITH (autovacuum_enabled = off);
CREATE INDEX kv_undo_key ON kv_undo (key, valid_through);

COMMENT ON TABLE kv_undo IS 'Values of kv that commits of the last seconds have replaced.';
COMMENT ON COLUMN kv_undo.key IS 'Null in one row of each commit transaction, which marks that valid_through was a durable version.';
COMMENT ON COLUMN kv_undo.valid_through IS 'The last durable version at which the key had this value.';
COMMENT ON COLUMN kv_undo.value IS 'Null: the key was absent.';

-- Unlogged as kv_undo is: a crash or a promotion empties both, and without this row no earlier version is readable.
CREATE UNLOGGED TABLE kv_undo_floor (
    id         integer     PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    floor      bigint      NOT NULL,
    next_floor bigint      NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

INSERT INTO kv_undo_floor (floor, next_floor) VALUES (0, 0);

COMMENT ON TABLE kv_undo_floor IS 'From which version on kv_undo has every replaced value. One row, or none: no earlier version is readable.';
COMMENT ON COLUMN kv_undo_floor.next_floor IS 'The durable version when the partition that is filled now was begun; the next floor.';
COMMENT ON COLUMN kv_undo_floor.changed_at IS 'When the partitions took turns last, or tried to.';

-- Deletes half-open ranges (an end of null means past the last key), deletes keys, then inserts or updates keys. Keeps the
-- values that it replaces in the partition `undo_part` of kv_undo, unless that is null. The caller checks the fence in the
-- same transaction. The search path is pinned, since the caller's may name other tables `kv`.
CREATE FUNCTION write_data(
    cleared_begins bytea[], cleared_ends bytea[], cleared_keys bytea[], written_keys bytea[], written_values bytea[],
    version_before bigint, undo_part smallint
) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
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

-- Has the partitions of kv_undo take turns if the one that is filled has grown and the other holds nothing but values older
-- than every transaction's time limit. Called by the leader between its batches. Nothing here has to survive a crash, so
-- that the commit waits for no flush and no standby while it locks the lease row. Returns which
-- right is missing; an empty text if it emptied a partition; null if it is not time to.
CREATE FUNCTION keep_undo(leader_epoch bigint, leader_term uuid) RETURNS text
LANGUAGE plpgsql SET search_path FROM CURRENT SET synchronous_commit = off SET lock_timeout = '50ms' AS $$
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
