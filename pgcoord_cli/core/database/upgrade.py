"""Bringing a schema up to date in one call: session, lock and migrations."""

from __future__ import annotations

from collections.abc import Callable

from pgcoord_cli.core.database.advisory_keys import LockHolder
from pgcoord_cli.core.database.migrations import Migration, apply, migration_lock
from pgcoord_cli.core.database.session import migration_session
from pgcoord_cli.settings import Settings

LOCK_TIMEOUT = 30.0
"""Seconds to wait for another run that holds the migration lock."""


def upgrade(
    settings: Settings,
    *,
    to: int | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    on_wait: Callable[[LockHolder], None] = lambda _holder: None,
    on_applied: Callable[[Migration], None] = lambda _migration: None,
) -> list[Migration]:
    """Applies the missing migrations of `settings.schema` up to version `to`, and returns them.

    Calls `on_wait` if another session holds the lock, and `on_applied` after each migration. Raises Busy after
    `lock_timeout` seconds, and the errors of `migration_session` and `migrations.apply`.
    """
    with (
        migration_session(settings, read_only=False) as (conn, _server),
        migration_lock(conn, settings.schema, lock_timeout, on_wait),
    ):
        return apply(conn, settings.schema, to, on_applied)
