"""Grouped calls: everybody gets the result of their own item, and nobody is sent twice or forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pgcoord_cli.core.grouping import Grouping


class Sender:
    """Sends groups when it is let, and remembers them."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.may_go = asyncio.Semaphore(0)

    async def __call__(self, items: Sequence[int]) -> Sequence[str]:
        self.groups.append(list(items))
        await self.may_go.acquire()
        if 13 in items:
            raise ValueError("thirteen")
        return [str(item) for item in items]


async def until(sender: Sender, groups: int) -> None:
    while len(sender.groups) < groups:
        await asyncio.sleep(0)


def test_a_lone_caller_is_sent_at_once_and_those_who_come_meanwhile_share_the_next_group() -> None:
    async def scenario() -> None:
        sender = Sender()
        group = Grouping(sender, limit=3)
        callers = [asyncio.create_task(group(1))]
        await until(sender, 1)
        callers += [asyncio.create_task(group(number)) for number in range(2, 7)]
        for expected in ([[1]], [[1], [2, 3, 4]], [[1], [2, 3, 4], [5, 6]]):
            await until(sender, len(expected))
            assert sender.groups == expected
            sender.may_go.release()
        assert await asyncio.gather(*callers) == ["1", "2", "3", "4", "5", "6"]

    asyncio.run(scenario())


def test_an_error_reaches_its_whole_group_and_no_other() -> None:
    async def scenario() -> None:
        sender = Sender()
        group = Grouping(sender, limit=2)
        callers = [asyncio.create_task(group(number)) for number in (12, 13, 14)]
        for _ in range(2):
            sender.may_go.release()
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError, str]
        sender.may_go.release()
        assert await group(15) == "15", "and the next call is sent as ever"

    asyncio.run(scenario())


def test_a_caller_who_gives_up_takes_nobody_along() -> None:
    async def scenario() -> None:
        sender = Sender()
        group = Grouping(sender, limit=10)
        first = asyncio.create_task(group(1))
        await until(sender, 1)
        second, third = asyncio.create_task(group(2)), asyncio.create_task(group(3))
        await asyncio.sleep(0)
        for given_up in (first, second):
            given_up.cancel()
        for _ in range(2):
            sender.may_go.release()
        assert await third == "3"
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(scenario())
