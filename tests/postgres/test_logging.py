"""What the library logs: the name and the level of each event, and nothing at all unless a program wants it."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from threading import Thread

import pytest

from pgcoord_cli.core.concurrency.outage import MAX_REASONS
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.events.outbox import OUTBOXES
from pgcoord_cli.core.events.subscriptions import Subscription
from pgcoord_cli.core.kv.client import Transaction, open_database
from pgcoord_cli.core.leader.candidate import Candidate
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.errors import Fenced, TooOld
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, until_async
from tests.conftest import environment
from tests.faults.tail_process import Sql, add, terminate, until_gone

Log = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def log(caplog: Log) -> Log:
    """Captures every record of the library."""
    caplog.set_level(logging.DEBUG, "pgcoord")
    return caplog


def logged(log: Log, component: str, level: int = logging.INFO) -> list[tuple[str, str]]:
    """Returns level and text of the records of one component, from `level` on."""
    return [
        (record.levelname, record.getMessage())
        for record in list(log.records)
        if record.name == f"pgcoord.{component}" and record.levelno >= level
    ]


def until_logged(log: Log, component: str, text: str) -> logging.LogRecord:
    """Waits for a record of a component that contains a text."""
    found: list[logging.LogRecord] = []

    def is_logged() -> bool:
        of_component = [record for record in list(log.records) if record.name == f"pgcoord.{component}"]
        found[:] = [record for record in of_component if text in record.getMessage()]
        return bool(found)

    until(is_logged)
    return found[0]


# -- silence

PROGRAM = """
import logging, sys
import psycopg
from pgcoord_cli import StartPosition, append_completion_event, tail

if sys.argv[1:]:
    logging.basicConfig(format="%(name)s %(levelname)s")
with psycopg.connect(sys.stdin.readline(), autocommit=True) as conn:
    events = tail("completion", start=StartPosition.beginning())
    def append_and_read():
        appended = append_completion_event(conn, "00000000-0000-0000-0000-000000000001", "success")
        while next(events).event_id < appended:
            pass
    append_and_read()
    conn.execute("SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
                 " WHERE application_name = 'pgcoord/tail' AND datname = current_database()")
    append_and_read()
"""


def run_program(settings: Settings, *words: str) -> tuple[int, str, str]:
    """Runs a program whose tail loses its connection and gets another; returns its exit code and its output."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env=environment(settings), input=settings.dsn, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_library_is_silent_unless_the_program_configures_logging(settings: Settings) -> None:
    assert run_program(settings) == (0, "", "")
    assert run_program(settings, "configured") == (0, "", "pgcoord.tail WARNING\n")


# -- the leader


@contextmanager
def candidate(settings: Settings, node_id: str, ttl: float = 60) -> Iterator[Candidate]:
    """Runs a candidate in a thread, until the block is left."""
    one = Candidate(settings, node_id, ttl, lambda _event: None)
    thread = Thread(target=one.run)
    thread.start()
    try:
        yield one
    finally:
        one.stop()
        thread.join(TIMEOUT)


def test_an_election_and_a_release_are_logged(settings: Settings, log: Log) -> None:
    with candidate(settings, "west-1"):
        record = until_logged(log, "candidate", "elected")
    assert {name: vars(record)[name] for name in ("event", "node", "epoch")} == {
        "event": "elected", "node": "west-1", "epoch": 1,
    }  # fmt: skip
    assert logged(log, "candidate") == [
        ("INFO", "west-1: candidate: waiting for the leader lock"),
        ("INFO", "west-1: elected epoch 1: durable version 0"),
        ("INFO", "west-1: released epoch 1: released"),
    ]


def test_a_fence_is_logged_as_a_warning(settings: Settings, sql: Sql, log: Log) -> None:
    with candidate(settings, "west-1"):
        until_logged(log, "candidate", "elected epoch 1")
        sql.execute(
            "UPDATE leader_lease SET epoch = 2, term_id = gen_random_uuid(), leader_addr = 'east-1';"
            "SELECT pg_notify('pgcoord_leadership', '')"
        )
        record = until_logged(log, "candidate", "fenced")
    assert (record.levelname, vars(record)["epoch"]) == ("WARNING", 1)
    assert record.getMessage().startswith("west-1: fenced epoch 1: superseded by epoch 2 (east-1)")


# -- the commit client


def write_twice(settings: Settings) -> None:
    """Makes two commits of one client."""

    async def main() -> None:
        async with await open_database(settings) as db:
            for _ in range(2):
                await db.write(set_key, commit_seconds=TIMEOUT)

    asyncio.run(main())


async def set_key(transaction: Transaction) -> None:
    transaction.set(b"key", b"value")


LEADER_IS_BUSY = "SELECT pg_advisory_lock_shared('pgcoord.commit_requests'::regclass::oid::integer, 0)"


