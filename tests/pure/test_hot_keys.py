"""Turns at hot keys: who goes when, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial, wraps

import pytest

from pgcoord_cli.core.kv import hot_keys as module
from pgcoord_cli.core.kv.hot_keys import HotKeys

KEY, OTHER = b"counter", b"other"


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs a test in an event loop of its own; whoever waits too long fails it."""

    @wraps(test)
    def run(*args: object, **named: object) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(10):
                await test(*args, **named)

        asyncio.run(bounded())

    return run


async def settled() -> None:
    """Lets every task go on until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def work() -> None:
    """What most attempts here run."""


class TrialError(Exception):
    """What the work of an attempt may raise."""


class Attempt:
    """One attempt at a transaction that reads a key, in a task of its own."""

    def __init__(self, turns: HotKeys, key: bytes = KEY, kind: Callable[..., object] = work) -> None:
        self.has_read = False
        self._ending = asyncio.Event()
        self._outcome = "written"
        self.task = asyncio.create_task(self._run(turns, key, kind))

    async def _run(self, turns: HotKeys, key: bytes, kind: Callable[..., object]) -> None:
        turn = turns.turn(kind)
        assert turn
        with turn:
            await turn.take(key)
            self.has_read = True
            await self._ending.wait()
            if self._outcome == "lost":
                turn.lost()
            elif self._outcome == "only read":
                turn.was_not_needed()
            elif self._outcome == "failed":
                raise TrialError

    async def end(self, outcome: str = "written") -> None:
        """`written`, `lost` (and written), `only read`, or `failed`; then everybody goes on until he waits."""
        self._outcome = outcome
        self._ending.set()
        with pytest.raises(TrialError) if outcome == "failed" else nullcontext():
            await self.task
        await settled()


async def attempts(turns: HotKeys, number: int, key: bytes = KEY) -> list[Attempt]:
    """So many, which have begun one after the other."""
    made = []
    for _ in range(number):
        made.append(Attempt(turns, key))
        await settled()
    return made


async def hot(key: bytes = KEY) -> HotKeys:
    """Turns of which one has just lost a commit over the key."""
    turns = HotKeys()
    (loser,) = await attempts(turns, 1, key)
    await loser.end("lost")
    return turns


def reading(those: list[Attempt]) -> list[bool]:
    return [attempt.has_read for attempt in those]


@in_loop
async def test_nobody_waits_at_a_cold_key() -> None:
    assert reading(await attempts(HotKeys(), 3)) == [True, True, True]


@in_loop
async def test_at_a_hot_key_one_goes_after_the_other_in_order() -> None:
    those = await attempts(await hot(), 3)
    assert reading(those) == [True, False, False]
    await those[0].end()
    assert reading(those) == [True, True, False]
    await those[1].end("lost")
    assert reading(those) == [True, True, True]


@in_loop
async def test_other_keys_stay_cold() -> None:
    assert reading(await attempts(await hot(), 2, OTHER)) == [True, True]


@in_loop
async def test_other_work_never_waits() -> None:
    async def look() -> None:
        """Reads the same key."""

    turns = await hot()
    holder, waiting = await attempts(turns, 2)
    lookers = [Attempt(turns, kind=look) for _ in range(2)]
    await settled()
    assert reading([holder, waiting, *lookers]) == [True, False, True, True]


@in_loop
async def test_closures_over_one_function_and_partial_calls_are_the_same_work() -> None:
    def closure(number: int) -> Callable[..., object]:
        return lambda: number

    turns = HotKeys()
    loser = Attempt(turns, kind=closure(1))
    await settled()
    await loser.end("lost")
    those = [Attempt(turns, kind=kind) for kind in (closure(2), partial(closure(3)), partial(partial(closure(4))))]
    await settled()
    assert reading(those) == [True, False, False]


@in_loop
async def test_a_transaction_inside_another_takes_no_turn() -> None:
    turns = await hot()
    outer = turns.turn(work)
    assert outer
    with outer:
        assert turns.turn(work) is None
        assert await asyncio.create_task(taken_in_a_task(turns)) is None
    assert turns.turn(work)


async def taken_in_a_task(turns: HotKeys) -> object:
    return turns.turn(work)


@in_loop
async def test_a_reader_who_had_a_turn_lets_everybody_go() -> None:
    turns = await hot()
    those = await attempts(turns, 3)
    await those[0].end("only read")
    assert reading(those) == [True, True, True]
    assert reading(await attempts(turns, 2)) == [True, True], "the key is cold"


@in_loop
async def test_one_who_fails_passes_the_turn_on_and_says_nothing_about_the_key() -> None:
    those = await attempts(await hot(), 3)
    await those[0].end("failed")
    assert reading(those) == [True, True, False]


@in_loop
async def test_a_turn_passes_on_after_a_while_whatever_its_holder_does(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = await hot()
    monkeypatch.setattr(module, "TURN_SECONDS", 0.01)
    (slow,) = await attempts(turns, 1)
    monkeypatch.setattr(module, "TURN_SECONDS", 60.0)
    second, third = await attempts(turns, 2)
    while not second.has_read:
        await asyncio.sleep(0)
    assert not third.has_read
    await slow.end()
    assert not third.has_read, "the turn is not his any more"
    await second.end()
    assert third.has_read


@in_loop
async def test_nobody_waits_longer_than_a_turn_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, *_ = await attempts(turns := await hot(), 1)
    monkeypatch.setattr(module, "TURN_SECONDS", 0.01)
    those = await attempts(turns, 20)
    while not all(reading(those)):
        await asyncio.sleep(0)
    await holder.end()


@in_loop
async def test_one_who_is_cancelled_while_waiting_is_passed_over() -> None:
    those = await attempts(await hot(), 3)
    those[1].task.cancel()
    await settled()
    await those[0].end()
    assert those[2].has_read


@in_loop
async def test_one_who_is_cancelled_in_the_moment_of_its_turn_passes_it_on() -> None:
    those = await attempts(await hot(), 3)
    those[0]._ending.set()
    while not those[0].task.done():
        await asyncio.sleep(0)
    those[1].task.cancel()
    await settled()
    assert (those[1].task.cancelled(), those[2].has_read) == (True, True)


@in_loop
async def test_a_key_is_cold_again_when_nobody_lost_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOT_SECONDS", -1.0)
    assert reading(await attempts(await hot(), 2)) == [True, True]


@in_loop
async def test_a_key_stays_hot_as_long_as_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = await hot()
    first, second = await attempts(turns, 2)
    monkeypatch.setattr(module, "HOT_SECONDS", -1.0)
    await first.end()
    (third,) = await attempts(turns, 1)
    assert reading([second, third]) == [True, False]


@pytest.mark.parametrize(("seconds", "is_hot"), [(-1.0, True), (60.0, False)], ids=["cold ones go", "hot ones stay"])
@in_loop
async def test_where_many_keys_are_hot_there_is_room_for_no_more(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_hot: bool
) -> None:
    monkeypatch.setattr(module, "HOT_SECONDS", seconds)
    monkeypatch.setattr(module, "MANY_KEYS", 10)
    turns = HotKeys()
    for number in range(100):
        turns.heat(b"%d" % number, "kind")
    monkeypatch.setattr(module, "HOT_SECONDS", 60.0)
    turns.heat(KEY, "kind")
    assert (turns.queue_of(KEY, "kind") is not None) == is_hot
    assert len(turns._queues) == 10
