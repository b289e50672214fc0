"""Opening connections, and translating the errors of psycopg into those of pgcoord.

Every session has `application_name = pgcoord/<command>`, so that `pg_stat_activity` shows which command holds a lock or
a transaction. TCP keepalives and `tcp_user_timeout` detect a peer that is gone; both are defaults that the connection
string may override. No message or repr contains the password: libpq's own messages do not, except for the one about a
malformed connection string, which quotes it and is not passed on.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar
from weakref import WeakSet

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
from pgcoord_cli.settings import DSN_ARGUMENT, Settings

LIVENESS_DEFAULTS = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 10,  # seconds of silence before the first probe
    "keepalives_interval": 5,  # seconds between probes
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds that sent data may stay unacknowledged
}


SESSION_ENDING_SEVERITIES = ("FATAL", "PANIC")
"""Severities of the errors after which the server closes the session, whatever their SQLSTATE."""

MIGRATE_HINT = "create it with: pgcoord migrate up"

DSN_HINT = "write postgresql://user@host:5432/database or host=… port=… dbname=… user=…"

_UNKNOWN_KEYWORD = re.compile(r"(invalid (?:connection option|URI query parameter)):? \"([^\"]*)\"")
"""Matches libpq's message about a keyword that it does not know."""

_UNQUOTED = re.compile(r"(?:[^\"]|\"[=\]]\")*")
"""Matches the beginning of a message up to the first quotation of more than one sign of libpq's syntax."""

_STRAY_AT = re.compile(r"postgres(?:ql)?://(?>[^@/]*@)?+[^?]*@")
"""Matches a URI with an @ after the one that ends the password: libpq would read part of the password as the host."""

_BAD_OPTION = re.compile(
    r"(connection to server .* failed: )?(invalid|bad) [\w ]*(value|number)|could not match|definition of service"
    r"|.*service file"
)
"""Matches the messages of libpq and psycopg about the value of an option; those of a server begin with FATAL."""


T = TypeVar("T")


class Unconfirmed(psycopg.OperationalError):
    """The server committed, but stopped waiting for the synchronous standbys: a failover may lose the commit."""


def is_unconfirmed(notice: errors.Diagnostic) -> bool:
    """Whether a notice reports a cancelled wait for synchronous replication. The source function has no translation."""
    return notice.source_function == "SyncRepWaitForLSN"


FORK_HINT = "a forked process opens connections of its own"

_inherited: WeakSet[Connection[Any] | AsyncConnection[Any]] = WeakSet()
"""The open connections, which a forked child closes."""


def close_in_children(conn: Connection[Any] | AsyncConnection[Any]) -> None:
    """Has a forked child close its copy of the connection's socket, so that only this process keeps the session."""
    _inherited.add(conn)


def _close_inherited() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for conn in _inherited:
        if conn.pgconn.status == pq.ConnStatus.OK:
            # The number stays in use, by /dev/null: libpq, which does not know of the fork, would send its message of
            # the session's end to the parent's server process, or to a file that got the number meanwhile.
            os.dup2(null, conn.pgconn.socket, inheritable=False)
    os.close(null)


os.register_at_fork(after_in_child=_close_inherited)


def require_process(pid: int, what: str) -> None:
    """Raises UsageError unless this is process `pid`, which made `what`, and not a child that was forked from it."""
    if os.getpid() != pid:
        raise UsageError(
            f"{what} was opened by process {pid} and cannot be used in process {os.getpid()}", hint=FORK_HINT
        )


class Session(Connection[Any]):
    """A connection that never cancels a statement, and reports a commit that replication has not confirmed.

    psycopg cancels the running statement at Ctrl-C. If that is a commit which waits for a synchronous standby, the
    server then shows it to others although a failover may lose it (rule I16). Closing the socket does not: the
    server goes on waiting.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._opened_by = os.getpid()
        close_in_children(self)
        self._is_unconfirmed = False
        self.add_notice_handler(self._on_notice)

    def _on_notice(self, notice: errors.Diagnostic) -> None:
        self._is_unconfirmed |= is_unconfirmed(notice)

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits like psycopg, except that an interrupt closes the connection instead of cancelling the statement.

        Raises Unconfirmed after a commit that replication did not confirm, and UsageError in a forked child.
        """
        require_process(self._opened_by, "this connection")
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
    """A Session for asyncio: a cancelled task does not cancel its statement either."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        close_in_children(self)

    async def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits like psycopg, except that an interrupt or a cancelled task closes the connection."""
        limits = {} if timeout is None else {"timeout": timeout}
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval=interval, **limits)
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.pgconn.finish()
            raise


