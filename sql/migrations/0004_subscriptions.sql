-- breaking: no
-- How far each named reader of an outbox has got.

CREATE TABLE subscriptions (
    subscription_name text        PRIMARY KEY,
    outbox            text,
    last_position     bigint,
    fence             bigint      NOT NULL DEFAULT 0,
    updated_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);

COMMENT ON TABLE subscriptions IS 'The checkpoint of each subscription; whoever holds its lock moves it forward.';
COMMENT ON COLUMN subscriptions.last_position IS 'The last event that was dealt with; null: it has not been said where to begin.';
COMMENT ON COLUMN subscriptions.outbox IS 'The table whose event ids the position counts; null: positions of another kind.';
COMMENT ON COLUMN subscriptions.fence IS 'Grows with every acquisition of the lock; an older owner''s saves are refused.';
