"""Direct commits: they write what the leader would, exclude its batches, and fall back to the queue."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pgcoord_cli.core.commits import codec, mutations
from pgcoord_cli.core.commits.codec import Mutation, Op, Request
from pgcoord_cli.core.commits.recent_commits import stored_writes
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.kv import direct_commit
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.kv.submissions import PendingCommit, Submitter
from pgcoord_cli.core.leader import lease, resolver
from pgcoord_cli.core.leader.lease import Term, read_lease
from pgcoord_cli.core.leader.resolver import Resolver
from pgcoord_cli.db.callback_connection import Answer
from pgcoord_cli.db.sqlfiles import sql as statement
from pgcoord_cli.errors import Conflict, Fenced, Rejected
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, until_async, value
from tests.postgres.commit_scenarios import (
    Data,
    Sql,
    data,
    leader_thread,
    needs_leader,
    put,
    requests,
    run_scenario,
    scenario_test,
)

if TYPE_CHECKING:
    from tests.conftest import StartLeader

FOR_EVER = 10 * TIMEOUT

LOCKS = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND classid = 'commit_requests'::regclass"
)
"""Counts the holders of the lock that keeps direct commits and the leader apart."""


def paths(sql: Sql) -> list[str]:
    """Returns `direct` or `queue` for each committed request in id order. Only queued ones have a reply channel."""
    found = sql.execute("SELECT reply_channel FROM commit_requests WHERE status = 'committed' ORDER BY id")
    return ["direct" if channel is None else "queue" for (channel,) in found]


@pytest.fixture
def term(settings: Settings, leader_conn: Sql) -> Term:
    """Takes the lease, without a resolver."""
    term = lease.take_over(leader_conn, "pgcoord", "test", 600, lock_held=True)
    assert term
    return term


@pytest.fixture
def leader_conn(settings: Settings) -> Iterator[Sql]:
    with open_session(replace(settings, lock_timeout=0, statement_timeout=0), "leader run", writes=True) as conn:
        yield conn


@pytest.fixture
def leader(leader_conn: Sql, term: Term) -> Resolver:
    """A resolver that works only when the test calls it."""
    return Resolver(leader_conn, term)


def commit_directly(
    conn: Sql, version: int, key: bytes = b"k", *, reads: tuple[bytes, ...] = (), term_id: UUID | None = None
) -> Any:
    """Commits b"v" under a key in the caller's transaction; returns its version, or None if it was enqueued."""
    arguments = [
        uuid4(),
        1,
        term_id or last_term(conn),
        version,
        list(reads),
        [],
        [],
        [],
        [],
        [],
        [key],
        [b"v"],
        "reply",
    ]
    row = psycopg.RawCursor(conn).execute(statement("commits", "commit_directly"), arguments).fetchone()
    assert row
    return row[0]


def last_term(conn: Sql) -> UUID:
    (term_id,) = conn.execute("SELECT last_term_id FROM pgcoord.leader_lease").fetchone() or (None,)
    assert isinstance(term_id, UUID)
    return term_id


# -- the same result as by the leader


