"""A candidate that fails again and again: attempts lie apart, whoever wakes it, and the same trouble is told once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pgcoord_cli.core.leader import candidate
from pgcoord_cli.core.leader.candidate import RECONNECT_SECONDS, Candidate, CandidateEvent
from pgcoord_cli.errors import ConnectionFailed
from pgcoord_cli.settings import Settings

DOWN, REFUSED = "nobody listens there", "too many clients"


class Clock:
    """Stands for the time and for the wake-ups of a candidate that is woken ten times a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += min(seconds, 0.1)

    def set(self) -> None:
        """It is always set."""


class Session:
    """What `run` opens first, to see whether it may."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(candidate, "time", clock)
    monkeypatch.setattr(candidate, "open_session", lambda *_args, **_named: Session())
    return clock


def attempts(monkeypatch: pytest.MonkeyPatch, clock: Clock, troubles: list[str]) -> tuple[list[float], list[str]]:
    """When a candidate tried, if each attempt ends with the next of these troubles, and what it said."""
    said: list[str] = []
    times: list[float] = []
    coming: Iterator[str] = iter(troubles)

    def serve(_self: Any) -> None:
        times.append(clock.now)
        trouble = next(coming, None)
        if trouble is None:
            one.stop()
        else:
            raise ConnectionFailed(trouble)

    def report(event: CandidateEvent) -> None:
        said.append(event.event if event.event == "standing" else event.detail)

    monkeypatch.setattr(Candidate, "_serve_one_term", serve)
    one = Candidate(Settings(), "me", 10, report)
    one._wakeup.close()
    one._wakeup = clock  # type: ignore[assignment]
    one.run()
    return times, said


def test_attempts_lie_apart_whoever_wakes_the_candidate(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    times, _ = attempts(monkeypatch, clock, [DOWN] * 5)
    assert times == pytest.approx([number * RECONNECT_SECONDS for number in range(6)])


def test_the_same_trouble_is_told_once(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    _, said = attempts(monkeypatch, clock, [DOWN, DOWN, REFUSED, REFUSED, DOWN])
    assert said == ["standing", DOWN, REFUSED, DOWN]
