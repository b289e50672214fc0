"""Failovers under load: what was acknowledged survives those that wait for a standby, and what was read of commits that
the others lost is refused.

The rounds are independent of each other, so that `-n` runs them side by side:
`pytest -m slow --rounds 20 --stall 30 tests/faults/test_failover.py`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from threading import Event
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import Installation
from pgcoord_cli.core.events.outbox import append_completion_event, append_lease_event
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.locks.ownership import Ownership, acquire_leadership
from pgcoord_cli.errors import Fenced, PgcoordError, TooOld
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, until_async, value
from tests.faults.replication import Pair, a_pair
from tests.faults.tail_process import TailProcess, add_named, tail_starter

if TYPE_CHECKING:
    from tests.conftest import LeaderProcess, StartLeader

Sql = psycopg.Connection[Any]

SHORT_STALL = 2.0
CLIENTS = 8  # of each way to commit
COMMIT_SECONDS = 1.5  # until a client takes an outcome for unknown
EPOCH = "SELECT epoch FROM leader_lease"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives each test one ordinary round, and the rounds of the slow run."""
    rounds = range(1, metafunc.config.getoption("--rounds") + 1)
    if "stall" in metafunc.fixturenames:
        seconds = metafunc.config.getoption("--stall")
        slow = [
            pytest.param(seconds, is_killed, id=f"{name}-{number}", marks=pytest.mark.slow)
            for number in rounds
            for name, is_killed in (("leaders_live", False), ("leaders_killed", True))
        ]
        metafunc.parametrize(("stall", "leaders_are_killed"), [pytest.param(SHORT_STALL, True, id="short"), *slow])
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in rounds)])


@pytest.fixture
def pair(installation: Installation) -> Iterator[Pair]:
    with a_pair(installation) as pair:
        upgrade(Settings(dsn=pair.primary.dsn))
        yield pair


@pytest.fixture
def settings(pair: Pair) -> Settings:
    return Settings(dsn=pair.dsn)


# -- with a synchronous standby


@dataclass
class Acknowledged:
    """What the load was told to be committed, and how often the outcome stayed unknown."""

    commits: dict[bytes, int] = field(default_factory=dict)
    events: set[tuple[str, int, str]] = field(default_factory=set)
    fences: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    positions: dict[str, int] = field(default_factory=dict)
    unknown: int = 0

    @property
    def counts(self) -> dict[str, int]:
        fences = sum(map(len, self.fences.values()))
        return {"commits": len(self.commits), "events": len(self.events), "fences": fences, "unknown": self.unknown}


async def write_directly(tr: Transaction, key: bytes) -> None:
    tr.set(key, b"v")


async def write_by_leader(tr: Transaction, key: bytes) -> None:
    tr.append_if_fits(key, b"v")  # what depends on the stored value only the leader does


Way = Callable[[Transaction, bytes], Awaitable[None]]
WAYS: tuple[Way, ...] = (write_directly, write_by_leader)


class Load:
    """Clients of every kind; they end when `stopped` is set, or their connection is lost."""

    def __init__(self, pair: Pair, settings: Settings) -> None:
        self._pair = pair
        self._settings = settings
        self.stopped = Event()
        self.acknowledged = Acknowledged()

    async def commit(self, db: Database, write: Way, client: int) -> None:
        number = 0
        way = WAYS.index(write)
        while not self.stopped.is_set():
            number += 1
            key = f"{way}-{client}-{number}".encode()
            try:
                version = await db.write(lambda tr: write(tr, key), commit_seconds=COMMIT_SECONDS)  # noqa: B023
            except PgcoordError:
                self.acknowledged.unknown += 1
                await asyncio.sleep(0.01)  # a lost connection is refused at once
            else:
                self.acknowledged.commits[key] = version

    def append_events(self, table: str) -> None:
        append: Callable[..., int] = append_lease_event if table == "lease_events" else append_completion_event
        kind = "acquired" if table == "lease_events" else "success"
        with suppress(psycopg.OperationalError), psycopg.connect(self._pair.primary.dsn) as conn:
            while not self.stopped.is_set():
                execution_id = str(uuid.uuid4())
                try:
                    event_id = append(conn, execution_id, kind)
                    conn.commit()
                except psycopg.OperationalError:
                    self.acknowledged.unknown += 1
                    raise
                self.acknowledged.events.add((table, event_id, execution_id))

    def own(self, name: str) -> None:
        """Acquires the name over and over, and saves a position under each fence."""
        acknowledged = self.acknowledged
        position = 0
        while not self.stopped.is_set():
            try:
                with acquire_leadership(self._pair.primary.dsn, name, timeout_seconds=COMMIT_SECONDS) as owner:
                    acknowledged.fences[name].append(owner.fence)
                    position += 1
                    owner.checkpoint.save(position)
                    acknowledged.positions[name] = position
            except (PgcoordError, psycopg.Error):
                acknowledged.unknown += 1
                self.stopped.wait(0.05)

    @contextmanager
    def in_threads(self) -> Iterator[None]:
        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(self.append_events, table) for table in ("lease_events", "completion_events") * 2]
            running += [pool.submit(self.own, name) for name in ("billing", "mailer")]
            try:
                yield
            finally:
                self.stopped.set()
            for thread in running:
                thread.result(TIMEOUT)

    async def run(self, act: Callable[[], None]) -> None:
        """Runs the load while `act` runs in a thread."""
        async with await open_database(self._settings) as db:
            commits = [self.commit(db, write, n) for write in WAYS for n in range(CLIENTS)]
            tasks = [asyncio.create_task(commit) for commit in commits]
            with self.in_threads():
                await asyncio.to_thread(act)
            await asyncio.gather(*tasks)

    def is_under_way(self) -> bool:
        """Whether every kind of client has been acknowledged something."""
        told = self.acknowledged
        # Copies, each made in one step: the clients go on meanwhile.
        ways = {key.split(b"-")[0] for key in list(told.commits)}
        return len(ways) == 2 and len({table for table, *_ in list(told.events)}) == 2 and len(told.positions) == 2


