"""Locks whose holder is cut off, frozen or killed: the command ends with the lock, and a former owner saves nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.locks import run as lock_run
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.errors import LockLost
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
    """Starts `pgcoord lock run`; ends those that are left when the test is over."""
    with lock_starter(lambda: settings) as starter:
        yield starter


@pytest.fixture
def through_proxy(settings: Settings) -> Iterator[tuple[StallingProxy, Settings]]:
    """A TCP port in front of the test's server, and the test's database by way of it."""
    address = conninfo_to_dict(settings.dsn)
    proxy = StallingProxy(f"{address['host']}/.s.PGSQL.{address.get('port', 5432)}")
    yield proxy, replace(settings, dsn=make_conninfo(settings.dsn, host="127.0.0.1", port=proxy.port))
    proxy.close()


# -- the command ends with the lock


def test_i19_a_command_ends_with_all_it_started_when_its_session_is_ended(start: StartLock, sql: Sql) -> None:
    lock = start("nightly", "--", *FAMILY)
    family = lock.has_family()
    assert {os.getpgid(pid) for pid in family} == {family[0]}, "in a group of its own"
    end_holder(sql)
    code, left, err = lock.ended()
    assert (code, left) == (4, [])
    assert "the connection that held 'nightly' is gone; the command was ended" in err
    until(lambda: not any(map(is_running, family)))


def test_the_end_of_the_session_is_seen_without_a_heartbeat(
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


def test_a_command_that_will_not_end_is_killed_after_the_grace_with_all_it_started(start: StartLock, sql: Sql) -> None:
    lock = start("nightly", "--kill-grace", "100ms", "--", *STUBBORN)
    family = lock.has_family()
    end_holder(sql)
    assert lock.ended()[0] == 4
    until(lambda: not any(map(is_running, family)))


def test_a_command_may_use_its_grace_to_end_in_order(start: StartLock, sql: Sql) -> None:
    text = "trap 'echo ended in order; kill $!; exit' TERM; sleep 600 & echo $$ $!; wait"
    lock = start("nightly", "--kill-grace", "24h", "--", "sh", "-c", text)
    lock.has_family()
    end_holder(sql)
    assert lock.ended()[:2] == (4, ["ended in order\n"])


def test_a_signal_is_passed_on_while_the_command_is_being_ended(start: StartLock, sql: Sql) -> None:
    text = "trap 'echo asked' TERM; trap 'echo hurried; exit 5' INT; echo $$; while :; do sleep 600 & wait; done"
    lock = start("nightly", "--kill-grace", "24h", "--", "sh", "-c", text)
    lock.has_family()
    end_holder(sql)
    assert lock.line() == "asked\n"
    assert lock.end(signal.SIGINT)[:2] == (4, ["hurried\n"])


def test_the_lock_is_free_while_the_command_is_being_ended_and_the_next_may_run(start: StartLock, sql: Sql) -> None:
    """That is what the fence is for: the numbers tell which of the two is the later."""
    text = "trap '' TERM; echo $$ $PGCOORD_FENCE; while :; do sleep 600; done"
    first = start("nightly", "--fence", "--kill-grace", "24h", "--", "sh", "-c", text)
    pid, first_fence = first.has_family()
    end_holder(sql)
    second = start("nightly", "--fence", "--", "sh", "-c", "echo $PGCOORD_FENCE")
    code, lines, _ = second.ended()
    assert (code, int(lines[0])) == (0, first_fence + 1)
    assert is_running(pid)


def test_a_command_ends_when_its_connection_falls_silent(
    start: StartLock, through_proxy: tuple[StallingProxy, Settings]
) -> None:
    """Nothing is closed, so that only a heartbeat that is not answered can tell."""
    proxy, settings = through_proxy
    lock = start("nightly", "--", *FAMILY, settings_=settings)
    family = lock.has_family()
    proxy.stall()
    assert lock.ended()[:2] == (4, [])
    until(lambda: not any(map(is_running, family)))


def test_a_command_ends_when_the_server_goes_down(
    start: StartLock, own_server: EmbeddedServer, own_settings: Settings
) -> None:
    lock = start("nightly", "--", *FAMILY, settings_=own_settings)
    family = lock.has_family()
    own_server.stop()
    assert lock.ended()[:2] == (4, [])
    until(lambda: not any(map(is_running, family)))


def test_a_command_is_not_run_when_the_connection_is_lost_while_it_waits_for_the_lock(
    start: StartLock, settings: Settings, sql: Sql
) -> None:
    with acquire_leadership(settings.dsn, "nightly"):
        waiter = start("nightly", "--wait", "24h", "--", "echo", "it ran")
        until_waiting(sql)
        terminate(sql, "pgcoord/lock nightly")
        assert waiter.ended()[:2] == (4, [])


@pytest.mark.slow
def test_a_command_runs_on_over_many_heartbeats(start: StartLock) -> None:
    assert start("nightly", "--", "sleep", "15").ended()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=str)
def test_a_signal_is_passed_on_to_all_that_the_command_started(
    number: signal.Signals, start: StartLock, sql: Sql
) -> None:
    name = number.name.removeprefix("SIG")
    # Shells let what they start in the background ignore SIGINT; Python starts it as it is.
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


def test_a_command_that_a_signal_ended_tells_which(start: StartLock) -> None:
    lock = start("nightly", "--", *FAMILY)
    lock.has_family()
    assert lock.end(signal.SIGTERM)[0] == 128 + signal.SIGTERM


def test_a_lock_run_that_is_killed_frees_the_lock(start: StartLock, sql: Sql) -> None:
    lock = start("nightly", "--", *FAMILY)
    lock.has_family()
    lock.process.kill()
    until_free(sql)
    assert start("nightly", "--", "true").ended()[0] == 0


# -- a former owner saves nothing

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


def test_i13_an_owner_that_was_frozen_while_another_took_over_saves_nothing_when_it_goes_on(
    settings: Settings, sql: Sql
) -> None:
    sql.execute("CREATE TABLE public.invoices (number integer)")
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, settings.dsn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin and first.stdout

        def order(position: int) -> None:
            assert first.stdin
            first.stdin.write(f"{position}\n")
            first.stdin.flush()

        assert first.stdout.readline() == "owned\n"
        order(1)
        assert first.stdout.readline() == "saved\n"
        first.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
        end_holder(sql)
        with acquire_leadership(settings.dsn, "mailer") as second:
            assert second.checkpoint.load() == 1
            order(5)
            first.send_signal(signal.SIGCONT)
            assert first.stdout.readline() == "fenced\n"
            second.checkpoint.save(2)
            assert second.checkpoint.load() == 2
        assert sql.execute("SELECT number FROM public.invoices").fetchall() == [(1,)]


# -- anything at any time

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

def lives(conn):
    try:
        return bool(conn.execute("SELECT 1"))
    except psycopg.Error:
        return False

def connect_in_turn():
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
                note(service, "two owners" if lives(lock) else "refusal", owner.fence, position)
                raise

come = connect
while True:
    try:
        own_and_save(come())
        come = connect
    except LockNotAcquired:
        come = connect_in_turn  # PostgreSQL hands the lock on; who has it already acquires the name at once
    except (PgcoordError, psycopg.Error):
        come = connect
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
"""What became of the checkpoint and of the writes that belong to it. All are numbered under the lock of the
subscription's row, which is kept until the transaction ends: so the numbers tell the order of the commits."""


