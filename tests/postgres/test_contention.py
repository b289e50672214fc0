"""Many callers of work that conflicts: few attempts are in flight at once, all callers commit, other work goes on."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from pgcoord_cli.core.kv import admission, blocking
from pgcoord_cli.core.kv.client import Database, Transaction
from pgcoord_cli.core.kv.conflict_limit import ConflictLimit
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT
from tests.postgres.commit_scenarios import Sql, data, needs_leader, run_scenario, scenario_test

KEYS, SCAN, CALLERS, EACH = 400, 100, 256, 4


def key_of(number: int) -> bytes:
    return b"k%04d" % number


async def scan_and_write(transaction: Transaction) -> None:
    """Reads a hundred keys and writes one of them."""
    first = random.randrange(KEYS - SCAN)
    rows = await transaction.get_range(key_of(first), key_of(first + SCAN))
    key, value = random.choice(rows)
    transaction.set(key, b"%d" % (int(value) + 1))


async def fill(transaction: Transaction) -> None:
    for number in range(KEYS):
        transaction.set(key_of(number), b"0")


async def call_often(db: Database) -> None:
    """Commits EACH transactions for each of CALLERS callers."""
    await db.run(fill)

    async def caller() -> None:
        for _ in range(EACH):
            await db.run(scan_and_write, retry_limit=100_000)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


def xx_commit(sql: Sql) -> float:
    counts = dict(sql.execute("SELECT status, count(*) FROM commit_requests GROUP BY status").fetchall())
    return float(counts["conflict"] / counts["committed"])


@needs_leader
def test_many_callers_waste_few_attempts_and_all_of_them_commit(settings: Settings, sql: Sql) -> None:
    """Without a limit there are twelve conflicts for each commit."""
    run_scenario(settings, call_often)
    assert sum(map(int, data(sql).values())) == CALLERS * EACH
    counts = dict(sql.execute("SELECT status, count(*) FROM commit_requests GROUP BY status").fetchall())
    assert counts["conflict"] < 3 * counts["committed"]


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits every kind of work to one attempt in flight, which keeps its slot until it ends."""
    monkeypatch.setattr(ConflictLimit, "admits", lambda _, in_flight: in_flight == 0)
    monkeypatch.setattr(admission, "SLOT_SECONDS", 3600.0)


@needs_leader
@pytest.mark.usefixtures("one_at_a_time")
@scenario_test
async def test_a_transaction_that_the_work_of_another_starts_does_not_wait_for_it(db: Database) -> None:
    async def work(transaction: Transaction, depth: int) -> None:
        transaction.set(b"%d" % depth, b"")
        if depth:
            await asyncio.gather(*(db.run(partial(work, depth=depth - 1)) for _ in range(2)))

    await asyncio.wait_for(db.run(partial(work, depth=2)), TIMEOUT)


@needs_leader
@pytest.mark.usefixtures("one_at_a_time")
@scenario_test
async def test_other_work_goes_on_while_limited_work_waits(db: Database) -> None:
    began, end = asyncio.Event(), asyncio.Event()

    async def held(transaction: Transaction) -> None:
        began.set()
        await end.wait()

    async def other(transaction: Transaction) -> None:
        transaction.set(b"other", b"")

    those = [asyncio.create_task(db.run(held)) for _ in range(2)]
    await began.wait()
    await asyncio.wait_for(db.run(other), TIMEOUT)
    assert not any(task.done() for task in those)
    end.set()
    await asyncio.wait_for(asyncio.gather(*those), TIMEOUT)


@needs_leader
@pytest.mark.usefixtures("one_at_a_time")
def test_threads_of_the_blocking_client_share_the_limit(settings: Settings, sql: Sql) -> None:
    def nested(transaction: blocking.Transaction) -> None:
        transaction.set(b"inner", b"")

    def work(transaction: blocking.Transaction) -> None:
        at_once.append(1)
        assert len(at_once) == 1
        database.run(nested)
        transaction.set(b"outer", b"")
        at_once.pop()

    at_once: list[int] = []
    with blocking.connect(settings.dsn, schema=settings.schema) as database, ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(database.run, work) for _ in range(8)]:
            done.result(TIMEOUT)
    assert data(sql) == {b"inner": b"", b"outer": b""}
