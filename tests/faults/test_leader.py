"""Leaders that are killed, frozen, disconnected or blocked: real processes against a real server."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.database.grants import grant
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.errors import ConnectionFailed, OutcomeUnknown
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, until_async, value

if TYPE_CHECKING:
    from tests.conftest import LeaderProcess, StartLeader, TwoLeaders

Sql = psycopg.Connection[Any]
T = TypeVar("T")

TABLES = ("kv", "commit_requests", "leader_lease", "leader_history")


def play(settings: Settings, scenario: Callable[[Database], Awaitable[T]]) -> T:
    """Runs a scenario with its own client; returns its result."""

    async def main() -> T:
        async with await open_database(settings) as db:
            return await scenario(db)

    return asyncio.run(main())


def commit(settings: Settings, key: bytes) -> int:
    """Writes one key through the leader; returns the commit version."""

    async def write(db: Database) -> int:
        return await db.write(lambda tr: _set(tr, key), commit_seconds=TIMEOUT)

    return play(settings, write)


async def _set(tr: Transaction, key: bytes) -> None:
    tr.append_if_fits(key, b"v")  # depends on the stored value, so that it is no direct commit


def ends(sql: Sql) -> list[tuple[int, str, str | None]]:
    """Returns epoch, leader and end reason of every term."""
    return sql.execute("SELECT epoch, leader_addr, end_reason FROM leader_history ORDER BY epoch").fetchall()


def leader_sessions(sql: Sql) -> set[int]:
    """Pids of the sessions that hold the lock that a leader's sessions share."""
    found = sql.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return {row[0] for row in found}