@needs_leader
def test_i5_a_direct_commit_gets_the_next_version(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        assert [await put(db, a=b"1"), await put(db, a=b"2", b=b"3")] == [1, 2]
        assert await db.transaction().get(b"a") == b"2"

    run_scenario(settings, scenario)
    assert paths(sql) == ["direct", "direct"]
    assert data(sql) == {b"a": b"2", b"b": b"3"}
    assert value(sql, "SELECT durable_version FROM leader_lease") == 2
    assert value(sql, "SELECT bool_and(created_at <= resolved_at) FROM commit_requests")


small = st.binary(max_size=3)
sized = st.sampled_from([255, 256, 65_535, 65_536]).map(lambda length: b"x" * length)
operand = small | sized
interval = st.tuples(small, small | st.none())
mutation = (
    st.tuples(st.just(Op.SET), small, operand)
    | st.tuples(st.just(Op.CLEAR), small, st.none())
    | st.tuples(st.just(Op.CLEAR_RANGE), small, small | st.none())
)
plain_requests = st.builds(
    lambda keys, ranges, changes: Request(keys, ranges, (), tuple(Mutation(*change) for change in changes)),
    st.lists(small, max_size=20).map(tuple),
    st.lists(interval, max_size=20).map(tuple),
    st.lists(mutation, min_size=1, max_size=20),
)


@given(plain_requests)
@hypothesis_settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_direct_commit_stores_the_payload_that_a_client_would_have_sent(settings: Settings, request: Request) -> None:
    writes = mutations.fold(request.mutations)
    net = [
        *(Mutation(Op.CLEAR_RANGE, begin, end) for begin, end in writes.ranges),
        *(Mutation(Op.CLEAR, key, None) for key in writes.removed),
        *(Mutation(Op.SET, key, written) for key, written in writes.written.items()),
    ]
    with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as conn:
        cursor = psycopg.RawCursor(conn)
        packed = cursor.execute(
            "SELECT packed_request($1::bytea[], $2, $3, $4, $5, $6, $7, $8)",
            [
                list(request.read_keys),
                *map(list, columns_of(request.read_ranges)),
                *map(list, columns_of(writes.ranges)),
                writes.removed,
                *map(list, columns_of(writes.written.items())),
            ],
        ).fetchone()
    assert packed == (codec.encode(request._replace(mutations=tuple(net))),)


def columns_of(pairs: Any) -> list[tuple[Any, ...]]:
    return list(zip(*pairs, strict=True)) or [(), ()]


@needs_leader
@scenario_test
async def test_a_direct_commit_clears_ranges_and_keys_before_it_writes(db: Database, sql: Sql) -> None:
    await put(db, a=b"1", b=b"2", c=b"3", d=b"4", y=b"5", z=b"6")
    tr = db.transaction()
    await tr.get_range(b"a", b"c")
    tr.set(b"b", b"hidden by the range")
    tr.clear_range(b"b", b"d")
    tr.set(b"c", b"new")
    tr.clear(b"a")
    tr.clear_range(b"y", None)
    await tr.commit()
    assert paths(sql) == ["direct", "direct"]
    assert data(sql) == {b"c": b"new", b"d": b"4"}


@needs_leader
@pytest.mark.parametrize(
    "work",
    [
        lambda tr: tr.add(b"k", b"\x01"),
        lambda tr: tr.set_versionstamped_value(b"k", bytes(14)),
        lambda tr: (tr.set(b"k", b""), tr.add_write_conflict_key(b"j")),
        lambda tr: tr.set(b"k", bytes(direct_commit.MAX_BYTES)),
    ],
)
def test_requests_that_need_the_leader_are_enqueued(
    settings: Settings, sql: Sql, work: Callable[[Transaction], Any]
) -> None:
    async def scenario(db: Database) -> None:
        tr = db.transaction()
        work(tr)
        assert await tr.commit() == 1

    run_scenario(settings, scenario)
    assert paths(sql) == ["queue"]


@needs_leader
@scenario_test
async def test_a_direct_commit_wakes_the_watches(db: Database, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "POLL_SECONDS", FOR_EVER)
    tr = db.transaction()
    watch = await tr.watch(b"k")
    await tr.commit()
    await put(db, other=b"1")
    await put(db, k=b"1")
    await asyncio.wait_for(watch, TIMEOUT)
    assert paths(sql) == ["direct", "direct"]


@needs_leader
@pytest.mark.parametrize(("default", "during"), [("on", "on"), ("off", "on"), ("remote_write", "remote_write")])
def test_i3_a_direct_commit_has_the_durability_of_the_database_and_at_least_survives_a_crash(
    settings: Settings, sql: Sql, default: str, during: str
) -> None:
    sql.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " NEW.value = convert_to(current_setting('synchronous_commit'), 'UTF8'); RETURN NEW; END $$"
    )
    sql.execute("CREATE TRIGGER note BEFORE INSERT ON kv FOR EACH ROW EXECUTE FUNCTION note()")
    sql.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {sql.info.dbname} SET synchronous_commit = {default}")
    run_scenario(settings, lambda db: put(db, k=b""))
    assert paths(sql) == ["direct"]
    assert data(sql) == {b"k": during.encode()}


