"""The blocking transaction client: one loop for all threads, interruptions, and what close and fork leave behind."""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from traceback import walk_stack

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import pgcoord_cli
from pgcoord_cli.core.kv import hot_keys
from pgcoord_cli.errors import (
    CommitRefused,
    Conflict,
    ConnectionFailed,
    NoLeader,
    OutcomeUnknown,
    Rejected,
    SchemaMissing,
    TransactionCancelled,
    UsageError,
    UsedDuringCommit,
)
from pgcoord_cli.settings import Settings
from pgcoord_cli.sync import Database, KeySelector, Transaction, Watch, connect
from tests.asking import TIMEOUT, until, value
from tests.postgres.commit_scenarios import Sql, data, needs_leader

THREADS = 8

APPLICATION = "blocking test"

ONE = struct.pack("<Q", 1)


@pytest.fixture
def database(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A client that finds its database by the environment alone."""
    monkeypatch.setenv("PGCOORD_DSN", settings.dsn)
    with connect(application=APPLICATION) as opened:
        yield opened
    assert client_threads() == []


def client_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == f"pgcoord/{APPLICATION}"]


def sessions(sql: Sql) -> int:
    count: int = value(
        sql,
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()",
        f"pgcoord/{APPLICATION}",
    )
    return count


def put(database: Database, **values: bytes) -> int:
    """Commits some keys, each named like its argument."""
    transaction = database.transaction()
    for name, written in values.items():
        transaction.set(name.encode(), written)
    return transaction.commit()


# -- transactions


@needs_leader
def test_a_transaction_reads_and_writes_by_plain_calls(database: Database, sql: Sql) -> None:
    put(database, a=b"1", b=b"2", c=b"3")
    transaction = database.transaction()
    assert transaction.read_version is None
    assert transaction.get(b"a") == b"1"
    assert transaction.read_version == 1
    assert transaction.get_range(b"a", b"c", limit=1, reverse=True) == [(b"b", b"2")]
    assert transaction.get_key(KeySelector.first_greater_than(b"b")) == b"c"
    transaction.set(b"a", b"new")
    transaction.add(b"n", ONE)
    transaction.clear(b"b")
    transaction.set_versionstamped_value(b"v", bytes(10) + struct.pack("<I", 0))
    assert transaction.get(b"a") == b"new"
    assert transaction.commit() == 2
    assert data(sql) == {b"a": b"new", b"c": b"3", b"n": ONE, b"v": transaction.versionstamp}


@needs_leader
def test_conflicts_that_the_caller_adds_count(database: Database) -> None:
    for by_range in (False, True):
        transaction = database.transaction()
        transaction.get(b"other")
        put(database, k=b"1")
        if by_range:
            transaction.add_read_conflict_range(b"a", b"z")
        else:
            transaction.add_read_conflict_key(b"k")
        transaction.set(b"own", b"1")
        with pytest.raises(Conflict):
            transaction.commit()
    reader, writer = database.transaction(), database.transaction()
    reader.get(b"k")
    reader.set(b"own", b"1")
    writer.add_write_conflict_key(b"k")
    writer.commit()
    with pytest.raises(Conflict):
        reader.commit()


@needs_leader
def test_run_runs_the_work_again_until_it_commits_and_returns_its_result(database: Database, sql: Sql) -> None:
    attempts: list[bytes | None] = []

    def work(transaction: Transaction) -> str:
        attempts.append(transaction.get(b"a"))
        if len(attempts) <= 2:
            put(database, a=b"%d" % len(attempts))
        transaction.set(b"a", b"mine")
        return f"attempt {len(attempts)}"

    assert database.run(work) == "attempt 3"
    assert attempts == [None, b"1", b"2"]
    assert data(sql) == {b"a": b"mine"}


@needs_leader
def test_run_raises_the_last_conflict_after_its_retries(database: Database) -> None:
    attempts = []

    def work(transaction: Transaction) -> None:
        attempts.append(transaction.get(b"a"))
        put(database, a=b"other")
        transaction.set(b"a", b"mine")

    with pytest.raises(Conflict):
        database.run(work, retry_limit=2)
    assert len(attempts) == 3


@needs_leader
@pytest.mark.parametrize("error", [LookupError, StopIteration, SystemExit, KeyboardInterrupt])
def test_what_the_work_raises_ends_the_run_and_nothing_is_written(
    database: Database, sql: Sql, error: type[BaseException]
) -> None:
    def work(transaction: Transaction) -> None:
        transaction.set(b"a", b"1")
        raise error

    with pytest.raises(error):
        database.run(work)
    put(database, b=b"2")
    assert data(sql) == {b"b": b"2"}


@needs_leader
def test_the_work_runs_in_the_thread_of_its_caller(database: Database) -> None:
    assert database.run(lambda _: threading.current_thread()) is threading.current_thread()


@needs_leader
def test_a_run_inside_a_run_does_not_wait_for_the_key_that_the_outer_one_holds(
    database: Database, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inner run conflicts with the outer one, which makes the key hot for both, as they are the same work."""
    monkeypatch.setattr(hot_keys, "TICKET_SECONDS", 3600.0)
    outer: list[int] = []
    inner: list[int] = []

    def work(transaction: Transaction) -> None:
        number = int(transaction.get(b"n") or 0)
        if len(inner) == len(outer) < 2:
            outer.append(number)
            database.run(work)
            inner.append(number)
        transaction.set(b"n", b"%d" % (number + 1))

    running = threading.Thread(target=database.run, args=[work], daemon=True)
    running.start()
    running.join(TIMEOUT)
    assert not running.is_alive()
    assert (outer, inner, data(sql)) == ([0, 1], [0, 1], {b"n": b"3"})


def test_what_no_commit_would_accept_is_refused_at_once(database: Database) -> None:
    with pytest.raises(Rejected):
        database.transaction().set(b"key", b"v" * 100_001)


# -- threads


@needs_leader
def test_i1_the_threads_of_a_program_share_one_client(database: Database, sql: Sql) -> None:
    together = Barrier(THREADS)

    def increase(transaction: Transaction) -> None:
        number = int(transaction.get(b"n") or 0)
        transaction.set(b"n", b"%d" % (number + 1))

    def run_ten() -> None:
        together.wait(TIMEOUT)
        for _ in range(10):
            database.run(increase)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(run_ten) for _ in range(THREADS)]:
            done.result()
    assert data(sql) == {b"n": b"%d" % (10 * THREADS)}
    assert len(client_threads()) == 1
    assert sessions(sql) <= 4, "three that run statements, and one that listens"