def any_alive(sql: Sql, pids: set[int]) -> bool:
    return bool(value(sql, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ANY (%s))", list(pids)))


def written(sql: Sql) -> list[Any]:
    """All data and all requests."""
    return [
        sql.execute("SELECT * FROM kv ORDER BY key").fetchall(),
        sql.execute("SELECT * FROM commit_requests ORDER BY id").fetchall(),
    ]


@contextmanager
def locked_data(settings: Settings, sql: Sql) -> Iterator[None]:
    """Within the block keys can be read but not written."""
    with psycopg.connect(settings.dsn) as holder:
        holder.execute("LOCK TABLE pgcoord.kv IN EXCLUSIVE MODE")
        yield
        holder.rollback()


def a_batch_waits(sql: Sql) -> bool:
    """Whether a leader has sent a batch that waits for a lock on the data."""
    text = (
        "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE NOT granted AND relation = 'kv'::regclass AND application_name = 'pgcoord/leader run')"
    )
    return bool(value(sql, text))


def commit_held_up(
    settings: Settings,
    sql: Sql,
    meanwhile: Callable[[], None],
    write: Callable[[Transaction, bytes], Awaitable[None]] = _set,
) -> int:
    """Writes the key `k` and returns its version. Calls `meanwhile` while the leader's batch is blocked on the server.

    The batch waits for a lock on the data until `meanwhile` has returned. It is the leader's second one: the first
    would already be blocked where its statements are prepared, before any of them is sent.
    """

    async def scenario(db: Database) -> int:
        await db.write(lambda tr: _set(tr, b"first"), commit_seconds=TIMEOUT)
        with locked_data(settings, sql):
            writer = asyncio.create_task(db.write(lambda tr: write(tr, b"k"), commit_seconds=TIMEOUT))
            await until_async(lambda: a_batch_waits(sql))
            await asyncio.to_thread(meanwhile)
        return await writer

    return play(settings, scenario)


def freeze_until_replaced(leader: LeaderProcess, standby: LeaderProcess) -> None:
    leader.signal(signal.SIGSTOP)
    standby.wait_for("elected epoch 2")


# -- leaders that end without a release


def test_a_killed_leader_is_replaced_before_its_lease_expires(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders
) -> None:
    first, second = two_leaders()
    assert commit(settings, b"a") == 1
    first.signal(signal.SIGKILL)
    second.wait_for("elected epoch 2")
    assert commit(settings, b"b") == 2
    assert ends(sql) == [(1, "first", "lost"), (2, "second", None)], "it did not expire"


@pytest.mark.parametrize("apart", [False, True], ids=["one client", "clients that try direct commits"])
def test_i8_a_kill_under_load_costs_no_commit_and_causes_no_reject(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders, apart: bool
) -> None:
    """Writers of different keys never conflict: every commit succeeds at the first try, before and after the kill."""
    first, _ = two_leaders()

    async def scenario(shared: Database) -> int:
        done = 0

        async def client(number: int) -> None:
            async with await open_database(settings, pool_size=1) as db:
                await writer(number, db)

        async def writer(number: int, db: Database = shared) -> None:
            nonlocal done
            for step in range(20):
                tr = db.transaction()
                assert await tr.get(b"%d" % number) == (b"%d" % (step - 1) if step else None)
                tr.set(b"%d" % number, b"%d" % step)
                await tr.commit()
                done += 1

        work = client if apart else writer
        writers = [asyncio.create_task(work(number)) for number in range(20)]
        await until_async(lambda: done >= 100)
        first.signal(signal.SIGKILL)
        await asyncio.gather(*writers)
        return done

    assert play(settings, scenario) == 400
    assert value(sql, "SELECT durable_version FROM leader_lease") == 400
    assert value(sql, "SELECT count(*) FROM commit_requests WHERE status <> 'committed'") == 0
    assert value(sql, "SELECT epoch FROM leader_lease") == 2


def test_i2_a_frozen_leader_is_replaced_when_its_lease_expires_and_writes_nothing_after_it_thaws(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders
) -> None:
    first, second = two_leaders("1s", "10s")
    assert commit(settings, b"a") == 1
    old_sessions = leader_sessions(sql)
    assert len(old_sessions) == 2, "keeper and resolver"
    freeze_until_replaced(first, second)
    until(lambda: not any_alive(sql, old_sessions))
    assert commit(settings, b"b") == 2
    before = written(sql)
    first.signal(signal.SIGCONT)
    assert "epoch 1" in first.wait_for("lost")
    first.wait_for("candidate:")
    assert written(sql) == before
    assert commit(settings, b"c") == 3
    assert ends(sql) == [(1, "first", "expired"), (2, "second", None)]
    second.signal(signal.SIGTERM)
    first.wait_for("elected epoch 3")
    assert commit(settings, b"d") == 4


def test_i2_a_leader_frozen_in_the_middle_of_a_batch_leaves_nothing_of_it(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders
) -> None:
    """Its transaction is waiting for a lock on the server. It must not be terminated, and the fence refuses it."""
    first, second = two_leaders("1s", "10s")
    assert commit_held_up(settings, sql, lambda: freeze_until_replaced(first, second)) == 2
    assert value(sql, "SELECT epoch FROM leader_lease WHERE leader_addr = 'second'") == 2
    first.signal(signal.SIGCONT)
    first.wait_for("fenced")
    assert value(sql, "SELECT count(*) FROM commit_requests WHERE status = 'committed'") == 2


@contextmanager
def two_operators(settings: Settings, sql: Sql) -> Iterator[tuple[Settings, Settings]]:
    """Two operator roles that may not terminate each other's sessions."""
    roles = [f"operator_{number}_{sql.info.dbname}" for number in (1, 2)]
    for role in roles:
        sql.execute(f"CREATE ROLE {role} LOGIN")
    try:
        with command_session(settings, "migrate grant", writes=True) as conn:
            grant(conn, {"operator": roles}, dry_run=False)
        one, two = (replace(settings, dsn=make_conninfo(settings.dsn, user=role)) for role in roles)
        yield one, two
    finally:
        for role in roles:
            sql.execute(f"DROP OWNED BY {role}")
            sql.execute(f"DROP ROLE {role}")


def test_i2_a_batch_that_a_frozen_leader_had_sent_is_fenced_on_the_server(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders
) -> None:
    """The successor may not terminate the old sessions: the batch goes on on the server until the fence refuses it."""
    with two_operators(settings, sql) as operators:
        first, second = two_leaders("1s", "10s", settings=operators)
        old_sessions = leader_sessions(sql)
        assert commit_held_up(settings, sql, lambda: freeze_until_replaced(first, second)) == 2
        assert leader_sessions(sql) > old_sessions, "they were not terminated"
        until(lambda: not any_busy(sql, old_sessions))
        assert value(sql, "SELECT durable_version FROM leader_lease") == 2, "the successor has committed"
        before = written(sql)
        first.signal(signal.SIGCONT)
        first.wait_for("fenced epoch 1")
        first.wait_for("candidate:")
        assert written(sql) == before
        assert ends(sql) == [(1, "first", "expired"), (2, "second", None)]
        assert [leader.end() for leader in (first, second)] == [0, 0]


def any_busy(sql: Sql, pids: set[int]) -> bool:
    """Whether any of the sessions runs a statement or has a transaction open."""
    text = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ANY (%s) AND state <> 'idle')"
    return bool(value(sql, text, list(pids)))