def conninfo(settings: Settings, command: str) -> str:
    """Returns the full connection string: the user's, completed from the environment and from our defaults.

    The application name and the client encoding are always ours. Text is exchanged as UTF-8 whatever the encoding of
    the database is: with SQL_ASCII, psycopg would return bytes. Raises UsageError for a malformed string.
    """
    given = _parsed(settings)
    added: dict[str, Any] = LIVENESS_DEFAULTS | _environment()
    if settings.connect_timeout is not None:
        added["connect_timeout"] = max(1, round(settings.connect_timeout))
    missing = {name: value for name, value in added.items() if name not in given}
    return make_conninfo(settings.dsn, **missing, application_name=f"pgcoord/{command}", client_encoding="UTF8")


def _environment() -> dict[str, str]:
    """Returns the options of LIVENESS_DEFAULTS that libpq takes from its variables or the service of PGSERVICE.

    They have to be known, since a default that is added to the connection string would override them.
    """
    options = {option.keyword.decode(): option.val for option in pq.Conninfo.get_defaults()}
    return {name: value.decode() for name in LIVENESS_DEFAULTS if (value := options.get(name)) is not None}


def _parsed(settings: Settings) -> dict[str, Any]:
    """Returns the options of the user's connection string. Raises UsageError, which quotes nothing of it."""
    try:
        given = conninfo_to_dict(settings.dsn)
    except psycopg.Error as error:
        raise _malformed(settings, str(error)) from None
    if settings.dsn.startswith(("postgresql:", "postgres:")) and not settings.dsn.isprintable():
        raise UsageError(
            f"{settings.dsn_source}: the URI contains a line break or another unprintable character",
            hint="remove it, often at the end of a value that was read from a file, or write it as %0A, %09, …",
        )
    if _STRAY_AT.match(settings.dsn):
        raise UsageError(
            f"{settings.dsn_source}: the URI has more than one @, or a / before it",
            hint="in a user or password, write %40 for @, %2F for /, %3A for :, %25 for %",
        )
    if not all(map(_is_port, str(given.get("port", "")).split(","))):
        raise UsageError(
            f"{settings.dsn_source}: the port is not a number from 1 to 65535",
            hint="a URI is postgresql://user:password@host:port/database",
        )
    return given


def _malformed(settings: Settings, reason: str) -> UsageError:
    """Returns the error for a string that libpq cannot parse: its reason, and the keyword unless that may be secret."""
    if unknown := _UNKNOWN_KEYWORD.match(reason):
        known = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
        similar = get_close_matches(unknown[2], known, 1)
        meant = f"did you mean {similar[0]}? " if similar else ""
        # After a password without quotes, a word may be the rest of the password.
        is_shown = similar or "pass" not in settings.dsn.partition(unknown[2])[0].lower()
        said = unknown[0] if is_shown else f"{unknown[1]} after the password, which needs quotes if it contains spaces"
        return UsageError(f"{settings.dsn_source}: {said}", hint=f"{meant}{DSN_HINT}")
    # What libpq quotes may be, or contain, the password; its other words are passed on.
    said = _UNQUOTED.match(reason)[0].strip(" \n:")  # type: ignore[index]
    said += " a word" if said.endswith("after") else ""
    return UsageError(f"{settings.dsn_source}: not a connection string: {said}", hint=DSN_HINT)


def _is_port(text: str) -> bool:
    return not text or (text.isdecimal() and 1 <= int(text) <= 65_535)


def connect(settings: Settings, command: str) -> Connection[Any]:
    """Opens a synchronous autocommit connection that takes `$1` parameters. Raises ConnectionFailed, UsageError."""
    target = conninfo(settings, command)
    try:
        return Session.connect(target, autocommit=True, cursor_factory=RawCursor)
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        raise connection_failed(settings, error) from None


