"""Locks whose holder loses its connection, freezes or is killed: the command ends, and a former owner cannot save."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.locks import run as lock_run
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.errors import Fenced, LockLost
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.lock_process import (
    FAMILY,
    STUBBORN,
    StartLock,
    end_holder,
    is_running,
    lock_starter,
    until_free,
    until_waiting,
)
from tests.faults.stalling_proxy import StallingProxy
from tests.faults.tail_process import Sql, terminate


@pytest.fixture
def start(settings: Settings) -> Iterator[StartLock]:
    """Starts `pgcoord lock run` on the test's database, and removes what is left after the test."""
    with lock_starter(lambda: settings) as starter:
        yield starter


@pytest.fixture
def through_proxy(settings: Settings) -> Iterator[tuple[StallingProxy, Settings]]:
    """A proxy in front of the test's server, and settings that connect through it."""
    address = conninfo_to_dict(settings.dsn)
    proxy = StallingProxy(f"{address['host']}/.s.PGSQL.{address.get('port', 5432)}")
    yield proxy, replace(settings, dsn=make_conninfo(settings.dsn, host="127.0.0.1", port=proxy.port))
    proxy.close()


# -- the command ends with the lock


def test_i19_a_command_and_its_descendants_end_when_the_session_is_terminated(start: StartLock, sql: Sql) -> None:
    lock = start("nightly", "--", *FAMILY)
    family = lock.has_family()
    assert {os.getpgid(pid) for pid in family} == {family[0]}, "in their own process group"
    end_holder(sql)
    code, left, err = lock.ended()
    assert (code, left) == (4, [])
    first, last = err.splitlines()
    assert re.search(r" WARNING \[locks\] 'nightly' is lost: connection lost: .+; terminating the command$", first)
    assert re.search(
        r" ERROR \[pgcoord\] lock 'nightly' is lost: connection lost: .+; the command was terminated", last
    )
    until(lambda: not any(map(is_running, family)))


def test_a_terminated_session_is_detected_without_a_heartbeat(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_run, "HEARTBEAT_SECONDS", 86_400)
    started = Event()
    run = lock_run.LockRun(settings, lock_run.LockOptions("nightly", ["sleep", "600"]))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run.run, started.set)
        assert started.wait(TIMEOUT)
        end_holder(sql)
        try:
            with pytest.raises(LockLost):
                running.result(TIMEOUT)
        finally:
            run.signal(signal.SIGKILL)


def test_a_command_that_ignores_term_is_killed_after_the_grace_with_its_descendants(start: StartLock, sql: Sql) -> None:
    lock = start("nightly", "--kill-grace", "100ms", "--", *STUBBORN)
    family = lock.has_family()
    end_holder(sql)
    assert lock.ended()[0] == 4
    until(lambda: not any(map(is_running, family)))


def test_a_command_may_use_the_grace_to_clean_up(start: StartLock, sql: Sql) -> None:
    text = "trap 'echo cleaned up; kill $!; exit' TERM; sleep 600 & echo $$ $!; wait"
    lock = start("nightly", "--kill-grace", "24h", "--", "sh", "-c", text)
    lock.has_family()
    end_holder(sql)
    assert lock.ended()[:2] == (4, ["cleaned up\n"])


def test_a_signal_is_passed_on_during_the_grace(start: StartLock, sql: Sql) -> None:
    text = "trap 'echo got TERM' TERM; trap 'echo got INT; exit 5' INT; echo $$; while :; do sleep 600 & wait; done"
    lock = start("nightly", "--kill-grace", "24h", "--", "sh", "-c", text)
    lock.has_family()
    end_holder(sql)
    assert lock.line() == "got TERM\n"
    assert lock.end(signal.SIGINT)[:2] == (4, ["got INT\n"])


def test_the_lock_is_free_during_the_grace_and_another_command_may_run(start: StartLock, sql: Sql) -> None:
    """The fence tells the two apart: the later command has the larger number."""
    text = "trap '' TERM; echo $$ $PGCOORD_FENCE; while :; do sleep 600; done"
    first = start("nightly", "--fence", "--kill-grace", "24h", "--", "sh", "-c", text)
    pid, first_fence = first.has_family()
    end_holder(sql)
    second = start("nightly", "--fence", "--", "sh", "-c", "echo $PGCOORD_FENCE")
    code, lines, _ = second.ended()
    assert (code, int(lines[0])) == (0, first_fence + 1)
    assert is_running(pid)