def test_of_many_candidates_one_replaces_a_frozen_leader_and_terminates_no_other(
    settings: Settings, sql: Sql, start_leader: StartLeader
) -> None:
    first = start_leader("first", "--ttl", "1s")
    first.wait_for("elected epoch 1")
    frozen = keeper_sessions(sql)
    for number in range(3):
        start_leader(f"other {number}", "--ttl", "10s").wait_for("candidate:")
    until(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == 3)
    others = keeper_sessions(sql) - frozen
    assert len(others) == 3
    first.signal(signal.SIGSTOP)
    until(lambda: value(sql, "SELECT epoch FROM leader_lease") == 2)
    assert commit(settings, b"k") == 1
    assert keeper_sessions(sql) == others
    assert ends(sql)[0] == (1, "first", "expired")
    assert len(ends(sql)) == 2


def keeper_sessions(sql: Sql) -> set[int]:
    """Pids of the sessions of lease keepers."""
    found = sql.execute(
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name = 'pgcoord/leader keeper' AND datname = current_database()"
    )
    return {row[0] for row in found}


# -- leaders that are stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, -signal.SIGINT)])
def test_a_stopped_leader_releases_its_lease_at_once(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders, number: signal.Signals, code: int
) -> None:
    first, second = two_leaders()
    assert commit(settings, b"a") == 1
    first.signal(number)
    first.wait_for("released epoch 1")
    second.wait_for("elected epoch 2")
    assert first.process.wait(TIMEOUT) == code
    assert commit(settings, b"b") == 2
    assert ends(sql) == [(1, "first", "released"), (2, "second", None)]


def test_a_candidate_that_waits_for_the_lock_can_be_stopped(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders
) -> None:
    _, second = two_leaders()
    until(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
    second.signal(signal.SIGTERM)
    assert second.process.wait(TIMEOUT) == 0
    assert ends(sql) == [(1, "first", None)]


def test_a_stopped_leader_finishes_the_batch_in_hand(settings: Settings, sql: Sql, start_leader: StartLeader) -> None:
    first = start_leader("first")
    first.wait_for("elected epoch 1")
    assert commit_held_up(settings, sql, lambda: first.signal(signal.SIGTERM)) == 2
    assert first.process.wait(TIMEOUT) == 0
    assert ends(sql) == [(1, "first", "released")]


# -- lost connections and servers


@pytest.mark.parametrize("which", ["leader keeper", "leader run"])
def test_i17_a_leader_that_loses_a_session_reports_it_and_stands_for_election_again(
    settings: Settings, sql: Sql, start_leader: StartLeader, which: str
) -> None:
    leader = start_leader("only", "--ttl", "60s")
    leader.wait_for("elected epoch 1")
    assert commit(settings, b"a") == 1
    ended = sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database()",
        [f"pgcoord/{which}"],
    )
    assert ended.rowcount == 1
    leader.wait_for("lost epoch 1")
    leader.wait_for("elected epoch 2")
    assert commit(settings, b"b") == 2
    assert [epoch for epoch, _, _ in ends(sql)] == [1, 2]


def test_i2_a_batch_whose_fate_is_unknown_is_never_applied_twice(
    settings: Settings, sql: Sql, start_leader: StartLeader
) -> None:
    """The session is terminated while the batch waits; the same process is elected again and reads the tables."""
    leader = start_leader("only", "--ttl", "60s")
    leader.wait_for("elected epoch 1")

    async def append(tr: Transaction, key: bytes) -> None:
        tr.append_if_fits(key, b"once")

    def terminate_sessions() -> None:
        for pid in leader_sessions(sql):
            sql.execute("SELECT pg_terminate_backend(%s)", [pid])

    assert commit_held_up(settings, sql, terminate_sessions, append) == 2
    assert value(sql, "SELECT value FROM kv WHERE key = 'k'") == b"once"


