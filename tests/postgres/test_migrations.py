"""Applying migrations: the ledger, the lock between runs, and the state after a failure."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgcoord_cli.core.database import migrations
from pgcoord_cli.core.database.advisory_keys import LockHolder, lock_key
from pgcoord_cli.core.database.migrations import LedgerRow, migration_files
from pgcoord_cli.core.database.session import migration_session
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.errors import (
    Busy,
    MigrationEdited,
    PermissionDenied,
    PgcoordError,
    SchemaMissing,
    SchemaUnknown,
    UsageError,
)
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

VERSIONS = [migration.version for migration in migration_files()]

InSchema = Callable[[Settings, str], Settings]


def connect(settings: Settings, **options: Any) -> psycopg.Connection[Any]:
    """Opens an autocommit connection that is not pgcoord's."""
    conn = psycopg.connect(settings.dsn, autocommit=True, **options)
    conn.execute(f"SET search_path = {settings.schema}")
    return conn


def versions(conn: psycopg.Connection[Any]) -> list[int]:
    return [row[0] for row in conn.execute("SELECT version FROM schema_migrations ORDER BY version")]


def until(conn: psycopg.Connection[Any], question: str, *arguments: Any) -> None:
    """Waits until the query `question` returns true."""
    deadline = time.monotonic() + TIMEOUT
    while not conn.execute(question, arguments).fetchone()[0]:  # type: ignore[index]
        assert time.monotonic() < deadline, f"never true: {question}"


@contextmanager
def migrating_elsewhere(settings: Settings, application: str = "deploy") -> Iterator[psycopg.Connection[Any]]:
    """Holds the migration lock of this schema in another session within the block."""
    with psycopg.connect(settings.dsn, autocommit=True, application_name=application) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [lock_key(settings.schema, "migrate")])
        yield other


@pytest.fixture
def role(empty_settings: Settings) -> Settings:
    """The settings of a role that may log in to the empty database and nothing else."""
    name = f"role_{uuid.uuid4().hex[:8]}"
    with connect(empty_settings) as conn:
        conn.execute(f"CREATE ROLE {name} LOGIN")
    return replace(empty_settings, dsn=make_conninfo(empty_settings.dsn, user=name))


# The ledger


def test_i12_each_migration_is_in_the_ledger_once_dated_by_the_server(empty_settings: Settings) -> None:
    with connect(empty_settings) as conn:
        before = conn.execute("SELECT clock_timestamp()").fetchone()
        applied = upgrade(empty_settings)
        again = upgrade(empty_settings)
        rows = conn.execute("SELECT * FROM schema_migrations ORDER BY version").fetchall()
        after = conn.execute("SELECT clock_timestamp()").fetchone()
    assert [migration.version for migration in applied] == VERSIONS
    assert again == []
    assert before
    assert after
    ledger = [LedgerRow(*row) for row in rows]
    assert [(row.version, row.name, row.checksum, row.breaking) for row in ledger] == [
        (file.version, file.name, file.checksum, file.breaking) for file in migration_files()
    ]
    assert all(before[0] <= row.applied_at <= after[0] for row in ledger)
    assert all(row.applied_by == "postgres" and row.execution_ms is not None for row in ledger)


def test_migrating_stops_at_the_given_version_and_continues_from_it(empty_settings: Settings) -> None:
    assert [migration.version for migration in upgrade(empty_settings, to=1)] == [1]
    assert upgrade(empty_settings, to=1) == []
    assert [migration.version for migration in upgrade(empty_settings)] == VERSIONS[1:]


def test_versions_are_dense_and_each_file_says_whether_it_is_breaking() -> None:
    assert list(range(1, len(VERSIONS) + 1)) == VERSIONS
    for migration in migration_files():
        assert migration.text.startswith(("-- breaking: no\n", "-- breaking: yes\n")), migration.name


def row_of(version: int, **changes: Any) -> LedgerRow:
    """Returns the ledger row of a migration of this program, or of one that it does not have."""
    known = {migration.version: migration for migration in migration_files()}
    name, checksum = (known[version].name, known[version].checksum) if version in known else ("new", "x")
    row = LedgerRow(version, name, checksum, datetime.now(UTC), "postgres", 1, False)
    return row._replace(**changes)


def test_files_and_ledger_are_compared_by_checksum_and_version() -> None:
    ledger = [row_of(1), row_of(2, checksum="edited"), row_of(9001), row_of(9002, breaking=True)]
    states = {state.version: state.state for state in migrations.compare(ledger)}
    assert states == dict.fromkeys(VERSIONS, "pending") | {
        1: "applied", 2: "edited", 9001: "unknown", 9002: "breaking",
    }  # fmt: skip


