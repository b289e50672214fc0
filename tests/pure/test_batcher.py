"""Batching: every item is sent once, in order, in batches that grow while one is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps

from pgcoord_cli.core.concurrency import batcher
from pgcoord_cli.core.concurrency.batcher import Batcher


class Sender:
    """Notes the batches, and what was refused. A batch with the item 13 cannot be sent."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.refused: list[tuple[int, str]] = []

    def send(self, batch: list[int]) -> None:
        if 13 in batch:
            raise TypeError("thirteen")
        self.batches.append(batch)

    def refuse(self, item: int, error: Exception) -> None:
        self.refused.append((item, str(error)))


def played(scenario: Callable[[Sender], Awaitable[None]]) -> Callable[[], None]:
    @wraps(scenario)
    def play() -> None:
        async def run() -> None:
            await scenario(Sender())

        asyncio.run(run())

    del play.__wrapped__
    return play


async def steps(count: int) -> None:
    """Lets the event loop take its next steps."""
    for _ in range(count):
        await asyncio.sleep(0)


@played
async def test_items_that_arrive_in_one_step_of_the_event_loop_share_a_batch(sender: Sender) -> None:
    calls = Batcher(sender.send, sender.refuse, limit=10)
    calls.add(1)
    calls.add(2)
    assert sender.batches == []
    await asyncio.sleep(0)
    assert sender.batches == [[1, 2]]


@played
async def test_items_that_arrive_while_a_batch_is_in_flight_share_the_next_ones(sender: Sender) -> None:
    calls = Batcher(sender.send, sender.refuse, limit=3)
    calls.add(1)
    await asyncio.sleep(0)
    for number in range(2, 7):
        calls.add(number)
    await asyncio.sleep(0)
    for expected in ([[1]], [[1], [2, 3, 4]], [[1], [2, 3, 4], [5, 6]]):
        assert sender.batches == expected
        assert not calls.is_idle
        calls.succeeded()
    assert calls.is_idle
    calls.add(7)
    await asyncio.sleep(0)
    assert sender.batches[-1] == [7]


@played
async def test_a_batch_ends_with_the_item_that_reaches_the_size_limit(sender: Sender) -> None:
    calls = Batcher(sender.send, sender.refuse, limit=100, size_of=lambda item: item, size_limit=10)
    for size in (3, 6, 1, 50, 9, 1, 1):
        calls.add(size)
    await asyncio.sleep(0)
    for _ in range(3):
        calls.succeeded()
    assert sender.batches == [[3, 6, 1], [50], [9, 1], [1]]


@played
async def test_i6_an_item_that_cannot_be_sent_is_refused_by_itself(sender: Sender) -> None:
    calls = Batcher(sender.send, sender.refuse, limit=10)
    for number in (12, 13, 14, 15):
        calls.add(number)
    await steps(10)
    assert sender.batches == [[12]]
    calls.succeeded()
    await steps(10)
    assert sender.refused == [(13, "thirteen")]
    assert sender.batches == [[12], [14]]
    calls.succeeded()
    calls.succeeded()
    assert sender.batches == [[12], [14], [15]]
    assert calls.is_idle
    for number in (16, 17):
        calls.add(number)
    await steps(10)
    assert sender.batches[3:] == [[16, 17]], "later ones share a batch again"


@played
async def test_i6_a_batch_that_turns_out_to_be_at_fault_is_sent_one_by_one(sender: Sender) -> None:
    calls = Batcher(sender.send, sender.refuse, limit=10)
    for number in (1, 2):
        calls.add(number)
    await steps(10)
    calls.is_at_fault(sender.batches[0], ValueError("one of them"))
    await steps(10)
    assert sender.batches == [[1, 2], [1]]
    calls.is_at_fault([1], ValueError("this one"))
    await steps(10)
    assert sender.batches == [[1, 2], [1], [2]]
    assert sender.refused == [(1, "this one")]


@played
async def test_hundreds_of_items_that_cannot_be_sent_are_all_refused(sender: Sender) -> None:
    calls = Batcher(sender.send, sender.refuse, limit=2_000)
    for _ in range(2_000):
        calls.add(13)
    calls.add(14)
    await steps(5_000)
    assert sender.refused == [(13, "thirteen")] * 2_000
    assert sender.batches == [[14]]


def test_a_batch_that_failed_is_sent_again_first_after_a_pause() -> None:
    async def scenario() -> None:
        sender, sent = Sender(), asyncio.Event()

        def send(batch: list[int]) -> None:
            sender.send(batch)
            sent.set()

        calls = Batcher(send, sender.refuse, limit=2)
        for number in (1, 2, 3):
            calls.add(number)
        await sent.wait()
        sent.clear()
        calls.add_first(sender.batches[0])
        calls.failed()
        assert not calls.is_idle
        await asyncio.wait_for(sent.wait(), 20 * batcher.FIRST_PAUSE)
        calls.succeeded()
        assert sender.batches == [[1, 2], [1, 2], [3]]

    asyncio.run(scenario())


@played
async def test_nothing_is_sent_after_the_close(sender: Sender) -> None:
    calls = Batcher(sender.send, sender.refuse, limit=2)
    calls.add(1)
    calls.close()
    await asyncio.sleep(0)
    assert sender.batches == []
