"""Migration runs that are concurrent, interrupted or killed: each migration is applied in full or not at all."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.database.advisory_keys import lock_key
from pgcoord_cli.core.database.migrations import migration_files
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

if TYPE_CHECKING:
    from tests.conftest import StartProgram

VERSIONS = [migration.version for migration in migration_files()]

WAITING_RUNS = """
    SELECT count(*) FROM pg_locks AS lock JOIN pg_stat_activity AS activity USING (pid)
     WHERE lock.locktype = 'advisory' AND NOT lock.granted AND activity.application_name = 'pgcoord/migrate'
       AND activity.datname = current_database()
"""

IN_THE_MIDDLE = """
    SELECT pid FROM pg_stat_activity
     WHERE application_name = 'pgcoord/migrate' AND datname = current_database()
       AND wait_event_type = 'Lock' AND query LIKE '-- breaking:%'
"""
"""Sessions that wait for a lock while they run the text of a migration."""


@pytest.fixture
def start(start_program: StartProgram, empty_settings: Settings) -> StartProgram:
    """Starts `pgcoord migrate up …` in its own process."""
    return partial(start_program, "migrate", "up", settings=empty_settings)


@pytest.fixture
def admin(empty_settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection that observes, with the schema in its search path."""
    with psycopg.connect(empty_settings.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
        yield conn


def versions(conn: psycopg.Connection[Any]) -> list[int]:
    return [row[0] for row in conn.execute("SELECT version FROM schema_migrations ORDER BY version")]


def tables(conn: psycopg.Connection[Any]) -> set[str]:
    return {row[0] for row in conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'pgcoord'")}


def until(conn: psycopg.Connection[Any], question: str, answer: Callable[[list[Any]], bool]) -> list[Any]:
    """Returns the first column of the rows, once `answer` is true of it."""
    deadline = time.monotonic() + TIMEOUT
    while not answer(rows := [row[0] for row in conn.execute(question)]):
        assert time.monotonic() < deadline, f"it stayed at {rows}: {question}"
    return rows


@contextmanager
def migration_two_held_up(settings: Settings) -> Iterator[None]:
    """Blocks migration 2 at its second table, which another transaction is creating, within the block."""
    upgrade(settings, to=1)
    with psycopg.connect(settings.dsn) as other, other.transaction(force_rollback=True):
        other.execute("CREATE TABLE pgcoord.commit_requests ()")
        yield


# Concurrent runs


def test_of_twenty_concurrent_runs_each_succeeds_and_each_migration_is_applied_once(
    empty_settings: Settings, admin: psycopg.Connection[Any]
) -> None:
    together = threading.Barrier(20)

    def run() -> list[int]:
        together.wait(TIMEOUT)
        return [migration.version for migration in upgrade(empty_settings)]

    with ThreadPoolExecutor(20) as pool:
        applied = [result.result() for result in [pool.submit(run) for _ in range(20)]]
    assert sorted(version for versions in applied for version in versions) == VERSIONS
    assert versions(admin) == VERSIONS


def test_processes_that_queue_for_the_lock_all_succeed(admin: psycopg.Connection[Any], start: StartProgram) -> None:
    admin.execute("SELECT pg_advisory_lock(%s)", [lock_key("pgcoord", "migrate")])
    processes = [start() for _ in range(6)]
    until(admin, WAITING_RUNS, lambda rows: rows == [6])
    admin.execute("SELECT pg_advisory_unlock_all()")
    answers = [(*process.communicate(timeout=TIMEOUT), process.returncode) for process in processes]
    assert [code for _, _, code in answers] == [0] * 6
    assert all("waiting for the migration lock held by pid" in err for _, err, _ in answers)
    assert sum("applied 0001_leader" in err for _, err, _ in answers) == 1
    assert sum("schema pgcoord is up to date" in err for _, err, _ in answers) == 5
    assert versions(admin) == VERSIONS


# Interrupted while waiting


@pytest.mark.parametrize(("words", "told"), [((), ""), (("-o", "json"), '"interrupted"')])
def test_ctrl_c_while_waiting_for_the_lock_ends_the_run_with_nothing_written(
    words: tuple[str, ...], told: str, admin: psycopg.Connection[Any], start: StartProgram
) -> None:
    admin.execute("SELECT pg_advisory_lock(%s)", [lock_key("pgcoord", "migrate")])
    process = start(*words)
    until(admin, WAITING_RUNS, lambda rows: rows == [1])
    process.send_signal(signal.SIGINT)
    data, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGINT
    assert told in data
    assert "Traceback" not in err
    assert tables(admin) == set()
    until(admin, WAITING_RUNS, lambda rows: rows == [0])


# Interrupted in a migration


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_signal_in_a_migration_leaves_neither_row_nor_objects(
    number: signal.Signals, code: int, empty_settings: Settings, admin: psycopg.Connection[Any], start: StartProgram
) -> None:
    with migration_two_held_up(empty_settings):
        process = start()
        (pid,) = until(admin, IN_THE_MIDDLE, lambda rows: len(rows) == 1)
        before = tables(admin)
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code
    assert "Traceback" not in err
    # The server ends the session when it next writes to the closed socket; until then it holds the lock.
    until(admin, f"SELECT pid FROM pg_stat_activity WHERE pid = {pid}", lambda rows: not rows)
    assert versions(admin) == [1]
    assert tables(admin) == before
    second = start()
    assert second.wait(TIMEOUT) == 0
    assert versions(admin) == VERSIONS


def test_a_session_terminated_in_a_migration_leaves_neither_row_nor_objects(
    empty_settings: Settings, admin: psycopg.Connection[Any], start: StartProgram
) -> None:
    with migration_two_held_up(empty_settings):
        process = start()
        (pid,) = until(admin, IN_THE_MIDDLE, lambda rows: len(rows) == 1)
        before = tables(admin)
        admin.execute("SELECT pg_terminate_backend(%s, 30000)", [pid])
        _, err = process.communicate(timeout=TIMEOUT)
        assert (versions(admin), tables(admin)) == ([1], before)
    assert process.returncode == 4
    assert err.startswith("error: connection lost: terminating connection due to administrator command\n")
    assert [migration.version for migration in upgrade(empty_settings)] == VERSIONS[1:]


def test_a_server_that_crashes_in_a_migration_restarts_without_row_and_objects(own_server: EmbeddedServer) -> None:
    settings = Settings(dsn=own_server.dsn)
    with ThreadPoolExecutor(1) as elsewhere, psycopg.connect(own_server.dsn, autocommit=True) as admin:
        upgrade(settings, to=1)
        other = psycopg.connect(own_server.dsn)
        other.execute("CREATE TABLE pgcoord.commit_requests ()")
        running = elsewhere.submit(upgrade, settings)
        until(admin, IN_THE_MIDDLE, lambda rows: len(rows) == 1)
        own_server.stop("immediate")
        error = running.exception(TIMEOUT)
        other.close()
    assert getattr(error, "exit_code", None) == 4, error
    own_server.start()
    with psycopg.connect(own_server.dsn, options="-c search_path=pgcoord") as conn:
        assert versions(conn) == [1]
        assert tables(conn) == {"leader_history", "leader_lease", "schema_migrations"}
    assert [migration.version for migration in upgrade(settings)] == VERSIONS[1:]
