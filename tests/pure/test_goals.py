"""The table of goals for the speed of commits: ratios by round, and whether each keeps its bound."""

from __future__ import annotations

import pytest

from benchmarks.goals import GOALS, Cell, Goal, goals, records, table
from benchmarks.measuring import Result
from benchmarks.workloads import WORKLOADS

OURS, THEIRS = Cell("w", 1), Cell("w", 1, "other")
RATE = Goal(1, "work", "other", OURS, THEIRS, 2)
LATENCY = RATE._replace(goal=0.5, of="latency")


def result(rate: float) -> Result:
    return Result(per_second=rate, p50_ms=1000 / rate, p99_ms=2000 / rate)


def measured(ours: list[float], theirs: list[float]) -> dict[Cell, list[Result]]:
    return {OURS: [result(rate) for rate in ours], THEIRS: [result(rate) for rate in theirs]}


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio", "is_met"),
    [
        ([200], [100], 2, True),
        ([199.6], [100], 2, True),
        ([190], [100], 1.9, False),
        # The machine was slow in the second and third round: what counts is the ratio within each.
        ([300, 80, 60], [100, 40, 20], 3, True),
        ([300, 80, 60], [100, 40, 40], 2, True),
    ],
)
def test_a_ratio_is_the_median_of_the_ratios_of_each_round(
    ours: list[float], theirs: list[float], ratio: float, is_met: bool
) -> None:
    (by_rate, by_latency) = table([RATE, LATENCY], measured(ours, theirs))
    assert (by_rate["ratio"], by_rate["met"]) == (pytest.approx(ratio), is_met)
    assert (by_latency["ratio"], by_latency["met"]) == (pytest.approx(1 / ratio, abs=0.01), 1 / ratio < 0.51)


def test_a_goal_that_was_not_measured_has_no_ratio() -> None:
    assert [row["met"] for row in table([RATE], {OURS: [result(1)]})] == [None]


def test_a_record_has_the_medians_and_the_ratios_to_pgcoord() -> None:
    ours, theirs = records(measured([100, 300, 200], [50, 150, 100]))
    assert (ours["per_second"], ours["p50_ms"], ours["ratio"]) == (200, 5, 1)
    assert (theirs["per_second"], theirs["ratio"], theirs["latency_ratio"]) == (100, 2, 0.5)


def test_every_row_has_a_goal_and_every_goal_a_workload() -> None:
    assert {goal.row for goal in goals([600_000])} == set(range(1, 11))
    names = {cell.workload for goal in GOALS for cell in (goal.ours, goal.theirs)}
    assert names == set(WORKLOADS) | {"set-to-watch"}
