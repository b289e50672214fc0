"""Commits through pgcoord and through three baselines, in one run on one server: `python -m benchmarks.commits`.

Workloads: read-modify-write of one of 10,000 keys; the same on 10 hot keys; scan 100 keys and write one of them. Each
runs with 1, 32 and 256 transactions in flight; the baselines have at most 32 connections, like a pool. With one in
flight, a client commits directly; "by leader" is the same with direct commits disabled. Durability is on everywhere.
Prints rates, percentiles and ratios, and writes them as JSON with `--json FILE`.

The superseded design needs btree_gist, which the embedded PostgreSQL lacks: `--server-version 15` runs on a local
installation that has it. `--history N` resolves N requests first; `--old-snapshot` holds a snapshot open meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psycopg
from tabulate import tabulate

from benchmarks import baselines
from benchmarks.baselines import KEYS, SCAN, key_of
from benchmarks.measuring import Result, Stopwatch, resident_bytes
from pgcoord_cli.core.database import session
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.kv.direct_commit import DirectCommitBackoff
from pgcoord_cli.core.leader import status as leader_status
from pgcoord_cli.settings import Settings

POOL = 32


class Workload(NamedTuple):
    """The transaction of a workload: a scan or a read-modify-write, and the number of keys it chooses from."""

    name: str
    keys: int
    scan: bool = False


WORKLOADS = {
    "rmw-10k": Workload("rmw-10k", KEYS),
    "rmw-hot10": Workload("rmw-hot10", 10),
    "scan100-write1": Workload("scan100-write1", KEYS, scan=True),
}
IN_FLIGHT = (1, 32, 256)


def transaction_of(workload: Workload) -> Callable[[Transaction], Awaitable[None]]:
    """Returns the workload as the work of a pgcoord transaction."""

    async def read_modify_write(transaction: Transaction) -> None:
        key = key_of(random.randrange(workload.keys))
        transaction.set(key, b"%d" % (int(await transaction.get(key) or 0) + 1))

    async def scan_and_write(transaction: Transaction) -> None:
        first = random.randrange(workload.keys - SCAN)
        rows = await transaction.get_range(key_of(first), key_of(first + SCAN))
        key, value = rows[random.randrange(len(rows))]
        transaction.set(key, b"%d" % (int(value) + 1))

    return scan_and_write if workload.scan else read_modify_write


async def drive(database: Database, workload: Workload, in_flight: int, seconds: float) -> Result:
    """Runs `in_flight` tasks that commit one transaction after the other, for `seconds`."""
    watch = Stopwatch(seconds)
    work = transaction_of(workload)

    async def worker() -> None:
        while watch.is_running():
            began = time.perf_counter()
            await database.run(work, retry_limit=100_000)
            watch.note(began)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return watch.result()


def run_pgcoord(settings: Settings, workload: Workload, in_flight: int, seconds: float) -> Result:
    """Measures the workload through one client in this process, after a short warm-up."""

    async def run() -> Result:
        async with await open_database(settings, "benchmark") as database:
            await drive(database, workload, in_flight, min(1.0, seconds / 4))
            return await drive(database, workload, in_flight, seconds)

    return asyncio.run(run())


@contextmanager
def leading(settings: Settings) -> Iterator[int]:
    """Runs a leader in a process of its own within the block; yields its process id."""
    environment = os.environ | {"PGCOORD_DSN": settings.dsn}
    process = subprocess.Popen([sys.executable, "-m", "pgcoord_cli", "leader", "run", "-q"], env=environment)
    try:
        with session.command_session(settings, "benchmark", writes=False) as conn:
            leader_status.wait_for_leader(conn, settings.schema, 30)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


async def fill(settings: Settings, requests: int) -> None:
    """Writes the ten thousand keys, and then resolves at least `requests` requests."""
    async with await open_database(settings, "benchmark") as database:
        for start in range(0, KEYS, 1000):
            await database.run(lambda tr, start=start: _set_all(tr, start))  # type: ignore[misc]
        done = 0
        while done < requests:
            result = await drive(database, WORKLOADS["rmw-10k"], 256, 5.0)
            done += int(result.per_second * 5)
            print(f"  history: {done} of {requests}", file=sys.stderr)


async def _set_all(transaction: Transaction, start: int) -> None:
    for number in range(start, start + 1000):
        transaction.set(key_of(number), b"0")


def measure(
    settings: Settings, bin_dir: Path, workload: Workload, in_flight: int, seconds: float, *, superseded: bool
) -> dict[str, Result]:
    """Measures pgcoord and every baseline on one workload, one after the other."""
    workers = min(in_flight, POOL)
    work = baselines.scan_and_write if workload.scan else baselines.read_modify_write
    script = "scan" if workload.scan else "rmw"
    found = {
        "pgcoord": run_pgcoord(settings, workload, in_flight, seconds),
        "serializable": baselines.run_workers(settings.dsn, work, workload.keys, workers, seconds, serializable=True),
        "pgbench": baselines.run_pgbench(bin_dir, settings.dsn, script, workload.keys, workers, seconds),
    }
    if in_flight == 1:
        with patch.object(DirectCommitBackoff, "admits", return_value=False):
            found["by leader"] = run_pgcoord(settings, workload, in_flight, seconds)
    if superseded and not workload.scan:
        stop = threading.Event()
        pruner = threading.Thread(target=baselines.prune_ranges, args=(settings.dsn, stop))
        pruner.start()
        found["superseded"] = baselines.run_workers(
            settings.dsn, baselines.superseded_write, workload.keys, workers, seconds, serializable=False
        )
        stop.set()
        pruner.join()
    return found


def rows_of(workload: Workload, in_flight: int, found: dict[str, Result]) -> list[dict[str, Any]]:
    """Returns one record for each of them; `ratio` is pgcoord's rate over theirs, `latency_ratio` the same for p50."""
    ours = found["pgcoord"]
    return [
        {"workload": workload.name, "in_flight": in_flight, "who": who}
        | result.as_record()
        | {
            "ratio": round(ours.per_second / result.per_second, 2) if result.per_second else None,
            "latency_ratio": round(ours.p50_ms / result.p50_ms, 2) if result.p50_ms else None,
        }
        for who, result in found.items()
    ]


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


def main() -> None:
    """Parses the call, runs the measurements, prints and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-version", type=int, default=18)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--in-flight", type=int, action="append")
    parser.add_argument("--history", type=int, default=0)
    parser.add_argument("--old-snapshot", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    installation = find_installation(options.server_version)
    with temporary_server(installation) as server:
        rows = _run(Settings(dsn=server.dsn), installation.bin_dir, options)
    print(tabulate(rows, headers="keys"))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _run(settings: Settings, bin_dir: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    upgrade(settings)
    superseded = baselines.prepare(settings.dsn)
    if not superseded:
        print("no btree_gist on this server: the superseded design is left out", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    with leading(settings) as leader_pid:
        asyncio.run(fill(settings, options.history))
        with old_snapshot(settings.dsn, options.old_snapshot):
            for name in options.workload or WORKLOADS:
                for in_flight in options.in_flight or IN_FLIGHT:
                    workload = WORKLOADS[name]
                    found = measure(settings, bin_dir, workload, in_flight, options.seconds, superseded=superseded)
                    rows += rows_of(workload, in_flight, found)
                    print(tabulate(rows[-len(found) :], headers="keys"), file=sys.stderr)
        print(f"leader: {resident_bytes(leader_pid) / 2**20:.0f} MiB resident", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
