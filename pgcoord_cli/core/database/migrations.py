"""Bringing a schema up to date, and knowing whether it is.

**Protocol.** A run takes a session advisory lock, so that any number of runs started at once go one after the
other; whoever waits is told who is ahead. Under the lock it reads the ledger, refuses to go on when an applied
migration no longer matches its file, and applies the missing ones in order. Each goes in a transaction of its own:
first its ledger row, then its statements, then how long they took. A crash therefore leaves either the migration
and its row, or neither.

**Files.** `sql/migrations/NNNN_<noun>.sql`, applied in the order of their numbers. The first line says whether an
older program may go on working beside it (`-- breaking: no`) or not (`-- breaking: yes`). A released file never
changes: its SHA-256 is in every ledger.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, Connection

from pgcoord_cli.core.database.advisory_keys import LockHolder, lock_holder, lock_key
from pgcoord_cli.db.sqlfiles import sql, sql_root
from pgcoord_cli.errors import Busy, MigrationEdited, SchemaMissing, SchemaUnknown, UsageError
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
    """One migration that a schema has had; `execution_ms` is in milliseconds."""

    version: int
    name: str
    checksum: str
    applied_at: datetime
    applied_by: str
    execution_ms: int | None
    breaking: bool


class MigrationState(NamedTuple):
    """A migration as file and ledger together see it; state is applied, pending, edited, unknown or breaking."""

    version: int
    name: str
    state: str
    applied_at: datetime | None
    applied_by: str | None
    execution_ms: int | None


@cache
def migration_files() -> tuple[Migration, ...]:
    """Every migration that this program carries, oldest first."""
    found = []
    for path in sorted((sql_root() / "migrations").iterdir()):
        if match := _FILE_NAME.fullmatch(path.name):
            text = path.read_text(encoding="utf-8")
            digest = hashlib.sha256(text.encode()).hexdigest()
            breaking = text.startswith("-- breaking: yes\n")
            found.append(Migration(int(match[1]), match[2], digest, breaking, text))
    return tuple(found)


def read_ledger(conn: Connection[Any]) -> list[LedgerRow]:
    """Every migration that the session's schema has had, oldest first."""
    return [LedgerRow(*row) for row in conn.execute(sql("migrations", "read_ledger"))]


async def read_ledger_async(conn: AsyncConnection[Any]) -> list[LedgerRow]:
    """The same for asyncio."""
    cursor = await conn.execute(sql("migrations", "read_ledger"))
    return [LedgerRow(*row) for row in await cursor.fetchall()]


def check_ledger(schema: str, ledger: Sequence[LedgerRow]) -> None:
    """SchemaMissing or SchemaUnknown unless this program can work on a schema with this ledger."""
    states = compare(ledger)
    if breaking := [f"{state.version:04}_{state.name}" for state in states if state.state == "breaking"]:
        raise SchemaUnknown(
            f"schema {schema!r} has migration {breaking[0]}, which this pgcoord does not know",
            hint="a newer pgcoord migrated it in a way that older ones cannot serve: upgrade pgcoord",
        )
    if pending := [state for state in states if state.state == "pending"]:
        raise SchemaMissing(
            f"schema {schema!r} lacks {len(pending)} migration(s), from {pending[0].version:04}_{pending[0].name} on",
            hint=f"bring it up to date with: {mending_command(schema)}",
        )


def mending_command(schema: str) -> str:
    """What makes a schema or brings it up to date, as a person types it."""
    return "pgcoord migrate up" + ("" if schema == Settings.schema else f" --schema {schema}")


def compare(ledger: Sequence[LedgerRow]) -> list[MigrationState]:
    """Files and ledger side by side, oldest first. Pure."""
    applied = {row.version: row for row in ledger}
    files = {migration.version: migration for migration in migration_files()}
    return [_state(files.get(version), applied.get(version)) for version in sorted(files.keys() | applied.keys())]


def _state(file: Migration | None, row: LedgerRow | None) -> MigrationState:
    if row is None:
        assert file is not None
        return MigrationState(file.version, file.name, "pending", None, None, None)
    if file is None:
        word = "breaking" if row.breaking else "unknown"
    else:
        word = "applied" if file.checksum == row.checksum else "edited"
    return MigrationState(row.version, row.name, word, row.applied_at, row.applied_by, row.execution_ms)


def states(conn: Connection[Any], *, has_ledger: bool) -> list[MigrationState]:
    """What `migrate status` shows. Reads only."""
    return compare(read_ledger(conn) if has_ledger else [])