# -- watches


@needs_leader
def test_a_watch_waits_for_another_value(database: Database) -> None:
    put(database, a=b"1")
    transaction = database.transaction()
    watch = transaction.watch(b"a")
    transaction.commit()
    assert watch.wait(0) is False
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watch.wait)
        put(database, a=b"2")
        assert waiting.result(TIMEOUT) is True
    assert watch.wait() is True


@needs_leader
def test_a_watch_that_is_cancelled_is_an_error_for_its_waiter(database: Database) -> None:
    watch = watched(database)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watch.wait)
        watch.cancel()
        with pytest.raises(ConnectionFailed, match="cancelled"):
            waiting.result(TIMEOUT)


def watched(database: Database) -> Watch:
    transaction = database.transaction()
    watch = transaction.watch(b"a")
    transaction.commit()
    return watch


# -- interruption


@needs_leader
def test_ctrl_c_ends_a_wait_and_leaves_the_client_usable(database: Database) -> None:
    watch = watched(database)
    main = threading.get_ident()

    def interrupt_once_waiting() -> None:
        until(lambda: "wait_for" in {frame.f_code.co_name for frame, _ in walk_stack(sys._current_frames()[main])})
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        interrupting = pool.submit(interrupt_once_waiting)
        with pytest.raises(KeyboardInterrupt):
            watch.wait()
        interrupting.result()
    assert put(database, a=b"1") == 1
    assert watch.wait(TIMEOUT) is True


