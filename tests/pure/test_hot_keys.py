"""Hot keys: the order in which attempts are admitted, and that no attempt waits for ever."""

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
    """Runs a test in an event loop of its own; fails it after ten seconds."""

    @wraps(test)
    def run(*args: object, **named: object) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(10):
                await test(*args, **named)

        asyncio.run(bounded())

    return run


async def settled() -> None:
    """Runs the other tasks of the event loop until each of them waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def work() -> None:
    """The work of most attempts in this file."""


class TrialError(Exception):
    """Raised by the work of an attempt that ends as `failed`."""


class Attempt:
    """One attempt at a transaction that reads a key, in a task of its own. It ends when `end` is called."""

    def __init__(self, hot_keys: HotKeys, key: bytes = KEY, kind: Callable[..., object] = work) -> None:
        self.has_read = False
        self._ending = asyncio.Event()
        self._outcome = "written"
        self.task = asyncio.create_task(self._run(hot_keys, key, kind))

    async def _run(self, hot_keys: HotKeys, key: bytes, kind: Callable[..., object]) -> None:
        ticket = hot_keys.ticket(kind)
        assert ticket
        with ticket:
            await ticket.acquire(key)
            self.has_read = True
            await self._ending.wait()
            if self._outcome == "conflict":
                ticket.conflicted()
            elif self._outcome == "only read":
                ticket.only_read()
            elif self._outcome == "failed":
                raise TrialError

    async def end(self, outcome: str = "written") -> None:
        """Ends the attempt as `written`, `conflict`, `only read` or `failed`; runs the others until each waits."""
        self._outcome = outcome
        self._ending.set()
        with pytest.raises(TrialError) if outcome == "failed" else nullcontext():
            await self.task
        await settled()


async def attempts(hot_keys: HotKeys, number: int, key: bytes = KEY) -> list[Attempt]:
    """Starts `number` attempts one after the other, each once the one before it reads or waits."""
    made = []
    for _ in range(number):
        made.append(Attempt(hot_keys, key))
        await settled()
    return made


async def hot(key: bytes = KEY) -> HotKeys:
    """Hot keys of a client that has just had a conflict over `key`."""
    hot_keys = HotKeys()
    (conflicting,) = await attempts(hot_keys, 1, key)
    await conflicting.end("conflict")
    return hot_keys


def reading(those: list[Attempt]) -> list[bool]:
    """Which of the attempts were admitted to their read."""
    return [attempt.has_read for attempt in those]


@in_loop
async def test_no_attempt_waits_at_a_cold_key() -> None:
    assert reading(await attempts(HotKeys(), 3)) == [True, True, True]


@in_loop
async def test_attempts_at_a_hot_key_are_admitted_one_at_a_time_in_order_of_arrival() -> None:
    those = await attempts(await hot(), 3)
    assert reading(those) == [True, False, False]
    await those[0].end()
    assert reading(those) == [True, True, False]
    await those[1].end("conflict")
    assert reading(those) == [True, True, True]


@in_loop
async def test_other_keys_stay_cold() -> None:
    assert reading(await attempts(await hot(), 2, OTHER)) == [True, True]


@in_loop
async def test_other_work_never_waits() -> None:
    async def read_only() -> None:
        """Reads the same key."""

    hot_keys = await hot()
    holder, waiting = await attempts(hot_keys, 2)
    readers = [Attempt(hot_keys, kind=read_only) for _ in range(2)]
    await settled()
    assert reading([holder, waiting, *readers]) == [True, False, True, True]


@in_loop
async def test_closures_over_one_function_its_partial_calls_and_its_wrappers_are_the_same_work() -> None:
    def closure(number: int) -> Callable[..., object]:
        return lambda: number

    def decorated(kind: Callable[..., object]) -> Callable[..., object]:
        @wraps(kind)
        def run() -> object:
            return kind()

        return run

    hot_keys = HotKeys()
    conflicting = Attempt(hot_keys, kind=closure(1))
    await settled()
    await conflicting.end("conflict")
    kinds = (closure(2), partial(closure(3)), partial(partial(closure(4))), partial(decorated(partial(closure(5)))))
    those = [Attempt(hot_keys, kind=kind) for kind in (*kinds, decorated(work))]
    await settled()
    assert reading(those) == [True, False, False, False, True], "the last one decorates another function"


@in_loop
async def test_a_transaction_inside_another_has_no_ticket() -> None:
    hot_keys = await hot()
    outer = hot_keys.ticket(work)
    assert outer
    with outer:
        assert hot_keys.ticket(work) is None
        assert await asyncio.create_task(ticket_in_a_task(hot_keys)) is None
    assert hot_keys.ticket(work)


async def ticket_in_a_task(hot_keys: HotKeys) -> object:
    return hot_keys.ticket(work)


@in_loop
async def test_an_attempt_that_held_the_key_and_only_read_admits_every_other() -> None:
    hot_keys = await hot()
    those = await attempts(hot_keys, 3)
    await those[0].end("only read")
    assert reading(those) == [True, True, True]
    assert reading(await attempts(hot_keys, 2)) == [True, True], "the key is cold"


@in_loop
async def test_a_failed_attempt_passes_the_key_on_and_leaves_it_hot() -> None:
    those = await attempts(await hot(), 3)
    await those[0].end("failed")
    assert reading(those) == [True, True, False]


@in_loop
async def test_a_key_is_passed_on_after_ticket_seconds_whatever_its_holder_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hot_keys = await hot()
    monkeypatch.setattr(module, "TICKET_SECONDS", 0.01)
    (slow,) = await attempts(hot_keys, 1)
    monkeypatch.setattr(module, "TICKET_SECONDS", 60.0)
    second, third = await attempts(hot_keys, 2)
    while not second.has_read:
        await asyncio.sleep(0)
    assert not third.has_read
    await slow.end()
    assert not third.has_read, "the end of the slow attempt must not release the key of the second"
    await second.end()
    assert third.has_read


@in_loop
async def test_no_attempt_waits_longer_than_ticket_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, *_ = await attempts(hot_keys := await hot(), 1)
    monkeypatch.setattr(module, "TICKET_SECONDS", 0.01)
    those = await attempts(hot_keys, 20)
    while not all(reading(those)):
        await asyncio.sleep(0)
    await holder.end()


@in_loop
async def test_an_attempt_cancelled_while_it_waits_is_passed_over() -> None:
    those = await attempts(await hot(), 3)
    those[1].task.cancel()
    await settled()
    await those[0].end()
    assert those[2].has_read


@in_loop
async def test_an_attempt_cancelled_in_the_step_of_its_admission_passes_the_key_on() -> None:
    those = await attempts(await hot(), 3)
    those[0]._ending.set()
    while not those[0].task.done():
        await asyncio.sleep(0)
    those[1].task.cancel()
    await settled()
    assert (those[1].task.cancelled(), those[2].has_read) == (True, True)


@in_loop
async def test_a_key_is_cold_hot_seconds_after_the_last_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOT_SECONDS", -1.0)
    assert reading(await attempts(await hot(), 2)) == [True, True]


@in_loop
async def test_a_key_stays_hot_while_attempts_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hot_keys = await hot()
    first, second = await attempts(hot_keys, 2)
    monkeypatch.setattr(module, "HOT_SECONDS", -1.0)
    await first.end()
    (third,) = await attempts(hot_keys, 1)
    assert reading([second, third]) == [True, False]


@pytest.mark.parametrize(
    ("seconds", "is_hot"), [(-1.0, True), (60.0, False)], ids=["cold keys are evicted", "hot keys stay"]
)
@in_loop
async def test_at_many_keys_a_cold_key_is_evicted_or_the_new_one_ignored(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_hot: bool
) -> None:
    monkeypatch.setattr(module, "HOT_SECONDS", seconds)
    monkeypatch.setattr(module, "MANY_KEYS", 10)
    hot_keys = HotKeys()
    for number in range(100):
        hot_keys.mark_hot(b"%d" % number, "kind")
    monkeypatch.setattr(module, "HOT_SECONDS", 60.0)
    hot_keys.mark_hot(KEY, "kind")
    assert (hot_keys.queue_of(KEY, "kind") is not None) == is_hot
    assert len(hot_keys._queues) == 10
