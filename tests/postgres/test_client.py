"""The commit client: what a transaction sees, and that its caller learns its true outcome.

All commits of this file go through the queue. Direct commits are tested in test_direct_commit.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import psycopg
import pytest
from psycopg import AsyncConnection

from pgcoord_cli.core.commits import codec, recent_commits
from pgcoord_cli.core.commits.codec import Mutation, Op, Range
from pgcoord_cli.core.commits.mutations import apply, covers
from pgcoord_cli.core.commits.requests import find_request
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.async_listener import AsyncListener
from pgcoord_cli.core.database.listener import Listener
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.kv import client, submissions
from pgcoord_cli.core.kv.client import Database, Transaction
from pgcoord_cli.core.kv.direct_commit import DirectCommitBackoff
from pgcoord_cli.core.kv.hot_keys import kind_of
from pgcoord_cli.core.kv.options import TransactionOptions
from pgcoord_cli.core.kv.snapshots import RangeRead, ReadSet
from pgcoord_cli.core.kv.submissions import PendingCommit, Submitter
from pgcoord_cli.core.leader import candidate
from pgcoord_cli.db.callback_connection import Answer
from pgcoord_cli.errors import Conflict, ConnectionFailed, OutcomeUnknown, Rejected, TimeLimit, UnsuitableServer
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until_async, value
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
from tests.postgres.counting_opener import CountingOpener

if TYPE_CHECKING:
    from tests.conftest import StartLeader, TwoLeaders

pytestmark = pytest.mark.usefixtures("no_direct_commits")


@pytest.fixture
def no_direct_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables direct commits: every commit goes through the queue."""
    monkeypatch.setattr(DirectCommitBackoff, "admits", lambda *_: False)


# -- reading


@needs_leader
@scenario_test
async def test_i5_the_first_write_of_a_fresh_database_is_version_1_and_is_read_back(db: Database) -> None:
    assert await put(db, a=b"1") == 1
    tr = db.transaction()
    assert await tr.get(b"a") == b"1"
    assert await tr.get(b"b") is None
    assert tr.read_version == 1
    assert await tr.commit() == 1, "without writes, the read version is returned"


@needs_leader
@scenario_test
async def test_a_transaction_reads_its_own_writes_and_no_other_does(db: Database) -> None:
    await put(db, a=b"1", b=b"2", c=b"3")
    tr = db.transaction()
    tr.set(b"a", b"new")
    tr.clear(b"b")
    tr.set(b"bb", b"own")
    tr.add(b"c", b"\x01")
    assert [await tr.get(key) for key in (b"a", b"b", b"bb", b"c")] == [b"new", None, b"own", b"4"]
    assert await tr.get_range(b"a", b"c") == [(b"a", b"new"), (b"bb", b"own")]
    tr.clear_range(b"a", b"b")
    tr.set(b"ab", b"after")
    assert await tr.get_range(b"", None) == [(b"ab", b"after"), (b"bb", b"own"), (b"c", b"4")]
    assert await db.transaction().get_range(b"", None) == [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]
    await tr.commit()
    assert await db.transaction().get_range(b"", None) == [(b"ab", b"after"), (b"bb", b"own"), (b"c", b"4")]


@needs_leader
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 4, 100])
@scenario_test
async def test_get_range_returns_the_first_or_last_rows_including_own_writes(
    db: Database, limit: int | None, reverse: bool
) -> None:
    await put(db, a=b"1", c=b"3", e=b"5", g=b"7")

    async def rows(tr: Transaction, begin: bytes, end: bytes | None) -> list[bytes]:
        return [key for key, _ in await tr.get_range(begin, end, limit=limit, reverse=reverse)]

    def expected(*names: bytes) -> list[bytes]:
        return sorted(names, reverse=reverse)[: limit or None]  # no limit and a limit of 0 are the same

    tr = db.transaction()
    assert await rows(tr, b"", None) == expected(b"a", b"c", b"e", b"g")
    assert await rows(tr, b"a\0", b"g") == expected(b"c", b"e")
    assert await rows(tr, b"e", b"e") == []
    for key in (b"a", b"g"):
        tr.clear(key)
    assert await rows(tr, b"", None) == expected(b"c", b"e"), "the rows after the cleared ones count"
    for key in (b"b", b"f", b"z"):
        tr.set(key, b"own")
    assert await rows(tr, b"", None) == expected(b"b", b"c", b"e", b"f", b"z")
    assert await rows(tr, b"b", b"f") == expected(b"b", b"c", b"e")


@scenario_test
async def test_a_range_read_that_postgresql_would_refuse_is_refused_before_it_is_sent(db: Database) -> None:
    """Other reads would share its statement, and so its error."""
    with pytest.raises(ValueError, match="limit"):
        await db.transaction().get_range(b"", None, limit=-1)
    with pytest.raises(TypeError):
        await db.transaction().get("text")  # type: ignore[arg-type]
    with pytest.raises(Rejected):
        await db.transaction().get(b"k" * (codec.MAX_KEY_BYTES + 1))


