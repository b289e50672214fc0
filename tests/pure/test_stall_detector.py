"""When a tail says that a gap holds it up: two seconds after it came to that very gap."""

from __future__ import annotations

import pytest

from pgcoord_cli.core.events import tail
from pgcoord_cli.core.events.tail import StallDetector


class Clock:
    """Stands in for the clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tail, "time", clock)
    return clock


def test_a_gap_is_told_of_once_after_two_seconds(clock: Clock) -> None:
    patience = StallDetector()
    found = []
    for clock.now in (100.0, 101.9, 102.0, 102.1, 200.0):
        patience.note(has_moved=False, is_at_gap=True)
        found.append(patience.is_over())
    assert found == [False, False, True, False, False]


def test_time_without_a_gap_does_not_count(clock: Clock) -> None:
    patience = StallDetector()
    for clock.now in (100.0, 150.0):
        patience.note(has_moved=False, is_at_gap=False)
    clock.now = 151.0
    patience.note(has_moved=False, is_at_gap=True)
    clock.now = 152.9
    assert not patience.is_over()


def test_each_gap_has_its_own_two_seconds(clock: Clock) -> None:
    patience = StallDetector()
    patience.note(has_moved=False, is_at_gap=True)
    clock.now = 101.0
    patience.note(has_moved=True, is_at_gap=True)
    clock.now = 102.5
    assert not patience.is_over()
    clock.now = 103.0
    assert patience.is_over()


def test_looks_come_more_and_more_rarely_until_something_moves() -> None:
    patience = StallDetector()
    first, second, third = (patience.next_recheck() for _ in range(3))
    assert first < second < third
    patience.note(has_moved=True, is_at_gap=False)
    assert patience.next_recheck() == first
