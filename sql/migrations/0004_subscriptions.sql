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

-- How far garbage collection of an outbox may go. Events that came before `committed_before_ms` are old enough, and
-- have no writer before them: one that is still open drew its ids after its transaction began. Events up to
-- `passed_by_all` (null: no subscription counts in this outbox) have been passed by every subscription.
CREATE FUNCTION collection_bound(
    outbox_name text, older_than double precision, OUT committed_before_ms bigint, OUT passed_by_all bigint
) LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $$
BEGIN
    SELECT CASE WHEN coalesce(bool_or(activity.xact_start IS NULL), false) THEN 0 -- prepared, or not ours to see
                ELSE (extract(epoch FROM least(min(activity.xact_start),
                                               clock_timestamp() - make_interval(secs => older_than))) * 1000)::bigint
           END
      INTO committed_before_ms
      FROM pg_locks AS held
      LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
     WHERE held.locktype = 'advisory' AND held.classid = outbox_name::regclass::oid AND held.objid = 0
       AND held.objsubid = 2
       AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database());
    SELECT min(last_position) INTO passed_by_all FROM subscriptions WHERE outbox = outbox_name;
END
$$;
