"""Advisory lock keys, and the sessions that hold them.

A key is 64 bits of a hash over the schema and a name, so that two schemas in one database never share a lock. The
hash is computed here and not by the server, so that every version of PostgreSQL gets the same key.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import blake2b
from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.db.sqlfiles import sql


class LockHolder(NamedTuple):
    """The session that holds a lock. `since` is the start of its transaction or, without one, of the session.

    PostgreSQL shows `client` and `since` of another role's session only to superusers and members of pg_read_all_stats.
    """

    pid: int
    application: str
    client: str | None
    since: datetime | None

    def __str__(self) -> str:
        application = self.application or "no application name"
        if self.client is None or self.since is None:
            return f"pid {self.pid} ({application})"
        return f"pid {self.pid} ({application}, {self.client}) since {self.since:%Y-%m-%d %H:%M:%S %Z}"


def lock_key(schema: str, name: str) -> int:
    """Returns the signed 64-bit key of the lock `name` in `schema`."""
    digest = blake2b(f"{schema}\0{name}".encode(), digest_size=8, person=b"pgcoord lock").digest()
    return int.from_bytes(digest, "big", signed=True)


def lock_holder(conn: Connection[Any], key: int) -> LockHolder | None:
    """Returns the session that holds the advisory lock `key` at this moment, or None."""
    row = conn.execute(sql("locks", "lock_holder"), [key]).fetchone()
    return LockHolder(*row) if row else None
