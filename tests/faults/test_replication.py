"""Synchronous standbys that stall, and failovers that lose commits: what was acknowledged, read and fenced."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import Installation
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.locks.ownership import acquire_leadership, break_lock
from pgcoord_cli.errors import (
    Busy,
    CoordinationError,
    Fenced,
    LockNotAcquired,
    OutcomeUnknown,
    PgcoordError,
    TooOld,
)
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, until_async, value
from tests.faults.replication import Pair, a_pair

if TYPE_CHECKING:
    from tests.conftest import StartLeader

Sql = psycopg.Connection[Any]
T = TypeVar("T")

LEADERSHIPS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgcoord/leadership'"

WAITING = """
    SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'pgcoord/' || %s
"""


@pytest.fixture
def pair(installation: Installation) -> Iterator[Pair]:
    with a_pair(installation) as pair:
        upgrade(Settings(dsn=pair.primary.dsn))
        yield pair


@pytest.fixture
def settings(pair: Pair) -> Settings:
    return Settings(dsn=pair.dsn)


def play(settings: Settings, scenario: Callable[[Database], Awaitable[T]]) -> T:
    async def main() -> T:
        async with await open_database(settings) as db:
            return await scenario(db)

    return asyncio.run(main())


async def write_directly(tr: Transaction, key: bytes) -> None:
    tr.set(key, b"v")


async def write_by_leader(tr: Transaction, key: bytes) -> None:
    tr.append_if_fits(key, b"v")  # what depends on the stored value only the leader does


WAYS = {"client": write_directly, "leader run": write_by_leader}


def keys(sql: Sql) -> set[bytes]:
    return {key for (key,) in sql.execute("SELECT key FROM kv")}


# -- a standby that stalls


def end_what_waits(sql: Sql, function: str) -> None:
    """As an administrator might, or a service manager that stops a client."""
    sql.execute(f"SELECT {function}(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'".encode())


INTERFERENCES: dict[str, Callable[[Sql], None]] = {
    "nothing": lambda _sql: None,
    "terminated": lambda sql: end_what_waits(sql, "pg_terminate_backend"),
    "cancelled": lambda sql: end_what_waits(sql, "pg_cancel_backend"),
}


@pytest.mark.parametrize(
    ("application", "interference"),
    [
        ("leader run", "terminated"),
        ("client", "cancelled"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("leader run", "nothing"), ("leader run", "cancelled"), ("client", "nothing"), ("client", "terminated"),
            )
        ),
    ],
)  # fmt: skip
def test_i16_what_a_stalled_standby_has_not_confirmed_is_not_acknowledged(
    application: str, interference: str, pair: Pair, settings: Settings, start_leader: StartLeader
) -> None:
    """Its row can be seen once the session that waits is ended; the failover then loses it."""
    write = WAYS[application]
    start_leader("first", "--ttl", "1s", settings=settings).wait_for("elected epoch 1")
    start_leader("second", "--ttl", "1s", settings=settings)
    pair.confirm_commits()

    async def scenario(db: Database) -> list[bytes]:
        await db.write(lambda tr: write(tr, b"before"), commit_seconds=TIMEOUT)
        pair.stall()
        with pair.on(pair.primary) as sql:
            commit = asyncio.create_task(db.write(lambda tr: write(tr, b"during"), commit_seconds=5.0))
            await until_async(lambda: value(sql, WAITING, application))
            INTERFERENCES[interference](sql)
            acknowledged = [b"before"]
            with suppress(OutcomeUnknown):
                await commit
                acknowledged.append(b"during")
        return acknowledged

    acknowledged = play(settings, scenario)
    pair.fail_over()
    with pair.on(pair.standby) as sql:
        assert keys(sql) >= set(acknowledged)
    assert acknowledged == [b"before"]


def test_i16_while_a_standby_stalls_no_leader_ends_the_commit_that_waits(
    pair: Pair, settings: Settings, start_leader: StartLeader
) -> None:
    """It waits beyond the lease; when the standby is back it is acknowledged, and a leader is elected."""
    first = start_leader("first", "--ttl", "1s", settings=settings)
    first.wait_for("elected epoch 1")
    second = start_leader("second", "--ttl", "1s", settings=settings)
    pair.confirm_commits()

    async def scenario(db: Database) -> int:
        pair.stall()
        with pair.on(pair.primary) as sql:
            commit = asyncio.create_task(db.write(lambda tr: write_by_leader(tr, b"k"), commit_seconds=TIMEOUT))
            await until_async(lambda: value(sql, WAITING, "leader run"))
            await until_async(
                lambda: value(sql, "SELECT expires_at < clock_timestamp() - interval '2 s' FROM leader_lease")
            )
            assert value(sql, WAITING, "leader run") == 1
            pair.resume()
            return await commit

    assert play(settings, scenario) == 1
    with pair.on(pair.primary) as sql:
        until(lambda: value(sql, "SELECT epoch > 1 AND expires_at > clock_timestamp() FROM leader_lease"))
    for leader in (first, second):
        assert leader.process.poll() is None


@pytest.mark.slow
def test_i16_leader_status_says_that_commits_wait_for_a_standby(
    pair: Pair, settings: Settings, start_leader: StartLeader, cli: Any
) -> None:
    start_leader("first", "--ttl", "60s", settings=settings).wait_for("elected epoch 1")
    with pair.on(pair.primary) as sql:
        sql.execute("CREATE ROLE status_reader LOGIN")
    assert cli("migrate", "grant", "--reader", "status_reader", settings=settings).returncode == 0
    reader = replace(settings, dsn=make_conninfo(settings.dsn, user="status_reader"))
    pair.confirm_commits()

    async def scenario(db: Database) -> None:
        pair.stall()
        with pair.on(pair.primary) as sql:
            commit = asyncio.create_task(db.write(lambda tr: write_directly(tr, b"k"), commit_seconds=TIMEOUT))
            await until_async(lambda: value(sql, WAITING, "client"))
            status = await asyncio.to_thread(cli, "leader", "status", settings=settings)
            assert "synchronous standby" in status.stdout
            assert "pg_read_all_stats" not in status.stderr
            status = await asyncio.to_thread(cli, "leader", "status", settings=reader)
            assert "may be missing here: to see it, this role needs a GRANT of pg_read_all_stats" in status.stderr
            pair.resume()
            await commit

    play(settings, scenario)


def test_i16_a_leader_that_waits_for_a_standby_can_be_stopped(
    pair: Pair, settings: Settings, start_leader: StartLeader
) -> None:
    leader = start_leader("first", "--ttl", "60s", settings=settings)
    leader.wait_for("elected epoch 1")
    pair.confirm_commits()

    async def scenario(db: Database) -> None:
        pair.stall()
        with pair.on(pair.primary) as sql:
            commit = asyncio.create_task(db.write(lambda tr: write_by_leader(tr, b"k"), commit_seconds=TIMEOUT))
            await until_async(lambda: value(sql, WAITING, "leader run"))
            leader.signal(signal.SIGTERM)
            assert await asyncio.to_thread(leader.process.wait, TIMEOUT) == 0
            assert value(sql, WAITING, "leader run") == 1, "its commit goes on waiting"
            pair.resume()
            await commit

    play(settings, scenario)


@pytest.mark.slow
def test_i16_commit_show_waits_for_the_standby_and_then_says_that_the_outcome_is_unknown(
    pair: Pair, settings: Settings, start_leader: StartLeader, cli: Any
) -> None:
    start_leader("first", "--ttl", "60s", settings=settings).wait_for("elected epoch 1")
    pair.confirm_commits()

    async def scenario(db: Database) -> None:
        pair.stall()
        with pair.on(pair.primary) as sql:
            commit = asyncio.create_task(db.write(lambda tr: write_directly(tr, b"k"), commit_seconds=TIMEOUT))
            await until_async(lambda: value(sql, WAITING, "client"))
            end_what_waits(sql, "pg_cancel_backend")
            await until_async(lambda: value(sql, "SELECT count(*) FROM commit_requests WHERE status = 'committed'"))
            request_id = str(value(sql, "SELECT request_id FROM commit_requests"))
            shown = await asyncio.to_thread(cli, "commit", "show", request_id, "-o", "json", settings=settings)
            assert (shown.returncode, "standby" in shown.stdout) == (10, True)
            pair.resume()
            shown = await asyncio.to_thread(cli, "commit", "show", request_id, "-o", "json", settings=settings)
            assert (shown.returncode, '"committed"' in shown.stdout) == (0, True)
            await commit

    play(settings, scenario)


# -- a failover that loses commits


def test_i2_what_was_read_of_lost_commits_never_commits(
    pair: Pair, settings: Settings, start_leader: StartLeader
) -> None:
    """Three leaders in a row; the standby has only what the first one did."""
    first = start_leader("first", "--ttl", "2s", settings=settings)
    first.wait_for("elected epoch 1")

    async def scenario(db: Database) -> None:
        await db.write(lambda tr: write_by_leader(tr, b"kept"), commit_seconds=TIMEOUT)
        with pair.on(pair.primary) as sql, pair.on(pair.standby) as copy:
            await until_async(lambda: keys(copy) == {b"kept"})
            pair.stall()
            second = start_leader("second", "--ttl", "2s", settings=settings)
            first.signal(signal.SIGKILL)
            second.wait_for("elected epoch 2")
            await db.write(lambda tr: write_by_leader(tr, b"lost"), commit_seconds=TIMEOUT)
            assert value(sql, "SELECT durable_version FROM leader_lease") == 2
        late = [db.transaction(commit_seconds=TIMEOUT) for _ in WAYS]
        for tr in late:
            assert await tr.get(b"lost") == b"v"
        second.signal(signal.SIGKILL)
        await asyncio.to_thread(pair.fail_over)
        third = start_leader("third", "--ttl", "2s", settings=settings)
        third.wait_for("elected epoch 2")
        for number in range(2):
            await db.write(lambda tr: write_by_leader(tr, b"new %d" % number), commit_seconds=TIMEOUT)  # noqa: B023
        for tr, write in zip(late, WAYS.values(), strict=True):
            await write(tr, b"derived")
            with pytest.raises(TooOld):
                await tr.commit()
        with pair.on(pair.standby) as sql:
            assert value(sql, "SELECT durable_version FROM leader_lease") == 3
            assert b"derived" not in keys(sql)

    play(settings, scenario)


@pytest.mark.slow
def test_i2_a_lease_that_was_copied_to_a_promoted_standby_is_void(
    pair: Pair, settings: Settings, start_leader: StartLeader
) -> None:
    """It has not run out there, but no direct commit is made under it."""
    leader = start_leader("first", "--ttl", "600s", settings=settings)
    leader.wait_for("elected epoch 1")

    async def scenario(db: Database) -> None:
        await db.write(lambda tr: write_directly(tr, b"k"), commit_seconds=TIMEOUT)
        with pair.on(pair.standby) as copy:
            await until_async(lambda: keys(copy) == {b"k"})
        leader.signal(signal.SIGKILL)
        await asyncio.to_thread(pair.fail_over)
        with pytest.raises(PgcoordError):
            await db.write(lambda tr: write_directly(tr, b"j"), commit_seconds=2.0)
        with pair.on(pair.standby) as sql:
            assert value(sql, "SELECT expires_at > clock_timestamp() FROM leader_lease")
            assert keys(sql) == {b"k"}

    play(settings, scenario)


# -- fences


def test_i13_a_fence_that_no_standby_confirms_is_an_error_at_a_deadline(pair: Pair, settings: Settings) -> None:
    """The commit goes on waiting, and keeps the name until it is confirmed."""
    pair.confirm_commits()
    with pair.on(pair.primary) as sql:
        acquire_leadership(settings.dsn, "billing").release()
        until(lambda: not value(sql, LEADERSHIPS))
        sql.execute("ALTER SYSTEM SET synchronous_commit = off")
        sql.execute("SELECT pg_reload_conf()")
        pair.stall()
        with pytest.raises(CoordinationError, match="was not confirmed within 1 s"):
            acquire_leadership(settings.dsn, "billing", timeout_seconds=1.0)
        assert value(sql, WAITING, "leadership") == 1
        with pytest.raises(LockNotAcquired):
            acquire_leadership(settings.dsn, "billing")
        with command_session(settings, "lock break", writes=True) as conn, pytest.raises(Busy, match="standby"):
            break_lock(conn, "pgcoord", "billing")
        pair.resume()
        until(lambda: not value(sql, LEADERSHIPS))
        with acquire_leadership(settings.dsn, "billing") as owner:
            assert owner.fence == 3


def test_i13_an_acquisition_whose_wait_for_the_standby_is_cancelled_fails(pair: Pair, settings: Settings) -> None:
    pair.confirm_commits()
    pair.stall()
    with pair.on(pair.primary) as sql, ThreadPoolExecutor(1) as pool:
        acquired = pool.submit(acquire_leadership, settings.dsn, "billing", timeout_seconds=TIMEOUT)
        until(lambda: value(sql, WAITING, "leadership"))
        end_what_waits(sql, "pg_cancel_backend")
        with pytest.raises(CoordinationError):
            acquired.result(TIMEOUT)


def test_i21_a_fence_number_that_a_failover_gave_out_again_is_told_apart(pair: Pair, settings: Settings) -> None:
    with pair.on(pair.standby) as copy:
        pair.stall()
        first = acquire_leadership(settings.dsn, "billing")
        assert not value(copy, "SELECT count(*) FROM subscriptions")
    pair.fail_over()
    with acquire_leadership(settings.dsn, "billing") as second, psycopg.connect(settings.dsn) as service:
        assert second.fence == first.fence
        second.checkpoint.save(10)
        with pytest.raises(Fenced):
            first.checkpoint.save(20, service)
        service.rollback()
        assert second.checkpoint.load() == 10
    first.release()
