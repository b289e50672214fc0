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
    UPDATE subscriptions
       SET last_position = greatest(last_position, $3::bigint), updated_at = clock_timestamp()
     WHERE subscription_name = $1::text AND fence = $2::bigint
    RETURNING fence
)
SELECT EXISTS (SELECT FROM saved) AS is_saved;

-- name: try_lock
-- Takes a session's advisory lock if nobody holds it.
SELECT pg_try_advisory_lock($1::bigint) AS is_taken;

-- name: end_session
-- Ends another session of the same role.
SELECT pg_terminate_backend($1::integer) AS is_ended;

-- name: checkpoint
-- Where a subscription stands.
SELECT outbox, last_position FROM subscriptions WHERE subscription_name = $1::text;
