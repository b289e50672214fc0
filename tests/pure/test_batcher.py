"""Grouped calls: everybody gets the result of their own item, and nobody is sent twice or forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps

import pytest

from pgcoord_cli.core.concurrency.batcher import Batcher


class Sender:
    """Sends groups when it is let, and remembers them."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self._done: list[Callable[[Sequence[str] | Exception], None]] = []

    def __call__(self, items: Sequence[int], done: Callable[[Sequence[str] | Exception], None]) -> None:
        self.groups.append(list(items))
        self._done.append(done)

    def let_go(self) -> None:
        """The results of the group that is under way."""
        items = self.groups[-1]
        self._done[-1](ValueError("thirteen") if 13 in items else [str(item) for item in items])


def played(scenario: Callable[[Sender], Awaitable[None]]) -> Callable[[], None]:
    @wraps(scenario)
    def play() -> None:
        async def run() -> None:
            await scenario(Sender())

        asyncio.run(run())

    del play.__wrapped__
    return play


@played
async def test_a_lone_caller_is_sent_at_once_and_those_who_come_meanwhile_share_the_next_group(sender: Sender) -> None:
    group = Batcher(sender, limit=3)
    callers = [group(1)]
    await asyncio.sleep(0)
    callers += [group(number) for number in range(2, 7)]
    for expected in ([[1]], [[1], [2, 3, 4]], [[1], [2, 3, 4], [5, 6]]):
        assert sender.groups == expected
        sender.let_go()
    assert await asyncio.gather(*callers) == ["1", "2", "3", "4", "5", "6"]
    assert len(sender.groups) == 3


@played
async def test_an_error_reaches_its_whole_group_and_no_other(sender: Sender) -> None:
    group = Batcher(sender, limit=2)
    callers = [group(number) for number in (11, 12, 13, 14)]
    await asyncio.sleep(0)
    for _ in range(2):
        sender.let_go()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert sender.groups == [[11, 12], [13, 14]]
    assert [type(result) for result in results] == [str, str, ValueError, ValueError]
    last = group(15)
    await asyncio.sleep(0)
    sender.let_go()
    assert await last == "15", "and the next call is sent as ever"


@played
async def test_a_caller_who_gives_up_takes_nobody_along(sender: Sender) -> None:
    group = Batcher(sender, limit=10)
    first = group(1)
    await asyncio.sleep(0)
    second, third = group(2), group(3)
    for given_up in (first, second):
        given_up.cancel()
    for _ in range(2):
        sender.let_go()
    assert await third == "3"
    with pytest.raises(asyncio.CancelledError):
        await first


def test_what_cannot_even_be_sent_harms_nobody_else() -> None:
    async def scenario() -> None:
        sender = Sender()

        def send(items: Sequence[int], done: Callable[[Sequence[str] | Exception], None]) -> None:
            if 13 in items:
                raise TypeError("thirteen")
            sender(items, done)

        group = Batcher(send, limit=10)
        with pytest.raises(TypeError):
            await group(13)
        later = group(14)
        await asyncio.sleep(0)
        sender.let_go()
        assert await later == "14"

    asyncio.run(scenario())
