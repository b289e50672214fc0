"""The goals for the speed of commits, rows 1 to 10: ratios of two measurements that ran in turn on one server."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from benchmarks.history import IN_FLIGHT as HISTORY_IN_FLIGHT
from benchmarks.history import name_of
from benchmarks.measuring import Record, Result


class Cell(NamedTuple):
    """One thing to measure: a workload, the number of transactions in flight, and what runs them."""

    workload: str
    in_flight: int
    who: str = "pgcoord"


Measurements = Mapping[Cell, list[Result]]
"""The results of each cell, one a round."""


class Goal(NamedTuple):
    """A bound for the ratio of two cells: of their rates at least, or of their median latencies at most."""

    row: int
    work: str
    against: str
    ours: Cell
    theirs: Cell
    goal: float
    of: Literal["rate", "latency"] = "rate"

    def ratio(self, measured: Measurements) -> float | None:
        """Returns the median of the ratios of each round; None unless both cells have been measured."""
        pairs = zip(measured.get(self.ours, []), measured.get(self.theirs, []), strict=False)
        if self.of == "rate":
            ratios = [ours.per_second / theirs.per_second for ours, theirs in pairs if theirs.per_second]
        else:
            ratios = [ours.p50_ms / theirs.p50_ms for ours, theirs in pairs if theirs.p50_ms]
        return statistics.median(ratios) if ratios else None

    def is_met(self, ratio: float) -> bool:
        """Whether the ratio, rounded as it is printed, keeps the bound."""
        return round(ratio, 2) >= self.goal if self.of == "rate" else round(ratio, 2) <= self.goal


def _against(row: int, work: str, workload: str, in_flight: int, who: str, against: str, goal: float) -> Goal:
    return Goal(row, work, against, Cell(workload, in_flight), Cell(workload, in_flight, who), goal)


SERIALIZABLE = "psycopg SERIALIZABLE"
UPDATE = "update 1 of 10,000 keys"

GOALS = (
    _against(1, f"{UPDATE}, 256 in flight", "rmw-10k", 256, "serializable", f"{SERIALIZABLE}, 32 connections", 6),
    _against(2, f"{UPDATE}, 256 in flight", "rmw-10k", 256, "superseded", "the superseded design", 10),
    _against(3, f"{UPDATE}, 256 in flight", "rmw-10k", 256, "pgbench", "pgbench SERIALIZABLE, 32 connections", 3),
    _against(4, "update 1 of 10 keys, 32 in flight", "rmw-hot10", 32, "serializable", SERIALIZABLE, 4),
    Goal(
        5, f"{UPDATE}, 1 in flight", f"{SERIALIZABLE}, median latency",
        Cell("rmw-10k", 1), Cell("rmw-10k", 1, "serializable"), 1.1, "latency",
    ),
    Goal(
        6, "scan 100 keys, write 1, 256 in flight", "itself with 32 in flight",
        Cell("scan100-write1", 256), Cell("scan100-write1", 32), 1,
    ),
    _against(7, "20 dependent reads, 1 write, 1 in flight", "reads20-write1", 1, "serializable", SERIALIZABLE, 1),
    _against(7, "20 dependent reads, 1 write, 32 in flight", "reads20-write1", 32, "serializable", SERIALIZABLE, 2.5),
    _against(9, f"{UPDATE}, 32 in flight", "rmw-10k", 32, "etcd", "etcd through aetcd", 3),
    _against(9, f"{UPDATE}, 256 in flight", "rmw-10k", 256, "etcd", "etcd through aetcd", 3),
    Goal(
        10, "set to watch", "etcd put to watch, median latency",
        Cell("set-to-watch", 1), Cell("set-to-watch", 1, "etcd"), 1, "latency",
    ),
)  # fmt: skip


def goals(history: Iterable[int]) -> list[Goal]:
    """Returns every goal in the order of the rows; row 8 for each number of settled requests."""
    beside = [
        _against(8, f"{UPDATE}, {in_flight} in flight, beside {requests:,} requests", name_of(requests), in_flight,
                 "fresh table", "a fresh table", 0.9)
        for requests in history for in_flight in HISTORY_IN_FLIGHT
    ]  # fmt: skip
    return sorted([*GOALS, *beside], key=lambda goal: goal.row)


def table(chosen: Iterable[Goal], measured: Measurements) -> list[Record]:
    """Returns a record for each goal; `ratio` and `met` are None if it has not been measured."""
    found: list[Record] = []
    for goal in chosen:
        ratio = goal.ratio(measured)
        found.append(
            {"row": goal.row, "work": goal.work, "against": goal.against}
            | {"ratio": None if ratio is None else round(ratio, 2)}
            | {"goal": f"{'>=' if goal.of == 'rate' else '<='} {goal.goal:g}"}
            | {"met": None if ratio is None else goal.is_met(ratio)}
        )
    return found


def records(measured: Measurements) -> list[Record]:
    """Returns a record for each cell with the medians of its rounds, and its ratios to pgcoord in the same workload.

    `ratio` is pgcoord's rate over its rate, `latency_ratio` the same for the median latency.
    """
    found: list[Record] = []
    for cell, results in measured.items():
        ours = cell._replace(who="pgcoord")
        compared = Goal(0, "", "", ours, cell, 0)
        ratios = {"ratio": compared.ratio(measured), "latency_ratio": compared._replace(of="latency").ratio(measured)}
        found.append(
            cell._asdict()
            | median(results).as_record()
            | {name: None if ratio is None else round(ratio, 2) for name, ratio in ratios.items()}
        )
    return found


def median(results: list[Result]) -> Result:
    """Returns the medians of the rates and of each percentile."""
    return Result(
        per_second=statistics.median(result.per_second for result in results),
        p50_ms=statistics.median(result.p50_ms for result in results),
        p99_ms=statistics.median(result.p99_ms for result in results),
    )
