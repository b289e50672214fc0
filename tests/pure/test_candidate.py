"""A candidate whose attempts fail: the pause between attempts, and that the same failure is reported once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pgcoord_cli.core.leader import candidate
from pgcoord_cli.core.leader.candidate import RECONNECT_SECONDS, Candidate, CandidateEvent
from pgcoord_cli.errors import ConnectionFailed
from pgcoord_cli.settings import Settings

DOWN, REFUSED = "connection refused", "too many clients"


class Clock:
    """Replaces the clock and the wake-up of a candidate that is woken ten times a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += min(seconds, 0.1)

    def set(self) -> None:
        """Does nothing: the wake-up is always set."""


class Session:
    """The session that `run` opens first as a check."""

    def close(self) -> None:
        """Does nothing."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(candidate, "time", clock)
    monkeypatch.setattr(candidate, "open_session", lambda *_args, **_named: Session())
    return clock


def attempts(monkeypatch: pytest.MonkeyPatch, clock: Clock, failures: list[str]) -> tuple[list[float], list[str]]:
    """Returns the times of a candidate's attempts, which end with these failures in order, and its reports."""
    reports: list[str] = []
    times: list[float] = []
    coming: Iterator[str] = iter(failures)

    def serve(_self: Any) -> None:
        times.append(clock.now)
        failure = next(coming, None)
        if failure is None:
            one.stop()
        else:
            raise ConnectionFailed(failure)

    def report(event: CandidateEvent) -> None:
        reports.append(event.event if event.event == "candidate" else event.detail)

    monkeypatch.setattr(Candidate, "_serve_one_term", serve)
    one = Candidate(Settings(), "me", 10, report)
    one._wakeup.close()
    one._wakeup = clock  # type: ignore[assignment]
    one.run()
    return times, reports


def test_i17_attempts_begin_a_pause_apart_however_often_the_candidate_is_woken(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    times, _ = attempts(monkeypatch, clock, [DOWN] * 5)
    assert times == pytest.approx([number * RECONNECT_SECONDS for number in range(6)])


def test_i17_the_same_failure_is_reported_once(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    _, reports = attempts(monkeypatch, clock, [DOWN, DOWN, REFUSED, REFUSED, DOWN])
    assert reports == ["candidate", DOWN, REFUSED, DOWN]
