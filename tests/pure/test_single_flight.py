"""One at a time, at once after a success, and after a pause that grows after a failure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from pgcoord_cli.core.concurrency.single_flight import SingleFlight


class Timers:
    """Stands for the event loop's timers: notes the pauses, and ends them when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        self._ends: list[Callable[[], None]] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)
        monkeypatch.setattr(random, "uniform", lambda _low, high: high)

    def _call_later(self, seconds: float, end: Callable[[], None]) -> asyncio.TimerHandle:
        self.pauses.append(seconds)
        self._ends.append(end)
        return asyncio.TimerHandle(0, lambda: None, (), asyncio.get_running_loop())

    def end_last(self) -> None:
        self._ends[-1]()


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    asyncio.run(run())


def test_after_a_success_the_next_goes_at_once() -> None:
    async def scenario() -> None:
        goes: list[bool] = []
        flight = SingleFlight(lambda: goes.append(flight.is_idle), 1, 8)
        assert flight.is_idle
        flight.begin()
        assert not flight.is_idle
        flight.succeeded()
        assert goes == [True]

    play(scenario)


def test_pauses_grow_while_one_failure_follows_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        timers, goes = Timers(monkeypatch), []
        flight = SingleFlight(lambda: goes.append("again"), 1, 4)
        for failures in range(1, 5):
            flight.begin()
            flight.failed()
            assert not flight.is_idle
            timers.end_last()
            assert flight.is_idle
            assert len(goes) == failures
        flight.succeeded()
        flight.failed()
        assert timers.pauses == [1, 2, 4, 4, 1]

    play(scenario)


def test_nothing_begins_after_the_close() -> None:
    async def scenario() -> None:
        goes: list[str] = []
        flight = SingleFlight(lambda: goes.append("again"), 0, 0)
        flight.begin()
        flight.failed()
        flight.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        flight.succeeded()
        assert not flight.is_idle
        assert not goes

    play(scenario)
