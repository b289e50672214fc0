"""From `kill -9` of the leader to the next acknowledged commit: `python -m benchmarks.failover`.

Two candidates with the default time to live run, and clients increment counters without a pause. In each round the
leader is killed, and the time to the first acknowledgement of a commit that *began* after the kill is measured; then a
new candidate is started in its place. At the end the counters must equal the number of acknowledged commits. The ratio
compares the median with the time to live, after which the expiry of the lease alone would allow a new leader.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from tabulate import tabulate

from pgcoord_cli.core.database import session
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.leader import status as leader_status
from pgcoord_cli.settings import Settings

TTL = 10.0
WRITERS = 16


class Candidates:
    """The processes of `pgcoord leader run`, by node id."""

    def __init__(self, settings: Settings) -> None:
        self._environment = os.environ | {"PGCOORD_DSN": settings.dsn}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts one more candidate."""
        name = f"candidate-{len(self._processes) + 1}"
        command = [sys.executable, "-m", "pgcoord_cli", "leader", "run", "-q", "--ttl", f"{TTL}s", "--node-id", name]
        self._processes[name] = subprocess.Popen(command, env=self._environment)

    def kill(self, name: str) -> None:
        """Kills a candidate with SIGKILL, and waits for its end."""
        self._processes[name].send_signal(signal.SIGKILL)
        self._processes[name].wait()

    def stop(self) -> None:
        """Terminates all candidates, and waits for their end."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait()


class Load:
    """Increments counters, and records when each acknowledged commit began and ended (`perf_counter`)."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.commits: list[tuple[float, float]] = []
        self.running = True

    async def writer(self, key: bytes) -> None:
        """Increments one counter until `running` is cleared."""

        async def increment(transaction: Transaction) -> None:
            transaction.add(key, (1).to_bytes(8, "little"))

        while self.running:
            began = time.perf_counter()
            await self._database.run(increment)
            self.commits.append((began, time.perf_counter()))

    async def first_after(self, moment: float) -> float:
        """Waits for a commit that began after `moment`, and returns the seconds from there to its acknowledgement."""
        while not (later := [end for began, end in self.commits[-4 * WRITERS :] if began > moment]):
            await asyncio.sleep(0.001)
        return min(later) - moment


def current_leader(settings: Settings) -> dict[str, Any]:
    """Returns the `leader` part of the status document."""
    with session.command_session(settings, "benchmark", writes=False) as conn:
        return leader_status.status_document(conn)["leader"]


def await_successor(settings: Settings, epoch: int) -> None:
    """Waits until there is a leader with a greater epoch."""
    with session.command_session(settings, "benchmark", writes=False) as conn:
        leader_status.wait_for_leader(conn, settings.schema, 60, after_epoch=epoch)


async def measure(settings: Settings, candidates: Candidates, rounds: int) -> list[float]:
    """Runs the rounds under load, and returns the gap of each in seconds."""
    gaps = []
    async with await open_database(settings, "benchmark") as database:
        load = Load(database)
        writers = [asyncio.create_task(load.writer(b"counter-%d" % number)) for number in range(WRITERS)]
        for _ in range(rounds):
            await asyncio.sleep(1.5)  # the second candidate waits for the lock, and there is load
            now = await asyncio.to_thread(current_leader, settings)
            killed_at = time.perf_counter()
            candidates.kill(now["leader_addr"])
            gaps.append(await load.first_after(killed_at))
            candidates.start()
            print(f"  epoch {now['epoch']}: {gaps[-1] * 1000:.0f} ms", file=sys.stderr)
        load.running = False
        await asyncio.gather(*writers)
        reader = database.transaction()
        rows = await reader.get_range(b"counter-", b"counter.")
        total = sum(int.from_bytes(value, "little") for _, value in rows)
        assert total == len(load.commits), f"{total} increments for {len(load.commits)} acknowledged commits"
    return gaps


def main() -> None:
    """Runs the rounds and prints the gaps beside the time to live."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-version", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with temporary_server(find_installation(options.server_version)) as server:
        settings = Settings(dsn=server.dsn)
        upgrade(settings)
        candidates = Candidates(settings)
        try:
            candidates.start()
            await_successor(settings, 0)
            candidates.start()
            gaps = asyncio.run(measure(settings, candidates, options.rounds))
        finally:
            candidates.stop()
    median = statistics.median(gaps)
    found = {"rounds": len(gaps), "median_ms": round(median * 1000), "longest_ms": round(max(gaps) * 1000)}
    print(tabulate([found | {"lease_alone_ratio": round(TTL / median, 1)}], headers="keys"))


if __name__ == "__main__":
    main()