@needs_leader
def test_ctrl_c_ends_a_commit_that_waits_and_leaves_the_client_usable(
    database: Database, settings: Settings, sql: Sql
) -> None:
    def work(transaction: Transaction) -> None:
        transaction.set(b"a", b"1")

    with psycopg.connect(settings.dsn) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute("LOCK TABLE pgcoord.kv IN ACCESS EXCLUSIVE MODE")
        interrupting = pool.submit(interrupt_once_blocked_by, sql, holder.info.backend_pid)
        with pytest.raises(KeyboardInterrupt):
            database.run(work)
        interrupting.result()
    assert database.run(lambda transaction: transaction.get(b"b")) is None


def interrupt_once_blocked_by(sql: Sql, pid: int) -> None:
    until(lambda: value(sql, "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))", pid))
    os.kill(os.getpid(), signal.SIGINT)


# -- opening and closing


def test_a_database_that_cannot_be_used_is_said_at_once_and_leaves_no_thread(empty_settings: Settings) -> None:
    with pytest.raises(SchemaMissing):
        connect(empty_settings.dsn, application=APPLICATION)
    with pytest.raises(ConnectionFailed) as failed:
        connect(make_conninfo(empty_settings.dsn, host="/nowhere"), application=APPLICATION)
    assert failed.value.hint == "the address comes from dsn; is the server up?"
    with pytest.raises(UsageError, match=r"schema: 'a\.b'"):
        connect(empty_settings.dsn, schema="a.b", application=APPLICATION)
    assert client_threads() == []


def test_a_closed_client_has_no_session_and_refuses_everything(database: Database, sql: Sql) -> None:
    transaction = database.transaction()
    transaction.get(b"a")
    assert sessions(sql)
    database.close()
    database.close()
    until(lambda: not sessions(sql))
    calls: list[Callable[[], object]] = [
        database.transaction,
        lambda: database.run(lambda _: None),
        lambda: transaction.get(b"b"),
        transaction.commit,
    ]
    for call in calls:
        with pytest.raises(ConnectionFailed, match="closed"):
            call()


@needs_leader
def test_close_ends_the_waits_of_other_threads(database: Database) -> None:
    watch = watched(database)
    inside = threading.Event()
    closed = threading.Event()

    def work(transaction: Transaction) -> None:
        inside.set()
        closed.wait(TIMEOUT)
        transaction.get(b"a")

    with ThreadPoolExecutor(2) as pool:
        waiting, running = pool.submit(watch.wait), pool.submit(database.run, work)
        assert inside.wait(TIMEOUT)
        database.close()
        closed.set()
        for call in (waiting, running):
            with pytest.raises(ConnectionFailed):
                call.result(TIMEOUT)


def test_i3_a_commit_that_waits_while_the_client_is_closed_is_unknown_rather_than_failed(
    database: Database, sql: Sql
) -> None:
    """No leader settles it, so that it certainly waits."""
    transaction = database.transaction()
    transaction.set(b"a", b"1")
    transaction.get(b"b")
    with ThreadPoolExecutor(1) as pool:
        committing = pool.submit(transaction.commit)
        until(lambda: value(sql, "SELECT count(*) FROM commit_requests"))
        database.close()
        with pytest.raises(OutcomeUnknown):
            committing.result(TIMEOUT)


def test_a_client_that_is_dropped_ends_its_thread_and_sessions(settings: Settings, sql: Sql) -> None:
    database = connect(settings.dsn, application=APPLICATION)
    (thread,) = [each for each in threading.enumerate() if each.name == f"pgcoord/{APPLICATION}"]
    del database
    gc.collect()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    until(lambda: not sessions(sql))


def program(text: str, settings: Settings) -> subprocess.CompletedProcess[str]:
    """Runs a program with PGCOORD_DSN set."""
    root = os.path.dirname(os.path.dirname(pgcoord_cli.__file__))  # noqa: PTH120
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text], env={"PGCOORD_DSN": settings.dsn, "PYTHONPATH": root},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


def test_a_program_that_forgets_to_close_ends(settings: Settings) -> None:
    text = """
from pgcoord_cli.sync import connect
database = connect()
print(database.transaction().get(b"a"))
"""
    done = program(text, settings)
    assert (done.stdout, done.stderr, done.returncode) == ("None\n", "", 0)


