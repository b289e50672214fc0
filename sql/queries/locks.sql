-- name: lock_holder
-- Who holds the advisory lock of this 64-bit key: pid, application, and, where this role may see it, client address and since when its transaction or session began.
SELECT activity.pid,
       activity.application_name AS application,
       CASE WHEN activity.backend_start IS NOT NULL THEN coalesce(activity.client_addr::text, 'local') END AS client,
       coalesce(activity.xact_start, activity.backend_start) AS since
  FROM pg_locks AS held
  JOIN pg_stat_activity AS activity USING (pid)
 WHERE held.locktype = 'advisory' AND held.objsubid = 1 AND held.granted
   AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND held.classid::bigint = ($1::bigint >> 32) & 4294967295
   AND held.objid::bigint = $1::bigint & 4294967295
 ORDER BY activity.backend_start
 LIMIT 1;
