-- name: acquire
-- Draws the next fence of a subscription, which is made where there is none; says where it stands.
INSERT INTO subscriptions AS subscription (subscription_name, outbox, fence)
VALUES ($1::text, $2::text, 1)
ON CONFLICT (subscription_name) DO UPDATE
   SET fence = subscription.fence + 1, outbox = coalesce(subscription.outbox, excluded.outbox),
       updated_at = clock_timestamp()
RETURNING fence, last_position, outbox;

-- name: save
-- Moves a checkpoint forward, under the fence of whoever saves; says whether it did.
WITH saved AS (
    UPDATE {schema}.subscriptions
       SET last_position = greatest(last_position, $3::bigint), updated_at = pg_catalog.clock_timestamp()
     WHERE subscription_name OPERATOR(pg_catalog.=) $1::pg_catalog.text
       AND fence OPERATOR(pg_catalog.=) $2::bigint
    RETURNING fence
)
SELECT EXISTS (SELECT FROM saved) AS is_saved;

-- name: checkpoint
-- Where a subscription stands.
SELECT outbox, last_position FROM subscriptions WHERE subscription_name = $1::text;

-- name: list
-- Subscriptions with how many events of their outbox lie ahead of them.
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
-- Moves a checkpoint to wherever, under the fence of whoever does so; null: nowhere yet.
UPDATE subscriptions
   SET last_position = $3::bigint, updated_at = clock_timestamp()
 WHERE subscription_name = $1::text AND fence = $2::bigint;

-- name: remove
-- Forgets where a subscription stands, under the fence of whoever does so. The fence stays: it must never go back.
UPDATE subscriptions
   SET last_position = NULL, outbox = NULL, updated_at = clock_timestamp()
 WHERE subscription_name = $1::text AND fence = $2::bigint;
