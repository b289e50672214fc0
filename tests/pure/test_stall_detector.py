"""When a tail reports that a gap holds it up: two seconds after it arrived at that gap."""

from __future__ import annotations

import pytest

from pgcoord_cli.core.events import stall_detector
from pgcoord_cli.core.events.stall_detector import FIRST_RECHECK, StallDetector


class Clock:
    """Replaces the clock of the module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stall_detector, "time", clock)
    return clock


def test_a_stall_is_reported_once_after_two_seconds(clock: Clock) -> None:
    stall = StallDetector()
    found = []
    for clock.now in (100.0, 101.9, 102.0, 102.1, 200.0):
        stall.record(has_moved=False, is_at_gap=True)
        found.append(stall.has_begun())
    assert found == [False, False, True, False, False]


def test_time_without_a_gap_does_not_count(clock: Clock) -> None:
    stall = StallDetector()
    for clock.now in (100.0, 150.0):
        stall.record(has_moved=False, is_at_gap=False)
    clock.now = 151.0
    stall.record(has_moved=False, is_at_gap=True)
    clock.now = 152.9
    assert not stall.has_begun()


def test_each_gap_has_its_own_two_seconds(clock: Clock) -> None:
    stall = StallDetector()
    stall.record(has_moved=False, is_at_gap=True)
    clock.now = 101.0
    stall.record(has_moved=True, is_at_gap=True)
    clock.now = 102.5
    assert not stall.has_begun()
    clock.now = 103.0
    assert stall.has_begun()


def test_the_pause_before_a_read_doubles_until_the_tail_moves() -> None:
    stall = StallDetector()
    pauses = [stall.next_recheck() for _ in range(4)]
    assert 2 * pauses[0] < pauses[3], "doubled three times, and shortened by up to a half"
    stall.record(has_moved=True, is_at_gap=False)
    assert stall.next_recheck() <= FIRST_RECHECK
