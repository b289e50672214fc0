-- breaking: no
-- The lease of the leader, always one row, and the history of terms. The protocol: docs/architecture.md#the-lease.

CREATE TABLE leader_lease (
    id                integer     PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    epoch             bigint      NOT NULL DEFAULT 0,
    term_id           uuid,
    last_term_id      uuid,
    leader_addr       text,
    holds_lock        boolean     NOT NULL DEFAULT false,
    server_started_at timestamptz,
    wal_history       text,
    durable_version   bigint      NOT NULL DEFAULT 0,
    conflict_floor    bigint      NOT NULL DEFAULT 0,
    window_start_id   bigint      NOT NULL DEFAULT 0,
    queue_floor_id    bigint      NOT NULL DEFAULT 0,
    acquired_at       timestamptz,
    renewed_at        timestamptz,
    expires_at        timestamptz,
    step_down_epoch   bigint,
    undo_part         smallint    DEFAULT 0,
    CHECK (conflict_floor <= durable_version)
    -- Each commit and each renewal updates the one row: free space in its page lets those updates be HOT, and vacuum
    -- has to run after a number of them, since a fraction of one row means nothing.
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);

COMMENT ON TABLE leader_lease IS 'The lease: leader, epoch, term, expiry, and the durable version. Always one row.';
COMMENT ON COLUMN leader_lease.epoch IS 'Number of the term that began last; each takeover adds one.';
COMMENT ON COLUMN leader_lease.term_id IS 'Random id of the present term; null when the lease was released.';
COMMENT ON COLUMN leader_lease.last_term_id IS 'Id of the term that began last, kept when the lease is released: clients read under it.';
COMMENT ON COLUMN leader_lease.holds_lock IS 'Whether the leader has the leader lock: only then does the end of its session free the lease.';
COMMENT ON COLUMN leader_lease.server_started_at IS 'Start time of the postmaster on which the term began; on a promoted standby or a restored copy it differs, and the lease is void.';
COMMENT ON COLUMN leader_lease.wal_history IS 'System identifier and timeline of the server on which the term began; they differ after a promotion or a restore.';
COMMENT ON COLUMN leader_lease.durable_version IS 'Version of the last committed transaction; 0 on a new database.';
COMMENT ON COLUMN leader_lease.conflict_floor IS 'A request whose read version is below this is always too_old.';
COMMENT ON COLUMN leader_lease.window_start_id IS 'Every commit with a version above conflict_floor has a request id above this.';
COMMENT ON COLUMN leader_lease.queue_floor_id IS 'No request with an id up to this is pending, or can become so.';
COMMENT ON COLUMN leader_lease.undo_part IS 'The partition of kv_undo that replaced values go to; null: they are not kept.';
COMMENT ON COLUMN leader_lease.step_down_epoch IS 'The epoch whose leader has been asked to step down; null: none has.';

INSERT INTO leader_lease DEFAULT VALUES;

CREATE TABLE leader_history (
    epoch         bigint      NOT NULL,
    term_id       uuid        PRIMARY KEY,
    leader_addr   text        NOT NULL,
    acquired_at   timestamptz NOT NULL,
    ended_at      timestamptz,
    end_reason    text,
    first_version bigint      NOT NULL,
    last_version  bigint
);

CREATE INDEX leader_history_acquired_at ON leader_history (acquired_at);

COMMENT ON TABLE leader_history IS 'Every term: its leader, when and why it ended, and the versions that it committed.';
COMMENT ON COLUMN leader_history.end_reason IS 'expired, lost, or what the leader stated when it released the lease; null: not ended.';
COMMENT ON COLUMN leader_history.first_version IS 'The version of the first commit of the term, or that it would have had.';
COMMENT ON COLUMN leader_history.last_version IS 'The durable version at the end of the term; null: not ended. A request that read a later version under this term is too_old.';
