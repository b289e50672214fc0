"""Opening connections, and turning what psycopg raises into errors a person can act on.

Every session carries `application_name = pgcoord/<command>`, so that an operator sees in `pg_stat_activity`
who holds what. Dead peers are noticed by TCP keepalives and `tcp_user_timeout`; both are defaults that the
connection string may override. No message or repr ever holds the password: libpq's own texts do not, but for the
one about a malformed string, which quotes it, and that one is not passed on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, Connection, errors, pq, waiting
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.raw_cursor import AsyncRawCursor, RawCursor

from pgcoord_cli.errors import (
    Busy,
    ConnectionFailed,
    OutcomeUnknown,
    PermissionDenied,
    PgcoordError,
    SchemaMissing,
    TimedOut,
    UnsuitableServer,
    UsageError,
)
from pgcoord_cli.settings import Settings

LIVENESS_DEFAULTS = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 10,  # seconds of silence before the first probe
    "keepalives_interval": 5,  # seconds between probes
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds that sent data may stay unacknowledged
}


SESSION_ENDING_SEVERITIES = ("FATAL", "PANIC")
"""Errors of this severity are the last that a session says, whatever their code."""

MIGRATE_HINT = "create it with: pgcoord migrate up"

_STRAY_AT = re.compile(r"postgres(?:ql)?://(?>[^@/]*@)?+[^?]*@")
"""A URI with an @ behind the one that ends the password: libpq would take part of it for a host or database."""

_BAD_OPTION = re.compile(
    r"(connection to server .* failed: )?(invalid|bad) [\w ]*(value|number)|could not match|definition of service"
)
"""What libpq and psycopg themselves say of an option's value; what a server says begins with FATAL."""


T = TypeVar("T")


class Unconfirmed(psycopg.OperationalError):
    """The server committed here, but stopped waiting for the synchronous standbys: the commit may be lost with it."""


def is_unconfirmed(notice: errors.Diagnostic) -> bool:
    """Whether a notice says that the wait for synchronous replication was cancelled, in whatever language."""
    return notice.source_function == "SyncRepWaitForLSN"


class Session(Connection[Any]):
    """A connection that never cancels a statement, and reports a commit that replication has not confirmed.

    psycopg cancels the running statement at Ctrl-C. If that is a commit which waits for a synchronous standby, the
    server then shows it to others although a failover may lose it (rule I16). Closing the socket does not: the
    server goes on waiting.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_unconfirmed = False
        self.add_notice_handler(self._on_notice)

    def _on_notice(self, notice: errors.Diagnostic) -> None:
        self._is_unconfirmed |= is_unconfirmed(notice)

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """As psycopg's, but for an interrupt. Raises Unconfirmed after a commit that replication did not confirm."""
        limits = {} if timeout is None else {"timeout": timeout}
        try:
            result = waiting.wait(gen, self.pgconn.socket, interval=interval, **limits)
        except KeyboardInterrupt:
            self.pgconn.finish()
            raise
        if self._is_unconfirmed:
            self._is_unconfirmed = False
            raise Unconfirmed("the server stopped waiting for synchronous replication")
        return result


class AsyncSession(AsyncConnection[Any]):
    """The same for asyncio, where a cancelled task must not cancel the statement either."""

    async def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """As psycopg's, but for an interrupt or a cancelled task."""
        limits = {} if timeout is None else {"timeout": timeout}
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval=interval, **limits)
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.pgconn.finish()
            raise


def conninfo(settings: Settings, command: str) -> str:
    """The full connection string: the user's, what his environment says, our defaults, then the application name.

    Text is exchanged as UTF-8, whatever the database's encoding: of SQL_ASCII, psycopg would make bytes.
    """
    given = _parsed(settings)
    added: dict[str, Any] = LIVENESS_DEFAULTS | _environment()
    if settings.connect_timeout is not None:
        added["connect_timeout"] = max(1, round(settings.connect_timeout))
    missing = {name: value for name, value in added.items() if name not in given}
    return make_conninfo(settings.dsn, **missing, application_name=f"pgcoord/{command}", client_encoding="UTF8")


def _environment() -> dict[str, str]:
    """What libpq's variables, or the service that PGSERVICE names, say of what we have defaults for."""
    options = {option.keyword.decode(): option.val for option in pq.Conninfo.get_defaults()}
    return {name: value.decode() for name in LIVENESS_DEFAULTS if (value := options.get(name)) is not None}


