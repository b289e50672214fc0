"""The recipes of docs/recipes.md under contention: their functions, as the page has them, raced by several clients."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from pgcoord_cli import Conflict, connect
from tests.postgres.commit_scenarios import Sql, data, needs_leader

if TYPE_CHECKING:
    from pgcoord_cli import Database
    from pgcoord_cli.settings import Settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
CLIENTS = 3

pytestmark = needs_leader


def recipe(heading: str) -> SimpleNamespace:
    """Returns the names that the program below a heading of the page defines, without running its main function."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1]
    program = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    names = {"__name__": "recipe"}
    exec(compile(program, f"{PAGE}: {heading}", "exec"), names)
    return SimpleNamespace(**names)


def race(settings: Settings, scenario: Callable[[list[Database]], Awaitable[None]]) -> None:
    """Runs a scenario with several clients, each with connections of its own."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            opened = [await connect(settings.dsn, schema=settings.schema) for _ in range(CLIENTS)]
            for database in opened:
                await stack.enter_async_context(database)
            await scenario(opened)

    asyncio.run(main())


def test_no_task_of_the_priority_queue_is_popped_twice_or_lost(settings: Settings, sql: Sql) -> None:
    queue = recipe("A priority queue")
    tasks = [b"%d" % number for number in range(90)]
    pushing = asyncio.Event()

    async def produce(database: Database, share: list[bytes]) -> None:
        for task in share:
            await database.run(partial(queue.push, priority=random.randrange(256), task=task))

    async def consume(database: Database) -> list[bytes]:
        popped: list[bytes] = []
        # The event is read before the pop: an empty queue is the end only if all had been pushed when it was read.
        while True:
            complete = pushing.is_set()
            task = await database.run(queue.pop)
            if task is not None:
                popped.append(task)
            elif complete:
                return popped

    async def scenario(clients: list[Database]) -> None:
        consumers = [asyncio.create_task(consume(database)) for database in clients * 2]
        await asyncio.gather(*(produce(database, tasks[n::CLIENTS]) for n, database in enumerate(clients)))
        pushing.set()
        popped = await asyncio.gather(*consumers)
        assert Counter(task for share in popped for task in share) == Counter(tasks)
        assert sum(bool(share) for share in popped) > 1, "only one consumer took part"

    race(settings, scenario)
    assert data(sql) == {}


def test_the_priority_queue_pops_by_priority_and_then_by_age(settings: Settings) -> None:
    queue = recipe("A priority queue")
    pushed = [(random.randrange(3), b"%d" % number) for number in range(30)]

    async def scenario(clients: list[Database]) -> None:
        for database, (priority, task) in zip(cycle(clients), pushed, strict=False):
            await database.run(partial(queue.push, priority=priority, task=task))
        # Sorting is stable: equal priorities stay in the order in which they were pushed.
        assert await queue.consume(clients[0]) == [task for _, task in sorted(pushed, key=lambda each: each[0])]

    race(settings, scenario)


def test_two_tasks_that_one_transaction_pushes_with_one_priority_are_both_kept(settings: Settings) -> None:
    queue = recipe("A priority queue")

    async def scenario(clients: list[Database]) -> None:
        transaction = clients[0].transaction()
        for task in (b"one", b"two"):
            await queue.push(transaction, 7, task)
        await transaction.commit()
        assert sorted(await queue.consume(clients[1])) == [b"one", b"two"]

    race(settings, scenario)


def test_the_counts_of_the_multi_map_are_exact(settings: Settings, sql: Sql) -> None:
    tags = recipe("A multi-map")
    pairs = [(name, value) for name in (b"a", b"ab") for value in (b"", b"\0", b"x", b"xy")]
    changes = [(tags.add, pair) for pair in pairs for _ in range(12)]
    # As many as were added for one pair of each name, fewer for the others.
    changes += [(tags.remove, pair) for pair in pairs for _ in range(12 if pair[1] == b"x" else 5)]
    random.shuffle(changes)

    async def make(database: Database, share: list[tuple[Callable[..., Awaitable[None]], tuple[bytes, bytes]]]) -> None:
        for change, (name, value) in share:
            await database.run(partial(change, name=name, value=value))

    async def scenario(clients: list[Database]) -> None:
        await asyncio.gather(*(make(database, changes[n::6]) for n, database in enumerate(clients * 2)))
        for name in (b"a", b"ab"):
            assert await tags.values(clients[0].transaction(), name) == {b"": 7, b"\0": 7, b"xy": 7}

    race(settings, scenario)
    assert len(data(sql)) == 6, "a pair with the count zero has no key"


def test_a_removal_from_the_multi_map_before_its_addition_leaves_nothing(settings: Settings, sql: Sql) -> None:
    tags = recipe("A multi-map")

    async def scenario(clients: list[Database]) -> None:
        await clients[0].run(partial(tags.remove, name=b"a", value=b"x"))
        assert await tags.values(clients[1].transaction(), b"a") == {b"x": -1}
        await clients[2].run(partial(tags.add, name=b"a", value=b"x"))

    race(settings, scenario)
    assert data(sql) == {}


def test_the_sharded_counter_loses_no_addition(settings: Settings, sql: Sql) -> None:
    counter = recipe("A sharded counter")
    amounts = [random.randrange(-5, 100) for _ in range(120)]
    seen: list[int] = []

    async def add(database: Database, share: list[int]) -> None:
        for amount in share:
            # Without retries: additions never conflict.
            await database.run(partial(counter.add, amount=amount), retry_limit=0)

    async def note_total(database: Database, note: bytes) -> None:
        async def work(transaction: object) -> None:
            seen.append(await counter.total(transaction))
            transaction.set(note, b"%d" % seen[-1])  # type: ignore[attr-defined]

        for _ in range(20):
            await database.run(work, retry_limit=0)  # a snapshot read never conflicts

    async def scenario(clients: list[Database]) -> None:
        await asyncio.gather(
            *(add(database, amounts[n::6]) for n, database in enumerate(clients * 2)),
            *(note_total(database, b"note/%d" % n) for n, database in enumerate(clients)),
        )
        for exact in (False, True):
            assert await counter.total(clients[0].transaction(), exact=exact) == sum(amounts)

    race(settings, scenario)
    assert len(seen) == 60
    assert len([key for key in data(sql) if key.startswith(counter.COUNTER)]) > 1, "all additions went to one shard"


@pytest.mark.parametrize("exact", [False, True])
def test_only_an_exact_total_of_the_sharded_counter_conflicts_with_an_addition(settings: Settings, exact: bool) -> None:
    counter = recipe("A sharded counter")

    async def scenario(clients: list[Database]) -> None:
        report = clients[0].transaction()
        report.set(b"report", b"%d" % await counter.total(report, exact=exact))
        await clients[1].run(partial(counter.add, amount=1))
        if exact:
            with pytest.raises(Conflict):
                await report.commit()
        else:
            await report.commit()

    race(settings, scenario)
