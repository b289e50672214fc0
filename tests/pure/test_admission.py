"""Admission: the order in which attempts get their slots, and that no attempt waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps

import pytest

from pgcoord_cli.core.kv import admission as module
from pgcoord_cli.core.kv.admission import Admission
from pgcoord_cli.core.kv.conflict_limit import FEWEST, SAMPLE
from pgcoord_cli.errors import Conflict

KIND, OTHER = "scan", "other work"


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


class Attempt:
    """One attempt, in a task of its own. It ends when `end` is called."""

    def __init__(self, admission: Admission, kind: str = KIND, *, run_again: bool = False) -> None:
        self.is_admitted = False
        self._ending = asyncio.Event()
        self._error: Exception | None = None
        self.task = asyncio.create_task(self._run(admission, kind, run_again=run_again))

    async def _run(self, admission: Admission, kind: str, *, run_again: bool) -> None:
        async with admission.slot(kind, run_again=run_again):
            self.is_admitted = True
            await self._ending.wait()
            if self._error:
                raise self._error

    async def end(self, error: Exception | None = None) -> None:
        """Ends the attempt, which was admitted, with an error or a commit."""
        assert self.is_admitted
        self._error = error
        self._ending.set()
        await asyncio.gather(self.task, return_exceptions=True)
        await settled()


async def attempts(admission: Admission, number: int, kind: str = KIND) -> list[Attempt]:
    """Starts so many attempts, one after the other."""
    made = [Attempt(admission, kind) for _ in range(number)]
    await settled()
    return made


def admitted(those: list[Attempt]) -> list[bool]:
    """Which of the attempts were admitted."""
    return [attempt.is_admitted for attempt in those]


async def contended() -> tuple[Admission, list[Attempt]]:
    """Returns slots of which all but the FEWEST were withdrawn after conflicts, and their holders."""
    admission = Admission()
    holders = await attempts(admission, FEWEST)
    while admission.kind(KIND).limit is None:
        for conflicting in await attempts(admission, SAMPLE):
            await conflicting.end(Conflict("a key was written"))
    while admission.kind(KIND).limit != FEWEST:
        # In the place of one holder, so that the others keep the kind of work in flight.
        await holders.pop().end(Conflict("a key was written"))
        holders += await attempts(admission, 1)
    return admission, holders


@in_loop
async def test_no_attempt_waits_without_conflicts() -> None:
    assert all(admitted(await attempts(Admission(), 1000)))


@in_loop
async def test_attempts_beyond_the_limit_are_admitted_in_order_of_arrival() -> None:
    admission, holders = await contended()
    those = await attempts(admission, 3)
    assert admitted(those) == [False, False, False]
    await holders[0].end()
    assert admitted(those) == [True, False, False]
    await holders[1].end(RuntimeError("the work failed"))
    assert admitted(those) == [True, True, False]
    await those[0].end()
    assert admitted(those) == [True, True, True]


@in_loop
async def test_a_transaction_that_is_run_again_goes_before_those_that_were_not_run_yet() -> None:
    admission, holders = await contended()
    [new] = await attempts(admission, 1)
    again = [Attempt(admission, run_again=True) for _ in range(2)]
    await settled()
    await holders[0].end()
    assert admitted([new, *again]) == [False, True, False]
    await holders[1].end()
    assert admitted([new, *again]) == [False, True, True]
    await holders[2].end()
    assert new.is_admitted


@in_loop
async def test_other_work_never_waits() -> None:
    admission, _ = await contended()
    assert admitted(await attempts(admission, 1)) == [False]
    assert all(admitted(await attempts(admission, 1000, OTHER)))


@in_loop
async def test_an_attempt_that_is_cancelled_leaves_the_queue() -> None:
    admission, holders = await contended()
    first, second = await attempts(admission, 2)
    first.task.cancel()
    await asyncio.gather(first.task, return_exceptions=True)
    await holders[0].end()
    assert admitted([first, second]) == [False, True]


@in_loop
async def test_an_attempt_that_is_cancelled_while_it_is_admitted_gives_its_slot_back() -> None:
    admission, holders = await contended()
    first, second = await attempts(admission, 2)
    holders[0]._ending.set()
    while not holders[0].task.done():
        await asyncio.sleep(0)
    # Now `first` has the slot, and has not run yet.
    first.task.cancel()
    await settled()
    assert admitted([first, second]) == [False, True]


@in_loop
async def test_attempts_that_take_long_do_not_starve_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOT_SECONDS", 0.01)
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    admission, holders = await contended()
    those = await attempts(admission, 3 * FEWEST)
    while not all(admitted(those)):
        await asyncio.sleep(0)
    assert not any(holder.task.done() for holder in holders)
    for attempt in holders + those:
        await attempt.end()
    await settled()
    assert admission._kinds == {}


@in_loop
async def test_the_limit_of_work_that_is_no_longer_in_flight_is_kept_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "KEPT_SECONDS", 3600.0)
    admission, holders = await contended()
    for _ in range(3):
        for attempt in holders:
            await attempt.end()
        holders = await attempts(admission, FEWEST)
        [waiting] = await attempts(admission, 1)
        assert admitted([*holders, waiting]) == [True] * FEWEST + [False]
        holders.append(waiting)


@in_loop
async def test_limited_work_that_is_in_flight_again_is_not_forgotten_until_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "KEPT_SECONDS", 3600.0)
    admission, holders = await contended()
    for attempt in holders:
        await attempt.end()
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    holders = await attempts(admission, FEWEST)
    admission._on_kept(KIND)  # as the timer does
    assert admission.kind(KIND).limit == FEWEST
    for attempt in holders:
        await attempt.end()
    assert admission._kinds == {}


@in_loop
async def test_work_that_is_no_longer_in_flight_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    admission, holders = await contended()
    [waiting] = await attempts(admission, 1)
    for attempt in holders:
        await attempt.end()
    assert admission._kinds
    await waiting.end()
    await settled()
    assert admission._kinds == {}
    assert all(admitted(await attempts(admission, 1000)))


@in_loop
async def test_work_whose_attempts_are_all_cancelled_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    admission, holders = await contended()
    [waiting] = await attempts(admission, 1)
    for attempt in holders:
        attempt.task.cancel()
    while not all(holder.task.done() for holder in holders):
        await asyncio.sleep(0)
    # Now `waiting` has a slot, and has not run yet.
    waiting.task.cancel()
    await asyncio.gather(waiting.task, return_exceptions=True)
    assert not waiting.is_admitted
    await settled()
    assert admission._kinds == {}
