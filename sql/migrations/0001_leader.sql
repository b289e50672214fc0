-- breaking: no
-- One row says who leads; its history says who led before.

CREATE TABLE leader_lease (
    id                integer     PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    epoch             bigint      NOT NULL DEFAULT 0,
    term_id           uuid,
    last_term_id      uuid,
    leader_addr       text,
    server_started_at timestamptz,
    durable_version   bigint      NOT NULL DEFAULT 0,
    conflict_floor    bigint      NOT NULL DEFAULT 0,
    window_start_id   bigint      NOT NULL DEFAULT 0,
    queue_floor_id    bigint      NOT NULL DEFAULT 0,
    acquired_at       timestamptz,
    renewed_at        timestamptz,
    expires_at        timestamptz,
    step_down_epoch   bigint,
    CHECK (conflict_floor <= durable_version)
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);

COMMENT ON TABLE leader_lease IS 'Who leads, until when, and how far the committed data has got. Always one row.';
COMMENT ON COLUMN leader_lease.term_id IS 'Random name of this leadership; null when the lease was released.';
COMMENT ON COLUMN leader_lease.last_term_id IS 'The term that began last, kept when the lease is released: what is read is read under it.';
COMMENT ON COLUMN leader_lease.server_started_at IS 'Start of the postmaster on which the term began: on a promoted standby or a restored copy, the lease is void.';
COMMENT ON COLUMN leader_lease.durable_version IS 'Version of the last committed transaction; 0 on a new database.';
COMMENT ON COLUMN leader_lease.conflict_floor IS 'A request that read below this version is too_old, for ever.';
COMMENT ON COLUMN leader_lease.window_start_id IS 'Every commit above conflict_floor has a request id above this.';
COMMENT ON COLUMN leader_lease.queue_floor_id IS 'No request at or below this id is pending, now or later.';
COMMENT ON COLUMN leader_lease.step_down_epoch IS 'The epoch whose leader has been asked to step down.';

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

COMMENT ON TABLE leader_history IS 'Every leadership: who, when, how it ended, which versions it committed.';
COMMENT ON COLUMN leader_history.first_version IS 'The version that its first commit got, or would have got.';