class Model:
    """The expected data, as a dictionary."""

    def __init__(self, stored: Data) -> None:
        self.data = dict(stored)

    def mutate(self, op: Op, key: bytes, operand: bytes | None) -> None:
        if op == Op.CLEAR_RANGE:
            self.data = {kept: value for kept, value in self.data.items() if not covers((key, operand), kept)}
            return
        value = apply(op, self.data.get(key), operand or b"")
        self.data.pop(key, None)
        if value is not None:
            self.data[key] = value

    def rows(self, begin: bytes, end: bytes | None) -> list[tuple[bytes, bytes]]:
        return sorted((key, value) for key, value in self.data.items() if covers((begin, end), key))


def random_mutation(rng: random.Random, keys: Sequence[bytes]) -> Mutation:
    op = rng.choice([*[op for op in Op if op < Op.SET_VERSIONSTAMPED_KEY], Op.SET, Op.ADD])
    if op == Op.CLEAR_RANGE:
        begin, end = sorted(rng.choices(keys, k=2))
        return Mutation(op, begin, rng.choice([end, end, None]))
    return Mutation(op, rng.choice(keys), None if op == Op.CLEAR else rng.randbytes(rng.randint(1, 2)))


METHODS = {op: op.name.lower() for op in Op}


def mutate(tr: Transaction, mutation: Mutation) -> None:
    """Calls the method of the transaction for this mutation."""
    op, key, operand = mutation
    arguments = [key] if op == Op.CLEAR else [key, operand]
    getattr(tr, METHODS[op])(*arguments)


@needs_leader
@pytest.mark.parametrize("seed", range(3))
@scenario_test
async def test_i1_sequential_transactions_read_and_write_like_a_dictionary(db: Database, sql: Sql, seed: int) -> None:
    rng = random.Random(seed)
    keys = [b"", b"a", b"a\0", b"b", b"c", b"\xff"]
    model = Model({})
    for _ in range(40):
        tr = db.transaction()
        for _ in range(rng.randint(1, 8)):
            begin, end = sorted(rng.choices(keys, k=2))
            if rng.random() < 0.3:
                assert await tr.get(begin) == model.data.get(begin)
            elif rng.random() < 0.4:
                limit, reverse = rng.choice([None, 1, 2]), rng.random() < 0.5
                found = await tr.get_range(begin, end, limit=limit, reverse=reverse)
                assert found == (model.rows(begin, end)[::-1] if reverse else model.rows(begin, end))[:limit]
            else:
                mutation = random_mutation(rng, keys)
                mutate(tr, mutation)
                model.mutate(*mutation)
        await tr.commit()
        assert data(sql) == model.data


@needs_leader
@scenario_test
async def test_a_key_that_holds_the_commits_versionstamp_cannot_be_read_before_the_commit(db: Database) -> None:
    template = b"?" * 10 + b"\0\0\0\0"
    await put(db, k=b"before")
    tr = db.transaction()
    tr.set_versionstamped_value(b"k", template)
    with pytest.raises(Rejected):
        await tr.get(b"k")
    tr.append_if_fits(b"k", b"!")
    with pytest.raises(Rejected):
        await tr.get(b"k")
    with pytest.raises(Rejected):
        await tr.get_range(b"a", b"z")
    assert await tr.get_range(b"l", None) == []
    await tr.commit()
    assert await db.transaction().get(b"k") == tr.versionstamp + b"!"
    tr = db.transaction()
    tr.set_versionstamped_value(b"k", template)
    tr.clear_range(b"a", b"z")
    assert await tr.get(b"k") is None


# -- rule I4: one consistent state


@needs_leader
@scenario_test
async def test_i4_reads_with_commits_between_are_of_one_version(db: Database) -> None:
    await put(db, a=b"1", b=b"1")
    tr = db.transaction()
    assert await tr.get(b"a") == b"1"
    await put(db, b=b"2")
    await put(db, a=b"3", b=b"3", c=b"3")
    assert (await tr.get(b"b"), await tr.get(b"c")) == (b"1", None)
    assert tr.read_version == 1
    assert await tr.commit() == 1, "a transaction that writes nothing never conflicts"


@needs_leader
@scenario_test
async def test_i4_a_range_is_of_the_version_of_the_first_read(db: Database) -> None:
    await put(db, a=b"1", c=b"1")
    for change in (b"b", b"c"):
        tr = db.transaction()
        before = await tr.get_range(b"a", b"d")
        await put(db, **{change.decode(): b"new"})
        assert await tr.get_range(b"a", b"d") == before
        tr.set(b"z", b"")
        with pytest.raises(Conflict):
            await tr.commit()