def test_after_a_fork_the_child_is_refused_and_the_parent_goes_on(settings: Settings) -> None:
    text = """
import os, sys, warnings
from pgcoord_cli import UsageError
from pgcoord_cli.sync import connect

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
database = connect()
transaction = database.transaction()
transaction.get(b"a")
if (child := os.fork()) == 0:
    for call in (database.transaction, lambda: database.run(print), lambda: transaction.get(b"b"), transaction.commit):
        try:
            call()
        except UsageError as error:
            print(error.message.replace(str(os.getpid()), "CHILD").replace(str(os.getppid()), "PARENT"), flush=True)
    database.close()
    with connect() as another:
        print(another.transaction().get(b"a"), flush=True)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print(transaction.get(b"b"))
database.close()
"""
    done = program(text, settings)
    refused = "this client was opened by process PARENT and cannot be used in process CHILD\n"
    assert (done.stderr, done.stdout, done.returncode) == ("", 4 * refused + "None\nNone\n", 0)


# -- the life of a transaction


@needs_leader
def test_i3_a_blocking_transaction_commits_once_and_can_be_reset(database: Database, sql: Sql) -> None:
    put(database, n=bytes(8))
    transaction = database.transaction()
    transaction.add(b"n", ONE)
    assert 0 < transaction.approximate_size < 50
    assert [transaction.commit(), transaction.commit()] == [2, 2]
    with pytest.raises(UsedDuringCommit):
        transaction.set(b"n", b"")
    transaction.reset()
    transaction.next_write_no_write_conflict_range()
    transaction.set(b"k", b"v")
    transaction.cancel()
    for use in (transaction.commit, lambda: transaction.get(b"k"), lambda: transaction.set(b"k", b"v")):
        with pytest.raises(TransactionCancelled):
            use()
    assert data(sql) == {b"n": ONE}


@needs_leader
def test_on_error_makes_a_blocking_transaction_new(database: Database, sql: Sql) -> None:
    transaction, attempts = database.transaction(), 0
    while True:
        attempts += 1
        try:
            count = int(transaction.get(b"k") or 0)
            if attempts == 1:
                put(database, k=b"5")
            transaction.set(b"k", b"%d" % (count + 1))
            transaction.commit()
            break
        except CommitRefused as error:
            transaction.on_error(error)
    assert data(sql) == {b"k": b"6"}
    with pytest.raises(Rejected):
        transaction.on_error(Rejected("final"))


def test_another_thread_cancels_a_commit_that_waits(database: Database, sql: Sql) -> None:
    transaction = database.transaction()
    transaction.add(b"n", ONE)
    with ThreadPoolExecutor(1) as pool:
        committing = pool.submit(transaction.commit)
        until(lambda: value(sql, "SELECT count(*) FROM commit_requests"))
        transaction.cancel()
        with pytest.raises(OutcomeUnknown, match="cancelled"):
            committing.result(TIMEOUT)


@needs_leader
def test_the_watch_of_a_blocking_transaction_that_does_not_commit_fails(database: Database) -> None:
    transaction = database.transaction()
    transaction.get(b"k")
    watch = transaction.watch(b"k")
    transaction.set(b"own", b"1")
    put(database, k=b"2")
    with pytest.raises(Conflict):
        transaction.commit()
    with pytest.raises(Conflict):
        watch.wait(TIMEOUT)
    dropped = database.transaction().watch(b"k")
    gc.collect()
    with pytest.raises(TransactionCancelled):
        dropped.wait(TIMEOUT)


def test_the_options_of_a_blocking_client(settings: Settings) -> None:
    with connect(settings.dsn, require_leader=True, retry_limit=3) as database:
        assert (database.options.require_leader, database.options.retry_limit) == (True, 3)
        database.options = database.options.changed(retry_limit=4)
        assert database.transaction(commit_seconds=1).options == database.options.changed(commit_seconds=1)
        with pytest.raises(NoLeader):
            put(database, k=b"v")
        with pytest.raises(NoLeader):
            database.run(lambda transaction: transaction.set(b"k", b"v"))
        with pytest.raises(NoLeader):
            database.wait_for_leader(0)
    with pytest.raises(UsageError, match="time_limit_seconds"):
        connect(settings.dsn, time_limit_seconds=6)
