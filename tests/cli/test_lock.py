"""`pgcoord lock`: commands under a lock and their exit codes, listing and breaking of locks."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.locks.ownership import Ownership, acquire_leadership, subscription_lock
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.lock_process import StartLock, lock_starter, until_free, until_waiting
from tests.faults.program_process import environment
from tests.faults.tail_process import Sql

if TYPE_CHECKING:
    from tests.conftest import Call, Cli

TELL = ("--", "sh", "-c", "echo it ran")


@pytest.fixture
def start(settings: Settings) -> Iterator[StartLock]:
    """Starts `pgcoord lock run`; ends the processes that still run at the end of the test."""
    with lock_starter(lambda: settings) as starter:
        yield starter


@pytest.fixture
def holder(settings: Settings) -> Iterator[Ownership]:
    """An owner of the lock `nightly`."""
    with acquire_leadership(settings.dsn, "nightly") as owner:
        yield owner


@pytest.fixture
def holder_pid(sql: Sql, holder: Ownership) -> int:
    """The pid of its session."""
    return int(value(sql, "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/leadership'"))


# -- exit codes


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -KILL $$", 128 + 9), ("kill -TERM $$", 128 + 15)],
)
def test_i19_the_exit_code_of_the_command_is_passed_through(script: str, code: int, cli: Cli) -> None:
    done = cli("lock", "run", "nightly", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_the_command_has_the_terminal_to_itself(cli: Cli) -> None:
    done = cli("lock", "run", "nightly", "--", "sh", "-c", "cat; echo talk >&2", stdin="given\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "given\n", "talk\n")


def test_options_behind_the_dashes_are_the_commands_own(cli: Cli) -> None:
    done = cli("lock", "run", "nightly", "--", "echo", "--wait", "-q", "--", "--help")
    assert (done.returncode, done.stdout) == (0, "--wait -q -- --help\n")


@pytest.mark.parametrize(
    ("command", "reason"), [("./no-such-command", "No such file or directory"), ("/etc/passwd", "Permission denied")]
)
def test_a_command_that_cannot_be_started_is_reported_and_the_lock_released(
    command: str, reason: str, cli: Cli, sql: Sql
) -> None:
    done = cli("lock", "run", "nightly", "--", command)
    assert done.returncode == 1
    assert f"cannot run {command}: {reason}" in done.stderr
    until_free(sql)


def test_a_lock_is_free_again_when_its_command_has_ended(cli: Cli) -> None:
    for _ in range(3):
        assert cli("lock", "run", "nightly", "--", "true").returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["nightly"], ["", *TELL], ["x" * 201, *TELL], ["nightly", "--wait", "soon", *TELL],
        ["nightly", "--conflict-exit-code", "256", *TELL], ["nightly", "--kill-grace", "-1s", *TELL],
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(words: list[str], offline: Call) -> None:
    assert offline("lock", "run", *words).code == 2


# -- a lock that is held


def test_a_lock_that_is_held_is_refused_and_the_holder_named(cli: Cli, holder_pid: int) -> None:
    done = cli("lock", "run", "nightly", *TELL)
    assert (done.returncode, done.stdout) == (5, "")
    assert f"'nightly' is held by pid {holder_pid} (pgcoord/leadership, local) since 20" in done.stderr


def test_other_names_are_free(cli: Cli, holder: Ownership) -> None:
    assert cli("lock", "run", "Nightly", *TELL).stdout == "it ran\n"


@pytest.mark.parametrize("code", [0, 75])
def test_a_conflict_ends_with_the_chosen_exit_code(code: int, cli: Cli, holder: Ownership) -> None:
    words = ("lock", "run", "nightly", "--conflict-exit-code", str(code))
    told = cli(*words, *TELL)
    assert (told.returncode, told.stdout) == (code, "")
    assert " INFO [locks] 'nightly' is held by pid" in told.stderr
    silent = cli(*words, "-q", *TELL)
    assert (silent.returncode, silent.stdout, silent.stderr) == (code, "", "")


def test_the_exit_code_for_a_conflict_is_not_used_for_errors(offline: Call) -> None:
    answer = offline("lock", "run", "nightly", "--conflict-exit-code", "0", "-q", *TELL)
    assert (answer.code, answer.out) == (4, "")
    assert "cannot connect" in answer.err


def test_the_example_that_cron_runs_on_two_machines_at_once(start: StartLock, cli: Cli, sql: Sql) -> None:
    collect = ("--", sys.executable, "-m", "pgcoord_cli", "gc", "all")
    with sql.transaction():
        # The work of the first run lasts until the second one has started.
        sql.execute("LOCK TABLE commit_requests IN ACCESS EXCLUSIVE MODE")
        first = start("nightly", *collect)
        until(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"))
        second = cli("lock", "run", "nightly", *collect)
        assert (second.returncode, second.stdout) == (5, "")
        assert "held by pid" in second.stderr
        cron = cli("lock", "run", "nightly", "--conflict-exit-code", "0", "-q", *collect)
        assert (cron.returncode, cron.stdout, cron.stderr) == (0, "", "")
    assert first.ended()[0] == 0


# -- waiting


def test_a_waiter_gets_the_lock_when_it_is_released(start: StartLock, sql: Sql, holder: Ownership) -> None:
    """The waiter is in PostgreSQL's own queue, as pg_locks shows."""
    waiter = start("nightly", "--wait", "24h", *TELL)
    until_waiting(sql)
    assert not waiter.stdout.is_waiting()
    holder.release()
    assert waiter.ended() == (0, ["it ran\n"], "")