def test_i16_nothing_acknowledged_is_lost_with_the_primary_while_a_standby_stalls(
    stall: float,
    leaders_are_killed: bool,
    pair: Pair,
    settings: Settings,
    start_leader: StartLeader,
    record_property: Callable[[str, object], None],
) -> None:
    leaders = [start_leader("first", "--ttl", "1s", settings=settings)]
    leaders[0].wait_for("elected epoch 1")
    pair.confirm_commits()
    load = Load(pair, settings)

    def act() -> None:
        until(load.is_under_way)
        pair.stall()
        stall_for(stall, leaders if leaders_are_killed else [], start_leader, settings)
        load.stopped.set()
        pair.fail_over()

    asyncio.run(load.run(act))
    record_property("acknowledged", load.acknowledged.counts)
    print(load.acknowledged.counts)
    with pair.on(pair.standby) as sql:
        assert missing(sql, load.acknowledged) == []
    start_leader("last", "--ttl", "1s", settings=settings)  # one whose first session was refused has ended
    nothing_repeats(pair, load.acknowledged)


def stall_for(seconds: float, killed: list[LeaderProcess], start_leader: StartLeader, settings: Settings) -> None:
    """Lets the stall last; kills each leader in turn, and starts the next, meanwhile."""
    end = time.monotonic() + seconds
    turns = 3
    for number in range(turns):
        time.sleep(max(0.0, end - time.monotonic()) / (turns - number))
        if killed:
            killed[-1].signal(signal.SIGKILL)
            killed.append(start_leader(f"next {number}", "--ttl", "1s", settings=settings))


def missing(sql: Sql, told: Acknowledged) -> list[object]:
    """What was acknowledged and is not there."""
    keys = {key for (key,) in sql.execute("SELECT key FROM kv")}
    versions = {v for (v,) in sql.execute("SELECT commit_version FROM commit_requests WHERE status = 'committed'")}
    events = {
        (table, *row)
        for table in ("lease_events", "completion_events")
        for row in sql.execute(f"SELECT event_id, execution_id::text FROM {table}".encode())
    }
    places = {name: (fence, position) for name, fence, position in sql.execute(
        "SELECT subscription_name, fence, last_position FROM subscriptions")}  # fmt: skip
    absent: list[object] = [*(set(told.commits) - keys), *(set(told.commits.values()) - versions)]
    absent += told.events - events
    absent += [(name, "fence") for name, fences in told.fences.items() if places[name][0] < max(fences)]
    absent += [(name, "position") for name, position in told.positions.items() if places[name][1] < position]
    return absent


def nothing_repeats(pair: Pair, told: Acknowledged) -> None:
    """Versions, fences and epochs that were acknowledged are not given out again."""
    assert len(set(told.commits.values())) == len(told.commits)
    for name, fences in told.fences.items():
        assert fences == sorted(set(fences))
        with acquire_leadership(pair.standby.dsn, name) as owner:
            assert owner.fence > fences[-1]
    with pair.on(pair.standby) as sql:
        until(lambda: value(sql, "SELECT epoch > 1 AND expires_at > clock_timestamp() FROM leader_lease"))
        assert value(sql, "SELECT count(*) = count(DISTINCT epoch) FROM leader_history")


# -- with an asynchronous standby