def test_i14_a_ledger_with_missing_or_unknown_breaking_migrations_is_refused() -> None:
    complete = [row_of(version) for version in VERSIONS]
    migrations.check_ledger("pgcoord", complete)
    migrations.check_ledger("pgcoord", [*complete, row_of(9001)])
    with pytest.raises(SchemaUnknown, match="9001_new"):
        migrations.check_ledger("pgcoord", [*complete, row_of(9001, breaking=True)])
    with pytest.raises(SchemaMissing, match="lacks 1 migration") as lacking:
        migrations.check_ledger("staging", complete[:-1])
    assert lacking.value.hint == "bring it up to date with: pgcoord migrate up --schema staging"


def test_i14_nothing_is_applied_over_an_edited_or_a_breaking_migration(empty_settings: Settings) -> None:
    upgrade(empty_settings, to=1)
    with connect(empty_settings) as conn:
        conn.execute("INSERT INTO schema_migrations VALUES (9001, 'new', 'x', now(), 'x', 1, true)")
        with pytest.raises(SchemaUnknown, match="9001_new"):
            upgrade(empty_settings)
        conn.execute("DELETE FROM schema_migrations WHERE version = 9001")
        conn.execute("UPDATE schema_migrations SET checksum = 'edited'")
        with pytest.raises(MigrationEdited, match="0001_leader"):
            upgrade(empty_settings)
        assert versions(conn) == [1]


@pytest.mark.parametrize("to", [0, -1, 9001])
def test_an_unknown_version_to_stop_at_is_refused(to: int) -> None:
    with pytest.raises(UsageError, match=f"--to: there is no migration {to}"):
        migrations.plan(migrations.compare([]), to)


# Failure


def test_a_failed_migration_leaves_neither_row_nor_objects(empty_settings: Settings) -> None:
    upgrade(empty_settings, to=1)
    with connect(empty_settings) as conn:
        conn.execute("CREATE TABLE commit_requests ()")
        with pytest.raises(PgcoordError, match='relation "commit_requests" already exists'):
            upgrade(empty_settings)
        assert versions(conn) == [1]
        assert conn.execute("SELECT to_regclass('kv')").fetchone() == (None,)
        conn.execute("DROP TABLE commit_requests")
        upgrade(empty_settings)
        assert versions(conn) == VERSIONS


def granted(refused: pytest.ExceptionInfo[PermissionDenied]) -> str:
    """Returns the GRANT statement at the end of a hint."""
    assert refused.value.hint
    return refused.value.hint[refused.value.hint.index("GRANT") :]


def test_the_grants_that_are_named_let_a_role_migrate(empty_settings: Settings, role: Settings) -> None:
    with connect(empty_settings) as conn:
        with pytest.raises(PermissionDenied, match="may not create schema pgcoord") as refused:
            upgrade(role)
        conn.execute(granted(refused))
        assert [migration.version for migration in upgrade(role)] == VERSIONS


def test_the_grants_on_a_schema_of_another_role_let_a_role_migrate(empty_settings: Settings, role: Settings) -> None:
    with connect(empty_settings) as conn:
        conn.execute(f"CREATE SCHEMA {role.schema}")
        with pytest.raises(PermissionDenied, match="permission denied for schema pgcoord") as refused:
            upgrade(role)
        conn.execute(granted(refused).partition(" TO ")[0] + f" TO {conninfo_to_dict(role.dsn)['user']}")
        conn.execute(f"REVOKE CREATE ON SCHEMA {role.schema} FROM {conninfo_to_dict(role.dsn)['user']}")
        with pytest.raises(
            PermissionDenied, match="which belongs to postgres: it lacks CREATE on the schema"
        ) as refused:
            upgrade(role)
        conn.execute(granted(refused))
        assert [migration.version for migration in upgrade(role)] == VERSIONS


def test_only_a_member_of_the_owner_can_migrate_further(empty_settings: Settings, role: Settings) -> None:
    upgrade(empty_settings, to=2)
    member = conninfo_to_dict(role.dsn)["user"]
    with connect(empty_settings) as conn:
        conn.execute(f"GRANT USAGE, CREATE ON SCHEMA {role.schema} TO {member}")
        conn.execute(f"GRANT SELECT ON schema_migrations TO {member}")
        with pytest.raises(PermissionDenied, match="whose tables belong to postgres") as refused:
            upgrade(role)
        conn.execute(granted(refused))
        assert [migration.version for migration in upgrade(role)] == VERSIONS[2:]


