"""Tails that lose connections, whose server crashes, that are frozen, killed or read slowly: no event is missed."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from threading import Event, Thread

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import Installation
from pgcoord_cli.core.embedded.server import EmbeddedServer, temporary_server
from pgcoord_cli.settings import Settings
from tests.asking import until, value
from tests.faults.program_process import environment
from tests.faults.stalling_proxy import StallingProxy
from tests.faults.tail_process import (
    Sql,
    StartTail,
    add,
    add_and_roll_back,
    tail_starter,
    terminate,
    until_asleep,
    until_gone,
    wake_until,
)

TAIL = "pgcoord/tail"
MARGIN = 8 * 2**20


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[StartTail]:
    """Starts `pgcoord tail lease … -o json` on the test's database, unless the call names another."""
    with tail_starter(partial(request.getfixturevalue, "settings")) as starter:
        yield lambda *words, settings_=None: starter("lease", *words, "-o", "json", settings_=settings_)


@contextmanager
def connected(settings: Settings) -> Iterator[Sql]:
    with psycopg.connect(settings.dsn, autocommit=True) as conn:
        yield conn


# -- lost connections


def test_i10_a_terminated_session_is_reported_and_replaced_and_no_event_is_missed(sql: Sql, start: StartTail) -> None:
    before = add(sql, 3)
    tail = start("--from-start")
    assert tail.ids(3) == before
    tail.freeze()  # so that events are committed while it is disconnected
    assert terminate(sql, TAIL) == 1
    until_gone(sql, TAIL)
    add_and_roll_back(sql, 2)
    meanwhile = add(sql, 3)
    tail.signal(signal.SIGCONT)
    lost = tail.record("disconnected")
    assert lost.keys() == {"type", "cursor", "message"}
    assert int(lost["cursor"][2:], 16) == before[-1]
    assert tail.record("connected")["cursor"] == lost["cursor"]
    assert tail.ids(3) == meanwhile
    after = add(sql, 3)
    assert tail.ids(3) == after
    assert tail.process.poll() is None


@pytest.mark.parametrize("ended_by", ["pg_cancel_backend", "pg_terminate_backend"])
def test_i17_a_tail_whose_first_read_meets_a_locked_table_waits(
    sql: Sql, settings: Settings, start: StartTail, ended_by: str
) -> None:
    """The first session was not refused, so a tail that follows stays; with --no-follow it ends."""
    before = add(sql, 2)
    waiting = f"FROM pg_stat_activity WHERE application_name = '{TAIL}' AND wait_event_type = 'Lock'"
    with connected(settings) as locker, locker.transaction():
        locker.execute("LOCK pgcoord.lease_events, pgcoord.outbox_floors IN ACCESS EXCLUSIVE MODE")
        tail, short = start("--from-start"), start("--from-start", "--no-follow")
        until(lambda: value(sql, f"SELECT count(*) = 2 {waiting}"))
        sql.execute(f"SELECT {ended_by}(pid) {waiting}".encode())
        lost = tail.record("disconnected")
        assert short.ended()[0] == (124 if ended_by == "pg_cancel_backend" else 4)
    assert int(lost["cursor"][2:], 16) == 0
    assert "; not started yet" in tail.message("disconnected")
    assert tail.record("connected")
    assert tail.ids(2) == before
    after = add(sql)
    assert tail.ids(1) == after


def test_without_json_a_lost_connection_is_reported_on_stderr(sql: Sql, settings: Settings) -> None:
    with tail_starter(lambda: settings) as start:
        tail = start("lease", "--from-start", "-o", "csv")
        assert tail.line().startswith("event_id,")
        (first,) = add(sql)
        assert tail.line().startswith(f"{first},")
        assert terminate(sql, TAIL) == 1
        assert f"02{first:016x}" in tail.message(" WARNING [tail] disconnected: connection lost")
        tail.message(" INFO [tail] connected again, after 1 attempt over ")
        (second,) = add(sql)
        assert tail.line().startswith(f"{second},")


def test_i10_a_tail_survives_a_crash_of_the_server(
    own_settings: Settings, own_server: EmbeddedServer, start: StartTail
) -> None:
    with connected(own_settings) as sql:
        before = add(sql, 3)
        tail = start("--from-start", settings_=own_settings)
        assert tail.ids(3) == before
        last = add(sql, 3)  # the crash may come before or after the tail has shown these
        own_server.stop("immediate")
    lost = tail.line()
    while json.loads(lost)["type"] == "event":
        assert json.loads(lost)["event_id"] == last.pop(0)
        lost = tail.line()
    assert json.loads(lost)["type"] == "disconnected"
    own_server.start()
    with connected(own_settings) as sql:
        after = add(sql, 3)
        assert tail.ids(len(last) + 3) == last + after
        add_and_roll_back(sql, 5)
        assert add(sql, 2) == tail.ids(2)