def test_a_direct_commit_that_falls_back_is_logged_at_debug(settings: Settings, sql: Sql, log: Log) -> None:
    with candidate(settings, "west-1"):
        until_logged(log, "candidate", "elected")
        sql.execute(LEADER_IS_BUSY)
        write_twice(settings)
    assert set(logged(log, "kv", logging.DEBUG)) == {
        ("DEBUG", "a direct commit falls back to the queue: another commit is in progress")
    }


def test_a_right_without_which_no_direct_commit_is_possible_is_logged_once(
    settings: Settings, sql: Sql, log: Log
) -> None:
    sql.execute("ALTER FUNCTION commit_directly RENAME TO moved")
    with candidate(settings, "west-1"):
        until_logged(log, "candidate", "elected")
        write_twice(settings)
    ((level, text),) = logged(log, "kv", logging.DEBUG)
    assert level == "INFO"
    assert text.startswith("all commits of this client go through the queue: no direct commit is possible: ")


def test_a_transaction_that_is_run_again_is_logged_at_debug(settings: Settings, log: Log) -> None:
    attempts = []

    async def main() -> None:
        async with await open_database(settings) as db:

            async def work(transaction: Transaction) -> None:
                await transaction.get(b"key")
                attempts.append(transaction)
                if len(attempts) == 1:
                    await db.write(set_key, commit_seconds=TIMEOUT)
                transaction.set(b"key", b"mine")

            await db.run(work, commit_seconds=TIMEOUT)

    with candidate(settings, "west-1"):
        until_logged(log, "candidate", "elected")
        asyncio.run(main())
    (record,) = [record for record in log.records if "is run again" in record.getMessage()]
    assert (record.name, record.levelname, vars(record)["retries"]) == ("pgcoord.kv", "DEBUG", 1)


def test_i17_an_outage_of_a_client_is_logged_once_and_its_end_with_the_count(
    own_settings: Settings, own_server: EmbeddedServer, log: Log
) -> None:
    async def main() -> None:
        async with await open_database(own_settings) as db:
            await db.write(set_key, commit_seconds=TIMEOUT)
            transaction = db.transaction(commit_seconds=TIMEOUT)
            await transaction.get(b"key")
            transaction.set(b"key", b"later")
            own_server.stop("immediate")
            commit = asyncio.create_task(transaction.commit())
            await until_async(lambda: logged(log, "kv") and logged(log, "listener"))
            own_server.start()
            with suppress(TooOld):  # if the next election takes longer than a transaction may
                await commit
            await until_async(lambda: len(logged(log, "listener")) > 1)

    with candidate(own_settings, "west-1"):
        until_logged(log, "candidate", "elected")
        asyncio.run(main())
    for component, trouble, recovery in [
        ("kv", "commits wait for the server: ", "commits are sent again, after "),
        ("listener", "not listening: ", "listening again, after "),
    ]:
        *warnings, (level, text) = logged(log, component)
        assert {level for level, _ in warnings} == {"WARNING"}
        assert all(text.startswith(trouble) for _, text in warnings)
        assert len(warnings) == len(set(warnings)) <= MAX_REASONS
        assert (level, text.startswith(recovery)) == ("INFO", True)


# -- locks and subscriptions


def test_ownership_is_logged_and_a_fence_as_a_warning(settings: Settings, sql: Sql, log: Log) -> None:
    former = acquire_leadership(settings.dsn, "nightly")
    assert terminate(sql, "pgcoord/leadership") == 1
    until_gone(sql, "pgcoord/leadership")
    with acquire_leadership(settings.dsn, "nightly"), pytest.raises(Fenced):
        former.checkpoint.save(1, sql)
    former.release()
    assert logged(log, "locks") == [
        ("INFO", "'nightly' is owned, with fence 1"),
        ("INFO", "'nightly' is owned, with fence 2"),
        ("WARNING", "'nightly' has been acquired by another owner; position 1 was not saved"),
        ("INFO", "'nightly' is released, with fence 2"),
        ("INFO", "'nightly' is released, with fence 1"),
    ]
    # With one at DEBUG before the last: that the session of the former owner is lost.
    assert [vars(record)["fence"] for record in log.records if record.name == "pgcoord.locks"] == [1, 2, 1, 2, 1, 1]


def test_a_save_that_loses_its_connection_is_logged_and_so_is_the_next_one(
    settings: Settings, sql: Sql, log: Log
) -> None:
    (event_id,) = add(sql)
    with closing(Subscription(settings, "importer", OUTBOXES["lease"])) as subscription:
        assert terminate(sql, "pgcoord/subscription") == 1
        until_gone(sql, "pgcoord/subscription")
        subscription.save(event_id)
    (lost, warning), (again, info) = logged(log, "subscription")
    assert (lost, again) == ("WARNING", "INFO")
    assert warning.startswith("'importer' is not saved yet: connection lost: ")
    assert info.startswith("'importer' is owned again, after 1 attempt over ")
