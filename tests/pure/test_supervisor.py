"""A supervisor whose attempts fail: the pauses between them, and that the same trouble is reported once."""

from __future__ import annotations

import logging
import random

import pytest

from pgcoord_cli.core.concurrency import outage, supervisor
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.supervisor import HEALTHY_SECONDS, Supervisor
from pgcoord_cli.core.concurrency.wakeup import Wakeup

LOG = "pgcoord.tried"

DOWN, REFUSED = "connection refused", "too many clients"


class Clock:
    """Replaces the clock and the wake-up of a supervisor that is woken ten times a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += min(seconds, 0.1)

    def set(self) -> None:
        """Does nothing: the wake-up is always set."""


class Attempts:
    """Attempts that last for given seconds and then end with given trouble; after the last the daemon is stopped."""

    def __init__(self, clock: Clock, *ends: tuple[float, str | None]) -> None:
        self.began: list[float] = []
        self.reports: list[str] = []
        self._clock = clock
        self._ends = list(ends)
        wakeup = Wakeup()
        logged = Outage(logging.getLogger(LOG), "unreachable", "connected")
        self._supervisor = Supervisor(
            wakeup, lambda: not self._ends, self.reports.append, self._on_recovery, logged, first=1, last=8
        )
        wakeup.close()
        self._supervisor._wakeup = clock  # type: ignore[assignment]
        self._supervisor.run(self._attempt)

    def _attempt(self) -> str | None:
        self.began.append(self._clock.now)
        seconds, trouble = self._ends.pop(0)
        self._clock.now += seconds
        return trouble

    def _on_recovery(self, attempts: int, seconds: float) -> None:
        self.reports.append(f"again after {attempts} in {seconds:.0f}s")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", clock)
    monkeypatch.setattr(outage, "time", clock)
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    return clock


def test_i17_pauses_grow_while_attempts_fail_however_often_the_daemon_is_woken(clock: Clock) -> None:
    attempts = Attempts(clock, *[(0.0, DOWN)] * 7)
    assert attempts.began == pytest.approx([0, 1, 3, 7, 15, 23, 31])


def test_i17_after_an_attempt_that_held_the_next_follows_at_once_and_pauses_start_over(clock: Clock) -> None:
    attempts = Attempts(clock, (0, DOWN), (0, DOWN), (HEALTHY_SECONDS, DOWN), (0, DOWN), (0, DOWN))
    assert attempts.began == pytest.approx([0, 1, 3, 13, 15])


def test_i17_the_same_trouble_is_reported_once_and_its_end_with_the_number_of_attempts(clock: Clock) -> None:
    attempts = Attempts(clock, *[(0.0, trouble) for trouble in (DOWN, DOWN, REFUSED, REFUSED, None, None, DOWN)])
    assert attempts.reports == [DOWN, REFUSED, "again after 4 in 15s", DOWN]


def test_i17_trouble_that_was_reported_already_makes_pauses_grow_but_is_not_reported_again(clock: Clock) -> None:
    attempts = Attempts(clock, (0, ""), (0, ""), (0, DOWN))
    assert attempts.began == pytest.approx([0, 1, 3])
    assert attempts.reports == [DOWN]


def test_i17_trouble_is_logged_once_and_its_end_with_all_attempts(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG)
    Attempts(clock, (0, ""), (0, DOWN), (0, DOWN), (0, None), (0, None))
    assert [record.message for record in caplog.records] == [
        f"unreachable: {DOWN}",
        "connected again, after 3 attempts over 7.0s",
    ]
