"""Migrations: applying the missing ones, and comparing the applied ones with the files of this program.

**Protocol.** A run takes a session advisory lock, so that runs that are started at the same time go one after the
other; a run that waits reports which session holds the lock. Under the lock it reads the ledger, refuses to go on if an
applied migration no longer matches its file, and applies the missing ones in order. Each is one transaction: first its
ledger row, then its statements, then their duration. So a crash leaves either the migration and its row, or neither.

**Files.** `sql/migrations/NNNN_<noun>.sql`, applied in the order of their numbers. The first line says whether an
older program can go on working beside the migration (`-- breaking: no`) or not (`-- breaking: yes`). A released file
never changes: its SHA-256 is in every ledger.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, Connection

from pgcoord_cli.core.database.advisory_keys import LockHolder, lock_holder, lock_key
from pgcoord_cli.db.sqlfiles import sql, sql_root
from pgcoord_cli.errors import Busy, MigrationEdited, PermissionDenied, SchemaMissing, SchemaUnknown, UsageError
from pgcoord_cli.settings import Settings

_FILE_NAME = re.compile(r"(\d{4})_(\w+)\.sql")


class Migration(NamedTuple):
    """One migration file of this program."""

    version: int
    name: str
    checksum: str
    breaking: bool
    text: str


class LedgerRow(NamedTuple):
    """One migration that has been applied to a schema. `execution_ms`: how long it took; None for psql scripts."""

    version: int
    name: str
    checksum: str
    applied_at: datetime
    applied_by: str
    execution_ms: int | None
    breaking: bool


class MigrationState(NamedTuple):
    """A migration compared between files and ledger.

    `state` is applied, pending, edited (the checksums differ), or unknown and breaking (in the ledger only).
    """

    version: int
    name: str
    state: str
    applied_at: datetime | None
    applied_by: str | None
    execution_ms: int | None


@cache
def migration_files() -> tuple[Migration, ...]:
    """Returns the migrations of this program, oldest first."""
    found = []
    for path in sorted((sql_root() / "migrations").iterdir()):
        if match := _FILE_NAME.fullmatch(path.name):
            text = path.read_text(encoding="utf-8")
            # Of the decoded text, so that line endings do not change the checksum.
            digest = hashlib.sha256(text.encode()).hexdigest()
            breaking = text.startswith("-- breaking: yes\n")
            found.append(Migration(int(match[1]), match[2], digest, breaking, text))
    return tuple(found)


def read_ledger(conn: Connection[Any]) -> list[LedgerRow]:
    """Returns the migrations that have been applied to the session's schema, oldest first."""
    return [LedgerRow(*row) for row in conn.execute(sql("migrations", "read_ledger"))]


async def read_ledger_async(conn: AsyncConnection[Any]) -> list[LedgerRow]:
    """Does the same for asyncio."""
    cursor = await conn.execute(sql("migrations", "read_ledger"))
    return [LedgerRow(*row) for row in await cursor.fetchall()]


def check_ledger(schema: str, ledger: Sequence[LedgerRow]) -> None:
    """Raises SchemaMissing or SchemaUnknown unless this program can work on a schema with this ledger. Pure."""
    states = compare(ledger)
    # First, because upgrading pgcoord is the cure even if migrations of this program are missing too.
    if breaking := [f"{state.version:04}_{state.name}" for state in states if state.state == "breaking"]:
        raise SchemaUnknown(
            f"schema {schema!r} has the breaking migration {breaking[0]}, which this version of pgcoord does not know",
            hint="it was applied by a newer version: upgrade pgcoord on this machine",
        )
    if pending := [state for state in states if state.state == "pending"]:
        raise SchemaMissing(
            f"schema {schema!r} lacks {len(pending)} migration(s), from {pending[0].version:04}_{pending[0].name} on",
            hint=f"bring it up to date with: {migrate_command(schema)}",
        )


def migrate_command(schema: str) -> str:
    """Returns the shell command that creates a schema or brings it up to date."""
    return "pgcoord migrate up" + ("" if schema == Settings.schema else f" --schema {schema}")


def compare(ledger: Sequence[LedgerRow]) -> list[MigrationState]:
    """Compares the files with a ledger; returns every migration of either, oldest first. Pure."""
    applied = {row.version: row for row in ledger}
    files = {migration.version: migration for migration in migration_files()}
    return [_state(files.get(version), applied.get(version)) for version in sorted(files.keys() | applied.keys())]


def _state(file: Migration | None, row: LedgerRow | None) -> MigrationState:
    if row is None:
        assert file is not None
        return MigrationState(file.version, file.name, "pending", None, None, None)
    if file is None:
        state = "breaking" if row.breaking else "unknown"
    else:
        state = "applied" if file.checksum == row.checksum else "edited"
    return MigrationState(row.version, row.name, state, row.applied_at, row.applied_by, row.execution_ms)


def states(conn: Connection[Any], *, has_ledger: bool) -> list[MigrationState]:
    """Returns the state of every migration of the session's schema, oldest first. Only reads."""
    return compare(read_ledger(conn) if has_ledger else [])


def plan(current: Sequence[MigrationState], to: int | None) -> list[Migration]:
    """Returns the migrations to apply, up to version `to`, in order. Pure.

    Raises UsageError if there is no such version, and as `verify`.
    """
    _require_known(to)
    # No migration may follow one that differs from its file: it was written for the schema that the file makes.
    verify(current)
    pending = {state.version for state in current if state.state == "pending"}
    return [m for m in migration_files() if m.version in pending and (to is None or m.version <= to)]


def _require_known(to: int | None) -> None:
    known = [migration.version for migration in migration_files()]
    if to is not None and to not in known:
        raise UsageError(f"--to: there is no migration {to}", hint=f"known: {', '.join(map(str, known))}")