def test_a_command_ends_when_the_connection_no_longer_answers(
    start: StartLock, through_proxy: tuple[StallingProxy, Settings]
) -> None:
    """No socket is closed, so only an unanswered heartbeat detects it."""
    proxy, settings = through_proxy
    lock = start("nightly", "--", *FAMILY, settings_=settings)
    family = lock.has_family()
    proxy.stall()
    assert lock.ended()[:2] == (4, [])
    until(lambda: not any(map(is_running, family)))


def test_a_command_ends_when_the_server_stops(
    start: StartLock, own_server: EmbeddedServer, own_settings: Settings
) -> None:
    lock = start("nightly", "--", *FAMILY, settings_=own_settings)
    family = lock.has_family()
    own_server.stop()
    assert lock.ended()[:2] == (4, [])
    until(lambda: not any(map(is_running, family)))


def test_a_command_is_not_run_if_the_connection_is_lost_during_the_wait_for_the_lock(
    start: StartLock, settings: Settings, sql: Sql
) -> None:
    with acquire_leadership(settings.dsn, "nightly"):
        waiter = start("nightly", "--wait", "24h", "--", "echo", "it ran")
        until_waiting(sql)
        terminate(sql, "pgcoord/lock nightly")
        waiter.message("cannot be waited for: ")
        until_waiting(sql)  # again, over another connection
        assert waiter.end(signal.SIGTERM)[:2] == (-signal.SIGTERM, [])


@pytest.mark.slow
def test_a_command_outlasts_several_heartbeats(start: StartLock) -> None:
    assert start("nightly", "--", "sleep", "15").ended()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=str)
def test_a_signal_is_passed_on_to_the_command_and_its_descendants(
    number: signal.Signals, start: StartLock, sql: Sql
) -> None:
    name = number.name.removeprefix("SIG")
    # A shell makes its background commands ignore SIGINT; Python leaves the disposition as it is.
    child = f"import signal, sys; signal.signal(signal.SIG{name}, lambda *_: sys.exit('child')); print(flush=True);"
    text = (
        f"import os, signal, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', '''{child}"
        " signal.pause()'''], stdout=subprocess.PIPE, stderr=sys.stdout); child.stdout.readline();"
        f" signal.signal(signal.SIG{name}, lambda *_: sys.exit(child.wait() + 41));"
        " print(os.getpid(), child.pid, flush=True); signal.pause()"
    )
    lock = start("nightly", "--", sys.executable, "-c", text)
    family = lock.has_family()
    assert lock.end(number)[:2] == (42, ["child\n"])
    until(lambda: not any(map(is_running, family)))
    until_free(sql)


def test_a_command_killed_by_a_signal_exits_with_128_plus_its_number(start: StartLock) -> None:
    lock = start("nightly", "--", *FAMILY)
    lock.has_family()
    assert lock.end(signal.SIGTERM)[0] == -signal.SIGTERM


def test_a_killed_lock_run_releases_the_lock(start: StartLock, sql: Sql) -> None:
    lock = start("nightly", "--", *FAMILY)
    lock.has_family()
    lock.process.kill()
    until_free(sql)
    assert start("nightly", "--", "true").ended()[0] == 0


# -- a former owner cannot save

OWNER = """
import json, sys
import psycopg
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.errors import PgcoordError

dsn = sys.argv[1]
owner = acquire_leadership(dsn, "mailer")
with psycopg.connect(dsn) as service:
    print("owned", flush=True)
    for line in sys.stdin:
        try:
            service.execute("INSERT INTO invoices VALUES (%s)", [int(line)])
            owner.checkpoint.save(int(line), service)
            service.commit()
            print("saved", flush=True)
        except PgcoordError as error:
            service.rollback()
            print(error.code, flush=True)
"""


def test_i13_an_owner_frozen_during_a_takeover_cannot_save_when_it_resumes(settings: Settings, sql: Sql) -> None:
    sql.execute("CREATE TABLE public.invoices (number integer)")
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, settings.dsn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin and first.stdout

        def request_save(position: int) -> None:
            assert first.stdin
            first.stdin.write(f"{position}\n")
            first.stdin.flush()

        assert first.stdout.readline() == "owned\n"
        request_save(1)
        assert first.stdout.readline() == "saved\n"
        first.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
        end_holder(sql)
        with acquire_leadership(settings.dsn, "mailer") as second:
            assert second.checkpoint.load() == 1
            request_save(5)
            first.send_signal(signal.SIGCONT)
            assert first.stdout.readline() == "fenced\n"
            second.checkpoint.save(2)
            assert second.checkpoint.load() == 2
        assert sql.execute("SELECT number FROM public.invoices").fetchall() == [(1,)]