def test_all_waiters_get_the_lock_one_after_the_other(start: StartLock, sql: Sql, holder: Ownership) -> None:
    waiters = [start("nightly", "--wait", "24h", "--fence", "--", "sh", "-c", "echo $PGCOORD_FENCE") for _ in range(3)]
    until_waiting(sql, 3)
    holder.release()
    ended = [waiter.ended() for waiter in waiters]
    assert sorted((code, *lines) for code, lines, _ in ended) == [(0, f"{number}\n") for number in (2, 3, 4)]


def test_a_wait_that_times_out_names_the_holder(cli: Cli, sql: Sql, holder_pid: int) -> None:
    done = cli("lock", "run", "nightly", "--wait", "100ms", *TELL)
    assert (done.returncode, done.stdout) == (5, "")
    assert f"held by pid {holder_pid} " in done.stderr


def test_a_wait_may_exceed_the_statement_timeout(cli: Cli, holder: Ownership) -> None:
    done = cli("lock", "run", "nightly", "--wait", "500ms", *TELL, env={"PGCOORD_STATEMENT_TIMEOUT": "50ms"})
    assert done.returncode == 5, "not 124"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_wait_that_is_interrupted_leaves_no_waiter_behind(
    number: signal.Signals, code: int, start: StartLock, sql: Sql, holder: Ownership
) -> None:
    waiter = start("nightly", "--wait", "24h", *TELL)
    until_waiting(sql)
    assert waiter.end(number)[:2] == (code, [])
    until_waiting(sql, 0)


# -- the fence


def test_each_run_gets_a_greater_fence(cli: Cli) -> None:
    numbers = [
        int(cli("lock", "run", "nightly", "--fence", "--", "sh", "-c", "echo $PGCOORD_FENCE").stdout)
        for _ in range(3)
    ]  # fmt: skip
    assert numbers == [1, 2, 3]


def test_without_the_option_there_is_no_fence(cli: Cli, sql: Sql) -> None:
    assert cli("lock", "run", "nightly", "--", "sh", "-c", "echo ${PGCOORD_FENCE-none}").stdout == "none\n"
    assert value(sql, "SELECT count(*) FROM subscriptions") == 0


# -- list and who


def test_a_list_shows_holders_and_waiters(
    call: Call, start: StartLock, sql: Sql, holder: Ownership, holder_pid: int, settings: Settings
) -> None:
    start("nightly", "--wait", "24h", *TELL)
    until_waiting(sql)
    with acquire_leadership(settings.dsn, "a name"):
        locks = call("lock", "list", "-o", "json").document
    shown = [(lock["name"], lock["is_waiting"], lock["application"], lock["client"]) for lock in locks]
    assert shown == [
        ("a name", False, "pgcoord/leadership", "local"),
        ("nightly", False, "pgcoord/leadership", "local"),
        ("nightly", True, "pgcoord/lock nightly", "local"),
    ]
    assert locks[1]["pid"] == holder_pid
    assert all(lock["since"].startswith("20") for lock in locks)


