"""The first part of the demonstration: transfers between accounts while the leader is killed.

**What it shows.** Two candidates run as processes of their own; one is elected. Concurrent clients transfer money, each
transfer a read of two accounts and a write of both. Half way the leader's process is killed with SIGKILL. The other
candidate is elected because the server has noticed the end of the leader's session; for the clients, some commits take
longer. At the end no money has appeared or vanished, and every transfer that was acknowledged is stored exactly once:
each adds one to a counter of its source account.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pgcoord_cli.core import gc
from pgcoord_cli.core.concurrency import event_loop
from pgcoord_cli.core.database import session
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.demo import flow as demo_flow
from pgcoord_cli.core.demo.reporter import Reporter
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.leader import status as leader_status
from pgcoord_cli.errors import PgcoordError
from pgcoord_cli.settings import Settings

ACCOUNTS = 100
OPENING_BALANCE = 1_000
CLIENTS = 32
TRANSFERS = 4_000
TTL = "5s"
ELECTION_SECONDS = 15.0
"""How long the demo waits for a leader: the lease's time to live, and a margin for a slow machine."""


class DemoResult(NamedTuple):
    """The result. Times are in seconds by the clock of this process."""

    transfers: int
    conflicts_retried: int
    epochs: list[int]
    failover_seconds: float
    sum_before: int
    sum_after: int
    acknowledged: int
    counted: int
    flow: dict[str, str] = {}  # noqa: RUF012 - replaced, never changed

    @property
    def ok(self) -> bool:
        """Whether the money is complete, each acknowledged transfer is stored once, and the flow ended as expected."""
        is_complete = self.sum_before == self.sum_after and self.acknowledged == self.counted
        return is_complete and self.flow == demo_flow.EXPECTED


def run(settings: Settings, reporter: Reporter) -> DemoResult:
    """Runs the whole demonstration on an empty database. Raises PgcoordError if a step fails."""
    reporter.step("Migrate the database")
    reporter.detail(", ".join(f"{done.version:04}_{done.name}" for done in upgrade(settings)))
    with _candidates(settings) as candidates:
        reporter.step("Start two candidates as processes and wait until one is elected")
        _await_leader(settings, after=None)
        reporter.detail(_describe_leader(settings))
        bank = Bank(settings, reporter, candidates)
        reporter.step(f"Transfer money between {ACCOUNTS} accounts: {CLIENTS} clients, {TRANSFERS} transfers")
        result = event_loop.run(bank.run())
        reporter.step("Check the leader and collect garbage")
        reporter.detail(_describe_leader(settings))
        reporter.detail(_collect(settings))
    return result._replace(flow=demo_flow.run_flow(settings, reporter))


