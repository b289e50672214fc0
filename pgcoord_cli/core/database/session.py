"""Opening database sessions that are fit for their work.

Every command opens its sessions here. Four checks come before anything is set, taken or written (rule I14):

1. The session has a backend of its own and does not go through a transaction pooler (`core.database.pooler_check`). The
   server is new enough and, if the command writes, it is a primary. Otherwise UnsuitableServer.
2. The schema exists and has every migration that this program needs. Otherwise SchemaMissing, with the command that
   applies them; for a name that was given by `--schema` it lists the schemas that the database has.
3. The schema has the name under which it was migrated: its functions and channels contain it. Otherwise SchemaUnknown.
4. No migration marked breaking has been applied by a newer pgcoord. Otherwise SchemaUnknown. Newer migrations that are
   not breaking only add things, and an older program goes on working beside them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from psycopg import AsyncConnection, Connection, IsolationLevel, RawCursor, errors
from psycopg.rows import tuple_row
from psycopg.sql import Identifier

from pgcoord_cli.core.database.migrations import check_ledger, migrate_command, read_ledger, read_ledger_async
from pgcoord_cli.core.database.pooler_check import require_own_backend
from pgcoord_cli.db.connection import connect, connect_async, mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import (
    ConnectionFailed,
    PermissionDenied,
    PgcoordError,
    SchemaMissing,
    SchemaUnknown,
    UnsuitableServer,
)
from pgcoord_cli.settings import Settings

OLDEST_SERVER = 150_000
"""The oldest supported version of PostgreSQL, as `server_version_num` counts."""

READY_SECONDS = 15.0
"""Timeout for the first statements of an asyncio session, which set it up and check it."""


class Server(NamedTuple):
    """The server of a session. `version_number` is `server_version_num`: 150004 is 15.4.

    `renamed_from` is the name under which the schema was migrated, if that is another one.
    """

    version_number: int
    in_recovery: bool
    has_ledger: bool
    renamed_from: str | None = None


@contextmanager
def command_session(settings: Settings, command: str, *, writes: bool) -> Iterator[Connection[Any]]:
    """Opens a session for one command on a migrated schema, and closes it. Translates psycopg's errors."""
    with mapped_errors(), closing(open_session(settings, command, writes=writes)) as conn:
        yield conn


@contextmanager
def migration_session(settings: Settings, *, read_only: bool) -> Iterator[tuple[Connection[Any], Server]]:
    """Opens a session whose schema may be missing; with `read_only`, the block is one READ ONLY transaction.

    Raises UnsuitableServer on a standby unless `read_only`. Translates psycopg's errors.
    """
    # No statement timeout: building an index on a large table takes as long as it takes.
    conn, server = open_bare_session(replace(settings, statement_timeout=0), "migrate")
    with mapped_errors(), closing(conn):
        if read_only:
            # The server enforces that nothing is changed.
            conn.read_only = True
            with conn.transaction():
                yield conn, server
        else:
            require_primary(server, writes=True)
            require_own_name(server, settings)
            yield conn, server


def open_session(settings: Settings, command: str, *, writes: bool) -> Connection[Any]:
    """Opens a synchronous session. Raises ConnectionFailed and the errors that the module's docstring lists."""
    return adopt_session(connect(settings, command), settings, writes=writes)


def adopt_session(conn: Connection[Any], settings: Settings, *, writes: bool) -> Connection[Any]:
    """Sets up and checks a connection that a caller hands over. Closes it on failure; raises as `open_session`."""
    try:
        # As the connections of `open_session` are made: statements take $1 parameters and commit by themselves.
        conn.autocommit = True
        conn.cursor_factory = RawCursor
        conn.row_factory = tuple_row
        with mapped_errors():
            server = _prepare(conn, settings)
            require_primary(server, writes=writes)
            require_ledger(conn, server, settings)
            check_ledger(settings.schema, read_ledger(conn))
    except BaseException:  # also an interrupt: the connection belongs to this function until it returns
        conn.close()
        raise
    return conn


async def open_session_async(settings: Settings, command: str, *, writes: bool) -> AsyncConnection[Any]:
    """Opens a session for asyncio. Raises as `open_session`, and ConnectionFailed after READY_SECONDS."""
    conn = await connect_async(settings, command)
    try:
        with mapped_errors():
            async with answer_timeout():
                await _make_ready(conn, settings, writes=writes)
    except BaseException:  # also a cancellation
        await conn.close()
        raise
    return conn