def test_i10_a_tail_from_now_is_not_ahead_of_ids_that_are_assigned_again_after_a_crash(
    installation: Installation, start: StartTail
) -> None:
    """Drawn ids reach the disk with the next commit or the next run of the WAL writer, here after 10 s."""
    with temporary_server(installation, {"wal_writer_delay": "10s"}) as server:
        settings = Settings(dsn=server.dsn)
        upgrade(settings)
        with connected(settings) as sql:
            add_and_roll_back(sql, 100)
            tail = start(settings_=settings)
            until_asleep(sql)
        server.stop("immediate")
        server.start()
        at = tail.record("connected")["cursor"]
        with connected(settings) as sql:
            new = add(sql, 3)
        assert int(at[2:], 16) < new[0]
        assert tail.ids(3) == new


def test_i10_a_tail_survives_a_crash_before_it_saves_its_subscription(
    own_settings: Settings, own_server: EmbeddedServer
) -> None:
    with connected(own_settings) as sql:
        before = add(sql, 1_000)
    with unread_tail(own_settings, "--subscription", "importer") as tail:
        assert tail.stdout
        until_full(tail.stdout.fileno())  # blocked within the batch, after which it saves
        own_server.stop("immediate")
        assert [json.loads(tail.stdout.readline())["event_id"] for _ in before] == before
        own_server.start()
        with connected(own_settings) as sql:
            after = add(sql)
        records = map(json.loads, tail.stdout)
        assert next(record["event_id"] for record in records if record["type"] == "event") == after[0]


# -- connections that no longer answer


@pytest.fixture
def proxy(settings: Settings) -> Iterator[StallingProxy]:
    """A TCP port in front of the test's server."""
    address = conninfo_to_dict(settings.dsn)
    one = StallingProxy(f"{address['host']}/.s.PGSQL.{address.get('port', 5432)}")
    yield one
    one.close()


@pytest.fixture
def through_proxy(settings: Settings, proxy: StallingProxy) -> Settings:
    """The test's database by way of the proxy."""
    return replace(settings, dsn=make_conninfo(settings.dsn, host="127.0.0.1", port=proxy.port))


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param((), id="no checkpoint"),
        pytest.param(
            ("--subscription", "importer"),
            id="subscription",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_i10_a_tail_detects_a_connection_that_no_longer_answers_and_misses_nothing(
    checkpoint: tuple[str, ...], sql: Sql, start: StartTail, proxy: StallingProxy, through_proxy: Settings
) -> None:
    """No socket is closed, so only a missing answer shows it."""
    tail = start("--from-start", *checkpoint, settings_=through_proxy)
    before = add(sql, 2)
    assert tail.ids(2) == before
    proxy.stall()
    meanwhile = add(sql, 3)
    lost = tail.record("disconnected")
    assert int(lost["cursor"][2:], 16) == before[-1]
    proxy.let_through()
    tail.record("connected")
    assert tail.ids(3) == meanwhile
    assert add(sql, 2) == tail.ids(2)


# -- frozen, and read slowly


def test_i10_a_frozen_tail_resumes_without_a_gap(sql: Sql, start: StartTail) -> None:
    tail = start("--from-start")
    assert add(sql, 2) == tail.ids(2)
    tail.freeze()
    add_and_roll_back(sql)
    meanwhile = add(sql, 50)
    tail.signal(signal.SIGCONT)
    assert tail.ids(50) == meanwhile


@contextmanager
def unread_tail(settings: Settings, *checkpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    """A tail from the beginning whose stdout is not read yet."""
    words = ["tail", "lease", "--from-start", "-o", "json", *checkpoint]
    process = subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", *words], env=environment(settings.dsn), stdout=subprocess.PIPE
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def until_full(pipe: int) -> None:
    """Waits until a pipe is full, so that its writer blocks."""
    size = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)

    def waiting() -> int:
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)

    # Whole lines are written, up to 4 KiB at once, so the writer may block before the pipe is completely full.
    until(lambda: waiting() > size - 8192)