# -- never beside the leader


def another_commit(sql: Sql) -> None:
    sql.execute("UPDATE leader_lease SET durable_version = durable_version + 1")


def next_epoch(sql: Sql) -> None:
    sql.execute("UPDATE leader_lease SET epoch = epoch + 1")


def lease_run_out(sql: Sql) -> None:
    sql.execute("UPDATE leader_lease SET expires_at = clock_timestamp()")


def lease_released(sql: Sql) -> None:
    sql.execute("UPDATE leader_lease SET term_id = NULL, leader_addr = NULL")


def leader_at_work(sql: Sql) -> None:
    sql.execute("SELECT pg_advisory_lock_shared('commit_requests'::regclass::oid::integer, 0)")


@pytest.mark.parametrize("happens", [another_commit, next_epoch, lease_run_out, lease_released, leader_at_work])
@pytest.mark.usefixtures("term")
def test_i2_a_direct_commit_that_is_not_admitted_is_enqueued(
    settings: Settings, sql: Sql, happens: Callable[[Sql], None]
) -> None:
    happens(sql)
    with psycopg.connect(settings.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
        conn.execute('LISTEN "pgcoord.commits"')
        assert commit_directly(conn, 0, reads=(b"r",)) is None
        assert [notification.channel for notification in conn.notifies(timeout=TIMEOUT, stop_after=1)] == [
            "pgcoord.commits"
        ]
    assert requests(sql) == [("pending", None)]
    assert data(sql) == {}
    (payload, reply) = sql.execute("SELECT payload, reply_channel FROM commit_requests").fetchone() or (b"", "")
    assert codec.decode(payload) == Request((b"r",), (), (), (Mutation(Op.SET, b"k", b"v"),))
    assert reply == "reply"


@pytest.mark.usefixtures("term")
def test_i2_on_a_copy_of_the_lease_no_direct_commit_is_made_and_no_batch_settled(sql: Sql, leader: Resolver) -> None:
    """As on a standby that was promoted: the term is the one that clients have read under, its versions may differ."""
    assert commit_directly(sql, 0) == 1
    sql.execute("UPDATE leader_lease SET server_started_at = server_started_at - interval '1 day'")
    assert commit_directly(sql, 1) is None
    with pytest.raises(Fenced):
        leader.resolve_batch()
    assert requests(sql) == [("committed", 1), ("pending", None)]


@contextmanager
def direct_commit_left_open(settings: Settings) -> Iterator[None]:
    """Makes a direct commit by hand in a transaction that stays open; expects that its session is terminated."""
    with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as client:
        assert commit_directly(client, 0) == 1
        client.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        yield
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")


def test_a_leader_whose_renewal_is_blocked_by_a_direct_commit_ends_that_session_and_goes_on(
    settings: Settings, sql: Sql, start_leader: StartLeader
) -> None:
    leader = start_leader("only", "--ttl", "2s")
    leader.wait_for("elected epoch 1")
    ran_out = value(sql, "SELECT expires_at FROM leader_lease")
    with direct_commit_left_open(settings):
        until(lambda: value(sql, "SELECT renewed_at > %s FROM leader_lease", ran_out))
    assert value(sql, "SELECT epoch FROM leader_lease") == 1
    assert data(sql) == {}
    leader.wait_for(" WARNING [leader] only: terminated a session that was idle in a direct commit")


def test_a_candidate_whose_election_is_blocked_by_a_direct_commit_ends_that_session_and_leads(
    settings: Settings, sql: Sql, start_leader: StartLeader
) -> None:
    first = start_leader("first", "--ttl", "2s")
    first.wait_for("elected epoch 1")
    second = start_leader("second", "--ttl", "1s")
    second.wait_for("candidate:")
    with direct_commit_left_open(settings):
        first.signal(signal.SIGKILL)
        second.wait_for("elected epoch 2")


@pytest.mark.usefixtures("term")
@pytest.mark.parametrize("happens", [another_commit, next_epoch, lease_run_out, lease_released])
def test_i2_a_change_of_the_lease_during_a_direct_commit_rolls_it_back(
    settings: Settings, sql: Sql, happens: Callable[[Sql], None]
) -> None:
    """The function has passed its checks and waits for a row of `kv`; then the lease or the version changes."""

    async def scenario() -> None:
        await until_async(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE NOT granted"))
        happens(sql)
        holder.rollback()

    async def both() -> Any:
        committing = asyncio.to_thread(commit_directly, conn, 0)
        return await asyncio.gather(committing, scenario(), return_exceptions=True)

    sql.execute("INSERT INTO kv VALUES ('k', 'old')")
    with (
        psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as holder,
        psycopg.connect(settings.dsn, autocommit=True, options="-c search_path=pgcoord") as conn,
    ):
        holder.execute("SELECT FROM kv FOR UPDATE")
        error, _ = asyncio.run(both())
    assert isinstance(error, psycopg.Error)
    assert error.sqlstate == resolver.FENCED
    assert requests(sql) == []
    assert data(sql) == {b"k": b"old"}


def test_i2_a_direct_commit_that_was_rolled_back_is_enqueued(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> int:
        with leader_thread(settings):
            await put(db, k=b"0")
            with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as holder:
                holder.execute("SELECT FROM kv FOR UPDATE")
                commit = asyncio.create_task(put(db, k=b"1"))
                await until_async(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE NOT granted"))
                sql.execute("UPDATE leader_lease SET epoch = epoch + 1, expires_at = clock_timestamp()")
        with leader_thread(settings):
            return await commit

    assert run_scenario(settings, scenario) == 2
    assert paths(sql) == ["direct", "queue"]
    assert data(sql) == {b"k": b"1"}


def test_i1_the_leader_adds_direct_commits_to_its_window_before_it_decides(sql: Sql, leader: Resolver) -> None:
    leader.resolve_batch()
    for version in range(5):
        assert commit_directly(sql, version, b"k%d" % version) == version + 1
    for read_version in range(6):
        request = Request((b"k3",), (), (), (Mutation(Op.SET, b"other", b"v"),))
        enqueue(sql, codec.encode(request), read_version)
    assert leader.resolve_batch() == 6
    queued = requests(sql)[5:]
    assert queued == [*[("conflict", None)] * 4, ("committed", 6), ("committed", 7)]


def enqueue(sql: Sql, payload: bytes, read_version: int) -> None:
    sql.execute(
        """
        INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, reply_channel)
        SELECT gen_random_uuid(), epoch, last_term_id, %s, %s, 'r' FROM leader_lease
        """,
        [read_version, payload],
    )


def test_i8_a_new_leader_loads_direct_commits_into_its_window(sql: Sql, leader_conn: Sql, leader: Resolver) -> None:
    for version in range(5):
        commit_directly(sql, version, b"k%d" % version)
    successor = Resolver(leader_conn, lease.take_over(leader_conn, "pgcoord", "b", 600, lock_held=True) or leader._term)
    for read_version in range(6):
        enqueue(sql, codec.encode(Request((b"k3",), (), (), (Mutation(Op.SET, b"o", b"v"),))), read_version)
    successor.resolve_batch()
    assert [status for status, _ in requests(sql)[5:]] == ["conflict"] * 4 + ["committed"] * 2


def test_i1_a_direct_commit_between_claim_and_settlement_rolls_the_batch_back_which_is_decided_again(
    sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock would prevent this; here the leader cannot get it, so that only the fence protects the data."""
    sql.execute("SELECT pg_advisory_lock('commit_requests'::regclass::oid::integer, 0)")
    monkeypatch.setattr(resolver, "BLOCK_TIMEOUT", b"1ms")
    enqueue(sql, codec.encode(Request((b"k",), (), (), (Mutation(Op.SET, b"stale", b"v"),))), 0)
    enqueue(sql, codec.encode(Request((), (), (), (Mutation(Op.SET, b"blind", b"v"),))), 0)
    decide = resolver.decide

    def decide_during_a_direct_commit(*arguments: Any) -> Any:
        verdicts = decide(*arguments)
        monkeypatch.setattr(resolver, "decide", decide)
        assert commit_directly(sql, 0) == 1
        return verdicts

    monkeypatch.setattr(resolver, "decide", decide_during_a_direct_commit)
    while leader.resolve_batch():
        pass
    assert requests(sql) == [("conflict", None), ("committed", 2), ("committed", 1)]
    assert data(sql) == {b"k": b"v", b"blind": b"v"}


def test_the_leader_excludes_direct_commits_only_while_it_works(
    sql: Sql, leader: Resolver, leader_conn: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[Any] = []
    decide = resolver.decide

    def count_holders(*arguments: Any) -> Any:
        during.append(value(sql, LOCKS))
        return decide(*arguments)

    monkeypatch.setattr(resolver, "decide", count_holders)
    blind = codec.encode(Request((), (), (), (Mutation(Op.SET, b"k", b"v"),)))
    enqueue(sql, blind, 0)
    leader.resolve_batch()
    assert (during, value(sql, LOCKS)) == ([1], 0), "after a single request the lock is released"
    enqueue(sql, blind, 0)
    enqueue(sql, blind, 0)
    leader.resolve_batch()
    assert (during, value(sql, LOCKS)) == ([1, 1], 1), (
        "after two requests at once the lock is kept, since more are likely"
    )
    leader.resolve_batch()
    assert value(sql, LOCKS) == 0, "an empty claim releases the lock"
    leader.resolve_batch(expected=False)
    assert (len(during), value(sql, LOCKS)) == (2, 0)


def test_a_leader_without_the_lock_tries_for_it_again_with_each_batch(
    sql: Sql, leader: Resolver, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct commit that is stuck ends some time. Until the leader has the lock, others can roll its batches back."""
    monkeypatch.setattr(resolver, "BLOCK_TIMEOUT", b"1ms")
    shared = f"{LOCKS} AND mode = 'ShareLock'"
    blind = codec.encode(Request((), (), (), (Mutation(Op.SET, b"k", b"v"),)))
    with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as holder:
        holder.execute("SELECT pg_advisory_xact_lock('commit_requests'::regclass::oid::integer, 0)")
        for _ in range(2):
            enqueue(sql, blind, 0)
        assert (leader.resolve_batch(), value(sql, shared)) == (2, 0)
        assert leader._block_timeout == resolver.BLOCK_RETRY_TIMEOUT, "the long wait is not repeated for each batch"
    for _ in range(2):
        enqueue(sql, blind, 0)
    assert (leader.resolve_batch(), value(sql, shared)) == (2, 1)
    assert leader._block_timeout == resolver.BLOCK_TIMEOUT


def test_the_limit_of_the_lock_wait_does_not_apply_to_a_locked_table(
    sql: Sql, leader: Resolver, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ALTER TABLE of an operator is no direct commit: the leader waits for it, and later releases its own lock."""
    monkeypatch.setattr(resolver, "BLOCK_TIMEOUT", b"1ms")
    leader.resolve_batch()
    enqueue(sql, codec.encode(Request((), (), (), (Mutation(Op.SET, b"k", b"v"),))), 0)
    with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as holder, ThreadPoolExecutor(1) as pool:
        holder.execute("LOCK TABLE commit_requests IN ACCESS EXCLUSIVE MODE")
        batch = pool.submit(leader.resolve_batch)
        until(
            lambda: value(
                sql, "SELECT count(*) FROM pg_locks WHERE relation = 'commit_requests'::regclass AND NOT granted"
            )
        )
        holder.rollback()
        assert batch.result(TIMEOUT) == 1
    leader.resolve_batch()
    assert value(sql, LOCKS) == 0


def test_a_poll_without_a_notification_takes_no_lock(sql: Sql, leader: Resolver, settings: Settings) -> None:
    """A direct commit in progress holds the lock, so the leader would wait if it asked for it."""
    leader.resolve_batch(expected=False)
    with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as client:
        assert commit_directly(client, 0) == 1
        assert leader.resolve_batch(expected=False) == 0
    assert leader.resolve_batch(expected=False) == 0
    assert leader.durable_version == 1


def test_i8_the_floors_rise_without_any_queued_request(
    sql: Sql, leader: Resolver, leader_conn: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with direct commits only, a successor reads no more than the window, and the queue floor rises."""
    monkeypatch.setattr(resolver, "STORE_FLOORS_AFTER", 10)
    monkeypatch.setattr(resolver, "OBSERVE_AFTER", 10)
    for version in range(40):
        commit_directly(sql, version)
        sql.execute("UPDATE commit_requests SET resolved_at = now() + %s * interval '1 s' WHERE id > %s", [version] * 2)
        leader.resolve_batch(expected=False)
    stored = read_lease(leader_conn)
    assert stored.durable_version == 40
    assert stored.conflict_floor > 20
    assert stored.window_start_id > 20
    assert stored.queue_floor_id > 20
    assert [period.version for period in leader._recent.periods] == list(range(35, 41)), (
        "one commit a second, for the six seconds of the window"
    )


def test_i2_a_superseded_leader_raises_no_floors(sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "STORE_FLOORS_AFTER", 0)
    commit_directly(sql, 0)
    next_epoch(sql)
    with pytest.raises(Fenced):
        leader.resolve_batch(expected=False)


# -- when a client tries a direct commit


@needs_leader
def test_i1_competing_direct_commits_lose_no_update(settings: Settings, sql: Sql) -> None:
    """Six clients with a connection each; every stored commit is one increment, in version order."""

    async def increment(tr: Transaction) -> None:
        tr.set(b"n", b"%d" % (int(await tr.get(b"n") or 0) + 1))

    async def client(commits: int) -> None:
        async with await open_database(settings, pool_size=1) as db:
            for _ in range(commits):
                await db.run(increment)

    async def scenario() -> None:
        await asyncio.gather(*(client(25) for _ in range(6)))

    asyncio.run(scenario())
    assert data(sql) == {b"n": b"150"}
    stored = sql.execute(
        "SELECT commit_version, payload FROM commit_requests WHERE commit_version IS NOT NULL ORDER BY commit_version"
    ).fetchall()
    assert [version for version, _ in stored] == list(range(1, 151))
    assert replayed(payload for _, payload in stored) == {b"n": b"150"}
    assert {stored_writes(payload, version)[0][0] for version, payload in stored} == {b"n"}


def replayed(payloads: Iterator[bytes]) -> Data:
    held: Data = {}
    for payload in payloads:
        for _, key, written in codec.decode(payload).mutations:
            assert int(written or 0) == int(held.get(key, b"0")) + 1
            held[key] = written or b""
    return held


@needs_leader
def test_a_client_uses_the_queue_for_a_while_after_a_direct_commit_fell_back(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_commit, "PAUSE_SECONDS", FOR_EVER)

    async def scenario(db: Database) -> None:
        late = db.transaction()
        await late.get(b"k")
        async with await open_database(settings) as another:
            await put(another, j=b"1")
        late.set(b"k", b"1")
        await late.commit()
        await put(db, k=b"2")
        assert paths(sql) == ["direct", "queue", "queue"]
        db._submitter._direct_backoff.fell_back(-FOR_EVER * 2)
        # The leader releases its lock only after it has settled the request before this one.
        await until_async(lambda: value(sql, LOCKS) == 0)
        await put(db, k=b"3")
        assert paths(sql)[3:] == ["direct"]

    run_scenario(settings, scenario)


@needs_leader
@scenario_test
async def test_several_commits_at_once_are_enqueued(db: Database, sql: Sql) -> None:
    await put(db, a=b"0")
    await asyncio.gather(*(put(db, **{f"k{number}": b"1"}) for number in range(5)))
    assert paths(sql) == ["direct", *["queue"] * 5]


@needs_leader
def test_i6_a_direct_commit_that_postgresql_refuses_is_rejected_by_the_leader(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_KEY_BYTES", 2_650)

    async def scenario(db: Database) -> None:
        tr = db.transaction()
        tr.set(bytes(2_650), b"")
        with pytest.raises(Rejected):
            await tr.commit()

    run_scenario(settings, scenario)
    assert [status for status, _ in requests(sql)] == ["rejected"]


# -- rule I3: the outcome


def lose_the_answer(monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any]) -> None:
    """Loses the answer to each direct commit; calls `before` first."""
    on_direct_answer = Submitter._on_direct_answer

    def lose(submitter: Submitter, commit: PendingCommit, _: Answer) -> None:
        before()
        on_direct_answer(submitter, commit, psycopg.OperationalError("the connection is lost"))

    monkeypatch.setattr(Submitter, "_on_direct_answer", lose)


@needs_leader
def test_i3_a_direct_commit_whose_answer_was_lost_is_found_and_applied_once(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_answer(monkeypatch, lambda: None)

    async def scenario(db: Database) -> None:
        assert await put(db, k=b"1") == 1

    run_scenario(settings, scenario)
    assert requests(sql) == [("committed", 1)]


@needs_leader
@pytest.mark.parametrize("while_it_waits", ["for the data", "for the lease"])
def test_i3_a_direct_commit_whose_session_was_ended_is_repeated_and_applies_once(
    settings: Settings, sql: Sql, while_it_waits: str
) -> None:
    lock = "SELECT FROM kv FOR UPDATE" if while_it_waits == "for the data" else "SELECT FROM leader_lease FOR UPDATE"
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'commit_directly'"
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'pgcoord/client' AND datname = current_database()"
    )

    async def scenario(db: Database) -> None:
        await put(db, k=b"0")
        with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as holder:
            holder.execute(lock)
            commit = asyncio.create_task(put(db, k=b"1"))
            await until_async(lambda: value(sql, waiting))
            sql.execute(end)
            await until_async(lambda: not value(sql, waiting))
        assert await commit == 2

    run_scenario(settings, scenario)
    assert requests(sql)[0] == ("committed", 1)
    assert [status for status, _ in requests(sql)] == ["committed", "committed"]
    assert data(sql) == {b"k": b"1"}


@needs_leader
@scenario_test
async def test_i3_a_conflict_is_still_a_conflict(db: Database, sql: Sql) -> None:
    loser = db.transaction()
    await loser.get(b"k")
    await put(db, k=b"1")
    loser.set(b"k", b"2")
    with pytest.raises(Conflict):
        await loser.commit()
    assert data(sql) == {b"k": b"1"}


# -- rights


def test_a_role_without_the_right_to_commit_cannot_commit_directly(settings: Settings, sql: Sql) -> None:
    sql.execute("DROP ROLE IF EXISTS passer_by")
    sql.execute("CREATE ROLE passer_by")
    try:
        sql.execute("GRANT USAGE ON SCHEMA pgcoord TO passer_by")
        sql.execute("SET ROLE passer_by")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="commit_directly"):
            commit_directly(sql, 0, term_id=uuid4())
    finally:
        sql.execute("RESET ROLE")
        sql.execute("DROP OWNED BY passer_by")
        sql.execute("DROP ROLE passer_by")


def refuse_direct_commits(sql: Sql) -> None:
    """Makes direct commits fail as for a role without the right. A sequence, which never rolls back, counts them."""
    sql.execute("CREATE SEQUENCE tries")
    sql.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.status = 'committed' THEN"
        " PERFORM nextval('pgcoord.tries'); RAISE insufficient_privilege; END IF; RETURN NEW; END $$"
    )
    sql.execute("CREATE TRIGGER refuse BEFORE INSERT ON commit_requests FOR EACH ROW EXECUTE FUNCTION refuse()")


@needs_leader
def test_a_role_that_may_not_commit_directly_uses_the_queue_and_does_not_try_again(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_commit, "PAUSE_SECONDS", 0.0)

    async def scenario(db: Database) -> None:
        for number in range(3):
            await put(db, k=b"%d" % number)

    refuse_direct_commits(sql)
    run_scenario(settings, scenario)
    assert value(sql, "SELECT last_value FROM tries") == 1
    assert paths(sql) == ["queue"] * 3


PLACES = [
    "read_keys", "read_begins", "read_ends", "cleared_begins", "cleared_ends", "cleared_keys", "written_keys",
    "written_values",
]  # fmt: skip


TERM = "(SELECT last_term_id FROM pgcoord.leader_lease)"


def call_with(sql: Sql, **given: Any) -> Any:
    """Calls commit_directly with the given lists, and empty ones for the others; returns the version or None."""
    names = ", ".join(f"{place} => %s::bytea[]" for place in PLACES)
    text = f"SELECT version FROM commit_directly(gen_random_uuid(), 1, {TERM}, 0, {names}, reply_channel => 'reply')"
    row = sql.execute(text, [given.get(place, []) for place in PLACES]).fetchone()
    assert row
    return row[0]


@pytest.mark.usefixtures("term")
@pytest.mark.parametrize("place", ["read_keys", "read_begins", "cleared_begins", "cleared_keys", "written_keys"])
def test_i6_a_request_with_a_nil_key_is_left_for_the_leader_to_reject(sql: Sql, place: str) -> None:
    partner = {"read_begins": "read_ends", "cleared_begins": "cleared_ends", "written_keys": "written_values"}
    assert call_with(sql, **{place: [None], partner.get(place, place): [None]}) is None
    (payload,) = sql.execute("SELECT payload FROM commit_requests").fetchone() or (b"",)
    with pytest.raises(codec.Undecodable):
        codec.decode(payload)


@pytest.mark.usefixtures("term")
@pytest.mark.parametrize("items", ["{{a},{b}}", "[0:1]={a,b}", "[2:2]={a}", None], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_i6_an_array_that_is_not_a_list_is_refused(sql: Sql, place: str, items: str | None) -> None:
    """Otherwise the stored payload could differ from the data that is written."""
    given = dict.fromkeys(PLACES, "{x}") | {place: items}
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        call_with(sql, **given)


@pytest.mark.usefixtures("term")
@pytest.mark.parametrize("place", [place for place in PLACES if not place.endswith("_keys")] + ["written_keys"])
def test_i6_lists_of_different_length_are_refused(sql: Sql, place: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        call_with(sql, **{place: [b"x"]})


@pytest.mark.parametrize(
    "setting", ["standard_conforming_strings = off", "search_path = pg_temp", "plpgsql.extra_errors = 'all'",
                "bytea_output = escape", "transform_null_equals = on"]
)  # fmt: skip
@pytest.mark.usefixtures("term")
def test_i6_no_setting_of_the_session_changes_what_is_stored(sql: Sql, settings: Settings, setting: str) -> None:
    with psycopg.connect(settings.dsn, autocommit=True) as conn:
        conn.execute(f"SET {setting}".encode())
        names = ", ".join(f"{place} => ARRAY['{place}']::bytea[]" for place in PLACES)
        call = (
            f"SELECT version FROM pgcoord.commit_directly(gen_random_uuid(), 1, {TERM}, 0, {names}, "
            "reply_channel => 'r')"
        )
        assert conn.execute(call.encode()).fetchone() == (1,)
    (payload,) = sql.execute("SELECT payload FROM commit_requests").fetchone() or (b"",)
    assert codec.decode(payload) == Request(
        (b"read_keys",),
        ((b"read_begins", b"read_ends"),),
        (),
        (
            Mutation(Op.CLEAR_RANGE, b"cleared_begins", b"cleared_ends"),
            Mutation(Op.CLEAR, b"cleared_keys", None),
            Mutation(Op.SET, b"written_keys", b"written_values"),
        ),
    )


@pytest.mark.usefixtures("term")
def test_i6_a_large_request_is_enqueued(sql: Sql) -> None:
    for size, version in ((direct_commit.MAX_BYTES, None), (direct_commit.MAX_BYTES - 100, 1)):
        assert call_with(sql, written_keys=[b"k"], written_values=[bytes(size)]) == version