# -- random faults

CONTENDERS = 8
ROUNDS = 40

CONTENDER = """
import os, random, sys
import psycopg
from pgcoord_cli.core.locks.ownership import acquire_leadership, subscription_lock
from pgcoord_cli.errors import Fenced, LockNotAcquired, PgcoordError

dsn, chance = sys.argv[1], random.Random(sys.argv[2])
me = f"contender {os.getpid()}"

def connect():
    return psycopg.connect(dsn, application_name=me, autocommit=True)

def note(service, *values):
    service.execute("INSERT INTO history (kind, fence, position) VALUES (%s, %s, %s)", values)

def is_alive(conn):
    try:
        return bool(conn.execute("SELECT 1"))
    except psycopg.Error:
        return False

def connect_and_wait():
    lock = connect()
    lock.execute("SELECT pg_advisory_lock(%s)", [subscription_lock("pgcoord", "mailer")])
    return lock

def own_and_save(lock):
    with acquire_leadership(lock, "mailer") as owner, connect() as service:
        position = owner.checkpoint.load() or 0
        for _ in range(chance.randint(1, 20)):
            position += 1
            try:
                with service.transaction():
                    owner.checkpoint.save(position, service)
                    note(service, "write", owner.fence, position)
            except Fenced:
                note(service, "two owners" if is_alive(lock) else "refusal", owner.fence, position)
                raise

next_connection = connect
while True:
    try:
        own_and_save(next_connection())
        next_connection = connect
    except LockNotAcquired:
        next_connection = connect_and_wait  # this session then holds the lock already, and acquires the name at once
    except (PgcoordError, psycopg.Error):
        next_connection = connect
"""

HISTORY = """
CREATE TABLE public.history (number bigserial PRIMARY KEY, kind text, fence bigint, position bigint);

CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.history (kind, fence, position) VALUES ('checkpoint', NEW.fence, NEW.last_position);
    RETURN NULL;
END $$;

CREATE TRIGGER note AFTER INSERT OR UPDATE ON pgcoord.subscriptions FOR EACH ROW EXECUTE FUNCTION public.note();
"""
"""Records every change of the checkpoint and every write that belongs to one. All are numbered under the lock of the
subscription's row, which is held until the transaction ends, so the numbers are in commit order."""


class Contenders:
    """Processes that compete for one name, and the faults to inject into them."""

    def __init__(self, dsn: str, sql: Sql, chance: random.Random) -> None:
        self._dsn = dsn
        self._sql = sql
        self._chance = chance
        self._running = [self._new() for _ in range(CONTENDERS)]
        self._frozen: list[subprocess.Popen[bytes]] = []

    def _new(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CONTENDER, self._dsn, str(self._chance.random())])

    def crash(self) -> None:
        """Kills a process and starts another."""
        victim = self._running.pop(self._chance.randrange(len(self._running)))
        victim.kill()
        victim.wait()
        self._running.append(self._new())

    def terminate(self) -> None:
        """Terminates the session that holds the lock; the owner's other session continues."""
        self._end_sessions("pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)")

    def freeze(self) -> None:
        """Stops a process at any point, also within a transaction. At least two always run on."""
        if len(self._running) > 2:
            self._freeze(self._chance.randrange(len(self._running)))

    def freeze_the_owner(self) -> None:
        """Stops the process that holds the lock; it may have released it before it is stopped."""
        query = """
            SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid)
             WHERE locktype = 'advisory' AND granted AND datname = current_database()
        """
        owners = [int(name.removeprefix("contender ")) for (name,) in self._sql.execute(query)]
        for number, one in enumerate(self._running):
            if one.pid in owners and len(self._running) > 2:
                return self._freeze(number)
        return None

    def _freeze(self, number: int) -> None:
        one = self._running.pop(number)
        one.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, one.pid, os.WSTOPPED | os.WNOWAIT)
        self._frozen.append(one)

    def thaw(self) -> None:
        """Continues a stopped process."""
        if self._frozen:
            one = self._frozen.pop(self._chance.randrange(len(self._frozen)))
            one.send_signal(signal.SIGCONT)
            self._running.append(one)

    def end_a_frozen_owner(self) -> None:
        """Terminates the sessions of stopped processes that block others, as an operator would."""
        names = ", ".join(f"'contender {one.pid}'" for one in self._frozen) or "NULL"
        blocks_others = "state = 'idle in transaction' OR pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
        self._end_sessions(f"application_name IN ({names}) AND ({blocks_others})")

    def _end_sessions(self, which: str) -> None:
        self._sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = current_database() AND application_name LIKE 'contender %' AND {which}"
        )

    def end(self) -> None:
        for one in [*self._running, *self._frozen]:
            one.kill()
            one.wait()