def peak_memory(pid: int) -> int:
    """Returns the peak resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


def test_memory_does_not_grow_with_the_backlog_of_a_slow_reader(sql: Sql, settings: Settings) -> None:
    """The reader starts to read when the tail blocks. The tail keeps running, so that its memory can be read."""
    small, large = 10_000, 200_000
    peaks = []
    for number in (small, large - small):
        add(sql, number)
        with unread_tail(settings) as tail:
            assert tail.stdout
            until_full(tail.stdout.fileno())
            total = number if number == small else large
            for expected in range(1, total + 1):
                assert tail.stdout.readline().startswith(b'{"type": "event", "event_id": %d, ' % expected)
            peaks.append(peak_memory(tail.pid))
    assert peaks[1] <= peaks[0] + MARGIN, f"MiB: {[peak >> 20 for peak in peaks]}"


# -- random faults


class Services:
    """Threads that write events, roll back a tenth of their transactions, and continue after each crash."""

    def __init__(self, settings: Settings, total: int, threads: int = 8) -> None:
        self._dsn = settings.dsn
        self._server_is_up = Event()
        self._server_is_up.set()
        self._threads = [Thread(target=self._write, args=[Random(seed), total // threads]) for seed in range(threads)]
        for thread in self._threads:
            thread.start()

    def restart(self, server: EmbeddedServer) -> None:
        """Crashes and restarts the server."""
        self._server_is_up.clear()
        server.stop("immediate")
        server.start()
        self._server_is_up.set()

    def join(self) -> None:
        """Waits until the threads have committed all their events."""
        for thread in self._threads:
            thread.join()

    def _write(self, random: Random, left: int) -> None:
        while left > 0:
            self._server_is_up.wait()
            with suppress(psycopg.OperationalError), psycopg.connect(self._dsn) as conn:
                while left > 0:
                    left -= _write_some(conn, random)


def _write_some(conn: Sql, random: Random) -> int:
    """Runs one transaction; returns how many events it committed."""
    number = random.randint(1, 5)
    add(conn, number)
    for _ in range(random.choice((0, 0, 0, 50))):  # a delay, so that later ids commit first
        conn.execute("SELECT")
    if random.random() < 0.1:
        conn.rollback()
        return 0
    conn.commit()
    return number


class Reader:
    """Tails that run one after the other with one checkpoint, and the ids that each has printed."""

    def __init__(self, start: StartTail, settings: Settings, checkpoint: tuple[str, str]) -> None:
        self._settings = settings
        self._start = partial(start, "--from-start", *checkpoint, settings_=settings)
        self._tail = self._start()
        self.runs: list[list[int]] = [[]]
        self.seen: set[int] = set()
        self.records: Counter[str] = Counter()

    def read(self) -> int | None:
        """Reads the next record; returns the id if it is an event."""
        return self._take(self._tail.line())

    def read_until(self, number: int) -> None:
        """Reads until that many different events have been printed."""
        while len(self.seen) < number:
            self.read()

    def kill(self) -> None:
        """Kills the tail and starts the next one when the server has ended the old session."""
        code, lines, _ = self._tail.end(signal.SIGKILL)
        assert code == -signal.SIGKILL
        for line in lines:
            self._take(line)
        self.runs.append([])
        with connected(self._settings) as sql:
            until_gone(sql, "pgcoord/subscription")
            before = wake_until(sql)
            self._tail = self._start()
            # A tail that has not started yet ends if it cannot connect.
            until(lambda: self._tail.stdout.is_waiting() or wake_until(sql) != before)

    def _take(self, line: str) -> int | None:
        record = json.loads(line)
        self.records[record["type"]] += 1
        if record["type"] != "event":
            return None
        event_id: int = record["event_id"]
        self.runs[-1].append(event_id)
        self.seen.add(event_id)
        return event_id


def disturb(how: str, reader: Reader, services: Services, settings: Settings, server: EmbeddedServer) -> None:
    if how == "kill":
        reader.kill()
    elif how == "restart":
        services.restart(server)
    else:
        with connected(settings) as sql:
            until(lambda: terminate(sql, TAIL))


@pytest.mark.parametrize(
    ("total", "restarts", "terminations", "kills"),
    [(3_000, 1, 3, 2), pytest.param(100_000, 5, 20, 5, marks=pytest.mark.slow)],
    ids=["some", "many"],
)
def test_i10_every_committed_event_and_no_other_is_printed_in_order_under_random_faults(
    total: int, restarts: int, terminations: int, kills: int,
    own_settings: Settings, own_server: EmbeddedServer, start: StartTail, place: Path,
) -> None:  # fmt: skip
    disturbances = ["restart"] * restarts + ["terminate"] * terminations + ["kill"] * kills
    Random(total).shuffle(disturbances)
    reader = Reader(start, own_settings, ("--cursor-file", str(place / "cursor")))
    services = Services(own_settings, total)
    for number, how in enumerate(disturbances, start=1):
        reader.read_until(total * number // (len(disturbances) + 1))
        disturb(how, reader, services, own_settings, own_server)
    services.join()
    with connected(own_settings) as sql:
        committed = {event_id for (event_id,) in sql.execute("SELECT event_id FROM pgcoord.lease_events")}
    missing = committed - reader.seen
    while missing:
        missing.discard(reader.read() or 0)
    assert reader.seen == committed, "no event that rolled back"
    assert all(run == sorted(set(run)) for run in reader.runs), "each once and in order"
    print(f"{len(committed)} committed, shown: {[len(run) for run in reader.runs]}, records: {dict(reader.records)}")
    assert len(reader.runs) == kills + 1