@needs_leader
@scenario_test
async def test_i4_readers_beside_transfers_always_see_the_same_sum(db: Database) -> None:
    """Each read is a statement of its own, and transfers commit between them."""
    accounts = [b"account %d" % number for number in range(4)]

    async def open_accounts(tr: Transaction) -> None:
        for account in accounts:
            tr.set(account, b"100")

    await db.run(open_accounts)
    rng, done = random.Random(4), asyncio.Event()

    async def transfer(tr: Transaction) -> None:
        giver, taker = rng.sample(accounts, 2)
        for account, change in ((giver, -1), (taker, 1)):
            tr.set(account, b"%d" % (int(await tr.get(account) or 0) + change))

    async def look() -> int:
        looks = 0
        while not done.is_set():
            tr = db.transaction()
            try:
                found = [int(await tr.get(account) or 0) for account in accounts[:2]]
                found += [int(value) for _, value in await tr.get_range(accounts[2], None)]
            except Conflict:
                continue
            assert sum(found) == 400
            looks += 1
        return looks

    lookers = [asyncio.create_task(look()) for _ in range(3)]
    await asyncio.gather(*(db.run(transfer) for _ in range(60)))
    done.set()
    assert sum(await asyncio.gather(*lookers)) > 0


@needs_leader
@scenario_test
async def test_a_limited_read_conflicts_only_with_writes_of_the_part_that_it_saw(db: Database) -> None:
    await put(db, b=b"1", d=b"1", f=b"1")
    cases: list[tuple[bool, str, bool]] = [
        (False, "a", True), (False, "b", True), (False, "bb", False), (False, "d", False),
        (True, "g", True), (True, "f", True), (True, "e", False), (True, "d", False),
    ]  # fmt: skip
    for reverse, written, conflicts in cases:
        tr = db.transaction()
        [(seen, _)] = await tr.get_range(b"a", None, limit=1, reverse=reverse)
        assert seen == (b"f" if reverse else b"b")
        tr.set(b"0", b"mine")
        meanwhile = db.transaction()
        if written in ("a", "bb", "e", "g"):
            meanwhile.set(written.encode(), b"1")
            meanwhile.clear(written.encode())
        else:
            meanwhile.set(written.encode(), b"2")
        await meanwhile.commit()
        if conflicts:
            with pytest.raises(Conflict):
                await tr.commit()
        else:
            await tr.commit()


@needs_leader
@scenario_test
async def test_a_snapshot_read_makes_no_conflict(db: Database) -> None:
    await put(db, a=b"1", b=b"1")
    tr = db.transaction()
    assert await tr.get(b"a", snapshot=True) == b"1"
    assert await tr.get_range(b"", None, snapshot=True) == [(b"a", b"1"), (b"b", b"1")]
    tr.set(b"c", b"1")
    await put(db, a=b"2")
    await tr.commit()


# -- committing


