"""Ownership of a name: at most one owner at a time, by an advisory lock and nothing else.

    with acquire_leadership(None, "billing") as owner:
        for event in source(owner.checkpoint.load()):
            with service.transaction():
                project(service, event)
                owner.checkpoint.save(event.position, service)

**The lock** is taken at once or not at all (LockNotAcquired), over a dedicated connection that no pool shares. It is
held as long as that connection lives; a crash, `kill -9` or a terminated session releases it at once. There is nothing
to renew, nothing to configure, and nothing for the owner's loop to poll.

**The fence** makes this safe. An owner whose session was terminated may not know it. Each acquisition draws a larger
number. Every save of the checkpoint names that number, and the statement compares it under the row's lock, in the
transaction of the writes that it belongs to. After another acquisition the former owner's saves raise Fenced, and its
writes roll back with them (rule I13).

A fence is used only once it is durable, whatever the server's default for `synchronous_commit`: a crash does not draw
it twice. A failover that loses commits may draw the number again, but not the random id that is drawn and compared
with it. While a synchronous standby stalls, the fence cannot become durable, and the acquisition fails at a deadline.

**The key** of the lock is a 64-bit hash of schema and name. The name behind each key is stored and compared, so two
names with the same key are reported (KeyCollision) instead of excluding each other without reason.

**Fork.** A child process does not share the ownership. Its copy of the socket is closed at the fork, so that the lock
ends with the parent; `load` and `save` raise UsageError there, and `release` does nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import UUID

import psycopg
from psycopg import Connection, RawCursor
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row, tuple_row

from pgcoord_cli.core.database.advisory_keys import LockHolder, lock_holder, lock_key
from pgcoord_cli.core.database.session import adopt_session, open_session
from pgcoord_cli.db.connection import (
    Unconfirmed,
    close_in_children,
    is_unconfirmed,
    require_process,
    translate,
)
from pgcoord_cli.db.pipeline import Pipeline, Unanswered
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import (
    Busy,
    ConditionFalse,
    ConnectionFailed,
    CoordinationError,
    Fenced,
    KeyCollision,
    LockNotAcquired,
    PgcoordError,
    UsageError,
)
from pgcoord_cli.settings import Settings, resolve_arguments

_log = logging.getLogger("pgcoord.locks")

MAX_NAME = 200
"""Characters in the name of a lock or subscription."""

FENCE_SECONDS = 10.0
"""How long the draw of a fence may go unanswered: it waits for the disk, and for synchronous standbys."""

RELEASE_SECONDS = 5.0
"""How long `release` waits for the server's answer."""


def check_name(name: str, option: str) -> str:
    """Returns `name`. Raises UsageError, which names `option`, if it is empty, too long or holds a null byte."""
    if not 0 < len(name) <= MAX_NAME or "\0" in name:
        raise UsageError(f"{option}: a name must have 1 to {MAX_NAME} characters, none of them a null byte")
    return name


def acquire_leadership(
    target: str | Connection[Any] | None,
    subscription_name: str,
    *,
    schema: str | None = None,
    timeout_seconds: float = FENCE_SECONDS,
) -> Ownership:
    """Acquires the ownership of a name, at once or not at all.

    `target` is a connection string of libpq; None for that of PGCOORD_DSN or libpq's environment; or a psycopg
    connection that serves nothing else from now on: it is put into autocommit, keeps the lock, and is closed by
    `release` or if the acquisition fails. `schema` is that of the cluster, PGCOORD_SCHEMA or `pgcoord` by default.

    Raises LockNotAcquired if the name has another owner; CoordinationError if the database cannot be reached or fails,
    or does not confirm the fence within `timeout_seconds`, which says nothing about owners; UsageError for a malformed
    argument, UnsuitableServer (a standby, a transaction pooler), SchemaMissing, SchemaUnknown, PermissionDenied,
    KeyCollision.
    """
    check_name(subscription_name, "subscription_name")
    settings = resolve_arguments(target if isinstance(target, str) else None, schema)
    try:
        conn = _session(target, settings)
        try:
            take_lock(conn, settings.schema, subscription_name)
            acquired = draw_fence(conn, subscription_name, None, timeout_seconds)
        except BaseException:
            # Also at a KeyboardInterrupt: an open connection would keep the lock until the process ends.
            conn.close()
            raise
    # Neither says whether the name has an owner, so both are raised as CoordinationError, never as LockNotAcquired.
    except psycopg.Error as error:
        raise CoordinationError(translate(error).message) from error
    except ConnectionFailed as error:
        raise CoordinationError(error.message, hint=error.hint) from error
    fence = acquired.fence
    _log.info(
        "%r is owned, with fence %d", subscription_name, fence.number, extra=_fields(subscription_name, fence.number)
    )
    return Ownership(conn, subscription_name, fence, settings.schema)


def _fields(name: str, fence: int) -> dict[str, Any]:
    """Returns the fields of log records about the ownership of a name."""
    return {"lock": name, "fence": fence}