@dataclass
class Bank:
    """The accounts, the clients that transfer money between them, and the counters of transfers."""

    settings: Settings
    reporter: Reporter
    candidates: dict[str, subprocess.Popen[bytes]]
    started: int = 0
    acknowledged: int = 0
    tries: int = 0
    killed_at: float | None = None
    failover_seconds: float = 0.0
    epochs: list[int] = field(default_factory=list)
    _first_failure: PgcoordError | None = None

    async def run(self) -> DemoResult:
        """Opens the accounts, makes the transfers, kills the leader half way, and counts."""
        async with await open_database(self.settings, "demo") as database:
            await database.run(self._open_accounts)
            before, _ = await database.run(self._count)
            self.epochs.append(await self._epoch())
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(self._client(database))
            self.epochs.append(await self._epoch())
            after, counted = await database.run(self._count)
        return DemoResult(
            transfers=TRANSFERS, conflicts_retried=self.tries - self.acknowledged, epochs=self.epochs,
            failover_seconds=self.failover_seconds, sum_before=before, sum_after=after,
            acknowledged=self.acknowledged, counted=counted,
        )  # fmt: skip

    async def _client(self, database: Database) -> None:
        while self.started < TRANSFERS:
            self.started += 1
            await database.run(self._transfer)
            self._acknowledge()
            if self.killed_at is None and self.acknowledged >= TRANSFERS // 2:
                self.killed_at = time.monotonic()
                await self._kill_leader()

    def _acknowledge(self) -> None:
        self.acknowledged += 1
        self.reporter.progress(self.acknowledged, TRANSFERS)

    async def _transfer(self, transaction: Transaction) -> None:
        """Moves up to a tenth of a random account's balance to another, and adds one to its counter."""
        self.tries += 1
        source, target = random.sample(range(ACCOUNTS), 2)
        balances = {name: int(await transaction.get(_account(name)) or 0) for name in (source, target)}
        amount = random.randint(0, balances[source] // 10)
        transaction.set(_account(source), b"%d" % (balances[source] - amount))
        transaction.set(_account(target), b"%d" % (balances[target] + amount))
        transaction.set(_counter(source), b"%d" % (int(await transaction.get(_counter(source)) or 0) + 1))

    async def _open_accounts(self, transaction: Transaction) -> None:
        for number in range(ACCOUNTS):
            transaction.set(_account(number), b"%d" % OPENING_BALANCE)
            transaction.set(_counter(number), b"0")

    async def _count(self, transaction: Transaction) -> tuple[int, int]:
        """Returns the sum of all accounts and that of all counters, read in one snapshot."""
        accounts = await transaction.get_range(b"account/", b"account0")
        counters = await transaction.get_range(b"counter/", b"counter0")
        return sum(int(value) for _, value in accounts), sum(int(value) for _, value in counters)

    async def _epoch(self) -> int:
        return await asyncio.to_thread(lambda: int(_leader(self.settings)["epoch"]))

    async def _kill_leader(self) -> None:
        """Kills the leader's process and measures the time until the next election."""
        old = await asyncio.to_thread(_leader, self.settings)
        victim = self.candidates[old["leader_addr"]]
        self.reporter.detail(f"kill -9 {victim.pid}: {old['leader_addr']}, the leader of epoch {old['epoch']}")
        killed_at = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        await asyncio.to_thread(_await_leader, self.settings, old["epoch"])
        self.failover_seconds = time.monotonic() - killed_at
        self.reporter.detail(f"after {self.failover_seconds:.2f}s {_describe_leader(self.settings)}")


def _account(number: int) -> bytes:
    return b"account/%03d" % number


def _counter(number: int) -> bytes:
    return b"counter/%03d" % number


@contextmanager
def _candidates(settings: Settings) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Runs two `pgcoord leader run` processes within the block; yields them by node id."""
    environment = os.environ | {"PGCOORD_DSN": settings.dsn, "PGCOORD_SCHEMA": settings.schema}
    command = [sys.executable, "-m", "pgcoord_cli", "leader", "run", "--ttl", TTL, "--quiet", "--node-id"]
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in ("candidate-1", "candidate-2"):
            started[name] = subprocess.Popen(
                [*command, name], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C only reaches the demo, which then stops them
            )  # fmt: skip
        yield started
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait()


def _leader(settings: Settings) -> dict[str, Any]:
    with session.command_session(settings, "demo", writes=False) as conn:
        return leader_status.status_document(conn)["leader"]


def _describe_leader(settings: Settings) -> str:
    now = _leader(settings)
    return f"{now['leader_addr']} is the leader of epoch {now['epoch']}; durable version {now['durable_version']}"


def _await_leader(settings: Settings, after: int | None) -> None:
    """Waits for a leader of an epoch later than `after`. Raises NoLeader after ELECTION_SECONDS."""
    with session.command_session(settings, "demo", writes=False) as conn:
        leader_status.wait_for_leader(conn, settings.schema, ELECTION_SECONDS, after_epoch=after or 0)


def _collect(settings: Settings) -> str:
    with session.command_session(settings, "demo", writes=True) as conn:
        collected = gc.collect_commit_requests(conn, gc.DEFAULT_RETENTION, gc.DEFAULT_BATCH_SIZE, lambda _: True)
    return (
        f"gc: {collected.deleted} requests deleted; those younger than {gc.DEFAULT_RETENTION / 60:.0f} minutes are kept"
    )
