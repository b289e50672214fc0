"""Serial replay: transactions of every kind run at once under faults, and a replay of the stored commits judges them.

The states of all versions are computed from the payloads that the table holds, one commit after the other, by a
dictionary. Against them, of every transaction that committed:

- each read, of whatever kind, returned the state of the read version with the transaction's own writes so far (I4);
- each read that can conflict would have returned the same just before the commit version, and no key or range that was
  added by hand was written in between (I1);
- it saw every commit that had been acknowledged before it began.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Mutation, Op, Range
from pgcoord_cli.core.commits.mutations import apply, covers, with_stamps, writes_of
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.kv.key_selector import KeySelector
from pgcoord_cli.errors import CommitRefused, OutcomeUnknown
from pgcoord_cli.settings import Settings
from tests.asking import until_async

if TYPE_CHECKING:
    from tests.conftest import StartLeader

Data = dict[bytes, bytes]
Result = Any

KEYS = [b"%c" % letter for letter in b"abcdefghij"]
TASKS = 16


class Read(NamedTuple):
    """A read with its result: `own_writes` is how many mutations the transaction had made before it."""

    look: Callable[[Data], Result]
    result: Result
    is_snapshot: bool
    own_writes: int


class Committed(NamedTuple):
    """What a transaction that committed has done."""

    version: int
    read_version: int
    acknowledged_before: int
    reads: list[Read]
    by_hand: list[Range]
    writes: list[Mutation]


class Program:
    """One random transaction."""

    def __init__(self, transaction: Transaction, rng: random.Random) -> None:
        self._transaction = transaction
        self._rng = rng
        self.reads: list[Read] = []
        self.by_hand: list[Range] = []
        self.writes: list[Mutation] = []

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self._rng.random()
            if step < 0.5:
                await self._read_at_once(self._rng.choice([1, 1, 1, 2, 5]))
            elif step < 0.6:
                self._add_conflict()
            else:
                self._write()

    async def _read_at_once(self, count: int) -> None:
        tasks = [asyncio.ensure_future(self._one_read()) for _ in range(count)]
        if count > 1 and self._rng.random() < 0.3:
            await asyncio.sleep(0)
            tasks[0].cancel()  # the others have to go on
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results[1 if tasks[0].cancelled() else 0 :]:
            if isinstance(result, BaseException):
                raise result

    async def _one_read(self) -> None:
        is_snapshot, own_writes = self._rng.random() < 0.3, len(self.writes)
        call, look = self._choose(is_snapshot=is_snapshot)
        self.reads.append(Read(look, await call, is_snapshot, own_writes))

    def _choose(self, *, is_snapshot: bool) -> tuple[Awaitable[Result], Callable[[Data], Result]]:
        rng, transaction = self._rng, self._transaction
        kind = rng.random()
        if kind < 0.5:
            key = rng.choice(KEYS)
            return transaction.get(key, snapshot=is_snapshot), lambda state: state.get(key)
        if kind < 0.8:
            begin, end = sorted(rng.sample(KEYS, 2))
            limit, reverse = rng.choice([None, 1, 3]), rng.random() < 0.5
            return (
                transaction.get_range(begin, end, limit=limit, reverse=reverse, snapshot=is_snapshot),
                lambda state: sorted(rows_in(state, (begin, end)), reverse=reverse)[:limit],
            )
        selector = KeySelector(rng.choice(KEYS), rng.random() < 0.5, rng.randint(-2, 3))
        return transaction.get_key(selector, snapshot=is_snapshot), lambda state: selected(state, selector)

    def _add_conflict(self) -> None:
        begin, end = sorted(self._rng.sample(KEYS, 2))
        kind = self._rng.random()
        if kind < 0.4:
            self._transaction.add_read_conflict_key(begin)
            self.by_hand.append((begin, begin + b"\0"))
        elif kind < 0.7:
            self._transaction.add_read_conflict_range(begin, end)
            self.by_hand.append((begin, end))
        else:
            self._transaction.add_write_conflict_range(begin, end)

    def _write(self) -> None:
        op = self._rng.choice([op for op in Op if op < Op.SET_VERSIONSTAMPED_KEY])
        if op == Op.CLEAR_RANGE:
            mutation = Mutation(op, *sorted(self._rng.sample(KEYS, 2)))
        else:
            operand = None if op == Op.CLEAR else self._rng.randbytes(self._rng.randint(1, 2))
            mutation = Mutation(op, self._rng.choice(KEYS), operand)
        self._transaction.mutate(*mutation)
        self.writes.append(mutation)


def rows_in(state: Data, interval: Range) -> list[tuple[bytes, bytes]]:
    return [row for row in state.items() if covers(interval, row[0])]


def selected(state: Data, selector: KeySelector) -> bytes | None:
    below = [key for key in state if key < selector.key or (selector.or_equal and key == selector.key)]
    place = len(below) - 1 + selector.offset
    return b"" if place < 0 else sorted(state)[place] if place < len(state) else None


class Recorder:
    """Runs random transactions in many tasks, and records those whose commit was acknowledged."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._acknowledged = 0
        self.committed: list[Committed] = []
        self.refused = self.unknown = 0

    async def run(self, transactions: int) -> None:
        await asyncio.gather(*(self._task(seed, transactions // TASKS) for seed in range(TASKS)))

    async def _task(self, seed: int, transactions: int) -> None:
        rng = random.Random(seed)
        for _ in range(transactions):
            try:
                await self._one(rng)
            except CommitRefused:
                self.refused += 1
            except OutcomeUnknown:
                self.unknown += 1

    async def _one(self, rng: random.Random) -> None:
        transaction, acknowledged = self._db.transaction(), self._acknowledged
        program = Program(transaction, rng)
        await program.run(rng.randint(1, 6))
        committing = asyncio.ensure_future(transaction.commit())
        if rng.random() < 0.03:
            await asyncio.sleep(0)
            committing.cancel()
        try:
            version = await committing
        except asyncio.CancelledError:  # it may still commit: the replay takes that from the table
            self.unknown += 1
            return
        self._acknowledged = max(self._acknowledged, version)
        read_version = transaction.read_version
        assert read_version is not None
        self.committed.append(
            Committed(version, read_version, acknowledged, program.reads, program.by_hand, program.writes)
        )


class Replay:
    """The states and the writes of all versions, from the stored requests."""

    def __init__(self, sql: psycopg.Connection[Any]) -> None:
        self.states: list[Data] = [{}]
        self._written: list[tuple[list[bytes], list[Range]]] = [([], [])]
        stored = sql.execute(
            "SELECT commit_version, payload FROM commit_requests WHERE status = 'committed' ORDER BY commit_version"
        )
        for version, payload in stored:
            assert version == len(self.states), "rule I5: dense"
            request = with_stamps(codec.decode(payload), version)
            self.states.append(after(self.states[-1], request.mutations))
            self._written.append(writes_of(request))

    def check(self, found: Committed) -> None:
        assert found.read_version >= found.acknowledged_before
        before = self.states[found.version - 1] if found.version > found.read_version else None
        for read in found.reads:
            own = found.writes[: read.own_writes]
            assert read.look(after(self.states[found.read_version], own)) == read.result, found
            if before is not None and not read.is_snapshot:
                assert read.look(after(before, own)) == read.result, found
        if before is not None:
            for interval in found.by_hand:
                assert not any(
                    self._writes(version, interval) for version in range(found.read_version + 1, found.version)
                )

    def _writes(self, version: int, interval: Range) -> bool:
        keys, ranges = self._written[version]
        return any(covers(interval, key) for key in keys) or any(
            begin < (interval[1] or b"\xff") and (end is None or interval[0] < end) for begin, end in ranges
        )


def after(state: Data, writes: Sequence[Mutation]) -> Data:
    """Returns the state that mutations leave, applied one by one."""
    state = dict(state)
    for op, key, operand in writes:
        if op == Op.CLEAR_RANGE:
            state = {other: value for other, value in state.items() if not covers((key, operand), other)}
            continue
        value = apply(op, state.pop(key, None), operand or b"")
        if value is not None:
            state[key] = value
    return state


def run_under_kills(settings: Settings, start_leader: StartLeader, transactions: int, kills: int) -> Recorder:
    """Runs transactions while leaders are killed one after the other; a candidate is always there to take over."""

    async def main() -> Recorder:
        async with await open_database(settings) as db:
            recorder = Recorder(db)
            running = asyncio.ensure_future(recorder.run(transactions))
            for kill in range(kills):
                wanted = transactions * (kill + 1) // (kills + 2)
                await until_async(lambda wanted=wanted: len(recorder.committed) + recorder.refused >= wanted)  # type: ignore[misc]
                leader = leaders.pop(0)
                leaders.append(await asyncio.to_thread(start_leader, f"node-{kill + 2}"))
                leader.process.kill()
                await asyncio.to_thread(leaders[0].wait_for, "elected epoch")
            await running
            return recorder

    leaders = [start_leader("node-0")]
    leaders[0].wait_for("elected epoch 1")
    leaders.append(start_leader("node-1"))
    return asyncio.run(main())


def judge(recorder: Recorder, sql: psycopg.Connection[Any], transactions: int) -> None:
    replay = Replay(sql)
    for found in recorder.committed:
        replay.check(found)
    assert dict(sql.execute("SELECT key, value FROM kv").fetchall()) == replay.states[-1]
    assert len(recorder.committed) + recorder.refused + recorder.unknown == transactions // TASKS * TASKS
    assert len(recorder.committed) > transactions / 10


def test_i1_i4_a_serial_replay_finds_every_read_at_its_version(
    settings: Settings, sql: psycopg.Connection[Any], start_leader: StartLeader
) -> None:
    recorder = run_under_kills(settings, start_leader, transactions=480, kills=1)
    judge(recorder, sql, 480)


@pytest.mark.slow
def test_i1_i4_a_serial_replay_of_ten_thousand_transactions_under_killed_leaders(
    settings: Settings, sql: psycopg.Connection[Any], start_leader: StartLeader
) -> None:
    recorder = run_under_kills(settings, start_leader, transactions=10_000, kills=8)
    judge(recorder, sql, 10_000)


async def read_own_writes(settings: Settings, operations: int) -> None:
    """Runs transactions one after the other, and compares every read with a dictionary."""
    rng = random.Random(15)
    state: Data = {}
    async with await open_database(settings) as db:
        while operations > 0:
            steps = min(operations, rng.randint(1, 60))
            operations -= steps
            transaction = db.transaction()
            program = Program(transaction, rng)
            await program.run(steps)
            for read in program.reads:
                assert read.look(after(state, program.writes[: read.own_writes])) == read.result
            await transaction.commit()
            state = after(state, program.writes)


@pytest.mark.parametrize("operations", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_i4_reads_see_the_own_writes_as_a_dictionary_does(
    settings: Settings, start_leader: StartLeader, operations: int
) -> None:
    start_leader("node").wait_for("elected epoch 1")
    asyncio.run(read_own_writes(settings, operations))
