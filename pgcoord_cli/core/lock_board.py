"""Who holds which named lock, who waits for it, and taking it away from them."""

from __future__ import annotations

from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from pgcoord_cli.core.leadership import subscription_lock
from pgcoord_cli.core.locks import LockHolder, lock_holder
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConditionFalse


def list_locks(conn: Connection[Any]) -> list[dict[str, Any]]:
    """Holders and waiters of the locks that have names in this schema."""
    return conn.cursor(row_factory=dict_row).execute(sql("locks", "list")).fetchall()


def holder_of(conn: Connection[Any], schema: str, name: str) -> LockHolder:
    """Who holds a lock. ConditionFalse: nobody does."""
    holder = lock_holder(conn, subscription_lock(schema, name))
    if holder is None:
        raise ConditionFalse(f"nobody holds {name!r}")
    return holder


def break_lock(conn: Connection[Any], schema: str, name: str) -> LockHolder:
    """Ends the session that holds a lock, and with it the lock; returns whose it was. ConditionFalse: nobody's."""
    holder = holder_of(conn, schema, name)
    conn.execute(sql("locks", "end_session"), [holder.pid])
    return holder