class Succession:
    """Leaders in a row: of the first everything is kept, of the second nothing; the others lead the standby."""

    def __init__(self, pair: Pair, settings: Settings, start_leader: StartLeader, random: Random) -> None:
        self._pair = pair
        self._settings = settings
        self._start_leader = start_leader
        self._random = random
        self._leader: LeaderProcess | None = None
        self.late: list[tuple[Way, Transaction]] = []

    async def elect(self, name: str, epoch: int) -> None:
        """Kills the leader, if there is one, and starts the next."""
        if self._leader:
            self._leader.signal(signal.SIGKILL)
        self._leader = self._start_leader(name, "--ttl", "2s", settings=self._settings)
        await asyncio.to_thread(self._leader.wait_for, f"elected epoch {epoch}")

    async def write(self, db: Database, name: str, number: int) -> None:
        for n in range(number):
            way = self._random.choice(WAYS)
            await db.run(lambda tr: way(tr, f"{name}-{n}".encode()), commit_seconds=TIMEOUT)  # noqa: B023

    async def keep(self, db: Database, running: TailProcess) -> None:
        """Commits what reaches the standby, a tail's position among it."""
        kept = self._random.randint(1, 5)
        await self.write(db, "kept", kept)
        with self._pair.on(self._pair.primary) as sql, self._pair.on(self._pair.standby) as copy:
            add_named(sql, 2)
            await asyncio.to_thread(running.ids, 2)
            await until_async(lambda: value(copy, "SELECT count(*) FROM subscriptions WHERE last_position = 2"))
            await until_async(lambda: value(copy, "SELECT durable_version FROM leader_lease") == kept)

    async def lose(self, db: Database, running: TailProcess) -> int:
        """Commits what the standby does not get, reads it in late transactions, and returns the number of commits."""
        lost = self._random.randint(1, 5)
        for number in range(lost):
            await self.write(db, f"lost-{number}", 1)
            for way in WAYS:
                self.late.append((way, db.transaction(commit_seconds=TIMEOUT)))
                assert await self.late[-1][1].get(f"lost-{number}-0".encode()) == b"v"
        with self._pair.on(self._pair.primary) as sql:
            add_named(sql, 40)
            await asyncio.to_thread(running.ids, 40)
        self._random.shuffle(self.late)
        return lost

    async def refuses(self, number: int) -> None:
        """Has the leader refuse so many of the transactions that read what was lost."""
        for n in range(number):
            way, tr = self.late.pop()
            await way(tr, f"derived-{n}".encode())
            with pytest.raises(TooOld):
                await tr.commit()


def test_i2_what_a_failover_lost_is_refused_to_transactions_tails_and_owners(
    seed: int,
    pair: Pair,
    settings: Settings,
    start_leader: StartLeader,
    record_property: Callable[[str, object], None],
) -> None:
    random = Random(seed)
    succession = Succession(pair, settings, start_leader, random)

    async def scenario(db: Database, running: TailProcess) -> Ownership:
        await succession.keep(db, running)
        pair.stall()
        await succession.elect("second", 2)
        lost = await succession.lose(db, running)
        owner = await asyncio.to_thread(acquire_leadership, pair.primary.dsn, "billing")
        await asyncio.to_thread(pair.fail_over)
        record_property("lost", {"commits": lost, "readers": len(succession.late), "events": 40, "owners": 1})
        await succession.elect("third", 2)
        await succession.write(db, "new", random.randint(0, 2 * lost))
        await succession.refuses(lost)
        await succession.elect("fourth", 3)
        await succession.write(db, "newer", random.randint(0, lost))
        await succession.refuses(len(succession.late))
        return owner

    async def main(running: TailProcess) -> Ownership:
        async with await open_database(settings) as db:
            await succession.elect("first", 1)
            return await scenario(db, running)

    with tail_starter(lambda: settings) as tails:
        running = tails("lease", "--subscription", "mailer", "--from-start", "-o", "json")
        former = asyncio.run(main(running))
        with pair.on(pair.standby) as sql:
            assert value(sql, "SELECT count(*) FROM kv WHERE key LIKE 'derived%%' OR key LIKE 'lost%%'") == 0
            add_named(sql, 80)
        code, lines, _ = running.ended()
    assert (code, json.loads(lines[-1])["error"]["code"]) == (8, "history_changed")
    refuses_to_save(pair, former)


def refuses_to_save(pair: Pair, former: Ownership) -> None:
    """The former owner of a name saves nothing, though its fence is given out again."""
    with acquire_leadership(pair.standby.dsn, "billing") as owner, psycopg.connect(pair.standby.dsn) as service:
        owner.checkpoint.save(10)
        with pytest.raises(Fenced):
            former.checkpoint.save(20, service)
        service.rollback()
        assert owner.checkpoint.load() == 10
    former.release()


# -- promoted soon after the migrations


def test_i10_events_are_written_on_a_standby_that_is_promoted_soon_after_the_migrations(pair: Pair) -> None:
    with pair.on(pair.primary) as sql, pair.on(pair.standby) as copy:
        position = value(sql, "SELECT pg_current_wal_lsn()")
        until(lambda: value(copy, "SELECT pg_last_wal_replay_lsn() >= %s", position))
    pair.fail_over()
    with pair.on(pair.standby) as sql:
        for table, append, kind in (("lease", append_lease_event, "acquired"),
                                    ("completion", append_completion_event, "success")):  # fmt: skip
            assert append(sql, str(uuid.uuid4()), kind) == 1, table