async def connect_async(settings: Settings, command: str) -> AsyncConnection[Any]:
    """Opens an asynchronous autocommit connection that takes `$1` parameters. Raises ConnectionFailed, UsageError."""
    target = conninfo(settings, command)
    try:
        return await AsyncSession.connect(target, autocommit=True, cursor_factory=AsyncRawCursor)
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        raise connection_failed(settings, error) from None


def connection_failed(settings: Settings, error: psycopg.Error) -> PgcoordError:
    """Returns the error for a connection that could not be opened, with the reason and the source of the address."""
    reason = redact(_first_reason(error))
    if _BAD_OPTION.match(reason):
        return UsageError(f"{settings.dsn_source}: {reason}", hint=DSN_HINT)
    others = "" if settings.dsn_source == DSN_ARGUMENT else " (--dsn and PGCOORD_DSN choose another)"
    return ConnectionFailed(
        f"cannot connect: {reason}", hint=f"the address comes from {settings.dsn_source}; is the server up?{others}"
    )


def _first_reason(error: psycopg.Error) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    # The rest of the message repeats our hint (libpq), or lists every address that was tried (psycopg).
    text = re.split(r" (?:Is the server running|Multiple connection attempts failed)", text)[0]
    return text.removeprefix("connection failed: ").removeprefix("connection is bad: ")


def redact(text: str) -> str:
    """Returns `text` with every password of a URI or of a `password=` keyword replaced by ***."""
    text = re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)
    return re.sub(r"(password\s*=\s*)('[^']*'|\S+)", r"\1***", text, flags=re.IGNORECASE)


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Translates a psycopg error that the block raises into a PgcoordError, which has a hint and an exit code."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error) from error


_CLASSES: tuple[tuple[tuple[type[psycopg.Error], ...], type[PgcoordError], str | None], ...] = (
    ((errors.LockNotAvailable,), Busy, "another session holds a lock; see pg_stat_activity, then try again"),
    ((errors.QueryCanceled,), TimedOut, "raise the limit with PGCOORD_STATEMENT_TIMEOUT"),
    (
        (errors.InsufficientPrivilege,),
        PermissionDenied,
        "the schema owner can grant the rights: pgcoord migrate grant",
    ),
    ((errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedFunction), SchemaMissing, MIGRATE_HINT),
    ((errors.UndefinedColumn,), SchemaMissing, MIGRATE_HINT),
    ((errors.ReadOnlySqlTransaction,), UnsuitableServer, "connect to the primary"),
)


def translate(error: psycopg.Error) -> PgcoordError:
    """Returns the PgcoordError for a psycopg error; its message is the server's primary message."""
    message = redact(error.diag.message_primary or (str(error).strip().splitlines() or [type(error).__name__])[0])
    if isinstance(error, Unconfirmed):
        return OutcomeUnknown(
            f"{message}: the change is made on this server, but a failover may lose it",
            hint="look at it again once the standby is back; docs/replication.md",
        )
    # Sessions have row_security = off: the server refuses a statement whose rows a policy might hide.
    if error.diag.source_function == "check_enable_rls":
        return PermissionDenied(
            message, hint="pgcoord has to see all rows: ALTER ROLE … BYPASSRLS, or disable the policy"
        )
    for kinds, target, hint in _CLASSES:
        if isinstance(error, kinds):
            return target(message, hint=hint)
    if is_connection_lost(error):
        return ConnectionFailed(f"connection lost: {message}", hint="is the server still up?")
    return PgcoordError(message)


def is_connection_lost(error: psycopg.Error) -> bool:
    """Whether the session has ended, so that it is not known whether a statement in flight took effect."""
    if error.diag.severity_nonlocalized in SESSION_ENDING_SEVERITIES:
        return True
    # An error without SQLSTATE is libpq's own. Class 08: connection exception; 57P: the server ends the session.
    state = error.sqlstate or ""
    return isinstance(error, psycopg.OperationalError) and (not state or state.startswith(("08", "57P")))
