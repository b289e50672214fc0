"""Connections of a client that does nothing are given back, and what comes next opens them again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

from pgcoord_cli.core.database.async_listener import AsyncListener
from pgcoord_cli.core.database.pool import Pool
from pgcoord_cli.core.kv import client
from pgcoord_cli.core.kv.client import Database
from pgcoord_cli.db.callback_connection import settle
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until_async
from tests.postgres.commit_scenarios import Sql, needs_leader, put, scenario_test
from tests.postgres.counting_opener import CountingOpener

CLIENTS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/client' AND datname = current_database()"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections become idle at once."""
    monkeypatch.setattr(client, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(client, "HEARTBEAT_SECONDS", 0.05)


def holds(sql: Sql, number: int) -> Callable[[], bool]:
    """Whether the clients hold so many connections."""
    return lambda: len(sql.execute(CLIENTS).fetchall()) == number


@needs_leader
@scenario_test
async def test_an_idle_client_holds_no_connection_and_goes_on_when_it_is_used_again(db: Database, sql: Sql) -> None:
    for number in range(5):
        await asyncio.gather(*(put(db, **{f"k{number}{other}": b"v"}) for other in range(20)))
        assert db._pool._connections or db._listener._channels
        await until_async(holds(sql, 0))
        assert not db._pool._connections
        assert await db.transaction().get(b"k%d7" % number) == b"v"
    assert len(await db.transaction().get_range(b"k", b"l")) == 100


@needs_leader
@scenario_test
async def test_a_watch_is_notified_after_the_connections_were_given_back(db: Database, sql: Sql) -> None:
    await put(db, k=b"1")
    await until_async(holds(sql, 0))
    tr = db.transaction()
    watch = await tr.watch(b"k")
    await tr.commit()
    await put(db, k=b"2")
    await asyncio.wait_for(watch.changed, TIMEOUT)


def test_connections_that_are_closed_as_soon_as_they_are_free_lose_no_statement(settings: Settings) -> None:
    async def scenario() -> None:
        opener = CountingOpener(settings)
        pool = Pool(opener, 3, idle_seconds=0.0)
        for number in range(1, 15):
            answers = [asyncio.get_running_loop().create_future() for _ in range(number)]
            for answer in answers:
                pool.run("SELECT 1", [], partial(settle, answer))
            await asyncio.wait_for(asyncio.gather(*answers), TIMEOUT)
        assert opener.count > 14, "not all statements were on the same connections"
        await pool.close()

    asyncio.run(scenario())


def test_a_channel_that_is_kept_stays_listened_to_over_the_same_connection(settings: Settings, sql: Sql) -> None:
    async def scenario() -> None:
        opener = CountingOpener(settings)
        listener = AsyncListener(opener, heartbeat_seconds=0.01)
        await listener.listen("kept", lambda: None)
        [[pid]] = sql.execute(CLIENTS).fetchall()
        # The last statement of its session: so that many heartbeats have passed.
        for _ in range(5):
            asked_at = sql.execute("SELECT query_start FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone()
            while sql.execute("SELECT query_start FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() == asked_at:
                assert listener.keep("kept")
                await asyncio.sleep(0)
        assert opener.count == 1
        await until_async(holds(sql, 0))
        assert not listener.keep("kept")
        await listener.listen("kept", lambda: None)
        assert opener.count == 2
        await listener.close()

    asyncio.run(scenario())
