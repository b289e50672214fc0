"""The client's few connections: opened when needed, shared by statements, replaced when they break."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.database.pool import Pool
from pgcoord_cli.db.binary import integer
from pgcoord_cli.db.callback_connection import Row, settle
from pgcoord_cli.errors import ConnectionFailed
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until_async
from tests.postgres.counting_opener import CountingOpener

Sql = psycopg.Connection[Any]
PID = "SELECT pg_backend_pid()"
SIZE = 3


def on_a_pool(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs a test with a pool, its opener, and a session beside it."""

    @wraps(test)
    def run(settings: Settings, sql: Sql) -> None:
        async def run_scenario() -> None:
            opener = CountingOpener(settings)
            pool = Pool(opener, SIZE)
            try:
                async with asyncio.timeout(TIMEOUT):
                    await test(pool, opener, sql)
            finally:
                await pool.close()

        asyncio.run(run_scenario())

    del run.__wrapped__
    return run


async def fetch(pool: Pool, text: str) -> list[Row]:
    """The rows of a statement."""
    rows: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
    pool.run(text, [], partial(settle, rows))
    return await rows


async def pids(pool: Pool, statements: int) -> list[int]:
    """The sessions that so many statements at once ran in."""
    answers = await asyncio.gather(*(fetch(pool, PID) for _ in range(statements)))
    return [integer(rows[0][0]) for rows in answers]


@on_a_pool
async def test_one_statement_after_the_other_takes_one_connection(pool: Pool, opener: CountingOpener, sql: Sql) -> None:
    assert len({pid for _ in range(20) for pid in await pids(pool, 1)}) == 1
    assert opener.count == 1


@on_a_pool
async def test_many_at_once_take_as_many_as_there_may_be(pool: Pool, opener: CountingOpener, sql: Sql) -> None:
    for _ in range(5):
        assert len(set(await pids(pool, 40))) <= SIZE
    assert opener.count == SIZE


@on_a_pool
async def test_where_no_more_can_be_opened_all_wait_for_those_there_are(
    pool: Pool, opener: CountingOpener, sql: Sql
) -> None:
    [only] = await pids(pool, 1)
    opener.failing = set(range(2, 1000))
    for _ in range(3):
        assert await pids(pool, 20) == [only] * 20
    assert opener.count > 1


@on_a_pool
async def test_who_waits_for_a_busy_connection_gets_another_once_one_can_be_opened(
    pool: Pool, opener: CountingOpener, sql: Sql
) -> None:
    await pids(pool, 1)
    opener.failing = {2}
    asleep = asyncio.create_task(fetch(pool, "SELECT pg_sleep(600)"))
    await asyncio.sleep(0)
    assert len(await pids(pool, 1)) == 1
    assert not asleep.done()


@on_a_pool
async def test_what_opening_raises_reaches_one_who_waits_and_the_next_tries_again(
    pool: Pool, opener: CountingOpener, sql: Sql
) -> None:
    opener.failing = {1, 2, 3, 4}
    outcomes = await asyncio.gather(*(pids(pool, 1) for _ in range(6)), return_exceptions=True)
    assert [isinstance(outcome, ConnectionFailed) for outcome in outcomes] == [True] * 4 + [False] * 2


@on_a_pool
async def test_a_connection_that_broke_is_replaced(pool: Pool, opener: CountingOpener, sql: Sql) -> None:
    for _ in range(3):
        before = set(await pids(pool, 10))
        await asyncio.gather(*pool._openings)
        asleep = asyncio.create_task(fetch(pool, "SELECT pg_sleep(600)"))
        await asyncio.sleep(0)
        sql.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE application_name = 'pgcoord/client' AND datname = current_database()"
        )
        with pytest.raises(psycopg.OperationalError):
            await asleep
        assert before.isdisjoint(await pids(pool, 10))


@on_a_pool
async def test_where_one_connection_broke_the_idle_ones_are_not_trusted(
    pool: Pool, opener: CountingOpener, sql: Sql
) -> None:
    before = set(await pids(pool, 10))
    await asyncio.gather(*pool._openings)
    asleep = asyncio.create_task(fetch(pool, "SELECT pg_backend_pid(), pg_sleep(600)"))
    await asyncio.sleep(0)
    query = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)' AND application_name = 'pgcoord/client'"
    await until_async(lambda: sql.execute(query.encode()).fetchone())
    sql.execute("SELECT pg_terminate_backend(%s, 10000)", sql.execute(query.encode()).fetchone())
    with pytest.raises(psycopg.OperationalError):
        await asleep
    assert before.isdisjoint(await pids(pool, 1))


@on_a_pool
async def test_a_caller_who_gives_up_leaves_the_connection_to_others(
    pool: Pool, opener: CountingOpener, sql: Sql
) -> None:
    [before] = await pids(pool, 1)
    given_up = asyncio.create_task(fetch(pool, PID))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    await pids(pool, 2)
    assert before in await pids(pool, SIZE)


@on_a_pool
async def test_a_pool_that_is_closed_tells_everybody(pool: Pool, opener: CountingOpener, sql: Sql) -> None:
    waiting = [asyncio.create_task(fetch(pool, "SELECT pg_sleep(600)")) for _ in range(2 * SIZE)]
    while opener.count < SIZE:
        await asyncio.sleep(0)
    await pids(pool, 0)
    await pool.close()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, ConnectionFailed | psycopg.OperationalError) for outcome in outcomes), outcomes
    with pytest.raises(ConnectionFailed, match="closed"):
        await fetch(pool, PID)
