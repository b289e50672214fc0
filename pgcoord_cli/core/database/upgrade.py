"""Bringing a database's schema up to date in one call: session, lock, migrations."""

from __future__ import annotations

from collections.abc import Callable

from pgcoord_cli.core.database.advisory_keys import LockHolder
from pgcoord_cli.core.database.migrations import Migration, apply, migration_lock
from pgcoord_cli.core.database.session import migration_session
from pgcoord_cli.settings import Settings

LOCK_TIMEOUT = 30.0


def upgrade(
    settings: Settings,
    *,
    to: int | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    waiting: Callable[[LockHolder], None] = lambda _holder: None,
    applied: Callable[[Migration], None] = lambda _migration: None,
) -> list[Migration]:
    """Applies what the schema lacks; `waiting` hears who is ahead, `applied` of each. Busy on timeout."""
    with (
        migration_session(settings, read_only=False) as (conn, _server),
        migration_lock(conn, settings.schema, lock_timeout, waiting),
    ):
        return apply(conn, settings.schema, to, applied)
