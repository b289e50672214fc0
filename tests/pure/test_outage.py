"""Outages: a failure that repeats is logged once and counted, until it ends."""

from __future__ import annotations

import logging

import pytest

from pgcoord_cli.core.concurrency import outage
from pgcoord_cli.core.concurrency.outage import MAX_REASONS, Outage

NAME = "pgcoord.tried"


class Clock:
    """Replaces the clock of outages."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outage, "time", clock)
    return clock


@pytest.fixture
def tried(caplog: pytest.LogCaptureFixture) -> Outage:
    caplog.set_level(logging.DEBUG, NAME)
    return Outage(logging.getLogger(NAME), "unreachable", "connected", node="west-1")


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[tuple[str, str]]:
    """Returns what was logged at `level` or above, and forgets it."""
    found = [(record.levelname, record.message) for record in caplog.records if record.levelno >= level]
    caplog.clear()
    return found


def test_i17_a_failure_that_repeats_is_logged_once_and_counted(
    tried: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(57):
        tried.failed("connection refused")
        clock.now += 1
    assert lines(caplog) == [("WARNING", "unreachable: connection refused")]
    tried.ended()
    assert lines(caplog) == [("INFO", "connected again, after 57 attempts over 57s")]


def test_each_further_attempt_is_logged_at_debug(tried: Outage, caplog: pytest.LogCaptureFixture) -> None:
    tried.failed("connection refused")
    tried.failed("connection refused")
    assert lines(caplog, logging.DEBUG) == [
        ("WARNING", "unreachable: connection refused"),
        ("DEBUG", "unreachable: connection refused (attempt 2)"),
    ]


def test_another_reason_is_logged_once_too_also_if_the_two_alternate(
    tried: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in ["refused", "starting up"] * 3:
        tried.failed(reason)
    assert lines(caplog) == [("WARNING", "unreachable: refused"), ("WARNING", "unreachable: starting up")]


def test_reasons_that_never_repeat_are_not_logged_without_end(tried: Outage, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(MAX_REASONS + 3):
        tried.failed(f"pid {number} has gone")
    assert len(lines(caplog)) == MAX_REASONS


def test_the_next_outage_is_logged_again(tried: Outage, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        tried.failed("refused")
        clock.now += 0.25
        tried.ended()
    assert (
        lines(caplog)
        == [("WARNING", "unreachable: refused"), ("INFO", "connected again, after 1 attempt over 0.2s")] * 2
    )


def test_a_success_without_an_outage_is_not_logged(tried: Outage, caplog: pytest.LogCaptureFixture) -> None:
    tried.ended()
    assert lines(caplog, logging.DEBUG) == []


def test_an_outage_of_several_lasts_until_the_last_of_them_has_succeeded(
    tried: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for slot in (1, 2):
        tried.failed("refused", source=slot)
    clock.now = 12
    tried.ended(source=1)
    tried.ended(source=3)
    assert lines(caplog) == [("WARNING", "unreachable: refused")]
    tried.failed("refused", source=1)  # begun before the server was back
    tried.ended(source=2)
    assert lines(caplog) == []
    tried.ended(source=1)
    assert lines(caplog) == [("INFO", "connected again, after 3 attempts over 12s")]


def test_a_failure_that_was_logged_already_is_counted(
    tried: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    tried.counted()
    clock.now = 3
    assert lines(caplog, logging.DEBUG) == []
    tried.ended()
    assert lines(caplog) == [("INFO", "connected again, after 1 attempt over 3.0s")]


def test_fields_go_with_every_record(tried: Outage, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    tried.failed("refused", epoch=7)
    tried.failed("refused")
    clock.now = 1.5
    tried.ended(epoch=8)
    records = [vars(record) for record in caplog.records]
    assert [(record["node"], record["attempts"]) for record in records] == [("west-1", 1), ("west-1", 2), ("west-1", 2)]
    assert [record.get("epoch") for record in records] == [7, None, 8]
    assert records[-1]["seconds"] == 1.5
