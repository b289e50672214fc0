"""Reading at a version: every read of a transaction is of its one read version (rule I4)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.commits.codec import MAX_KEY_BYTES
from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.session import command_session, open_session
from pgcoord_cli.core.kv.client import Database, Transaction
from pgcoord_cli.core.kv.key_selector import KeySelector
from pgcoord_cli.core.leader import lease, resolver
from pgcoord_cli.core.leader.resolver import Resolver
from pgcoord_cli.db.sqlfiles import sql as statement
from pgcoord_cli.errors import Conflict, Rejected, TooOld
from pgcoord_cli.settings import Settings
from tests.asking import value
from tests.postgres.commit_scenarios import Data, Sql, needs_leader, put, scenario_test


@pytest.fixture(autouse=True)
def _no_turns_by_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "KEEP_UNDO_SECONDS", float("inf"))


@pytest.fixture
def other(settings: Settings) -> Iterator[Sql]:
    """Another session, with transactions of its own."""
    with psycopg.connect(settings.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
        yield conn


ZERO = bytes(8)


@pytest.mark.parametrize("seed", range(3))
@needs_leader
@scenario_test
async def test_i4_every_read_at_a_version_finds_the_state_of_that_version(db: Database, seed: int) -> None:
    rng = random.Random(seed)
    keys = [b"%02d" % number for number in range(30)]
    states: dict[int, Data] = {0: {}}

    async def write() -> None:
        transaction = db.transaction()
        for _ in range(rng.randrange(1, 5)):
            if rng.random() < 0.1:
                first, last = sorted(rng.sample(keys, 2))
                transaction.clear_range(first, rng.choice([last, None]))
            elif rng.random() < 0.3:
                transaction.clear(rng.choice(keys))
            else:
                transaction.set(rng.choice(keys), b"%d" % rng.random())
        await transaction.commit()

    for _ in range(30):
        # One at a time, which are direct commits, and several at once, which the leader settles in batches.
        await asyncio.gather(*(write() for _ in range(rng.choice([1, 1, 5]))))
        now = db.transaction()
        state = dict(await now.get_range(b"", None))
        states[now.read_version or 0] = state

    for _ in range(60):
        version = rng.choice(list(states))
        await check_reads(db, version, states[version], rng, keys)


async def check_reads(db: Database, version: int, state: Data, rng: random.Random, keys: list[bytes]) -> None:
    transaction = db.transaction()
    await transaction.set_read_version(version)
    begin, end = sorted(rng.sample(keys, 2))
    limit, reverse = rng.choice([None, 1, 3, 10]), rng.random() < 0.5
    rows = sorted((row for row in state.items() if begin <= row[0] < end), reverse=reverse)[:limit]
    some = rng.sample(keys, 3)
    selector = KeySelector(rng.choice(keys), rng.random() < 0.5, rng.randrange(-2, 4))
    found = await asyncio.gather(
        transaction.get_range(begin, end, limit=limit, reverse=reverse, snapshot=rng.random() < 0.5),
        *(transaction.get(key) for key in some),
        transaction.get_key(selector),
    )
    assert found == [rows, *map(state.get, some), selected(state, selector)]
    assert [row async for row in transaction.range(b"", None)] == sorted(state.items())
    assert await transaction.commit() == transaction.read_version


def selected(state: Data, selector: KeySelector) -> bytes | None:
    below = [key for key in state if key < selector.key or (selector.or_equal and key == selector.key)]
    place = len(below) - 1 + selector.offset
    return b"" if place < 0 else sorted(state)[place] if place < len(state) else None


@needs_leader
@scenario_test
async def test_i4_a_read_version_within_a_batch_is_the_state_that_the_batch_left(db: Database, sql: Sql) -> None:
    async def append(number: int) -> int:
        transaction = db.transaction()
        transaction.set(b"%02d" % number, b"")
        return await transaction.commit()

    versions = await asyncio.gather(*(append(number) for number in range(40)))
    await put(db, later=b"")
    (boundaries,) = sql.execute("SELECT array_agg(valid_through) FROM kv_undo WHERE key IS NULL").fetchone() or ((),)
    assert len(boundaries) < len(versions), "no batch had several commits"
    for version in versions:
        transaction = db.transaction()
        await transaction.set_read_version(version)
        rows = await transaction.get_range(b"", None)
        assert transaction.read_version == min(each for each in boundaries if each >= version)
        assert len(rows) == transaction.read_version


@pytest.mark.parametrize("snapshot", [False, True])
@needs_leader
@scenario_test
async def test_i4_reads_at_the_same_time_are_of_one_version(db: Database, snapshot: bool) -> None:
    await put(db, a=b"100", b=b"0")
    stopped = False

    async def swap() -> None:
        number = 0
        while not stopped:
            number += 1
            await put(db, a=b"%d" % (100 - number % 100), b=b"%d" % (number % 100))

    async def read(transaction: Transaction, key: bytes, steps: int) -> int:
        for _ in range(steps):
            await asyncio.sleep(0)
        return int(await transaction.get(key, snapshot=snapshot) or 0)

    swapping = asyncio.ensure_future(swap())
    for steps in range(100):
        transaction = db.transaction()
        sums = await asyncio.gather(read(transaction, b"a", 0), read(transaction, b"b", steps % 20))
        assert sum(sums) == 100
        await transaction.commit()
    stopped = True
    await swapping


@needs_leader
@scenario_test
async def test_i4_a_cancelled_read_leaves_the_others_of_its_transaction_as_they_are(db: Database) -> None:
    await put(db, a=b"1")
    transaction = db.transaction()
    first, second = (asyncio.ensure_future(transaction.get(key)) for key in (b"a", b"b"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is None
    assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    assert await transaction.get(b"a") == b"1"


@needs_leader
@scenario_test
async def test_i4_a_conflict_added_by_hand_counts_from_the_read_version(db: Database) -> None:
    for add in ("key", "range"):
        await put(db, x=b"old", y=b"0")
        transaction = db.transaction()
        seen = await transaction.get(b"x", snapshot=True)
        await put(db, x=b"new")
        await transaction.get(b"y")
        if add == "key":
            transaction.add_read_conflict_key(b"x")
        else:
            transaction.add_read_conflict_range(b"x", b"x\0")
        transaction.set(b"copy", seen or b"")
        with pytest.raises(Conflict):
            await transaction.commit()


@needs_leader
@scenario_test
async def test_i4_readers_of_many_keys_beside_a_busy_writer_never_conflict(db: Database) -> None:
    keys = [b"%02d" % number for number in range(20)]
    done = asyncio.Event()

    async def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            transaction = db.transaction()
            for key in keys:
                transaction.set(key, b"%d" % number)
            await transaction.commit()

    async def read() -> None:
        for _ in range(10):
            transaction = db.transaction()
            assert len({await transaction.get(key) for key in keys}) == 1
            await transaction.commit()

    writing = asyncio.ensure_future(write())
    await asyncio.gather(*(read() for _ in range(10)))
    done.set()
    await writing


@needs_leader
@scenario_test
async def test_i20_a_read_after_others_reads_only_its_own_key(db: Database, sql: Sql) -> None:
    await put(db, **{f"k{number}": b"" for number in range(50)})
    transaction = db.transaction()
    for number in range(50):
        await transaction.get(b"k%d" % number)
        await put(db, other=b"%d" % number)
    reads = sql.execute(
        "SELECT idx_scan FROM pg_stat_user_tables, pg_stat_force_next_flush() WHERE relname = 'kv'"
    ).fetchone()
    assert reads is not None
    # At most one look-up for each of its own reads and of the writer's; reading all again would be 1,275 more.
    assert reads[0] < 400


@needs_leader
@scenario_test
async def test_after_a_write_a_limited_read_conflicts_with_what_it_returns(db: Database) -> None:
    await put(db, **{f"q{number}": b"" for number in range(10)})
    for reverse, pushed in ((False, b"q99"), (True, b"q")):
        transaction = db.transaction()
        transaction.set(b"worker", b"busy")
        ((key, _),) = await transaction.get_range(b"q", b"r", limit=1, reverse=reverse)
        assert await transaction.get_key(KeySelector.first_greater_or_equal(key)) == key
        transaction.clear(key)
        other = db.transaction()
        other.set(pushed, b"")
        await other.commit()
        await transaction.commit()


@needs_leader
@scenario_test
async def test_keys_of_the_greatest_length_can_be_read_selected_and_checked(db: Database) -> None:
    key = b"K" * MAX_KEY_BYTES
    await db.run(lambda transaction: _set(transaction, key))
    transaction = db.transaction()
    transaction.add_read_conflict_key(key)
    transaction.add_write_conflict_key(key)
    assert await transaction.get_key(KeySelector.first_greater_than(key)) is None
    assert await transaction.get_key(KeySelector.first_greater_or_equal(b"K")) == key
    assert await transaction.get_key(KeySelector.last_less_or_equal(key)) == key
    assert await transaction.get_range(b"K", b"L", limit=1) == [(key, b"v")]
    assert await transaction.get_range(key, key + b"\0", reverse=True) == [(key, b"v")]
    transaction.clear_range(key, key + b"\0")
    transaction.add(b"count", ZERO)
    await transaction.commit()
    assert await db.transaction().get(key) is None


async def _set(transaction: Transaction, key: bytes) -> None:
    transaction.set(key, b"v")


@needs_leader
@scenario_test
async def test_a_range_that_an_own_clear_answers_makes_no_conflict(db: Database) -> None:
    transaction = db.transaction()
    await transaction.get(b"elsewhere")
    transaction.clear_range(b"a", b"b")
    assert await transaction.get_range(b"a", b"b") == []
    transaction.set(b"own", b"1")
    assert await transaction.get_range(b"own", b"own\0") == [(b"own", b"1")]
    await put(db, a1=b"1", own=b"2")
    await transaction.commit()


@needs_leader
@scenario_test
async def test_an_iterator_that_is_left_early_reads_and_conflicts_with_little(db: Database) -> None:
    await put(db, **{f"k{number:04}": b"" for number in range(1200)})
    transaction = db.transaction()
    async for key, _ in transaction.range(b"k", b"l"):
        if key == b"k0001":
            break
    transaction.set(b"z", b"")
    await put(db, k1100=b"new")
    await transaction.commit()
    transaction = db.transaction()
    assert len([row async for row in transaction.range(b"k", b"l")]) == 1200
    assert [key async for key, _ in transaction.range(b"k", b"l", limit=2, reverse=True)] == [b"k1199", b"k1198"]


@needs_leader
@scenario_test
async def test_a_version_that_was_not_committed_cannot_be_read(db: Database) -> None:
    version = await put(db, a=b"1")
    assert await db.read_version() == version
    with pytest.raises(Rejected, match="has not been committed"):
        await db.transaction().set_read_version(version + 1)
    transaction = db.transaction()
    await transaction.get(b"a")
    with pytest.raises(Rejected, match="read version already"):
        await transaction.set_read_version(version)


# -- the replaced values


@pytest.mark.parametrize("analysed", [False, True])
@pytest.mark.parametrize("planned_once", [False, True])
def test_i20_a_read_at_a_version_reads_one_replaced_value_of_many(
    settings: Settings, sql: Sql, planned_once: bool, analysed: bool
) -> None:
    for key in ("'hot'", "NULL"):
        sql.execute(f"INSERT INTO kv_undo SELECT i % 2, {key}, i, 'x' FROM generate_series(1, 20000) AS i")
    sql.execute("UPDATE leader_lease SET durable_version = 30000")
    if analysed:
        sql.execute("ANALYZE")
    fetched = "SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables WHERE relname LIKE 'kv_undo__'"
    with open_session(settings, "test", writes=True) as conn, conn.transaction():
        if planned_once:
            conn.execute(statement("session", "plan_once"))
        found = conn.execute(statement("kv", "version_at"), [100]).fetchone()
        assert found is not None and found[-1] == 100
        conn.execute(statement("kv", "read_keys_at"), [[b"hot"], [100], None]).fetchone()
        assert int(value(conn, fetched)) <= 4


def grow(sql: Sql) -> None:
    """Makes the filled partition large enough, and the last turn long enough ago, for the partitions to take turns."""
    sql.execute(
        "INSERT INTO kv_undo SELECT undo_part, decode(md5(i::text), 'hex'), -1, decode(repeat('00', 1500), 'hex')"
        "  FROM leader_lease, generate_series(1, 1500) AS i"
    )
    sql.execute("UPDATE kv_undo_floor SET changed_at = changed_at - interval '1 minute'")


def turn(sql: Sql) -> tuple[int, int] | None:
    """Has the partitions take turns as the leader does; returns the partition that is filled now, and the floor."""
    sql.execute("SELECT keep_undo(epoch, term_id) FROM leader_lease")
    return sql.execute("SELECT undo_part, floor FROM leader_lease, kv_undo_floor").fetchone()


@needs_leader
@scenario_test
async def test_i20_the_partitions_of_replaced_values_take_turns(db: Database, sql: Sql) -> None:
    for number in range(3):
        await put(db, a=b"%d" % number)
    reader = db.transaction()
    await reader.get(b"a")
    assert turn(sql) == (0, 0), "neither old nor large"
    grow(sql)
    assert turn(sql) == (1, 0), "the older partition is kept"
    await put(db, a=b"later")
    assert await reader.get(b"b") is None
    assert turn(sql) == (1, 0), "not twice within a time limit"
    grow(sql)
    assert turn(sql) == (0, 3), "now the older one is emptied"
    assert sql.execute("SELECT count(*) FROM kv_undo_0").fetchone() == (0,)
    assert await reader.get(b"c") is None, "the version from which on values are kept"
    early = db.transaction()
    with pytest.raises(TooOld):
        await early.set_read_version(2)
    await put(db, a=b"latest")
    grow(sql)
    assert turn(sql) == (1, 4)
    with pytest.raises(TooOld):
        await reader.get(b"d")


@needs_leader
@scenario_test
async def test_i20_a_session_that_reads_for_long_delays_the_turn_but_no_commit(
    db: Database, sql: Sql, other: Sql
) -> None:
    await put(db, a=b"1")
    grow(sql)
    with other.transaction():
        other.execute("LOCK TABLE kv_undo IN ACCESS SHARE MODE")  # as pg_dump does
        assert turn(sql) == (0, 0)
        await put(db, a=b"2")
    assert turn(sql) == (0, 0), "the next attempt comes later"
    grow(sql)
    assert turn(sql) == (1, 0)


def test_i20_an_operator_can_empty_the_replaced_values_and_without_the_right_the_leader_says_so(
    settings: Settings, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    sql.execute("DROP ROLE IF EXISTS leading_role; CREATE ROLE leading_role LOGIN")
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"operator": ["leading_role"]}, dry_run=False)
    operator = replace(settings, dsn=make_conninfo(settings.dsn, user="leading_role"))
    with caplog.at_level("INFO"), open_session(operator, "leader run", writes=True) as conn:
        term = lease.take_over(conn, "pgcoord", "test", 600, lock_held=True)
        assert term
        leader = Resolver(conn, term)
        grow(sql)
        leader._keep_undo()
        assert sql.execute("SELECT undo_part FROM leader_lease").fetchone() == (1,)
        sql.execute("REVOKE TRUNCATE ON kv_undo_0 FROM leading_role")
        for _ in range(2):
            grow(sql)
            leader._keep_undo()
            leader._keep_undo()  # not yet time to try again
        sql.execute("GRANT TRUNCATE ON kv_undo_0 TO leading_role")
        grow(sql)
        leader._keep_undo()
    told = [record.getMessage() for record in caplog.records if record.name == "pgcoord.resolver"]
    assert len(told) == 2
    assert "permission denied for table kv_undo_0; the schema owner can grant it" in told[0]
    assert told[1].startswith("replaced values are emptied again, after 2 attempts")


@needs_leader
@scenario_test
async def test_i4_a_direct_commit_during_the_turn_is_rolled_back(db: Database, sql: Sql, other: Sql) -> None:
    await put(db, a=b"1")
    grow(sql)
    with other.transaction():
        # The turn, not yet committed: a direct commit would store the replaced value in the partition before.
        other.execute("UPDATE leader_lease SET undo_part = 1")
        writing = asyncio.ensure_future(put(db, a=b"2"))
        while not sql.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall():
            await asyncio.sleep(0.01)
    assert await writing == 2
    assert sql.execute("SELECT undo_part FROM kv_undo WHERE key = 'a' AND valid_through = 1").fetchall() == [(1,)]


@needs_leader
@scenario_test
async def test_i4_without_the_floor_no_earlier_version_can_be_read(db: Database, sql: Sql) -> None:
    await put(db, a=b"1")
    reader = db.transaction()
    await reader.get(b"a")
    sql.execute("DELETE FROM kv_undo_floor")  # as a crash of the server leaves it
    assert await reader.get(b"b") is None, "nothing was committed since"
    await put(db, b=b"2")
    with pytest.raises(TooOld):
        await reader.get(b"c")
    sql.execute("SELECT keep_undo(epoch, term_id) FROM leader_lease")
    reader = db.transaction()
    await reader.get(b"a")
    await put(db, a=b"3")
    assert await reader.get(b"b") == b"2"


@needs_leader
@scenario_test
async def test_i4_a_version_of_another_history_cannot_be_read(db: Database, sql: Sql) -> None:
    await put(db, a=b"1")
    await put(db, a=b"2")
    reader = db.transaction()
    await reader.get(b"a")
    sql.execute("UPDATE leader_lease SET last_term_id = gen_random_uuid()")  # as a promoted standby may have it
    sql.execute("UPDATE leader_history SET last_version = 1")
    with pytest.raises(TooOld, match="lost with its term"):
        await reader.get(b"b")
    sql.execute("UPDATE leader_history SET last_version = 2")
    assert await reader.get(b"b") is None, "the new term went on from where the reader's ended"