def plan(current: Sequence[MigrationState], to: int | None) -> list[Migration]:
    """The migrations to apply, in order; raises MigrationEdited, SchemaUnknown, UsageError. Pure."""
    _require_known(to)
    verify(current)
    pending = {state.version for state in current if state.state == "pending"}
    return [m for m in migration_files() if m.version in pending and (to is None or m.version <= to)]


def _require_known(to: int | None) -> None:
    known = [migration.version for migration in migration_files()]
    if to is not None and to not in known:
        raise UsageError(f"--to: there is no migration {to}", hint=f"known: {', '.join(map(str, known))}")


def verify(current: Sequence[MigrationState]) -> None:
    """MigrationEdited or SchemaUnknown when what was applied is not what this program carries."""
    for state in current:
        label = f"{state.version:04}_{state.name}"
        if state.state == "edited":
            raise MigrationEdited(
                f"migration {label} was edited after it was applied: its checksum differs",
                hint="restore the released file and put the change into a new migration",
            )
        if state.state == "breaking":
            raise SchemaUnknown(f"this pgcoord does not know migration {label}", hint="upgrade pgcoord")


@contextmanager
def migration_lock(
    conn: Connection[Any], schema: str, lock_timeout: float, waiting: Callable[[LockHolder], None]
) -> Iterator[None]:
    """Holds the lock that keeps runs apart; `waiting` hears who is ahead. Busy after `lock_timeout` seconds."""
    key = lock_key(schema, "migrate")
    _take_lock(conn, key, lock_timeout, waiting)
    try:
        yield
    finally:
        if not conn.closed:
            conn.execute(sql("migrations", "unlock"), [key])


def _take_lock(conn: Connection[Any], key: int, lock_timeout: float, waiting: Callable[[LockHolder], None]) -> None:
    row = conn.execute(sql("migrations", "try_lock"), [key]).fetchone()
    if row and row[0]:
        return
    if holder := lock_holder(conn, key):
        waiting(holder)
    try:
        with conn.transaction():  # for this wait alone; the lock itself is the session's and outlives the transaction
            conn.execute("SELECT set_config('lock_timeout', $1, true)", [f"{max(1, round(lock_timeout * 1000))}"])
            conn.execute(sql("migrations", "wait_for_lock"), [key])
    except psycopg.errors.LockNotAvailable:
        holder = lock_holder(conn, key) or holder
        raise Busy(
            f"another migration run holds the lock: {holder}", hint="wait for it, or raise --lock-timeout"
        ) from None


def apply(conn: Connection[Any], schema: str, to: int | None, applied: Callable[[Migration], None]) -> list[Migration]:
    """Applies what is missing, under `migration_lock`; `applied` hears of each. Returns what it applied."""
    _require_known(to)  # before anything is made
    ensure_ledger(conn, schema)
    todo = plan(states(conn, has_ledger=True), to)
    for migration in todo:
        with conn.transaction():
            conn.execute(
                sql("migrations", "record_migration"),
                [migration.version, migration.name, migration.checksum, migration.breaking],
            )
            _run_script(conn, migration.text)
            conn.execute(sql("migrations", "record_duration"), [migration.version])
        applied(migration)
    return todo


def ensure_ledger(conn: Connection[Any], schema: str) -> None:
    """Makes the schema and its ledger where they are missing; where they are not, nobody needs the right to."""
    if conn.execute(sql("migrations", "find_ledger"), [schema]).fetchone():
        return
    missing = conn.execute(sql("migrations", "schema_to_create"), [schema]).fetchone()
    with conn.transaction():
        if missing:
            conn.execute(missing[0])
        conn.execute(sql("migrations", "create_ledger"))


def _run_script(conn: Connection[Any], text: str) -> None:
    # The simple protocol takes many statements at once; libpq is reached directly because cursors do not.
    psycopg.ClientCursor(conn).execute(text)


def script(schema: str, migrations: Sequence[Migration]) -> str:
    """Returns what `apply` does as a psql script, for DDL that is run by hand. The script ends at the first error."""
    head = (
        sql("migrations", "create_schema", schema=schema),
        sql("migrations", "choose_schema", schema=schema),
        sql("migrations", "create_ledger"),
    )
    parts = [f"{statement};\n" for statement in head] + [_script_of(migration) for migration in migrations]
    return "\\set ON_ERROR_STOP on\n" + "".join(parts)


def _script_of(migration: Migration) -> str:
    values = (str(migration.version), f"'{migration.name}'", f"'{migration.checksum}'", str(migration.breaking).lower())
    row = str(sql("migrations", "record_migration"))
    for number, value in enumerate(values, start=1):
        row = row.replace(f"${number}", value)
    return f"\nBEGIN;\n{row};\n{migration.text}COMMIT;\n"