async def _make_ready(conn: AsyncConnection[Any], settings: Settings, *, writes: bool) -> None:
    try:
        row = await (await conn.execute(*_preparation(settings, conn.info.backend_pid))).fetchone()
    except errors.FeatureNotSupported:  # see _prepare
        await conn.set_isolation_level(IsolationLevel.READ_COMMITTED)
        async with conn.transaction():
            row = await (await conn.execute(*_preparation(settings, conn.info.backend_pid))).fetchone()
        await conn.set_isolation_level(None)
    if row is not None and not row[1]:
        # In a thread, because the check opens connections and blocks until they answer.
        await asyncio.to_thread(require_own_backend, settings, conn.pgconn)
        row = await (await conn.execute(*_preparation(settings, row[0]))).fetchone()
    server = _server(row)
    # Before the ledger: on a standby, a hint to migrate would be of no use.
    require_primary(server, writes=writes)
    if not server.has_ledger:
        others = await (await conn.execute(*_other_schemas(settings))).fetchall()
        raise schema_missing(settings, [row[0] for row in others])
    require_own_name(server, settings)
    check_ledger(settings.schema, await read_ledger_async(conn))


@asynccontextmanager
async def answer_timeout() -> AsyncIterator[None]:
    """Raises ConnectionFailed if the block, which talks to a connected server, takes longer than READY_SECONDS."""
    try:
        async with asyncio.timeout(READY_SECONDS):
            yield
    except TimeoutError:
        raise ConnectionFailed(
            f"the server accepted the connection but did not answer within {READY_SECONDS:g}s"
        ) from None


def open_bare_session(settings: Settings, command: str) -> tuple[Connection[Any], Server]:
    """Opens a session on a supported server whose schema may be missing. Raises ConnectionFailed, UnsuitableServer."""
    conn = connect(settings, command)
    try:
        with mapped_errors():
            server = _prepare(conn, settings)
    except BaseException as error:
        hint = _schema_grants(conn, settings) if isinstance(error.__cause__, errors.InsufficientPrivilege) else None
        conn.close()
        if hint:
            raise PermissionDenied(str(error), hint=hint) from error.__cause__
        raise
    return conn, server


def _schema_grants(conn: Connection[Any], settings: Settings) -> str:
    schema, role = _quoted(settings.schema), _quoted(conn.info.user)
    return (
        f"as the owner of the schema: GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}, to migrate it; "
        "pgcoord migrate grant, to use it"
    )


def _quoted(name: str) -> str:
    return Identifier(name).as_string()


def _prepare(conn: Connection[Any], settings: Settings) -> Server:
    # The statement sets nothing if the backend has another pid than the server announced: then there may be a pooler
    # between, and settings would stay behind with a backend that other clients use (rule I14).
    try:
        row = conn.execute(*_preparation(settings, conn.info.backend_pid)).fetchone()
    except errors.FeatureNotSupported:
        # A standby refuses every statement where default_transaction_isolation is serializable.
        conn.isolation_level = IsolationLevel.READ_COMMITTED
        with conn.transaction():
            row = conn.execute(*_preparation(settings, conn.info.backend_pid)).fetchone()
        conn.isolation_level = None
    if row is not None and not row[1]:
        require_own_backend(settings, conn.pgconn)
        # A pooler in session mode, or a proxy: the session has its own backend, under the pid that this gave.
        row = conn.execute(*_preparation(settings, row[0])).fetchone()
    return _server(row)


def require_primary(server: Server, *, writes: bool) -> None:
    """Raises UnsuitableServer if the command writes and the server is a standby."""
    if writes and server.in_recovery:
        raise UnsuitableServer(
            "this server is a standby, on which nothing can be written",
            hint="connect to the primary, for example with target_session_attrs=read-write in the connection string",
        )


def require_ledger(conn: Connection[Any], server: Server, settings: Settings) -> None:
    """Raises SchemaMissing if the schema has not been migrated, and as `require_own_name`."""
    if not server.has_ledger:
        raise schema_missing(settings, [row[0] for row in conn.execute(*_other_schemas(settings))])
    require_own_name(server, settings)


def require_own_name(server: Server, settings: Settings) -> None:
    """Raises SchemaUnknown if the schema was migrated under another name, which its functions and channels contain."""
    if server.renamed_from:
        raise SchemaUnknown(
            f"schema {settings.schema!r} was named {server.renamed_from!r} when it was migrated, and its functions "
            "still use that name",
            hint=f"rename it back: ALTER SCHEMA {_quoted(settings.schema)} RENAME TO {_quoted(server.renamed_from)}",
        )


def _preparation(settings: Settings, backend_pid: int) -> tuple[Any, list[Any]]:
    # All settings in one statement, because each round trip adds to the time that every command takes. In milliseconds.
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


def schema_missing(settings: Settings, others: Sequence[str]) -> PgcoordError:
    """Returns the error for a schema without migrations; `others` are the pgcoord schemas that the database has."""
    # Only a name that was given can be mistyped, and only another schema shows that this is a database of pgcoord.
    if settings.schema_given and others:
        return SchemaMissing(
            f"--schema or PGCOORD_SCHEMA: there is no pgcoord schema {settings.schema!r} in this database",
            hint=f"found: {', '.join(others)}; create a new one with: {migrate_command(settings.schema)}",
        )
    return SchemaMissing(
        f"schema {settings.schema!r} has not been migrated",
        hint=f"create it with: {migrate_command(settings.schema)}",
    )