def _parsed(settings: Settings) -> dict[str, Any]:
    """The options of the user's connection string; UsageError, which quotes nothing of it, where it is malformed."""
    try:
        given = conninfo_to_dict(settings.dsn)
    except psycopg.Error:
        raise UsageError(
            f"{settings.dsn_source}: not a connection string that libpq understands",
            hint="write postgresql://user@host:5432/database or host=… port=… dbname=… user=…",
        ) from None
    if _STRAY_AT.match(settings.dsn):
        raise UsageError(
            f"{settings.dsn_source}: more than one @ in the URI, or a / before it",
            hint="in a user or password, write %40 for @, %2F for /, %3A for :, %25 for %",
        )
    if not all(map(_is_port, str(given.get("port", "")).split(","))):
        raise UsageError(
            f"{settings.dsn_source}: the port is not a number from 1 to 65535",
            hint="a URI is postgresql://user:password@host:port/database",
        )
    return given


def _is_port(text: str) -> bool:
    return not text or (text.isdecimal() and 1 <= int(text) <= 65_535)


def connect(settings: Settings, command: str) -> Connection[Any]:
    """A synchronous autocommit connection that takes `$1` parameters; raises ConnectionFailed, UsageError."""
    target = conninfo(settings, command)
    try:
        return Session.connect(target, autocommit=True, cursor_factory=RawCursor)
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        raise connection_failed(settings, error) from None


async def connect_async(settings: Settings, command: str) -> AsyncConnection[Any]:
    """The same for asyncio."""
    target = conninfo(settings, command)
    try:
        return await AsyncSession.connect(target, autocommit=True, cursor_factory=AsyncRawCursor)
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        raise connection_failed(settings, error) from None


def connection_failed(settings: Settings, error: psycopg.Error) -> PgcoordError:
    """One line with the address that was tried, the server's reason, and where the address came from."""
    reason = redact(_first_reason(error))
    if _BAD_OPTION.match(reason):
        return UsageError(f"{settings.dsn_source}: {reason}")
    return ConnectionFailed(
        f"cannot connect: {reason}",
        hint=f"the address comes from {settings.dsn_source}; is the server up? (--dsn and PGCOORD_DSN choose another)",
    )


def _first_reason(error: psycopg.Error) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    # libpq asks whether the server is running, as our hint does, and psycopg lists every address that it tried.
    text = re.split(r" (?:Is the server running|Multiple connection attempts failed)", text)[0]
    return text.removeprefix("connection failed: ").removeprefix("connection is bad: ")


def redact(text: str) -> str:
    """`text` with anything that looks like a password of a URI or keyword string struck out."""
    text = re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)
    return re.sub(r"(password\s*=\s*)('[^']*'|\S+)", r"\1***", text, flags=re.IGNORECASE)


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Within the block, a psycopg error leaves as the PgcoordError that says what to do about it."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error) from error


_CLASSES: tuple[tuple[tuple[type[psycopg.Error], ...], type[PgcoordError], str | None], ...] = (
    ((errors.LockNotAvailable,), Busy, "somebody holds a lock; see pg_stat_activity, then try again"),
    ((errors.QueryCanceled,), TimedOut, "PGCOORD_STATEMENT_TIMEOUT raises the limit"),
    ((errors.InsufficientPrivilege,), PermissionDenied, "an owner can give the right: pgcoord migrate grant"),
    ((errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedFunction), SchemaMissing, MIGRATE_HINT),
    ((errors.UndefinedColumn,), SchemaMissing, MIGRATE_HINT),
    ((errors.ReadOnlySqlTransaction,), UnsuitableServer, "connect to the primary"),
)


def translate(error: psycopg.Error) -> PgcoordError:
    """The PgcoordError for a psycopg error; its message is the server's first line."""
    message = redact(error.diag.message_primary or (str(error).strip().splitlines() or [type(error).__name__])[0])
    if isinstance(error, Unconfirmed):
        return OutcomeUnknown(
            f"{message}: the change is made on this server, but a failover may lose it",
            hint="look at it again once the standby is back; docs/replication.md",
        )
    for kinds, target, hint in _CLASSES:
        if isinstance(error, kinds):
            return target(message, hint=hint)
    if is_connection_lost(error):
        return ConnectionFailed(f"connection lost: {message}", hint="is the server still up?")
    return PgcoordError(message)


def is_connection_lost(error: psycopg.Error) -> bool:
    """Whether the session is gone, so that the fate of a statement in flight is unknown."""
    if error.diag.severity_nonlocalized in SESSION_ENDING_SEVERITIES:
        return True
    state = error.sqlstate or ""
    return isinstance(error, psycopg.OperationalError) and (not state or state.startswith(("08", "57P")))