def history(sql: Sql) -> list[tuple[Any, ...]]:
    """Returns everything that was committed, in commit order."""
    return sql.execute("SELECT kind, fence, position FROM public.history ORDER BY number").fetchall()


def check(events: list[tuple[Any, ...]]) -> None:
    """Checks that every write was made under the latest fence of its time, and every position written once.

    Also that no owner was refused whose session still held the lock.
    """
    written = last_fence = last_position = 0
    for kind, fence, position in events:
        assert kind != "two owners"
        if kind == "checkpoint":
            assert fence >= last_fence
            assert (position or 0) >= last_position
            last_fence, last_position = fence, position or 0
        elif kind == "write":
            assert fence == last_fence, "a write under an older fence"
            assert position == last_position == written + 1
            written += 1


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(1_000, marks=pytest.mark.slow)])
def test_i13_two_owners_never_both_save_under_random_faults(rounds: int, settings: Settings, sql: Sql) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    sql.execute(HISTORY)
    contenders = Contenders(settings.dsn, sql, chance)
    faults: list[Callable[[], None]] = [
        contenders.crash, contenders.terminate, contenders.freeze, contenders.freeze_the_owner, contenders.thaw,
    ]  # fmt: skip

    def has_saved_since(before: int) -> bool:
        """Returns whether a write was committed after that number."""
        contenders.end_a_frozen_owner()
        return bool(value(sql, "SELECT count(*) FROM public.history WHERE kind = 'write' AND number > %s", before))

    def last_number() -> int:
        return int(value(sql, "SELECT coalesce(max(number), 0) FROM public.history"))

    try:
        until(lambda: has_saved_since(0))
        for _ in range(rounds):
            chance.choice(faults)()
            before = last_number()
            until(lambda before=before: has_saved_since(before))  # type: ignore[misc]
    finally:
        contenders.end()
    events = history(sql)
    counts = Counter(kind for kind, _, _ in events)
    print(f"{counts}, {max(fence for _, fence, _ in events)} acquisitions")
    check(events)
    assert value(sql, "SELECT last_position FROM subscriptions") == counts["write"]


# -- a server that forgets


def forget_the_last_commits(server: EmbeddedServer, sql: Sql) -> None:
    """Has commits wait for no disk, and none of them get there by itself before the server crashes."""
    for setting in ("synchronous_commit = off", "wal_writer_delay = '10s'"):
        sql.execute(f"ALTER SYSTEM SET {setting}".encode())
    sql.execute("SELECT pg_reload_conf()")
    until(lambda: value(sql, "SELECT current_setting('synchronous_commit') = 'off'"))


def crash(server: EmbeddedServer) -> None:
    """Loses what has not reached the disk."""
    server.stop("immediate")
    server.start()


def test_i13_a_crash_gives_out_no_fence_again_whatever_the_servers_default(
    own_server: EmbeddedServer, own_settings: Settings, start: StartLock
) -> None:
    with psycopg.connect(own_settings.dsn, autocommit=True) as sql:
        forget_the_last_commits(own_server, sql)
        acquire_leadership(own_settings.dsn, "billing").release()
        sql.execute("CHECKPOINT")
    first = acquire_leadership(own_settings.dsn, "billing")
    lock = start("nightly", "--fence", "--", "sh", "-c", "echo $PGCOORD_FENCE; sleep 600", settings_=own_settings)
    fence = int(lock.line())
    crash(own_server)
    with acquire_leadership(own_settings.dsn, "billing") as second, psycopg.connect(own_settings.dsn) as service:
        assert second.fence > first.fence
        second.checkpoint.save(10)
        with pytest.raises(Fenced):
            first.checkpoint.save(20, service)
        assert second.checkpoint.load() == 10
    first.release()
    again = start("nightly", "--fence", "--", "sh", "-c", "echo $PGCOORD_FENCE", settings_=own_settings)
    assert int(again.line()) > fence