def verify(current: Sequence[MigrationState]) -> None:
    """Raises MigrationEdited or SchemaUnknown if an applied migration is edited or breaking. Pure."""
    for state in current:
        label = f"{state.version:04}_{state.name}"
        if state.state == "edited":
            raise MigrationEdited(
                f"migration {label} was edited after it was applied: the checksums of file and ledger differ",
                hint="restore the released file and put the change into a new migration",
            )
        if state.state == "breaking":
            raise SchemaUnknown(
                f"this version of pgcoord does not know the breaking migration {label}", hint="upgrade pgcoord"
            )


@contextmanager
def migration_lock(
    conn: Connection[Any], schema: str, lock_timeout: float, on_wait: Callable[[LockHolder], None]
) -> Iterator[None]:
    """Holds the migration lock of a schema within the block. Raises Busy after `lock_timeout` seconds.

    If another session holds the lock, calls `on_wait` with it once before waiting.
    """
    key = lock_key(schema, "migrate")
    _take_lock(conn, key, lock_timeout, on_wait)
    try:
        yield
    finally:
        if not conn.closed:  # a lost connection has released the lock
            conn.execute(sql("migrations", "unlock"), [key])


def _take_lock(conn: Connection[Any], key: int, lock_timeout: float, on_wait: Callable[[LockHolder], None]) -> None:
    row = conn.execute(sql("migrations", "try_lock"), [key]).fetchone()
    if row and row[0]:
        return
    if holder := lock_holder(conn, key):
        on_wait(holder)
    # An interrupt closes the connection without cancelling the statement, and the session would wait on for the lock.
    with suppress(psycopg.errors.InvalidParameterValue):  # the server's operating system cannot report it
        conn.execute(sql("locks", "check_client"))
    try:
        # The timeout is the transaction's, so that later statements keep their own; the lock is the session's.
        with conn.transaction():
            conn.execute("SELECT set_config('lock_timeout', $1, true)", [f"{max(1, round(lock_timeout * 1000))}"])
            conn.execute(sql("migrations", "wait_for_lock"), [key])
    except psycopg.errors.LockNotAvailable:
        # Another run may hold the lock by now.
        holder = lock_holder(conn, key) or holder
        raise Busy(
            f"another migration run holds the lock: {holder}", hint="wait for it to end, or raise --lock-timeout"
        ) from None
    conn.execute("RESET client_connection_check_interval")  # no commit may be given up because its client is gone


def apply(
    conn: Connection[Any], schema: str, to: int | None, on_applied: Callable[[Migration], None]
) -> list[Migration]:
    """Applies the missing migrations up to version `to`, and returns them. To be called within `migration_lock`.

    Calls `on_applied` after each. Raises as `plan`, and psycopg's errors.
    """
    _require_known(to)  # before the schema is created
    ensure_ledger(conn, schema)
    # Read under the lock, so that the plan contains nothing that another run has applied meanwhile.
    todo = plan(states(conn, has_ledger=True), to)
    if todo and (stranger := conn.execute(sql("migrations", "not_owner"), [schema]).fetchone()):
        raise PermissionDenied(stranger[0], hint=stranger[1])
    for migration in todo:
        # One transaction, with the ledger row first: a run without the lock would block on the row's key, and fail,
        # instead of applying the migration a second time.
        with conn.transaction():
            conn.execute(
                sql("migrations", "record_migration"),
                [migration.version, migration.name, migration.checksum, migration.breaking],
            )
            _run_script(conn, migration.text)
            conn.execute(sql("migrations", "record_duration"), [migration.version])
        on_applied(migration)
    return todo


def ensure_ledger(conn: Connection[Any], schema: str) -> None:
    """Creates the schema and its ledger if they are missing. Raises PermissionDenied, which names the lacking right."""
    # Looked for first, because CREATE … IF NOT EXISTS would ask for the right to create even where nothing is missing.
    if conn.execute(sql("migrations", "find_ledger"), [schema]).fetchone():
        return
    if lacking := conn.execute(sql("migrations", "lacking_right"), [schema]).fetchone():
        raise PermissionDenied(lacking[0], hint=f"as {lacking[1]} or a superuser: {lacking[2]}")
    missing = conn.execute(sql("migrations", "schema_to_create"), [schema]).fetchone()
    with conn.transaction():
        if missing:
            conn.execute(missing[0])
        conn.execute(sql("migrations", "create_ledger"))


def _run_script(conn: Connection[Any], text: str) -> None:
    # A ClientCursor without parameters uses the simple protocol, which takes several statements in one message.
    psycopg.ClientCursor(conn).execute(text)


def script(schema: str, migrations: Sequence[Migration]) -> str:
    """Returns what `apply` does as a psql script that stops at the first error, for DDL that is run by hand."""
    head = (
        sql("migrations", "create_schema", schema=schema),
        sql("migrations", "choose_schema", schema=schema),
        sql("migrations", "create_ledger"),
    )
    parts = [f"{statement};\n" for statement in head] + [_script_of(migration) for migration in migrations]
    return "\\set ON_ERROR_STOP on\n" + "".join(parts)


def _script_of(migration: Migration) -> str:
    # psql has no $1 parameters. The values need no escaping: numbers, a file name of \w characters and a digest.
    values = (str(migration.version), f"'{migration.name}'", f"'{migration.checksum}'", str(migration.breaking).lower())
    row = str(sql("migrations", "record_migration"))
    for number, value in enumerate(values, start=1):
        row = row.replace(f"${number}", value)
    return f"\nBEGIN;\n{row};\n{migration.text}COMMIT;\n"
