"""Rates, percentiles and memory of a measurement, and the command line of benchmarks with several parts."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

Record = dict[str, Any]


@dataclass
class Stopwatch:
    """Collects the duration of each unit of work, in seconds, for `seconds` from its creation."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def is_running(self) -> bool:
        """Whether there is time left."""
        return time.perf_counter() - self.began < self.seconds

    def note(self, began: float) -> None:
        """Records the end of a unit of work that began at this `perf_counter`."""
        self.latencies.append(time.perf_counter() - began)

    def result(self) -> Result:
        """Returns the rate and the percentiles of the units recorded so far."""
        elapsed = time.perf_counter() - self.began
        ordered = sorted(self.latencies) or [0.0]
        return Result(
            per_second=len(self.latencies) / elapsed,
            p50_ms=statistics.median(ordered) * 1000,
            p99_ms=ordered[int(len(ordered) * 0.99)] * 1000,
        )


@dataclass(frozen=True)
class Result:
    """Units a second, and latencies in milliseconds."""

    per_second: float
    p50_ms: float
    p99_ms: float

    def as_record(self) -> dict[str, Any]:
        """Returns the numbers rounded, for tables and JSON."""
        return {
            "per_second": round(self.per_second, 1), "p50_ms": round(self.p50_ms, 2), "p99_ms": round(self.p99_ms, 2)
        }  # fmt: skip


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process in bytes (Linux only); 0 if it is not known."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def call_parser(description: str | None, *parts: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of every benchmark that has several parts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-version", type=int, default=18)
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--json", type=Path)
    return parser


def run_parts(parts: Mapping[str, Callable[[], list[Record]]], options: argparse.Namespace) -> None:
    """Runs the chosen parts, prints a table after each, and writes all records with `--json`."""
    found: dict[str, list[Record]] = {}
    for name in options.only or parts:
        found[name] = parts[name]()
        print(f"{name}\n{tabulate(found[name], headers='keys')}\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
