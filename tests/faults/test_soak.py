"""Long runs, for leaks that only show after minutes."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgcoord_cli.core.kv.client import Transaction, open_database
from pgcoord_cli.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import StartLeader

MINUTES = 10
TASKS = 64
MARGIN = 16 * 2**20


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS:"))


async def increment(tr: Transaction) -> None:
    key = b"%05d" % random.randrange(10_000)
    tr.set(key, b"%d" % (int(await tr.get(key) or 0) + 1))


@pytest.mark.slow
def test_a_leader_uses_no_more_memory_after_ten_minutes_of_commits_than_after_two(
    settings: Settings, start_leader: StartLeader
) -> None:
    leader = start_leader("leader")
    leader.wait_for("elected epoch")
    sizes: list[int] = []

    async def scenario() -> int:
        ends_at = time.monotonic() + MINUTES * 60
        committed = 0

        async def worker() -> None:
            nonlocal committed
            while time.monotonic() < ends_at:
                await db.run(increment)
                committed += 1

        async with await open_database(settings) as db:
            workers = asyncio.gather(*(worker() for _ in range(TASKS)))
            for _ in range(MINUTES):
                await asyncio.wait([workers], timeout=60)
                sizes.append(resident_bytes(leader.process.pid))
            await workers
        return committed

    committed = asyncio.run(scenario())
    print(f"{committed} commits; MiB at each minute: {[size >> 20 for size in sizes]}")
    assert committed > 1_000
    assert max(sizes[2:]) <= sizes[1] + MARGIN