@pytest.mark.parametrize("how_many", [1, 10])
def test_i3_leaders_and_clients_survive_a_crash_of_the_server_and_no_acknowledged_commit_is_lost(
    own_settings: Settings, own_server: EmbeddedServer, start_leader: StartLeader, how_many: int
) -> None:
    """One writer makes direct commits, ten commit through the leader."""
    leaders = [start_leader(name, settings=own_settings) for name in ("first", "second")]
    for leader in leaders:
        leader.wait_for("candidate:")
    acknowledged = unknown = 0

    async def increment(tr: Transaction) -> None:
        tr.set(b"n", b"%d" % (int(await tr.get(b"n") or 0) + 1))

    async def writer(db: Database, goal: int) -> None:
        nonlocal acknowledged, unknown
        while acknowledged < goal:
            try:
                await db.run(increment)
                acknowledged += 1
            except ConnectionFailed:
                await asyncio.sleep(0)  # from a read: nothing was sent
            except OutcomeUnknown:
                unknown += 1
                assert unknown <= 10, "at most one for each writer, the commit that was in flight"

    async def scenario(db: Database) -> int:
        writers = [asyncio.create_task(writer(db, 150)) for _ in range(how_many)]
        await until_async(lambda: acknowledged >= 50)
        await asyncio.to_thread(own_server.stop, "immediate")
        before = acknowledged
        await asyncio.to_thread(own_server.start)
        await asyncio.gather(*writers)
        assert acknowledged > before
        return int(await db.transaction().get(b"n") or 0)

    total = play(own_settings, scenario)
    assert acknowledged <= total <= acknowledged + unknown
    for leader in leaders:
        assert leader.end() == 0
    with psycopg.connect(own_settings.dsn, autocommit=True, options="-c search_path=pgcoord") as sql:
        versions = sql.execute(
            "SELECT commit_version FROM commit_requests WHERE status = 'committed' ORDER BY commit_version"
        ).fetchall()
        assert [version for (version,) in versions] == list(range(1, total + 1)), "rule I5: dense"
        assert value(sql, "SELECT durable_version FROM leader_lease") == total


def test_i17_a_candidate_stands_for_election_again_when_the_server_is_back(
    own_settings: Settings, own_server: EmbeddedServer, start_leader: StartLeader
) -> None:
    leader = start_leader("only", settings=own_settings)
    leader.wait_for("elected epoch 1")
    own_server.stop("immediate")
    leader.wait_for("unreachable")
    own_server.start()
    leader.wait_for("elected epoch 2")
    assert commit(own_settings, b"k") == 1


# -- long batches


def test_a_leader_renews_its_lease_while_a_batch_takes_longer_than_that(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders
) -> None:
    two_leaders("1s", "1s")

    def outlast_the_lease() -> None:
        expires_at = value(sql, "SELECT expires_at FROM leader_lease")
        # Until a renewal after the moment at which the lease would have expired without any.
        until(lambda: value(sql, "SELECT renewed_at > %s FROM leader_lease", expires_at))

    assert commit_held_up(settings, sql, outlast_the_lease) == 2
    assert ends(sql) == [(1, "first", None)]


def test_i3_a_leaders_commits_are_durable_even_if_synchronous_commit_is_off_by_default(
    settings: Settings, sql: Sql, start_leader: StartLeader
) -> None:
    sql.execute(f"ALTER DATABASE {sql.info.dbname} SET synchronous_commit = off")
    sql.execute("CREATE TABLE seen (setting text)")
    sql.execute(
        "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO pgcoord.seen SELECT current_setting('synchronous_commit'); RETURN NULL; END $$"
    )
    sql.execute("CREATE TRIGGER look AFTER UPDATE ON commit_requests FOR EACH ROW EXECUTE FUNCTION look()")
    start_leader("only").wait_for("elected epoch 1")
    assert commit(settings, b"k") == 1
    assert sql.execute("SELECT setting FROM seen").fetchall() == [("on",)]