class Contenders:
    """Processes that all want the same name, and what happens to them."""

    def __init__(self, dsn: str, sql: Sql, chance: random.Random) -> None:
        self._dsn = dsn
        self._sql = sql
        self._chance = chance
        self._running = [self._new() for _ in range(CONTENDERS)]
        self._frozen: list[subprocess.Popen[bytes]] = []

    def _new(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CONTENDER, self._dsn, str(self._chance.random())])

    def crash(self) -> None:
        """One is killed, and another comes in its stead."""
        victim = self._running.pop(self._chance.randrange(len(self._running)))
        victim.kill()
        victim.wait()
        self._running.append(self._new())

    def terminate(self) -> None:
        """The session that holds the lock ends without its owner's knowing, whose other one goes on."""
        self._end_sessions("pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)")

    def freeze(self) -> None:
        """One stands still, wherever it is: also in the middle of a transaction. Some always run on."""
        if len(self._running) > 2:
            self._freeze(self._chance.randrange(len(self._running)))

    def freeze_the_owner(self) -> None:
        """The one that seems to own the name; it may have given it back before it stands still."""
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
        """One that stood still goes on, and finds out what it missed."""
        if self._frozen:
            one = self._frozen.pop(self._chance.randrange(len(self._frozen)))
            one.send_signal(signal.SIGCONT)
            self._running.append(one)

    def end_a_frozen_owner(self) -> None:
        """As an operator would, who sees that nothing goes on. It will not know when it goes on itself."""
        names = ", ".join(f"'contender {one.pid}'" for one in self._frozen) or "NULL"
        holds_others_up = (
            "state = 'idle in transaction' OR pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
        )
        self._end_sessions(f"application_name IN ({names}) AND ({holds_others_up})")

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
    """Everything that was committed, in its order."""
    return sql.execute("SELECT kind, fence, position FROM public.history ORDER BY number").fetchall()


def check(events: list[tuple[Any, ...]]) -> None:
    """Every write happened under the fence that was the last one then, and every position was written once.

    Nor was anybody refused who had the lock still.
    """
    written = last_fence = last_position = 0
    for kind, fence, position in events:
        assert kind != "two owners"
        if kind == "checkpoint":
            assert fence >= last_fence
            assert (position or 0) >= last_position
            last_fence, last_position = fence, position or 0
        elif kind == "write":
            assert fence == last_fence, "somebody wrote under an older fence"
            assert position == last_position == written + 1
            written += 1


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(1_000, marks=pytest.mark.slow)])
def test_i13_no_two_owners_both_save_whatever_happens_to_them(rounds: int, settings: Settings, sql: Sql) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    sql.execute(HISTORY)
    contenders = Contenders(settings.dsn, sql, chance)
    happenings: list[Callable[[], None]] = [
        contenders.crash, contenders.terminate, contenders.freeze, contenders.freeze_the_owner, contenders.thaw,
    ]  # fmt: skip

    def goes_on(before: int) -> bool:
        """Whether something was saved since."""
        contenders.end_a_frozen_owner()
        return bool(value(sql, "SELECT count(*) FROM public.history WHERE kind = 'write' AND number > %s", before))

    def last_number() -> int:
        return int(value(sql, "SELECT coalesce(max(number), 0) FROM public.history"))

    try:
        until(lambda: goes_on(0))
        for _ in range(rounds):
            chance.choice(happenings)()
            before = last_number()
            until(lambda before=before: goes_on(before))  # type: ignore[misc]
    finally:
        contenders.end()
    events = history(sql)
    counts = Counter(kind for kind, _, _ in events)
    print(f"{counts}, {max(fence for _, fence, _ in events)} acquisitions")
    check(events)
    assert value(sql, "SELECT last_position FROM subscriptions") == counts["write"]
