"""Opening a database session that is fit for its work, or saying why it is not.

Every command comes through here, and three questions are asked before it may touch anything (rule I14):

1. Does this session have a backend of its own, or does it go through a transaction pooler (`core.database.pooler_check`)? Is the
   server new enough, and, if the command is going to write, is it a primary? Otherwise UnsuitableServer.
2. Does the schema exist and carry every migration that this program needs? Otherwise SchemaMissing, with the
   command that mends it. A `--schema` that does not exist in a database where another schema is migrated is
   taken for a typing mistake: UsageError.
3. Has a newer pgcoord migrated it, with a migration marked breaking? Then SchemaUnknown. Newer migrations that
   are not breaking only add things, and an older program goes on working beside them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from psycopg import AsyncConnection, Connection, RawCursor
from psycopg.rows import tuple_row

from pgcoord_cli.core.database.migrations import check_ledger, mending_command, read_ledger, read_ledger_async
from pgcoord_cli.core.database.pooler_check import require_own_backend
from pgcoord_cli.db.connection import connect, connect_async, mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, PgcoordError, SchemaMissing, UnsuitableServer, UsageError
from pgcoord_cli.settings import Settings

OLDEST_SERVER = 150_000

READY_SECONDS = 15.0
"""How long a server that has taken a connection may take over what makes it a session."""


class Server(NamedTuple):
    """What the session found: `version_number` as PostgreSQL counts (150004 is 15.4)."""

    version_number: int
    in_recovery: bool
    has_ledger: bool


@contextmanager
def command_session(settings: Settings, command: str, *, writes: bool) -> Iterator[Connection[Any]]:
    """A session on a migrated schema for one command's work; psycopg's errors leave it translated."""
    with mapped_errors(), closing(open_session(settings, command, writes=writes)) as conn:
        yield conn


@contextmanager
def migration_session(settings: Settings, *, read_only: bool) -> Iterator[tuple[Connection[Any], Server]]:
    """A session whose schema may be missing, without a statement timeout; `read_only`: one READ ONLY transaction."""
    conn, server = open_bare_session(replace(settings, statement_timeout=0), "migrate")
    with mapped_errors(), closing(conn):
        if read_only:
            conn.read_only = True
            with conn.transaction():
                yield conn, server
        else:
            require_primary(server, writes=True)
            yield conn, server


def open_session(settings: Settings, command: str, *, writes: bool) -> Connection[Any]:
    """A synchronous session on a migrated schema. Raises what the module's docstring lists, and ConnectionFailed."""
    return adopt_session(connect(settings, command), settings, writes=writes)


def adopt_session(conn: Connection[Any], settings: Settings, *, writes: bool) -> Connection[Any]:
    """Makes a connection that the caller hands over what `open_session` would return. Closes it when that fails."""
    try:
        conn.autocommit = True
        conn.cursor_factory = RawCursor
        conn.row_factory = tuple_row
        with mapped_errors():
            server = _prepare(conn, settings)
            require_primary(server, writes=writes)
            require_ledger(conn, server, settings)
            check_ledger(settings.schema, read_ledger(conn))
    except BaseException:
        conn.close()
        raise
    return conn


async def open_session_async(settings: Settings, command: str, *, writes: bool) -> AsyncConnection[Any]:
    """The same for asyncio."""
    conn = await connect_async(settings, command)
    try:
        with mapped_errors():
            async with answer_expected():
                await _make_ready(conn, settings, writes=writes)
    except BaseException:
        await conn.close()
        raise
    return conn


async def _make_ready(conn: AsyncConnection[Any], settings: Settings, *, writes: bool) -> None:
    row = await (await conn.execute(*_preparation(settings, conn.info.backend_pid))).fetchone()
    if row is not None and not row[1]:
        await asyncio.to_thread(require_own_backend, settings, conn.pgconn)
        row = await (await conn.execute(*_preparation(settings, row[0]))).fetchone()
    server = _server(row)
    require_primary(server, writes=writes)
    if not server.has_ledger:
        others = await (await conn.execute(*_other_schemas(settings))).fetchall()
        raise unmigrated(settings, [row[0] for row in others])
    check_ledger(settings.schema, await read_ledger_async(conn))


@asynccontextmanager
async def answer_expected() -> AsyncIterator[None]:
    """Within the block, a server that is connected and then falls silent leaves as ConnectionFailed."""
    try:
        async with asyncio.timeout(READY_SECONDS):
            yield
    except TimeoutError:
        raise ConnectionFailed("the server does not answer") from None


def open_bare_session(settings: Settings, command: str) -> tuple[Connection[Any], Server]:
    """A session on a supported server whose schema may still be missing: what `migrate` starts from."""
    conn = connect(settings, command)
    try:
        with mapped_errors():
            server = _prepare(conn, settings)
    except BaseException:
        conn.close()
        raise
    return conn, server


def _prepare(conn: Connection[Any], settings: Settings) -> Server:
    row = conn.execute(*_preparation(settings, conn.info.backend_pid)).fetchone()
    if row is not None and not row[1]:
        require_own_backend(settings, conn.pgconn)
        row = conn.execute(*_preparation(settings, row[0])).fetchone()
    return _server(row)


def require_primary(server: Server, *, writes: bool) -> None:
    """UnsuitableServer when the session is on a standby and the command is going to write."""
    if writes and server.in_recovery:
        raise UnsuitableServer(
            "this server is a standby: nothing can be changed here",
            hint="connect to the primary, for example with target_session_attrs=read-write in the connection string",
        )


def require_ledger(conn: Connection[Any], server: Server, settings: Settings) -> None:
    """SchemaMissing unless the schema has been migrated; UsageError if its name looks like a typing mistake."""
    if not server.has_ledger:
        raise unmigrated(settings, [row[0] for row in conn.execute(*_other_schemas(settings))])


def _preparation(settings: Settings, backend_pid: int) -> tuple[Any, list[Any]]:
    timeouts = [f"{round(seconds * 1000)}" for seconds in (settings.statement_timeout, settings.lock_timeout)]
    return sql("session", "prepare_session"), [settings.schema, *timeouts, backend_pid]


def _other_schemas(settings: Settings) -> tuple[Any, list[str]]:
    return sql("session", "other_schemas"), [settings.schema]


def _server(row: tuple[Any, ...] | None) -> Server:
    assert row is not None
    server = Server(*row[2:])
    if server.version_number < OLDEST_SERVER:
        raise UnsuitableServer(
            f"PostgreSQL {server.version_number // 10_000} is not supported",
            hint="pgcoord needs PostgreSQL 15 or newer",
        )
    return server


def unmigrated(settings: Settings, others: Sequence[str]) -> PgcoordError:
    """What to say of a schema that is not there; `others` are the pgcoord schemas that this database does have."""
    if settings.schema_given and others:
        return UsageError(
            f"--schema or PGCOORD_SCHEMA: there is no pgcoord schema {settings.schema!r} in this database",
            hint=f"found: {', '.join(others)}; a new one is made by: {mending_command(settings.schema)}",
        )
    return SchemaMissing(
        f"schema {settings.schema!r} has not been migrated",
        hint=f"create it with: {mending_command(settings.schema)}",
    )