@needs_leader
def test_i1_of_two_that_read_and_write_the_same_key_one_conflicts(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        first, second = db.transaction(), db.transaction()
        for tr, written in ((first, b"1"), (second, b"2")):
            await tr.get(b"k")
            tr.set(b"k", written)
        assert await first.commit() == 1
        with pytest.raises(Conflict):
            await second.commit()

    run_scenario(settings, scenario)
    assert data(sql) == {b"k": b"1"}


@needs_leader
@scenario_test
async def test_run_retries_until_there_is_no_conflict(db: Database) -> None:
    attempts = 0

    async def work(tr: Transaction) -> str:
        nonlocal attempts
        attempts += 1
        value = int(await tr.get(b"k") or 0)
        if attempts <= 3:
            await put(db, k=b"%d" % (value + 10))
        tr.set(b"k", b"%d" % (value + 1))
        return f"attempt {attempts}"

    assert await db.run(work) == "attempt 4"
    assert await db.transaction().get(b"k") == b"31"


@needs_leader
@scenario_test
async def test_run_raises_the_last_conflict_after_its_retry_limit(db: Database) -> None:
    attempts = 0

    async def work(tr: Transaction) -> None:
        nonlocal attempts
        attempts += 1
        await tr.get(b"k")
        await put(db, k=b"%d" % attempts)
        tr.set(b"k", b"mine")

    with pytest.raises(Conflict):
        await db.run(work, retry_limit=2)
    assert attempts == 3


@needs_leader
def test_run_raises_what_its_work_raises_and_writes_nothing(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        async def work(tr: Transaction) -> None:
            tr.set(b"k", b"v")
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            await db.run(work)

    run_scenario(settings, scenario)
    assert requests(sql) == []


@needs_leader
def test_run_retries_after_the_time_limit(settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(db: Database) -> None:
        attempts = 0

        async def work(tr: Transaction) -> None:
            nonlocal attempts
            attempts += 1
            await tr.get(b"k")
            tr.set(b"k", b"v")

        monkeypatch.setattr(TransactionOptions, "__post_init__", lambda _: None)
        with pytest.raises(TimeLimit):
            await db.run(work, retry_limit=0, time_limit_seconds=-1.0)
        attempts = 0
        db.options = db.options.changed(time_limit_seconds=-1.0)
        with pytest.raises(TimeLimit):
            await db.run(work, retry_limit=1)
        assert attempts == 2
        await db.run(work, time_limit_seconds=5.0)

    run_scenario(settings, scenario)
    assert requests(sql) == [("committed", 1)]


@needs_leader
@scenario_test
async def test_i6_what_is_too_large_is_rejected_before_it_is_sent(db: Database, sql: Sql) -> None:
    tr = db.transaction()
    with pytest.raises(Rejected):
        tr.set(b"k" * (codec.MAX_KEY_BYTES + 1), b"")
    with pytest.raises(Rejected):
        tr.set(b"k", b"v" * (codec.MAX_VALUE_BYTES + 1))
    with pytest.raises(Rejected):
        tr.clear_range(b"b", b"a")
    for number in range(codec.MAX_TRANSACTION_BYTES // codec.MAX_VALUE_BYTES + 1):
        tr.set(b"%d" % number, b"v" * codec.MAX_VALUE_BYTES)
    with pytest.raises(Rejected):
        await tr.commit()
    assert requests(sql) == []
    largest = db.transaction()
    largest.set(b"k" * codec.MAX_KEY_BYTES, b"v" * codec.MAX_VALUE_BYTES)
    assert await largest.commit() == 1


@needs_leader
def test_i1_concurrent_increments_add_up_exactly(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        async def increment(tr: Transaction) -> None:
            tr.set(b"n", b"%d" % (int(await tr.get(b"n") or 0) + 1))
            tr.add(b"m", b"\x01\0")

        await asyncio.gather(*(db.run(increment) for _ in range(150)))

    run_scenario(settings, scenario)
    assert data(sql) == {b"n": b"150", b"m": (150).to_bytes(2, "little")}


@needs_leader
def test_transactions_that_keep_incrementing_one_key_are_queued(settings: Settings, sql: Sql) -> None:
    async def increment(tr: Transaction) -> None:
        tr.set(b"n", b"%d" % (int(await tr.get(b"n") or 0) + 1))

    async def scenario(db: Database) -> None:
        async def increment_often() -> None:
            for _ in range(20):
                await db.run(increment)

        await asyncio.gather(*(increment_often() for _ in range(20)))

    run_scenario(settings, scenario)
    assert data(sql) == {b"n": b"400"}
    statuses = dict(sql.execute("SELECT status, count(*) FROM commit_requests GROUP BY status").fetchall())
    assert statuses["committed"] == 400
    assert statuses["conflict"] < 100, "all but one of the first twenty, and few after them"


@needs_leader
@scenario_test
async def test_a_hot_key_stays_hot_after_a_failure_and_is_cold_after_an_attempt_that_only_read(db: Database) -> None:
    outcomes = iter([RuntimeError(), None])

    async def work(tr: Transaction) -> None:
        await tr.get(b"k")
        if error := next(outcomes):
            raise error

    kind = kind_of(work)
    db._hot_keys.mark_hot(b"k", kind)
    with pytest.raises(RuntimeError):
        await db.run(work)
    assert db._hot_keys.queue_of(b"k", kind)
    await db.run(work)
    assert db._hot_keys.queue_of(b"k", kind) is None


@needs_leader
def test_one_connection_is_enough_for_many_commits_at_once(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        async def work(number: int, tr: Transaction) -> None:
            await tr.get_range(b"%d" % number, b"%d\xff" % number, limit=1)
            tr.set(b"%d" % number, b"v")

        await asyncio.gather(*(db.run(partial(work, number)) for number in range(1_000, 1_050)))

    run_scenario(settings, scenario, pool_size=1)
    assert len(data(sql)) == 50


@needs_leader
def test_no_request_is_sent_twice_without_need(settings: Settings, sql: Sql) -> None:
    """Outcomes are asked for while other requests are being sent; a request sent twice would use two ids."""

    async def scenario(db: Database) -> None:
        async def worker(number: int) -> None:
            for step in range(8):
                for _ in range(number * step % 5):
                    await db.transaction().get(b"x")
                await put(db, **{f"k{number}": b"%d" % step})

        await asyncio.gather(*(worker(number) for number in range(60)))

    run_scenario(settings, scenario)
    assert value(sql, "SELECT max(id) - count(*) FROM commit_requests") == 0


@needs_leader
def test_reads_and_writes_go_on_after_a_caller_was_cancelled(settings: Settings) -> None:
    """No answer to a cancelled task reaches another."""

    async def scenario(db: Database) -> None:
        await put(db, a=b"1", b=b"2")
        for _ in range(20):
            cancelled = [asyncio.create_task(db.transaction().get(b"a")) for _ in range(5)]
            cancelled += [asyncio.create_task(put(db, a=b"1")) for _ in range(5)]  # type: ignore[arg-type]
            await asyncio.sleep(0)
            reader = asyncio.create_task(db.transaction().get(b"b"))
            await asyncio.sleep(0)
            for task in cancelled:
                task.cancel()
            assert await reader == b"2"
        assert await put(db, c=b"3") > 1

    run_scenario(settings, scenario, pool_size=1)


# -- connections that break


def end_sessions(sql: Sql) -> int:
    """Terminates every session of the client, and returns how many there were."""
    ended = sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'pgcoord/client' AND datname = current_database()"
    )
    return ended.rowcount


@needs_leader
def test_i3_sessions_ended_while_a_commit_is_waited_for_do_not_change_its_outcome(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        await put(db, k=b"1")
        loser = db.transaction()
        await loser.get(b"k")
        loser.set(b"k", b"never")
        with psycopg.connect(settings.dsn) as holder:
            holder.execute("LOCK TABLE pgcoord.kv IN EXCLUSIVE MODE")
            winner = asyncio.create_task(put(db, k=b"2"))
            await until_async(lambda: value(sql, "SELECT count(*) FROM commit_requests WHERE status = 'pending'") == 1)
            lost = asyncio.create_task(loser.commit())
            await until_async(lambda: value(sql, "SELECT count(*) FROM commit_requests WHERE status = 'pending'") == 2)
            assert end_sessions(sql) >= 2, "the listener and at least one of the pool's"
        assert await winner == 2
        with pytest.raises(Conflict):
            await lost
        assert await put(db, after=b"3") == 3

    run_scenario(settings, scenario)
    assert [status for status, _ in requests(sql)] == ["committed", "committed", "conflict", "committed"]


@needs_leader
def test_i3_a_session_ended_in_the_middle_of_sending_is_replaced_and_the_request_applies_once(
    settings: Settings, sql: Sql
) -> None:
    async def scenario(db: Database) -> None:
        await put(db, k=b"0")
        with psycopg.connect(settings.dsn) as holder:
            holder.execute("LOCK TABLE pgcoord.commit_requests IN EXCLUSIVE MODE")
            commit = asyncio.create_task(put(db, k=b"1"))
            await until_async(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE NOT granted"))
            end_sessions(sql)
        assert await commit == 2

    run_scenario(settings, scenario)
    assert requests(sql) == [("committed", 1), ("committed", 2)]


@needs_leader
@scenario_test
async def test_reads_go_on_after_all_sessions_were_ended(db: Database, sql: Sql) -> None:
    await put(db, k=b"1")
    await asyncio.gather(*(db.transaction().get(b"k") for _ in range(20)))
    for _ in range(3):
        end_sessions(sql)
        assert await asyncio.gather(*(db.transaction().get(b"k") for _ in range(20))) == [b"1"] * 20


def lose_first_answer(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """Makes the first requests arrive while the connection breaks before their answer; runs `meanwhile` in between."""
    on_enqueued = Submitter._on_enqueue_answer
    losses: list[asyncio.Task[None]] = []

    async def lose(submitter: Submitter, batch: Sequence[PendingCommit]) -> None:
        await meanwhile()
        on_enqueued(submitter, batch, psycopg.OperationalError("the connection is lost"))

    def pass_all_but_the_first(submitter: Submitter, batch: Sequence[PendingCommit], answer: Answer) -> None:
        if losses:
            on_enqueued(submitter, batch, answer)
        else:
            losses.append(asyncio.create_task(lose(submitter, batch)))

    monkeypatch.setattr(Submitter, "_on_enqueue_answer", pass_all_but_the_first)


@needs_leader
def test_a_reply_before_the_answer_to_the_insert_is_not_lost(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two arrive over different connections, in any order; no second reply follows, and no poll."""
    monkeypatch.setattr(channels, "POLL_SECONDS", 10 * TIMEOUT)
    on_enqueued, late = Submitter._on_enqueued, []
    monkeypatch.setattr(Submitter, "_on_enqueue_answer", lambda *answer: late.append(answer))

    async def scenario(db: Database) -> None:
        assert await asyncio.wait_for(put(db, k=b"v"), TIMEOUT) == 1
        on_enqueued(*late.pop())
        commit = asyncio.create_task(put(db, k=b"w"))
        await until_async(lambda: late)
        on_enqueued(*late.pop())
        assert await asyncio.wait_for(commit, TIMEOUT) == 2

    run_scenario(settings, scenario)


@needs_leader
def test_i3_a_request_whose_answer_was_lost_is_sent_again_and_applies_once(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def settled() -> None:
        await until_async(lambda: requests(sql) == [("committed", 1)])

    lose_first_answer(monkeypatch, settled)

    async def scenario(db: Database) -> None:
        tr = db.transaction()
        tr.append_if_fits(b"k", b"once")
        assert await tr.commit() == 1

    run_scenario(settings, scenario)
    assert requests(sql) == [("committed", 1)]
    assert data(sql) == {b"k": b"once"}


@needs_leader
def test_i3_a_commit_that_was_collected_before_it_was_sent_again_is_never_reported_as_too_old(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer was lost, and the row was garbage-collected while the client could not reach the server."""

    async def settled_and_collected() -> None:
        await until_async(lambda: requests(sql) == [("committed", 1)])
        sql.execute("DELETE FROM commit_requests")
        monkeypatch.setattr(recent_commits, "CONFLICT_WINDOW", timedelta(0))

    lose_first_answer(monkeypatch, settled_and_collected)

    async def scenario(db: Database) -> int | None:
        tr = db.transaction()
        tr.append_if_fits(b"k", b"once")
        try:
            return await tr.commit()
        except OutcomeUnknown:
            return None

    # The client may have asked for the outcome before the row was deleted; then it submits nothing again.
    version = run_scenario(settings, scenario)
    assert (version, requests(sql)) in [(None, [("too_old", None)]), (1, [])]
    assert data(sql) == {b"k": b"once"}


def test_i3_a_request_that_a_crash_lost_is_submitted_again(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> int:
        commit = asyncio.create_task(put(db, k=b"v"))
        await until_async(lambda: requests(sql))
        sql.execute("DELETE FROM commit_requests")
        await until_async(lambda: requests(sql))
        with leader_thread(settings):
            return await commit

    assert run_scenario(settings, scenario) == 1
    assert requests(sql) == [("committed", 1)]


# -- calls that cannot be served, or come after the close


@needs_leader
@scenario_test
async def test_a_read_that_cannot_be_sent_fails_no_other(db: Database) -> None:
    await put(db, k=b"v")
    for limit in (2**63, 2**200):
        with pytest.raises(ValueError, match="limit"):
            await db.transaction().get_range(b"a", b"z", limit=limit)
        with pytest.raises(struct.error):
            await db._reader.read(ReadSet(ranges=(RangeRead(b"a", b"z", limit),)))
        assert await asyncio.wait_for(db.transaction().get(b"k"), TIMEOUT) == b"v"


@needs_leader
@scenario_test
async def test_closing_a_client_under_load_leaves_no_caller_waiting(db: Database) -> None:
    async def commit_repeatedly() -> None:
        while True:
            await put(db, k=b"v")

    late = db.transaction()
    await late.get(b"k")
    late.set(b"k", b"late")
    workers = [asyncio.create_task(commit_repeatedly()) for _ in range(50)]
    await put(db, first=b"v")
    await db.close()
    _, waiting = await asyncio.wait(workers, timeout=TIMEOUT)
    assert not waiting
    assert {type(worker.exception()) for worker in workers} <= {OutcomeUnknown, ConnectionFailed}
    for commit in (late.commit(), put(db, k=b"v")):
        with pytest.raises(ConnectionFailed, match="closed"):
            await asyncio.wait_for(commit, TIMEOUT)


@needs_leader
@scenario_test
async def test_a_closed_client_opens_no_connection(db: Database) -> None:
    tr = db.transaction()
    watch = await tr.watch(b"k")
    await db.close()
    await tr.commit()
    assert watch.changed.cancelled()
    assert db._listener._task is None


@needs_leader
def test_a_connection_that_does_not_answer_is_replaced(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server process is frozen: the connection stays open, and no timeout of the server takes effect."""
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.5)

    async def scenario(db: Database) -> None:
        await put(db, k=b"v")
        while db._pool._openings:
            await asyncio.gather(*db._pool._openings)
        # Only idle processes are frozen, which hold no lock of the server.
        idle = "FROM pg_stat_activity WHERE application_name = 'pgcoord/client' AND wait_event = 'ClientRead'"
        connections = len(db._pool._connections)
        await until_async(lambda: value(sql, f"SELECT count(*) {idle}") == connections + 1)
        pids = [pid for (pid,) in sql.execute(f"SELECT pid {idle} AND query NOT LIKE 'LISTEN%'".encode())]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert await asyncio.wait_for(put(db, k=b"w"), TIMEOUT) > 1
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    run_scenario(replace(settings, statement_timeout=0.5), scenario)


@needs_leader
def test_large_transactions_are_sent_in_several_batches(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "BATCH_BYTES", 150_000)
    enqueue, sizes = Submitter._enqueue, []

    def record(submitter: Submitter, batch: list[PendingCommit]) -> None:
        sizes.append(len(batch))
        enqueue(submitter, batch)

    async def scenario(db: Database) -> None:
        await put(db, first=b"v")
        monkeypatch.setattr(Submitter, "_enqueue", record)
        await asyncio.gather(*(put(db, **{f"k{number}": bytes(100_000)}) for number in range(6)))

    run_scenario(settings, scenario)
    assert sum(sizes) == 6
    assert max(sizes) <= 2


# -- outcomes that are not known


def request_id_of(error: OutcomeUnknown) -> UUID:
    """Returns the request id in the hint of the error."""
    found = re.search(r"commit show ([0-9a-f-]{36})", error.hint or "")
    assert found, error.hint
    return UUID(found[1])


def test_i3_without_a_leader_the_outcome_is_unknown_and_can_be_asked_for_later(settings: Settings) -> None:
    async def scenario(db: Database) -> UUID:
        tr = db.transaction(commit_seconds=0.2)
        tr.set(b"k", b"v")
        with pytest.raises(OutcomeUnknown, match="no leader") as unknown:
            await tr.commit()
        return request_id_of(unknown.value)

    request_id = run_scenario(settings, scenario)
    with closing(open_session(settings, "commit show", writes=False)) as conn:
        found = find_request(conn, request_id)
        assert found and found.status == "pending"
        with leader_thread(settings):
            asyncio.run(until_async(lambda: (row := find_request(conn, request_id)) and row.status != "pending"))
        found = find_request(conn, request_id)
        assert found and (found.status, found.commit_version) == ("committed", 1)


@scenario_test
async def test_closing_a_client_reports_pending_commits_as_unknown(db: Database, sql: Sql) -> None:
    commit = asyncio.create_task(put(db, k=b"v"))
    await until_async(lambda: requests(sql))
    await db.close()
    with pytest.raises(OutcomeUnknown, match="closed"):
        await commit


@scenario_test
async def test_i3_the_reason_of_an_unknown_outcome_names_the_error_of_the_server(db: Database, sql: Sql) -> None:
    tr = db.transaction(commit_seconds=1.5)
    tr.set(b"k", b"v")
    commit = asyncio.create_task(tr.commit())
    await until_async(lambda: requests(sql))
    sql.execute("ALTER TABLE commit_requests RENAME TO elsewhere")
    with pytest.raises(OutcomeUnknown, match="commit_requests"):
        await commit


class Unreachable:
    """An opener that always fails, as when the server is down."""

    async def __call__(self) -> AsyncConnection[Any]:
        raise ConnectionFailed("the server is down")


@needs_leader
@scenario_test
async def test_a_client_can_be_closed_while_the_server_is_down(db: Database) -> None:
    tr = db.transaction()
    watch = await tr.watch(b"k")
    db._listener._opener = Unreachable()
    await tr.commit()  # it wrote nothing, and waits for no leader
    commit = asyncio.create_task(put(db, k=b"v"))
    await until_async(lambda: db._submitter._trouble or db._submitter._listening)
    await asyncio.wait_for(db.close(), TIMEOUT)
    assert watch.changed.cancelled()
    with pytest.raises(ConnectionFailed, match="not sent"):
        await commit


@needs_leader
@scenario_test
async def test_i3_a_request_that_was_not_sent_in_time_is_not_committed(db: Database, sql: Sql) -> None:
    tr = db.transaction(commit_seconds=0.2)
    await tr.get(b"k")
    tr.set(b"k", b"v")
    opener, db._listener._opener = db._listener._opener, Unreachable()
    with pytest.raises(ConnectionFailed, match="not sent: the server is down"):
        await tr.commit()
    db._listener._opener = opener
    await put(db, later=b"v")
    assert data(sql) == {b"later": b"v"}, "not afterwards either"


@needs_leader
@scenario_test
async def test_i3_a_request_without_any_connection_is_not_committed(db: Database, sql: Sql) -> None:
    await put(db, first=b"v")
    tr = db.transaction(commit_seconds=0.2)
    await tr.get(b"k")
    tr.set(b"k", b"v")
    db._pool._opener = Unreachable()
    await asyncio.gather(*db._pool._openings)
    for connection in list(db._pool._connections):
        connection.close()
        db._pool._forget(connection)
    with pytest.raises(ConnectionFailed, match="not sent: the server is down"):
        await tr.commit()
    assert data(sql) == {b"first": b"v"}


def test_i3_a_request_that_may_have_arrived_and_cannot_be_sent_again_has_an_unknown_outcome(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locked_out() -> None:
        sql.execute("ALTER TABLE commit_requests RENAME TO elsewhere")

    lose_first_answer(monkeypatch, locked_out)

    async def scenario(db: Database) -> None:
        with pytest.raises(OutcomeUnknown, match="commit_requests"):
            await put(db, k=b"v")

    run_scenario(settings, scenario)
    assert value(sql, "SELECT count(*) FROM elsewhere") == 1


# -- rule I7


@pytest.fixture
def no_notifications(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the client ignore notifications and the leader listen to no channel, with a shorter poll interval."""

    def listen_to_nothing(conn: psycopg.Connection[Any], _channels: Sequence[str], wakeup: Wakeup) -> Listener:
        return Listener(conn, wakeup)

    monkeypatch.setattr(AsyncListener, "_on_notify", lambda *_: None)
    monkeypatch.setattr(candidate, "listen", listen_to_nothing)
    monkeypatch.setattr(channels, "POLL_SECONDS", 0.1)


@pytest.mark.usefixtures("no_notifications")
@needs_leader
def test_i7_with_every_notification_dropped_everything_still_works(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        async def increment(tr: Transaction) -> None:
            tr.set(b"n", b"%d" % (int(await tr.get(b"n") or 0) + 1))

        for number in range(1, 4):
            assert await put(db, k=b"v") == number
        await asyncio.gather(*(db.run(increment) for _ in range(5)))
        tr = db.transaction()
        watch = await tr.watch(b"k")
        await tr.commit()
        await put(db, k=b"changed")
        await asyncio.wait_for(watch, TIMEOUT)

    run_scenario(settings, scenario)
    assert data(sql) == {b"k": b"changed", b"n": b"5"}


# -- the listener


STANDBY = UnsuitableServer("this server is a standby")


async def notify(sql: Sql, channel: str, notified: asyncio.Event) -> None:
    """Notifies the channel, and waits until the callback was called."""
    notified.clear()
    sql.execute(f'NOTIFY "{channel}"')
    await asyncio.wait_for(notified.wait(), TIMEOUT)


def test_a_listener_survives_a_server_that_is_unsuitable_for_a_while(settings: Settings, sql: Sql) -> None:
    async def scenario() -> None:
        notified = asyncio.Event()
        openings = CountingOpener(settings, [2, 3], STANDBY)
        listener = AsyncListener(openings)
        await listener.listen("news", notified.set)
        notified.clear()
        end_sessions(sql)
        await asyncio.wait_for(
            notified.wait(), TIMEOUT
        )  # called after a reconnect, since a notification may have been missed
        assert openings.count == 4
        await notify(sql, "news", notified)
        await listener.close()

    asyncio.run(scenario())


def test_the_first_caller_of_a_listener_gets_the_error_of_its_connection_and_may_retry(
    settings: Settings, sql: Sql
) -> None:
    async def scenario() -> None:
        notified = asyncio.Event()
        listener = AsyncListener(CountingOpener(settings, [1], STANDBY))
        with pytest.raises(UnsuitableServer):
            await listener.listen("news", notified.set)
        await asyncio.wait_for(listener.listen("news", notified.set), TIMEOUT)
        await notify(sql, "news", notified)
        await listener.close()

    asyncio.run(scenario())


def test_i7_a_channel_added_while_the_listener_reconnects_misses_no_notification(settings: Settings, sql: Sql) -> None:
    """Once `listen` has returned, every notification of its channel calls the callback."""

    async def scenario() -> None:
        listener = AsyncListener(CountingOpener(settings))
        await listener.listen("old", lambda: None)
        for number in range(10):
            notified = asyncio.Event()
            end_sessions(sql)
            await listener.listen(f"new {number}", notified.set)
            await notify(sql, f"new {number}", notified)
        await asyncio.wait_for(listener.listen("last", lambda: None), TIMEOUT)
        await listener.close()

    asyncio.run(scenario())


# -- rule I1: strict serialisability over changes of the leader


class Recorded(NamedTuple):
    """A committed transaction: its version, its reads with their results, and its writes."""

    version: int
    reads: list[tuple[bytes, bytes | None]]
    ranges: list[tuple[Range, list[tuple[bytes, bytes]]]]
    writes: list[Mutation]


KEYS = [b"%c" % letter for letter in b"abcdefgh"]


class Recorder:
    """Runs random transactions in many tasks, and records those that committed."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.records: list[Recorded] = []
        self.conflicts = 0
        self.acknowledged = 0

    async def task(self, seed: int, transactions: int) -> None:
        rng = random.Random(seed)
        for _ in range(transactions):
            try:
                await self._one_transaction(rng)
            except Conflict:
                self.conflicts += 1

    async def _one_transaction(self, rng: random.Random) -> None:
        tr = self._db.transaction()
        acknowledged = self.acknowledged
        reads = [(key, await tr.get(key)) for key in rng.sample(KEYS, rng.randint(0, 2))]
        ranges: list[tuple[Range, list[tuple[bytes, bytes]]]] = []
        if rng.random() < 0.3:
            begin, end = sorted(rng.sample(KEYS, 2))
            ranges = [((begin, end), await tr.get_range(begin, end))]
        writes = [random_mutation(rng, KEYS) for _ in range(rng.randint(0, 3))]
        for mutation in writes:
            mutate(tr, mutation)
        version = await tr.commit()
        assert (tr.read_version or 0) >= acknowledged, "it sees all that was acknowledged before it began"
        self.acknowledged = max(self.acknowledged, version)
        self.records.append(Recorded(version, reads, ranges, writes))


def replay(records: Sequence[Recorded]) -> Data:
    """Replays the transactions in version order, compares every read with its recorded result, and returns the data."""
    writers = sorted(record for record in records if record.writes)
    assert [record.version for record in writers] == list(range(1, len(writers) + 1)), "rule I5: dense"
    model = Model({})
    states = [dict(model.data)]
    for record in writers:
        for mutation in record.writes:
            model.mutate(*mutation)
        states.append(dict(model.data))
    for record in records:
        # A transaction with writes read the state before its version; one without, the state of its version.
        state = Model(states[record.version - 1] if record.writes else states[record.version])
        for key, found in record.reads:
            assert state.data.get(key) == found, record
        for (begin, end), rows in record.ranges:
            assert state.rows(begin, end) == rows, record
    return model.data


def test_i1_concurrent_transactions_are_serialisable_across_two_takeovers(
    settings: Settings, sql: Sql, two_leaders: TwoLeaders, start_leader: StartLeader
) -> None:
    first, second = two_leaders()

    async def scenario(db: Database) -> Recorder:
        recorder = Recorder(db)
        tasks = [asyncio.create_task(recorder.task(seed, 40)) for seed in range(10)]
        await until_async(lambda: len(recorder.records) >= 100)
        first.signal(signal.SIGKILL)
        await asyncio.to_thread(second.wait_for, "elected epoch")
        await until_async(lambda: len(recorder.records) >= 200)
        second.signal(signal.SIGKILL)
        await asyncio.to_thread(start_leader("third", "--ttl", "60s").wait_for, "elected epoch")
        await asyncio.gather(*tasks)
        return recorder

    recorder = run_scenario(settings, scenario)
    assert replay(recorder.records) == data(sql)
    assert value(sql, "SELECT max(epoch) FROM leader_history") == 3
    assert len(recorder.records) > 200
    assert recorder.conflicts > 0
