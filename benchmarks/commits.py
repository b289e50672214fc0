"""Commits through pgcoord and through its alternatives, in turn on one machine: `python -m benchmarks.commits`.

Workloads: read-modify-write of one of 10,000 keys; the same on 10 hot keys; scan 100 keys and write one of them; read
20 keys one after the other and write the last. Each runs with 1, 32 and 256 transactions in flight; the baselines have
at most 32 connections, like a pool. With one in flight, a client commits directly; "by leader" is the same with direct
commits disabled. Durability is on everywhere.

After them: commits beside 600,000 settled requests and on a fresh table (`--history N`, which may be repeated; 0 leaves
it out), and from a set to its watch. Each is measured `--rounds` times in turn; rates and latencies are medians, ratios
the medians of the ratios of each round.

`--table` measures what the goals, rows 1 to 10, compare, and nothing else. `--json FILE` writes everything.

The superseded design needs btree_gist, which the embedded PostgreSQL lacks: `--server-version 15` runs on a local
installation that has it. etcd is measured if it is installed: `pip install -e '.[bench]'`. `--old-snapshot` holds a
snapshot open meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg
from tabulate import tabulate

from benchmarks import baselines, etcd, history
from benchmarks.goals import Cell, goals, records, table
from benchmarks.measuring import Result, resident_bytes
from benchmarks.workloads import WORKLOADS, Workload, leading, run_by_leader, run_pgcoord, set_to_watch, write_keys
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.settings import Settings

POOL = 32
IN_FLIGHT = (1, 32, 256)
HISTORY = 600_000

Contestants = Mapping[str, Callable[[], Result]]


class Place(NamedTuple):
    """Where the measurements run: the server, its programs, whether it has btree_gist, and etcd's port, if it runs."""

    settings: Settings
    bin_dir: Path
    has_gist: bool
    etcd_port: int | None


class Run:
    """Measures the chosen cells in turn, and keeps their results."""

    def __init__(self, rounds: int, wanted: frozenset[Cell] | None) -> None:
        self._rounds = rounds
        self._wanted = wanted
        self.measured: dict[Cell, list[Result]] = {}

    def measure(self, workload: str, in_flights: Mapping[int, Contestants]) -> None:
        """Measures every contestant of a workload once, then all of them again, until all rounds are done."""
        cells = {
            Cell(workload, in_flight, who): run
            for in_flight, contestants in in_flights.items()
            for who, run in contestants.items()
        }
        chosen = {cell: run for cell, run in cells.items() if self._wanted is None or cell in self._wanted}
        for _ in range(self._rounds if chosen else 0):
            for cell, run in chosen.items():
                self.measured.setdefault(cell, []).append(run())
        done = {cell: self.measured[cell] for cell in chosen}
        if done:
            print(tabulate(records(done), headers="keys"), file=sys.stderr, flush=True)


def contestants(place: Place, workload: Workload, in_flight: int, seconds: float) -> Contestants:
    """Returns what to measure on a workload, by name: pgcoord and every baseline that can run it."""
    dsn, keys, workers = place.settings.dsn, workload.keys, min(in_flight, POOL)
    found: dict[str, Callable[[], Result]] = {
        "pgcoord": partial(run_pgcoord, place.settings, workload, in_flight, seconds),
        "serializable": partial(
            baselines.run_workers, dsn, workload.psycopg, keys, workers, seconds, serializable=True
        ),
    }
    if workload.pgbench:
        found["pgbench"] = partial(baselines.run_pgbench, place.bin_dir, dsn, workload.pgbench, keys, workers, seconds)
    if in_flight == 1:
        found["by leader"] = partial(run_by_leader, place.settings, workload, in_flight, seconds)
    if workload.is_update and place.has_gist:
        found["superseded"] = partial(baselines.run_superseded, dsn, keys, workers, seconds)
    if workload.is_update and place.etcd_port:
        found["etcd"] = partial(etcd.read_modify_write, place.etcd_port, keys, in_flight, seconds)
    return found


def watch_contestants(place: Place, seconds: float) -> Contestants:
    """Returns what to measure from a set to its watch."""
    found: dict[str, Callable[[], Result]] = {"pgcoord": partial(set_to_watch, place.settings, seconds)}
    if place.etcd_port:
        found["etcd"] = partial(etcd.put_to_watch, place.etcd_port, seconds)
    return found


@contextmanager
def old_snapshot(dsn: str, wanted: bool) -> Iterator[None]:
    """Holds a snapshot open within the block, so that no dead row since then can be removed; if `wanted`."""
    if not wanted:
        yield
        return
    with psycopg.connect(dsn) as conn:
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT count(*) FROM pgcoord.leader_lease")
        yield


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-version", type=int, default=18)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this one, without what follows")
    parser.add_argument("--in-flight", type=int, action="append")
    parser.add_argument("--history", type=int, action="append", help="settled requests; may be repeated; 0: none")
    parser.add_argument("--table", action="store_true", help="only what the goals compare")
    parser.add_argument("--old-snapshot", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    # A call that chooses a workload measures that alone, unless it names a history too.
    options.history = [n for n in options.history or ([] if options.workload else [HISTORY]) if n]
    return options


def main() -> None:
    """Runs the measurements, prints and writes them."""
    options = parse()
    chosen = goals(options.history)
    compared = frozenset(cell for goal in chosen for cell in (goal.ours, goal.theirs))
    run = Run(options.rounds, compared if options.table else None)
    installation = find_installation(options.server_version)
    with ExitStack() as stack:
        server = stack.enter_context(temporary_server(installation))
        settings = Settings(dsn=server.dsn)
        _measure_workloads(run, _place(stack, settings, installation.bin_dir), options)
        for requests in options.history:
            _measure_history(run, settings, requests, options)
    found = {"goals": table(chosen, run.measured), "measurements": records(run.measured)}
    compared_rows = [row for row in found["goals"] if options.table or row["ratio"] is not None]
    for rows in (found["measurements"], compared_rows):
        print(tabulate(rows, headers="keys") + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def _place(stack: ExitStack, settings: Settings, bin_dir: Path) -> Place:
    upgrade(settings)
    has_gist = baselines.prepare(settings.dsn)
    if not has_gist:
        print("no btree_gist on this server: the superseded design is left out", file=sys.stderr)
    lacking = etcd.missing()
    if lacking:
        print(f"etcd is left out; install {lacking}", file=sys.stderr)
    port = None if lacking else stack.enter_context(etcd.etcd_server())
    return Place(settings, bin_dir, has_gist, port)


def _measure_workloads(run: Run, place: Place, options: argparse.Namespace) -> None:
    with leading(place.settings) as leader_pid:
        write_keys(place.settings)
        with old_snapshot(place.settings.dsn, options.old_snapshot):
            for name in options.workload or WORKLOADS:
                run.measure(
                    name,
                    {
                        in_flight: contestants(place, WORKLOADS[name], in_flight, options.seconds)
                        for in_flight in options.in_flight or IN_FLIGHT
                    },
                )
            if not options.workload:
                run.measure("set-to-watch", {1: watch_contestants(place, options.seconds)})
        print(f"leader: {resident_bytes(leader_pid) / 2**20:.0f} MiB resident", file=sys.stderr)


def _measure_history(run: Run, settings: Settings, requests: int, options: argparse.Namespace) -> None:
    with history.databases(settings, requests) as (full, fresh):
        run.measure(
            history.name_of(requests),
            {
                in_flight: history.contestants(full, fresh, in_flight, options.seconds)
                for in_flight in history.IN_FLIGHT
            },
        )


if __name__ == "__main__":
    main()