def test_an_empty_list_is_reported(call: Call) -> None:
    assert call("lock", "list", "-o", "table") == (0, "", "no lock is held\n")
    assert call("lock", "list", "-o", "json").document == []


def test_a_lock_of_others_is_not_listed(call: Call, sql: Sql, settings: Settings) -> None:
    """Neither a lock without a name in this schema, nor one of another database."""
    key = subscription_lock("pgcoord", "nightly")
    elsewhere = psycopg.conninfo.make_conninfo(settings.dsn, dbname="postgres")
    with acquire_leadership(settings.dsn, "nightly"):
        pass  # so that the name is known
    until_free(sql)
    sql.execute("SELECT pg_advisory_lock(42), pg_advisory_lock(4, 2)")
    with closing(psycopg.connect(elsewhere)) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [key])
        assert call("lock", "list", "-o", "json").document == []
        assert call("lock", "who", "nightly").code == 3


def test_who_shows_the_holder_of_a_lock(call: Call, holder_pid: int) -> None:
    found = call("lock", "who", "nightly", "-o", "json").document
    assert (found["name"], found["pid"], found["application"]) == ("nightly", holder_pid, "pgcoord/leadership")


@pytest.mark.parametrize("words", [("who",), ("break", "--yes"), ("break",)], ids=" ".join)
def test_a_lock_without_a_holder_is_exit_code_3(words: tuple[str, ...], call: Call) -> None:
    answer = call("lock", *words, "nightly", "-o", "json")
    assert (answer.code, answer.error["message"]) == (3, "lock 'nightly' is free")


# -- breaking


def is_there(sql: Sql, pid: int) -> Any:
    """Whether that session exists."""
    return value(sql, "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid)


def test_breaking_a_lock_ends_its_holders_session(call: Call, sql: Sql, holder_pid: int) -> None:
    broken = call("lock", "break", "nightly", "--yes", "-o", "json").document
    assert (broken["name"], broken["broken"]["pid"]) == ("nightly", holder_pid)
    until(lambda: not is_there(sql, holder_pid))
    until_free(sql)


def test_breaking_a_lock_ends_the_command_that_runs_under_it(call: Call, start: StartLock) -> None:
    lock = start("nightly", "--", "sh", "-c", "echo it runs; exec sleep 600")
    lock.line()
    assert call("lock", "break", "nightly", "--yes").code == 0
    code, _, err = lock.ended()
    assert code == 4
    assert "lock 'nightly' is lost: " in err


def test_without_a_terminal_a_lock_is_not_broken_without_yes(cli: Cli, sql: Sql, holder_pid: int) -> None:
    done = cli("lock", "break", "nightly", stdin="nightly\n")
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    assert is_there(sql, holder_pid)


@pytest.mark.parametrize(("typed", "code", "sessions"), [("nightly", 0, 0), ("nightl", 2, 1), ("y", 2, 1)])
def test_at_a_terminal_the_name_has_to_be_typed(
    typed: str, code: int, sessions: int, settings: Settings, sql: Sql, holder_pid: int
) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", "lock", "break", "nightly"],
        env=environment(settings.dsn), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.write(ours, f"{typed}\n".encode())
        _, err = process.communicate(timeout=TIMEOUT)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == code
    assert f"'nightly' is held by pid {holder_pid} (pgcoord/leadership, local)" in err
    until(lambda: is_there(sql, holder_pid) == sessions)


def test_a_lock_list_is_a_table(call: Call, holder_pid: int) -> None:
    lines = call("lock", "list", "-o", "plain").out.splitlines()
    assert len(lines) == 1
    assert lines[0].split("\t")[0] == "nightly"
    assert json.loads(call("lock", "list", "-o", "jsonl").out)["pid"] == holder_pid


def test_what_a_role_may_not_see_of_a_holder_is_said(
    call: Call, settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    role = f"reader_{uuid.uuid4().hex[:8]}"
    sql.execute(f"CREATE ROLE {role} LOGIN")
    assert call("migrate", "grant", "--reader", role).code == 0
    dsn = make_conninfo(settings.dsn, user=role)
    with acquire_leadership(settings.dsn, "nightly"):
        for words in (("list",), ("who", "nightly")):
            assert "needs a GRANT of pg_read_all_stats" in call("lock", *words, PGCOORD_DSN=dsn).err
            assert "pg_read_all_stats" not in call("lock", *words).err
