"""What surrounds a commit: the types of arguments, the life of a transaction, its options, its watches."""

from __future__ import annotations

import asyncio
import gc
import struct
from asyncio import Task
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any, Unpack

import pytest

from pgcoord_cli.core.kv.client import Database, Transaction
from pgcoord_cli.core.kv.key_selector import KeySelector
from pgcoord_cli.core.kv.options import OptionChanges, TransactionOptions
from pgcoord_cli.errors import (
    Conflict,
    ConnectionFailed,
    NoLeader,
    OutcomeUnknown,
    PgcoordError,
    Rejected,
    TimeLimit,
    TooOld,
    TransactionCancelled,
    TransactionTooLarge,
    UsageError,
    UsedDuringCommit,
)
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until_async
from tests.postgres.commit_scenarios import (
    Sql,
    data,
    leader_thread,
    needs_leader,
    put,
    requests,
    run_scenario,
    scenario_test,
)

# -- types


WRITES: dict[str, Callable[[Transaction, Any], object]] = {
    "set a key": lambda tr, it: tr.set(it, b""),
    "set a value": lambda tr, it: tr.set(b"k", it),
    "add a key": lambda tr, it: tr.add(it, b"1"),
    "add an operand": lambda tr, it: tr.add(b"k", it),
    "append an operand": lambda tr, it: tr.append_if_fits(b"k", it),
    "clear": lambda tr, it: tr.clear(it),
    "clear a range from": lambda tr, it: tr.clear_range(it, b"k"),
    "stamp a key": lambda tr, it: tr.set_versionstamped_key(it, b"v"),
    "stamp a value": lambda tr, it: tr.set_versionstamped_value(b"k", it),
    "read conflict key": lambda tr, it: tr.add_read_conflict_key(it),
    "read conflict range": lambda tr, it: tr.add_read_conflict_range(it, b"k"),
    "write conflict key": lambda tr, it: tr.add_write_conflict_key(it),
    "write conflict range": lambda tr, it: tr.add_write_conflict_range(it, b"k"),
}

ENDS: dict[str, Callable[[Transaction, Any], object]] = {
    "clear a range to": lambda tr, it: tr.clear_range(b"", it),
    "read conflict range to": lambda tr, it: tr.add_read_conflict_range(b"", it),
    "write conflict range to": lambda tr, it: tr.add_write_conflict_range(b"", it),
}
"""None is allowed here: past the last key."""

READS: dict[str, Callable[[Transaction, Any], Any]] = {
    "get": lambda tr, it: tr.get(it),
    "watch": lambda tr, it: tr.watch(it),
    "get_range from": lambda tr, it: tr.get_range(it, b"k"),
    "get_range from a selector": lambda tr, it: tr.get_range(KeySelector.first_greater_than(it), b"k"),
    "get_key": lambda tr, it: tr.get_key(KeySelector.last_less_than(it)),
    "get_key without a selector": lambda tr, it: tr.get_key(it),
}