def test_a_role_can_migrate_a_schema_that_was_created_for_it(empty_settings: Settings, role: Settings) -> None:
    with pytest.raises(PermissionDenied, match="it lacks CREATE on database"):
        upgrade(role)
    with connect(empty_settings) as conn:
        owner = psycopg.conninfo.conninfo_to_dict(role.dsn)["user"]
        conn.execute(f"CREATE SCHEMA {role.schema} AUTHORIZATION {owner}")
        assert [migration.version for migration in upgrade(role)] == VERSIONS
        assert versions(conn) == VERSIONS


# The lock


def test_the_key_of_the_lock_is_the_same_in_every_release() -> None:
    assert lock_key("pgcoord", "migrate") == -9073367998569989524
    assert lock_key("staging", "migrate") != lock_key("pgcoord", "migrate") != lock_key("pgcoord", "election")


def test_waiting_names_the_holder_and_ends_at_the_lock_timeout(empty_settings: Settings) -> None:
    holders: list[LockHolder] = []
    with migrating_elsewhere(empty_settings, "deploy job 7") as other:
        pid = other.info.backend_pid
        with pytest.raises(Busy) as busy:
            upgrade(empty_settings, lock_timeout=0.05, on_wait=holders.append)
    assert [(holder.pid, holder.application, holder.client) for holder in holders] == [(pid, "deploy job 7", "local")]
    assert busy.value.message == f"another migration run holds the lock: {holders[0]}"
    assert f"pid {pid} (deploy job 7, local) since 20" in busy.value.message
    with connect(empty_settings) as conn:
        assert conn.execute("SELECT to_regnamespace('pgcoord')").fetchone() == (None,)


def test_a_holder_is_described_as_far_as_the_role_may_see_it(empty_settings: Settings, role: Settings) -> None:
    holders: list[LockHolder] = []
    with migrating_elsewhere(empty_settings, "deploy job 7") as other:
        pid = other.info.backend_pid
        with pytest.raises(Busy):
            upgrade(role, lock_timeout=0.05, on_wait=holders.append)
    assert [str(holder) for holder in holders] == [f"pid {pid} (deploy job 7)"]


def test_a_run_that_waited_continues_with_its_own_lock_timeout(empty_settings: Settings) -> None:
    def wait_and_look() -> Any:
        with (
            migration_session(empty_settings, read_only=False) as (conn, _),
            migrations.migration_lock(conn, "pgcoord", TIMEOUT, lambda _: None),
        ):
            return conn.execute("SHOW lock_timeout").fetchone()

    with ThreadPoolExecutor(1) as elsewhere, migrating_elsewhere(empty_settings) as other:
        waiting = elsewhere.submit(wait_and_look)
        until(other, "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)")
        other.execute("SELECT pg_advisory_unlock_all()")
        assert waiting.result(TIMEOUT) == ("10s",)


def test_the_lock_is_released(empty_settings: Settings) -> None:
    with migration_session(empty_settings, read_only=False) as (conn, _):
        for _ in range(2):
            with migrations.migration_lock(conn, "pgcoord", 1, lambda _: None):
                pass
        assert conn.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


def test_two_schemas_in_one_database_are_independent(empty_settings: Settings, in_schema: InSchema) -> None:
    first, second = in_schema(empty_settings, "first"), in_schema(empty_settings, "second")
    with migrating_elsewhere(first):
        upgrade(second, lock_timeout=0.05)
    upgrade(first, to=1)
    with connect(first) as one, connect(second) as two:
        one.execute("UPDATE schema_migrations SET checksum = 'edited'")
        two.execute("INSERT INTO kv VALUES ('key', 'value')")
        assert versions(one) == [1]
        assert versions(two) == VERSIONS
        assert upgrade(second) == []
        # The function of each works on the tables of its own schema, whatever the caller's search path is.
        bodies = one.execute("SELECT proconfig FROM pg_proc WHERE proname = 'settle_commits'").fetchall()
        assert bodies == [(["search_path=second, pg_temp"],)]


# Reading only


def test_a_read_only_session_is_one_read_only_transaction(empty_settings: Settings) -> None:
    upgrade(empty_settings)
    with migration_session(empty_settings, read_only=True) as (conn, _):
        assert conn.execute("SHOW transaction_read_only").fetchone() == ("on",)
        assert conn.info.transaction_status.name == "INTRANS"
    with (
        pytest.raises(PgcoordError, match="read-only transaction"),
        migration_session(empty_settings, read_only=True) as (conn, _),
    ):
        migrations.ensure_ledger(conn, "another")
