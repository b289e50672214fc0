-- name: acquire
-- Draws the next fence of a subscription, inserting it if missing; returns it with its position and outbox. The transaction will be durable, and confirmed by synchronous standbys.
WITH durable AS MATERIALIZED (
    -- For this transaction only. A fence that a crash could take back would be drawn twice.
    SELECT CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')
                THEN set_config('synchronous_commit', 'on', true) END AS synchronous_commit
)
INSERT INTO subscriptions AS subscription (subscription_name, outbox, fence, fence_id, filters)
SELECT $1::text, $2::text, 1, gen_random_uuid(), $3::text::jsonb FROM durable
ON CONFLICT (subscription_name) DO UPDATE
   SET fence = subscription.fence + 1, fence_id = excluded.fence_id,
       -- A row with positions of the application's own does not become one of an outbox.
       outbox = CASE WHEN subscription.outbox IS NULL AND subscription.last_position IS NULL THEN excluded.outbox
                     ELSE subscription.outbox END,
       filters = coalesce(subscription.filters, excluded.filters), updated_at = clock_timestamp()
RETURNING fence, fence_id, last_position, outbox, passed::text, filters::text;

-- name: save
-- Moves a checkpoint forward if the fence is the latest; returns whether it is.
WITH saved AS (
    UPDATE {schema}.subscriptions
       SET last_position = greatest(last_position, $3::bigint),
           passed = CASE WHEN last_position OPERATOR(pg_catalog.>) $3::bigint THEN passed
                         WHEN last_position OPERATOR(pg_catalog.=) $3::bigint
                         THEN coalesce($5::pg_catalog.text::pg_catalog.jsonb, passed)
                         ELSE $5::pg_catalog.text::pg_catalog.jsonb END,
           updated_at = pg_catalog.clock_timestamp()
     WHERE subscription_name OPERATOR(pg_catalog.=) $1::pg_catalog.text
       AND fence OPERATOR(pg_catalog.=) $2::bigint AND fence_id OPERATOR(pg_catalog.=) $4::pg_catalog.uuid
    RETURNING fence
)
SELECT EXISTS (SELECT FROM saved) AS is_saved;

-- name: checkpoint
-- The outbox and position of a subscription.
SELECT outbox, last_position, passed::text AS passed FROM subscriptions WHERE subscription_name = $1::text;

-- name: list
-- Subscriptions with the number of events of their outbox after their position.
SELECT subscription_name, outbox, last_position, fence, updated_at,
       CASE outbox
           WHEN 'lease_events' THEN (SELECT count(*) FROM lease_events WHERE event_id > coalesce(last_position, 0))
           WHEN 'completion_events' THEN (SELECT count(*) FROM completion_events
                                           WHERE event_id > coalesce(last_position, 0))
       END AS lag
  FROM subscriptions
 WHERE (outbox IS NOT NULL OR last_position IS NOT NULL) AND ($1::text IS NULL OR subscription_name = $1::text)
 ORDER BY subscription_name;

-- name: set_position
-- Sets a checkpoint to any position if the fence is the latest; null: no position.
UPDATE subscriptions
   SET last_position = $3::bigint, passed = NULL, updated_at = clock_timestamp()
 WHERE subscription_name = $1::text AND fence = $2::bigint AND fence_id = $4::uuid;

-- name: remove
-- Clears the checkpoint and outbox of a subscription if the fence is the latest. The fence stays: it never goes back.
UPDATE subscriptions
   SET last_position = NULL, passed = NULL, filters = NULL, outbox = NULL, updated_at = clock_timestamp()
 WHERE subscription_name = $1::text AND fence = $2::bigint AND fence_id = $3::uuid;
