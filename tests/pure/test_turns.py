"""Turns at hot keys: who goes when, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps

import pytest

from pgcoord_cli.core import turns as module
from pgcoord_cli.core.turns import Turn, Turns

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


class Attempt:
    """One attempt at a transaction that reads a key."""

    def __init__(self, turns: Turns, key: bytes = KEY) -> None:
        self.turn = Turn(turns)
        self.reading = asyncio.create_task(self.turn.take(key))

    @property
    def has_read(self) -> bool:
        return self.reading.done()

    def end(self, *, wrote_key: bool = True, conflicted: bool = False) -> None:
        self.turn.end(wrote_key=wrote_key, conflicted=conflicted)


async def attempts(turns: Turns, number: int, key: bytes = KEY) -> list[Attempt]:
    """So many, which have begun one after the other."""
    made = []
    for _ in range(number):
        made.append(Attempt(turns, key))
        await settled()
    return made


async def hot(key: bytes = KEY) -> Turns:
    """Turns of which one has just lost a commit over the key."""
    turns = Turns()
    (loser,) = await attempts(turns, 1, key)
    loser.end(conflicted=True)
    return turns


def reading(those: list[Attempt]) -> list[bool]:
    return [attempt.has_read for attempt in those]


@in_loop
async def test_nobody_waits_at_a_cold_key() -> None:
    assert reading(await attempts(Turns(), 3)) == [True, True, True]


@in_loop
async def test_at_a_hot_key_one_goes_after_the_other_in_order() -> None:
    those = await attempts(await hot(), 3)
    assert reading(those) == [True, False, False]
    those[0].end()
    await settled()
    assert reading(those) == [True, True, False]
    those[1].end(conflicted=True)
    await settled()
    assert reading(those) == [True, True, True]


@in_loop
async def test_other_keys_stay_cold() -> None:
    assert reading(await attempts(await hot(), 2, OTHER)) == [True, True]


@in_loop
async def test_a_conflict_over_what_was_only_read_heats_nothing() -> None:
    turns = Turns()
    (loser,) = await attempts(turns, 1)
    loser.end(wrote_key=False, conflicted=True)
    assert reading(await attempts(turns, 2)) == [True, True]


@in_loop
async def test_a_reader_who_had_a_turn_lets_everybody_go() -> None:
    turns = await hot()
    those = await attempts(turns, 3)
    those[0].end(wrote_key=False)
    await settled()
    assert reading(those) == [True, True, True]
    assert reading(await attempts(turns, 2)) == [True, True], "the key is cold"


@in_loop
async def test_a_loser_with_a_turn_that_had_not_written_yet_keeps_the_key_hot() -> None:
    turns = await hot()
    those = await attempts(turns, 3)
    those[0].end(wrote_key=False, conflicted=True)
    await settled()
    assert reading(those) == [True, True, False]


@in_loop
async def test_a_turn_passes_on_after_a_while_whatever_its_holder_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_SECONDS", 0.0)
    slow, second, third = await attempts(await hot(), 3)
    await asyncio.gather(second.reading, third.reading)
    slow.end()
    assert slow.has_read


@in_loop
async def test_a_holder_who_comes_late_does_not_pass_on_the_turn_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_SECONDS", 0.0)
    slow, second = await attempts(turns := await hot(), 2)
    await second.reading
    monkeypatch.setattr(module, "TURN_SECONDS", 60.0)
    holder, waiting = await attempts(turns, 2)
    assert reading([holder, waiting]) == [True, False]
    slow.end()
    second.end()
    await settled()
    assert not waiting.has_read


@in_loop
async def test_one_who_is_cancelled_while_waiting_is_passed_over() -> None:
    those = await attempts(await hot(), 3)
    those[1].reading.cancel()
    await settled()
    those[0].end()
    await settled()
    assert those[2].has_read


@in_loop
async def test_one_who_is_cancelled_in_the_moment_of_its_turn_passes_it_on() -> None:
    those = await attempts(await hot(), 3)
    those[0].end()
    those[1].reading.cancel()
    await settled()
    assert (those[1].reading.cancelled(), those[2].has_read) == (True, True)


@in_loop
async def test_a_key_is_cold_again_when_nobody_lost_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOT_SECONDS", -1.0)
    assert reading(await attempts(await hot(), 2)) == [True, True]


@in_loop
async def test_a_key_stays_hot_as_long_as_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = await hot()
    first, second = await attempts(turns, 2)
    monkeypatch.setattr(module, "HOT_SECONDS", -1.0)
    first.end()
    await settled()
    (third,) = await attempts(turns, 1)
    assert reading([second, third]) == [True, False]


@in_loop
async def test_cold_keys_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOT_SECONDS", -1.0)
    monkeypatch.setattr(module, "MANY_KEYS", 10)
    turns = Turns()
    for number in range(100):
        turns.heat(b"%d" % number)
    assert len(turns._queues) <= 10
