"""The transactions that the benchmark of commits measures, run through pgcoord's client and a leader process."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

from benchmarks.baselines import KEYS, SCAN, WALK, Work, key_of, next_number
from benchmarks.baselines import read_modify_write as read_modify_write_sql
from benchmarks.baselines import scan_and_write as scan_and_write_sql
from benchmarks.baselines import walk_and_write as walk_and_write_sql
from benchmarks.measuring import Result, Stopwatch
from pgcoord_cli.core.database import session
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.kv.direct_commit import DirectCommitBackoff
from pgcoord_cli.core.leader import status as leader_status
from pgcoord_cli.settings import Settings

TransactionWork = Callable[[Transaction], Awaitable[None]]


class Workload(NamedTuple):
    """A transaction over `keys` keys: the work of pgcoord and psycopg, and the name of its script for pgbench."""

    name: str
    keys: int
    work: Callable[[int], TransactionWork]
    psycopg: Work
    pgbench: str | None = None

    @property
    def is_update(self) -> bool:
        """Whether it reads and writes one key: the superseded design and etcd do only that."""
        return self.pgbench == "rmw"


def read_modify_write(keys: int) -> TransactionWork:
    """Increments one of `keys` keys."""

    async def work(transaction: Transaction) -> None:
        key = key_of(random.randrange(keys))
        transaction.set(key, b"%d" % (int(await transaction.get(key) or 0) + 1))

    return work


def scan_and_write(keys: int) -> TransactionWork:
    """Reads a hundred adjacent keys in one range and writes one of them."""

    async def work(transaction: Transaction) -> None:
        first = random.randrange(keys - SCAN)
        rows = await transaction.get_range(key_of(first), key_of(first + SCAN))
        key, value = rows[random.randrange(len(rows))]
        transaction.set(key, b"%d" % (int(value) + 1))

    return work


def walk_and_write(keys: int) -> TransactionWork:
    """Reads twenty keys one after the other, each named by the value before it, and writes the last one."""

    async def work(transaction: Transaction) -> None:
        number, value = random.randrange(keys), 0
        for step in range(WALK):
            number = next_number(number, value, keys) if step else number
            value = int(await transaction.get(key_of(number)) or 0)
        transaction.set(key_of(number), b"%d" % (value + 1))

    return work


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("rmw-10k", KEYS, read_modify_write, read_modify_write_sql, "rmw"),
        Workload("rmw-hot10", 10, read_modify_write, read_modify_write_sql, "rmw"),
        Workload("scan100-write1", KEYS, scan_and_write, scan_and_write_sql, "scan"),
        Workload("reads20-write1", KEYS, walk_and_write, walk_and_write_sql),
    )
}


async def drive(database: Database, workload: Workload, in_flight: int, seconds: float) -> Result:
    """Runs `in_flight` tasks that commit one transaction after the other, for `seconds`."""
    watch = Stopwatch(seconds)
    work = workload.work(workload.keys)

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


def run_by_leader(settings: Settings, workload: Workload, in_flight: int, seconds: float) -> Result:
    """Measures the workload with direct commits disabled."""
    with patch.object(DirectCommitBackoff, "admits", return_value=False):
        return run_pgcoord(settings, workload, in_flight, seconds)


def set_to_watch(settings: Settings, seconds: float) -> Result:
    """Measures the time from the begin of a set by one client to the end of a watch of the key in another client."""

    async def run() -> Result:
        async with (
            await open_database(settings, "benchmark") as writer,
            await open_database(settings, "benchmark") as reader,
        ):
            stopwatch = Stopwatch(seconds)
            number = 0
            while stopwatch.is_running():
                number += 1
                await _set_once(writer, reader, number, stopwatch)
            return stopwatch.result()

    return asyncio.run(run())


async def _set_once(writer: Database, reader: Database, number: int, stopwatch: Stopwatch) -> None:
    watching = reader.transaction()
    watch = await watching.watch(b"watched")
    await watching.commit()

    async def write(transaction: Transaction) -> None:
        transaction.set(b"watched", b"%d" % number)

    async def notice() -> None:
        await watch
        stopwatch.note(began)

    began = time.perf_counter()
    await asyncio.gather(writer.run(write), notice())


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


def write_keys(settings: Settings) -> None:
    """Writes the ten thousand keys."""

    async def run() -> None:
        async with await open_database(settings, "benchmark") as database:
            for start in range(0, KEYS, 1000):
                await database.run(lambda tr, start=start: _set_thousand(tr, start))  # type: ignore[misc]

    asyncio.run(run())


async def _set_thousand(transaction: Transaction, start: int) -> None:
    for number in range(start, start + 1000):
        transaction.set(key_of(number), b"0")
