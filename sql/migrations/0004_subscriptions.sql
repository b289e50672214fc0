-- breaking: no
-- The checkpoints of subscriptions, and how far garbage collection may follow them: docs/tails.md.

CREATE TABLE subscriptions (
    subscription_name text        PRIMARY KEY,
    outbox            text,
    last_position     bigint,
    fence             bigint      NOT NULL DEFAULT 0,
    fence_id          uuid,
    passed            jsonb,
    filters           jsonb,
    updated_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Clients may write any row. What the commands and garbage collection could not read is refused here.
    CONSTRAINT name_has_1_to_200_characters CHECK (char_length(subscription_name) BETWEEN 1 AND 200),
    CONSTRAINT outbox_exists CHECK (outbox IN ('lease_events', 'completion_events')),
    -- Without an outbox, positions are the application's own, of any sign.
    CONSTRAINT position_in_an_outbox_is_not_negative CHECK (outbox IS NULL OR last_position >= 0),
    CONSTRAINT fence_is_not_negative CHECK (fence >= 0),
    -- A missing member makes the comparisons null, which a CHECK without IS TRUE would pass.
    CONSTRAINT passed_identifies_an_event CHECK (passed IS NULL OR (
        jsonb_typeof(passed -> 'event_id') = 'number' AND passed ->> 'event_id' ~ '^[0-9]{1,19}$'
        AND jsonb_typeof(passed -> 'execution_id') = 'string'
        AND jsonb_typeof(passed -> 'committed_at_ms') = 'number' AND passed ->> 'committed_at_ms' ~ '^-?[0-9]{1,19}$'
        AND (passed ->> 'event_id')::numeric <= 9223372036854775807
    ) IS TRUE),
    CONSTRAINT filters_are_an_object CHECK (jsonb_typeof(filters) = 'object'),
    -- From 1970 to 9999, in seconds: other times cannot be shown.
    CONSTRAINT updated_at_is_a_date CHECK (extract(epoch FROM updated_at) BETWEEN 0 AND 253402300799)
);

COMMENT ON TABLE subscriptions IS 'The checkpoint of each subscription; only the owner of its lock moves it, and a save moves it forward only.';
COMMENT ON COLUMN subscriptions.last_position IS 'The id of the last event that was processed; null: no position has been saved.';
COMMENT ON COLUMN subscriptions.outbox IS 'The table whose event ids the position refers to; null: positions of the application''s own.';
COMMENT ON COLUMN subscriptions.passed IS 'The last event that was passed: event_id, execution_id, committed_at_ms. Tells whether the position belongs to this history of the outbox; null: unknown.';
COMMENT ON COLUMN subscriptions.filters IS 'The filters of the tail that began the subscription.';
COMMENT ON COLUMN subscriptions.fence_id IS 'Random id, drawn with each fence: after a failover that lost data, the number alone can occur twice.';
COMMENT ON COLUMN subscriptions.fence IS 'Grows with every acquisition of the lock; a save under an older fence is refused.';

-- Returns how far garbage collection of an outbox may go. Events inserted before `committed_before_ms` (milliseconds
-- since 1970) are older than `older_than` seconds, and no open transaction can still commit an event with a lower id:
-- it drew its ids after it began. Events up to `passed_by_all` lie before the last event that each subscription of this
-- outbox has passed; null: it has none.
CREATE FUNCTION collection_bound(
    outbox_name text, older_than double precision, OUT committed_before_ms bigint, OUT passed_by_all bigint
) LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $$
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
