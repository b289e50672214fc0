"""`pgcoord bench`: measures the commits a second of this database and its leader, and their latencies.

Several tasks of one client increment random keys below a prefix of the run, one transaction after the other, for some
seconds. The keys are removed at the end. A latency covers the whole path: read, submit, resolve, durable commit, reply.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.settings import Settings

TICK_SECONDS = 0.1
"""Least seconds between two reports of progress."""


class BenchResult(NamedTuple):
    """The result of a run: commits a second, latencies in milliseconds, and the rate in each tenth of the run.

    `conflicts` counts the attempts that were retried.
    """

    commits: int
    seconds: float
    per_second: float
    conflicts: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    rates: list[int]


class Bench:
    """One run of `in_flight` tasks over `keys` keys for `seconds`. `tick` gets the seconds since its last call."""

    def __init__(self, seconds: float, in_flight: int, keys: int, tick: Callable[[float], None]) -> None:
        self._seconds = seconds
        self._in_flight = in_flight
        self._keys = keys
        self._tick = tick
        self._prefix = b"pgcoord-bench/" + secrets.token_hex(4).encode() + b"/"
        self._done: list[tuple[float, float]] = []  # end since the start of the run, and latency, in seconds
        self._attempts = 0
        self._began = self._ticked = 0.0

    async def run(self, settings: Settings) -> BenchResult:
        """Runs the tasks, removes their keys, and returns the result. Raises what commits raise."""
        async with await open_database(settings, "bench") as database:
            try:
                self._began = self._ticked = time.perf_counter()
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(self._in_flight):
                        tasks.create_task(self._commit_repeatedly(database))
                elapsed = time.perf_counter() - self._began
            finally:
                await database.run(self._remove_keys)
        return self._result(elapsed)

    def _is_running(self) -> bool:
        return time.perf_counter() - self._began < self._seconds

    async def _commit_repeatedly(self, database: Database) -> None:
        while self._is_running():
            began = time.perf_counter()
            await database.run(self._add_one)
            self._note(began, time.perf_counter())

    def _note(self, began: float, now: float) -> None:
        self._done.append((now - self._began, now - began))
        if now - self._ticked >= TICK_SECONDS:
            self._tick(now - self._ticked)
            self._ticked = now

    async def _add_one(self, transaction: Transaction) -> None:
        self._attempts += 1
        key = self._prefix + b"%d" % random.randrange(self._keys)
        transaction.set(key, b"%d" % (int(await transaction.get(key) or 0) + 1))

    async def _remove_keys(self, transaction: Transaction) -> None:
        # The prefix ends in a slash, which the digit zero follows in the order of bytes.
        transaction.clear_range(self._prefix, self._prefix[:-1] + b"0")

    def _result(self, elapsed: float) -> BenchResult:
        latencies = sorted(latency * 1000 for _, latency in self._done) or [0.0]

        def percentile(share: float) -> float:
            return round(latencies[min(len(latencies) - 1, int(len(latencies) * share))], 2)

        tenth = elapsed / 10
        rates = [0] * 10
        for at, _ in self._done:
            rates[min(9, int(at / tenth))] += 1
        return BenchResult(
            commits=len(self._done), seconds=round(elapsed, 2), per_second=round(len(self._done) / elapsed, 1),
            conflicts=self._attempts - len(self._done), p50_ms=percentile(0.5), p90_ms=percentile(0.9),
            p99_ms=percentile(0.99), max_ms=round(latencies[-1], 2), rates=[round(n / tenth) for n in rates],
        )  # fmt: skip