@scenario_test
async def test_i6_what_is_not_bytes_is_refused_where_it_enters(db: Database) -> None:
    for wrong in ("text", 1, None, 1.5, [b"k"], (b"k",)):
        for write in WRITES.values():
            with pytest.raises(TypeError, match="bytes"):
                write(db.transaction(), wrong)
        for read in READS.values():
            with pytest.raises(TypeError, match=r"bytes|KeySelector"):
                await read(db.transaction(), wrong)
        for end in ENDS.values():
            if wrong is not None:
                with pytest.raises(TypeError, match="bytes"):
                    end(db.transaction(), wrong)
        if wrong is not None:
            with pytest.raises(TypeError, match="bytes"):
                await db.transaction().get_range(b"", wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a number"):
        await db.transaction().get_key(KeySelector(b"k", False, "1"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not str; encode it"):
        db.transaction().set(b"k", "text")  # type: ignore[arg-type]


@needs_leader
@pytest.mark.parametrize("how", ["set", "add"])
@scenario_test
async def test_i6_a_value_that_is_not_bytes_stops_no_later_commit(db: Database, sql: Sql, how: str) -> None:
    tr = db.transaction()
    with pytest.raises(TypeError):
        getattr(tr, how)(b"k", "text")
    tr.set(b"fine", b"1")
    assert await tr.commit() == 1, "nothing was buffered by the call that was refused"
    assert await put(db, a=b"1") == 2
    assert data(sql) == {b"a": b"1", b"fine": b"1"}


@needs_leader
@scenario_test
async def test_a_bytearray_or_memoryview_is_copied(db: Database, sql: Sql) -> None:
    key, written = bytearray(b"k"), bytearray(b"v")
    tr = db.transaction()
    tr.set(key, memoryview(written))  # type: ignore[arg-type]
    tr.add_write_conflict_key(memoryview(key))  # type: ignore[arg-type]
    key[0] = written[0] = 0
    assert await tr.get(bytearray(b"k")) == b"v"  # type: ignore[arg-type]
    await tr.commit()
    assert data(sql) == {b"k": b"v"}


# -- the life of a transaction


@needs_leader
@scenario_test
async def test_i3_a_transaction_commits_once(db: Database, sql: Sql) -> None:
    await put(db, n=bytes(8))
    tr = db.transaction()
    tr.add(b"n", struct.pack("<Q", 1))
    assert [await tr.commit(), await tr.commit()] == [2, 2]
    await put(db, m=b"second")
    for use in USES.values():
        with pytest.raises(UsedDuringCommit, match="has committed"):
            await use(tr)
    assert await tr.commit() == 2
    assert data(sql) == {b"n": struct.pack("<Q", 1), b"m": b"second"}
    tr.reset()
    assert await tr.get(b"n") == struct.pack("<Q", 1)
    assert await tr.commit() == 3, "without writes: its new read version"


async def _set(tr: Transaction) -> None:
    tr.set(b"used", b"1")


async def _clear_range(tr: Transaction) -> None:
    tr.clear_range(b"", None)


async def _conflict_key(tr: Transaction) -> None:
    tr.add_read_conflict_key(b"k")


async def _conflict_range(tr: Transaction) -> None:
    tr.add_write_conflict_range(b"", None)


async def _next_write(tr: Transaction) -> None:
    tr.next_write_no_write_conflict_range()


async def _range(tr: Transaction) -> None:
    async for _ in tr.range(b"", None):
        pass


USES: dict[str, Callable[[Transaction], Awaitable[object]]] = {
    "get": lambda tr: tr.get(b"k"),
    "get_range": lambda tr: tr.get_range(b"", None),
    "range": _range,
    "get_key": lambda tr: tr.get_key(KeySelector.first_greater_than(b"")),
    "watch": lambda tr: tr.watch(b"k"),
    "set_read_version": lambda tr: tr.set_read_version(1),
    "set": _set,
    "clear_range": _clear_range,
    "add_read_conflict_key": _conflict_key,
    "add_write_conflict_range": _conflict_range,
    "next_write_no_write_conflict_range": _next_write,
}


async def queued_commit(db: Database, sql: Sql, **options: Unpack[OptionChanges]) -> tuple[Transaction, Task[int]]:
    """Returns a transaction whose request is in the queue, with no leader, and its commit."""
    tr = db.transaction(**options)
    tr.add(b"n", struct.pack("<Q", 1))
    commit = asyncio.create_task(tr.commit())
    await until_async(lambda: requests(sql) or commit.done())
    return tr, commit


@scenario_test
async def test_during_its_commit_a_transaction_is_refused(db: Database, sql: Sql) -> None:
    tr, commit = await queued_commit(db, sql)
    with pytest.raises(UsedDuringCommit, match="is committing"):
        await tr.commit()
    for use in USES.values():
        with pytest.raises(UsedDuringCommit, match="is committing"):
            await use(tr)
    tr.cancel()
    with pytest.raises(OutcomeUnknown, match="cancelled"):
        await commit
    for use in USES.values():
        with pytest.raises(TransactionCancelled):
            await use(tr)
    with pytest.raises(TransactionCancelled):
        await tr.commit()


@needs_leader
@scenario_test
async def test_i4_a_read_that_the_commit_overtakes_is_refused(db: Database) -> None:
    """No commit would check it for conflicts."""
    await put(db, k=b"1")
    tr = db.transaction()
    await tr.get(b"other")
    tr.set(b"own", b"1")
    read = asyncio.create_task(tr.get(b"k"))
    await asyncio.sleep(0)
    committed = asyncio.create_task(tr.commit())
    with pytest.raises(UsedDuringCommit):
        await read
    assert await committed == 2


def test_i3_after_an_unknown_outcome_a_commit_asks_for_the_same_request(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        tr, commit = await queued_commit(db, sql, commit_seconds=0.5)
        with pytest.raises(OutcomeUnknown):
            await commit
        with pytest.raises(UsedDuringCommit, match="may have committed"):
            tr.set(b"k", b"v")
        with pytest.raises(OutcomeUnknown):
            await tr.commit()
        assert len(requests(sql)) == 1
        with leader_thread(settings):
            assert await tr.commit() == 1
            assert await tr.commit() == 1

    run_scenario(settings, scenario)
    assert data(sql) == {b"n": struct.pack("<Q", 1)}
    assert requests(sql) == [("committed", 1)]


def test_i3_a_commit_that_succeeded_unnoticed_is_found_by_the_next_one(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        tr, commit = await queued_commit(db, sql)
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        with leader_thread(settings):
            await until_async(lambda: requests(sql) == [("committed", 1)])
            assert await tr.commit() == 1

    run_scenario(settings, scenario)
    assert data(sql) == {b"n": struct.pack("<Q", 1)}


@scenario_test
async def test_i3_a_commit_again_on_a_closed_client_is_unknown_rather_than_not_sent(db: Database, sql: Sql) -> None:
    tr, commit = await queued_commit(db, sql)
    await db.close()
    for attempt in (commit, tr.commit()):
        with pytest.raises(OutcomeUnknown, match="closed"):
            await attempt


async def conflicting(db: Database) -> Transaction:
    """Returns a transaction that will conflict, since what it read has been written."""
    tr = db.transaction()
    await tr.get(b"k")
    tr.set(b"own", b"1")
    await put(db, k=b"2")
    return tr


@needs_leader
@scenario_test
async def test_after_a_conflict_a_transaction_is_refused_until_it_is_reset(db: Database, sql: Sql) -> None:
    tr = await conflicting(db)
    for _ in range(2):
        with pytest.raises(Conflict):
            await tr.commit()
    for use in USES.values():
        with pytest.raises(Conflict):
            await use(tr)
    tr.reset()
    assert await tr.get(b"k") == b"2"
    tr.set(b"own", b"2")
    await tr.commit()
    assert data(sql) == {b"k": b"2", b"own": b"2"}


@needs_leader
@scenario_test
async def test_on_error_makes_a_transaction_new_for_another_attempt(db: Database) -> None:
    tr = await conflicting(db)
    attempts = 0
    while True:
        try:
            attempts += 1
            tr.set(b"own", await tr.get(b"k") or b"")
            await tr.commit()
            break
        except PgcoordError as error:
            await tr.on_error(error)
    assert attempts == 2
    for final in (Rejected("x"), OutcomeUnknown("x"), ConnectionFailed("x"), ValueError("x")):
        with pytest.raises(type(final)):
            await db.transaction().on_error(final)
    await db.transaction(retry_unknown=True).on_error(OutcomeUnknown("x"))
    for passing in (Conflict("x"), TooOld("x"), TimeLimit("x")):
        tr = db.transaction(retry_limit=1)
        await tr.on_error(passing)
        with pytest.raises(type(passing)):
            await tr.on_error(passing)
        tr.reset()
        await tr.on_error(passing)


@needs_leader
@scenario_test
async def test_a_reset_leaves_reads_in_progress_to_the_life_that_they_began_in(db: Database) -> None:
    await put(db, k=b"1")
    tr = db.transaction()
    before = asyncio.create_task(tr.get(b"k"))
    await asyncio.sleep(0)
    tr.reset()
    assert tr.read_version is None
    with pytest.raises(TransactionCancelled):
        await before
    assert tr.read_version is None
    await put(db, k=b"2")
    assert await tr.get(b"k") == b"2"


# -- watches of transactions that do not commit


@needs_leader
@scenario_test
async def test_a_watch_fails_with_the_error_of_its_transaction(db: Database) -> None:
    tr = db.transaction()
    await tr.get(b"k")
    watch = await tr.watch(b"k")
    tr.set(b"own", b"1")
    await put(db, k=b"2")
    with pytest.raises(Conflict):
        await tr.commit()
    with pytest.raises(Conflict):
        await asyncio.wait_for(watch, TIMEOUT)


@scenario_test
async def test_a_watch_of_a_transaction_that_is_cancelled_reset_or_dropped_fails(db: Database) -> None:
    for end in (Transaction.cancel, Transaction.reset, lambda _: None):
        tr = db.transaction()
        watch = await tr.watch(b"k")
        end(tr)
        del tr
        gc.collect()
        with pytest.raises(TransactionCancelled):
            await asyncio.wait_for(watch, TIMEOUT)
    watches, kept = [], []

    async def work(tr: Transaction) -> None:
        kept.append(tr)
        watches.append(await tr.watch(b"k"))
        raise LookupError

    with pytest.raises(LookupError):
        await db.run(work)
    with pytest.raises(TransactionCancelled):
        await asyncio.wait_for(watches[0], TIMEOUT)


# -- options


@needs_leader
@scenario_test
async def test_options_of_the_database_and_of_a_transaction(db: Database, sql: Sql) -> None:
    db.options = db.options.changed(size_limit_bytes=100)
    tr = db.transaction()
    tr.set(b"k", bytes(90))
    assert 90 < tr.approximate_size < 120
    with pytest.raises(TransactionTooLarge):
        await tr.commit()
    tr = db.transaction(size_limit_bytes=200)
    tr.set(b"k", bytes(90))
    tr.add_read_conflict_range(b"a", b"b")
    await tr.commit()
    tr = db.transaction(time_limit_seconds=0)
    with pytest.raises(TimeLimit, match="0s"):
        await tr.get(b"k")
        await tr.get(b"j")
    assert list(data(sql)) == [b"k"]
    wrong: list[OptionChanges] = [{"time_limit_seconds": 5.1}, {"size_limit_bytes": 10_000_001}, {"retry_limit": -1}]
    for options in wrong:
        with pytest.raises(UsageError, match=next(iter(options))):
            db.transaction(**options)
    with pytest.raises(UsageError, match="commit_seconds: '1' is not a number at least 0"):
        db.transaction(commit_seconds="1")  # type: ignore[arg-type]


def test_every_option_can_be_changed_by_name() -> None:
    assert {field.name for field in fields(TransactionOptions)} == set(OptionChanges.__annotations__)


@scenario_test
async def test_require_leader_raises_at_once_and_sends_nothing(db: Database, sql: Sql) -> None:
    tr = db.transaction(require_leader=True)
    tr.set(b"k", b"v")
    with pytest.raises(NoLeader):
        await tr.commit()
    assert requests(sql) == []
    with pytest.raises(NoLeader, match="within 0s"):
        await db.wait_for_leader(0)


def test_after_no_leader_the_same_transaction_can_be_committed(settings: Settings, sql: Sql) -> None:
    async def scenario(db: Database) -> None:
        tr = db.transaction(require_leader=True)
        tr.set(b"k", b"v")
        with pytest.raises(NoLeader):
            await tr.commit()
        waiting = asyncio.create_task(db.wait_for_leader(TIMEOUT))
        with leader_thread(settings):
            await waiting
            assert await tr.commit() == 1

    run_scenario(settings, scenario)
    assert data(sql) == {b"k": b"v"}


@needs_leader
@scenario_test
async def test_a_write_without_a_conflict_range_conflicts_with_no_reader(db: Database) -> None:
    for ignored, status in ((b"a", None), (b"b", Conflict)):
        reader = db.transaction()
        await reader.get(b"a")
        reader.set(b"r", b"1")
        writer = db.transaction()
        if ignored == b"a":
            writer.next_write_no_write_conflict_range()
        writer.set(b"a", b"2")
        writer.set(b"b", b"2")
        await writer.commit()
        if status:
            with pytest.raises(status):
                await reader.commit()
        else:
            await reader.commit()
    assert await db.transaction().get(b"a") == b"2"