def _session(target: str | Connection[Any] | None, settings: Settings) -> Connection[Any]:
    if target is None or isinstance(target, str):
        return open_session(settings, "leadership", writes=True)
    if not isinstance(target, Connection):
        raise UsageError(f"target: {type(target).__name__} is not a connection string or a psycopg.Connection")
    # The check for a pooler opens connections of its own: to the server of the target, not that of the environment.
    password = {"password": target.info.password} if target.info.password else {}
    address = make_conninfo(target.info.dsn, **password)
    close_in_children(target)
    return adopt_session(target, replace(settings, dsn=address, dsn_source="the connection"), writes=True)


def subscription_lock(schema: str, name: str) -> int:
    """Returns the advisory lock key of a name."""
    return lock_key(schema, f"subscription {name}")


def take_lock(
    conn: Connection[Any],
    schema: str,
    name: str,
    wait_seconds: float = 0.0,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Takes the lock of a name for the session of `conn`.

    Calls `on_wait`, then waits in PostgreSQL's queue for at most `wait_seconds`; with 0 it never waits. Raises
    LockNotAcquired, which names the holder, and KeyCollision.
    """
    key = subscription_lock(schema, name)
    # Before the lock is taken: a session that holds it must be the owner of this name, not of one with the same key.
    conn.execute(sql("locks", "name_key"), [key, name])
    (known,) = conn.execute(sql("locks", "name_of_key"), [key]).fetchone() or (name,)
    if known != name and subscription_lock(schema, known) != key:
        raise PgcoordError(
            f"the row of {name!r} in lock_names has the name {known!r}, which has another key: a client wrote it",
            hint=f"as an operator: DELETE FROM {schema}.lock_names WHERE lock_key = {key}",
        )
    if known != name:
        raise KeyCollision(f"{name!r} has the same 64-bit lock key as {known!r}", hint="choose another name")
    on_wait()
    if not (_wait_for(conn, key, wait_seconds) if wait_seconds else _try(conn, key)):
        # None if the lock was released after the attempt: the refusal stands, since nothing here retries.
        holder = lock_holder(conn, key) or "a session that has just ended"
        waited = f"; waited for {wait_seconds:g} s" if wait_seconds else ""
        raise LockNotAcquired(name, f"{name!r} is held by {holder}{waited}")


def _try(conn: Connection[Any], key: int) -> bool:
    row = conn.execute(sql("locks", "try_lock"), [key]).fetchone()
    return bool(row and row[0])


def _wait_for(conn: Connection[Any], key: int, seconds: float) -> bool:
    # The session blocks in PostgreSQL's queue of the lock, which is first come, first served; nothing polls.
    conn.execute(sql("locks", "set_lock_timeout"), [str(max(1, round(seconds * 1000)))])
    # An interrupt closes the connection without cancelling the statement (rule I16). The server has to find that out
    # by itself, or the session would wait on, and for a moment take the lock, long after its client has gone.
    with suppress(psycopg.errors.InvalidParameterValue):  # the server's operating system cannot report it
        conn.execute(sql("locks", "check_client"))
    try:
        conn.execute(sql("locks", "wait_for_lock"), [key])
    except psycopg.errors.LockNotAvailable:
        return False
    return True


class Fence(NamedTuple):
    """What one acquisition drew: a number that grows, and a random id, which no other acquisition has."""

    number: int
    fence_id: UUID


class Acquisition(NamedTuple):
    """A fence, and what the row of the name holds: the last position, the outbox that this counts in, and, as JSON, the
    last event passed and the filters of the tail that began it."""

    fence: Fence
    position: int | None
    outbox: str | None
    passed: str | None
    filters: str | None


def draw_fence(
    conn: Connection[Any],
    name: str,
    outbox: str | None,
    timeout_seconds: float = FENCE_SECONDS,
    *,
    filters: str | None = None,
) -> Acquisition:
    """Draws the next fence of a name, durably; returns it with the position. The caller holds the lock of the name.

    Raises ConnectionFailed, with the connection closed, if that is not confirmed within `timeout_seconds`.
    """
    encoding = conn.info.encoding
    values = [None if text is None else text.encode(encoding) for text in (name, outbox, filters)]
    warnings: list[str] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        if is_unconfirmed(notice):  # read here: libpq frees the notice when the handler returns
            warnings.append(notice.message_primary or "")

    conn.add_notice_handler(note)
    try:
        # The pipeline cancels nothing at its deadline, so that a commit that waits for a standby goes on waiting.
        rows = Pipeline(conn, timeout_seconds).fetch(sql("subscriptions", "acquire"), values)
    except Unanswered:
        raise ConnectionFailed(
            f"the fence of {name!r} was not confirmed within {timeout_seconds:g} s, so {name!r} was not acquired",
            hint="does a synchronous standby stall? see wait_event SyncRep in pg_stat_activity",
        ) from None
    except psycopg.errors.NumericValueOutOfRange:
        raise PgcoordError(
            f"the fence of {name!r} is at its maximum, which only a client that wrote the row can have caused",
            hint="as an operator, set subscriptions.fence of that row to the number of the last acquisition",
        ) from None
    finally:
        conn.remove_notice_handler(note)
    if warnings:
        raise Unconfirmed("the server stopped waiting for synchronous replication")
    number, fence_id, *rest = rows[0]
    return Acquisition(Fence(number, fence_id), *rest)


class Ownership:
    """The ownership of a name until `release`, or until its connection is lost. Made by `acquire_leadership`.

    `fence` is the number that this acquisition drew.
    """

    def __init__(self, conn: Connection[Any], subscription_name: str, fence: Fence, schema: str) -> None:
        self._conn = conn
        self._pid = os.getpid()
        self._schema = schema
        self.subscription_name = subscription_name
        self.fence = fence.number
        self.checkpoint = Checkpoint(conn, subscription_name, fence, schema)

    def release(self) -> None:
        """Releases the name, and closes the connection; repeated calls, and calls in a forked child, do nothing.

        When it returns, the server has released the lock, unless the server does not answer for RELEASE_SECONDS or the
        connection was lost: then the lock ends with the session.
        """
        if os.getpid() != self._pid or self._conn.closed:
            return
        name, fields = self.subscription_name, _fields(self.subscription_name, self.fence)
        try:
            # The end of a connection is noticed by the server a moment later; its answer to a statement is not late.
            key = subscription_lock(self._schema, name)
            Pipeline(self._conn, RELEASE_SECONDS).fetch(sql("locks", "unlock"), [key.to_bytes(8, "big", signed=True)])
        except psycopg.Error as error:
            _log.debug("the session of %r is lost: %s", name, error, extra=fields)
        finally:
            self._conn.close()
        _log.info("%r is released, with fence %d", name, self.fence, extra=fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Checkpoint:
    """The position up to which the owner of a name has processed its source."""

    def __init__(self, conn: Connection[Any], name: str, fence: Fence, schema: str) -> None:
        self._conn = conn
        self._pid = os.getpid()
        self._name = name
        self._fence = fence
        self._schema = schema

    def load(self) -> int | None:
        """Returns the last committed position, of any owner, or None.

        Raises CoordinationError, and UsageError in a forked child.
        """
        row = self._execute(self._conn, sql("subscriptions", "checkpoint"), [self._name])
        return row[1] if row else None

    def save(self, position: int, conn: Connection[Any] | None = None) -> None:
        """Saves `position` in the current transaction of `conn`, or in its own without a `conn`.

        A position never goes back: a smaller one changes nothing. Raises Fenced if the name has been acquired again
        since; the caller must then roll back the transaction. Raises CoordinationError, and UsageError in a forked
        child.
        """
        statement = sql("subscriptions", "save", schema=self._schema)
        row = self._execute(
            conn or self._conn, statement, [self._name, self._fence.number, position, self._fence.fence_id, None]
        )
        if not (row and row[0]):
            message = f"{self._name!r} has been acquired by another owner; position {position} was not saved"
            _log.warning("%s", message, extra=_fields(self._name, self._fence.number))
            raise Fenced(
                message,
                hint="roll back, and acquire the name again to continue from its checkpoint",
            )

    def _execute(self, conn: Connection[Any], text: str, values: list[Any]) -> tuple[Any, ...] | None:
        require_process(self._pid, f"the ownership of {self._name!r}")
        try:
            # The caller's connection keeps its cursor and row factories: both are chosen for this one cursor.
            return RawCursor(conn, row_factory=tuple_row).execute(text, values).fetchone()
        except psycopg.OperationalError as error:
            raise CoordinationError(translate(error).message) from error
        except psycopg.Error as error:
            raise translate(error) from error


def list_locks(conn: Connection[Any]) -> list[dict[str, Any]]:
    """Returns the sessions that hold or wait for a lock of this schema, holders first."""
    return conn.cursor(row_factory=dict_row).execute(sql("locks", "list")).fetchall()


def holder_of(conn: Connection[Any], schema: str, name: str) -> LockHolder:
    """Returns the session that holds a lock. Raises ConditionFalse if it is free."""
    holder = lock_holder(conn, subscription_lock(schema, name))
    if holder is None:
        raise ConditionFalse(f"lock {name!r} is free")
    return holder


def break_lock(conn: Connection[Any], schema: str, name: str) -> LockHolder:
    """Terminates the session that holds a lock, which releases it; returns that session.

    Raises ConditionFalse if the lock is free.
    """
    holder = holder_of(conn, schema, name)
    # By pid: if the lock has changed hands since, the former holder's session ends and the lock stays held.
    if not conn.execute(sql("locks", "end_session"), [holder.pid]).fetchone():
        raise Busy(
            f"{name!r} is held by {holder}, whose commit waits for a synchronous standby",
            hint="once the standby is back, the session ends by itself or can be ended",
        )
    return holder
