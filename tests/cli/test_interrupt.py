"""Ctrl-C and SIGTERM at critical moments: the process dies of the signal, no traceback, and no partial output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

if TYPE_CHECKING:
    from tests.conftest import LeaderProcess, StartLeader, StartProgram


ENDINGS = [(signal.SIGINT, -signal.SIGINT, "interrupted"), (signal.SIGTERM, -signal.SIGTERM, "terminated")]

both = pytest.mark.parametrize(("number", "code", "word"), ENDINGS, ids=["SIGINT", "SIGTERM"])

Session = psycopg.Connection[Any]


@pytest.fixture
def leader(start_leader: StartLeader) -> LeaderProcess:
    """An elected leader whose lease outlasts the test."""
    started = start_leader("n1", "--ttl", "60s")
    started.wait_for("elected epoch 1")
    return started


def until(sql: Session, condition: str) -> None:
    """Returns as soon as the condition is true."""
    deadline = time.monotonic() + TIMEOUT
    while not sql.execute(f"SELECT {condition}").fetchall()[0][0]:
        assert time.monotonic() < deadline, f"never true: {condition}"


def session(name: str, condition: str = "true") -> str:
    """A condition: a session of that command in the database of the test fulfils `where`."""
    return (
        "EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
        f" AND application_name = 'pgcoord/{name}' AND {condition})"
    )


def freeze(leader: LeaderProcess) -> None:
    """Stops the process by SIGSTOP; returns when it is stopped."""
    leader.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, leader.process.pid, os.WSTOPPED | os.WNOWAIT)


def ending(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr; fails if there is a traceback."""
    out, err = process.communicate(timeout=TIMEOUT)
    assert "Traceback" not in out + err
    assert "Exception ignored" not in err
    return process.returncode, out, err


def daemon_code(code: int) -> int:
    """Returns the exit code of a daemon: SIGTERM is how a service manager stops one."""
    return 0 if code == -signal.SIGTERM else code


def history(sql: Session) -> list[Any]:
    return sql.execute("SELECT epoch, leader_addr, end_reason FROM leader_history ORDER BY epoch").fetchall()


# leader run


@both
def test_a_leader_releases_its_lease(
    number: signal.Signals, code: int, word: str, leader: LeaderProcess, sql: Session
) -> None:
    leader.signal(number)
    assert leader.process.wait(TIMEOUT) == daemon_code(code)
    assert "released" in leader.wait_for("released"), word
    assert sql.execute("SELECT term_id, leader_addr FROM leader_lease").fetchall() == [(None, None)]
    assert history(sql) == [(1, "n1", "released")]
    assert not any("Traceback" in line for line in leader.written)


@both
def test_a_waiting_candidate_ends(
    number: signal.Signals, code: int, word: str, leader: LeaderProcess, start_program: StartProgram, sql: Session
) -> None:
    candidate = start_program("leader", "run", "--node-id", "n2", "-o", "json", "-q")
    until(sql, session("leader keeper", "wait_event_type = 'Lock'"))
    candidate.send_signal(number)
    ended, out, err = ending(candidate)
    assert (ended, err) == (daemon_code(code), ""), word
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["candidate"]
    assert history(sql) == [(1, "n1", None)]
    assert leader.process.poll() is None


@both
def test_a_second_signal_exits_at_once(
    number: signal.Signals, code: int, word: str, start_program: StartProgram, sql: Session, settings: Settings
) -> None:
    candidate = start_program("leader", "run", "--ttl", "60s", "-o", "json")
    assert candidate.stdout
    while json.loads(candidate.stdout.readline())["event"] != "elected":
        pass
    until(sql, session("leader run"))
    with psycopg.connect(settings.dsn) as other:
        other.execute("SELECT FROM pgcoord.leader_lease FOR UPDATE")
        candidate.send_signal(signal.SIGTERM)
        releasing = session("leader keeper", "wait_event_type = 'Lock'")
        until(sql, f"NOT {session('leader run')} AND {releasing}")
        candidate.send_signal(number)
        ended, out, _ = ending(candidate)
    assert (ended, json.loads(out)["error"]["code"]) == (code, word)


# kv set


@both
def test_i3_nothing_is_enqueued_by_a_write_that_still_waits_for_a_leader(
    number: signal.Signals, code: int, word: str, start_program: StartProgram, sql: Session
) -> None:
    write = start_program("kv", "set", "a", "b", "--timeout", "1h", "-o", "json")
    until(sql, session("kv set", "state = 'idle' AND query LIKE '%AS held%'"))
    write.send_signal(number)
    ended, out, err = ending(write)
    assert (ended, json.loads(out)["error"]["code"], err) == (code, word, "")
    assert sql.execute("SELECT count(*) FROM commit_requests").fetchall() == [(0,)]


@both
def test_i3_an_interrupted_write_never_reports_that_it_did_not_happen(
    number: signal.Signals, code: int, word: str, start_program: StartProgram, sql: Session, leader: LeaderProcess
) -> None:
    freeze(leader)
    write = start_program("kv", "add", "a", "1", "--timeout", "1h", "-o", "json")  # which only a leader can commit
    until(sql, "EXISTS (SELECT FROM commit_requests)")
    write.send_signal(number)
    ended, out, err = ending(write)
    assert (ended, json.loads(out)["error"]["code"]) == (code, word)
    assert "may have been sent already; see its outcome with: pgcoord commit list" in err
    leader.signal(signal.SIGCONT)
    until(sql, "EXISTS (SELECT FROM kv WHERE key = 'a')")


# gc


@pytest.fixture
def held_up(sql: Session) -> Iterator[None]:
    """Ten old requests. A delete of the sixth waits for a lock that the test holds until it releases it."""
    sql.execute(
        """
        INSERT INTO commit_requests (request_id, epoch, read_version, payload, status, resolved_at)
        SELECT gen_random_uuid(), 0, 0, '', 'conflict', clock_timestamp() - interval '1 day' FROM generate_series(1, 10)
        """
    )
    sql.execute(
        """
        CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(42);
            RETURN old;
        END $$
        """
    )
    sql.execute(
        "CREATE TRIGGER held_up BEFORE DELETE ON commit_requests FOR EACH ROW WHEN (old.id = 6)"
        " EXECUTE FUNCTION wait_for_the_test()"
    )
    sql.execute("SELECT pg_advisory_lock(42)")
    yield
    sql.execute("SELECT pg_advisory_unlock_all()")


@both
@pytest.mark.usefixtures("held_up")
def test_i11_finished_batches_stay_and_the_rest_is_not_deleted(
    number: signal.Signals, code: int, word: str, start_program: StartProgram, sql: Session
) -> None:
    collecting = start_program("gc", "commit-requests", "--batch-size", "2", "-o", "json")
    until(sql, session("gc", "wait_event = 'advisory'"))
    collecting.send_signal(number)
    ended, out, err = ending(collecting)
    assert (ended, json.loads(out)["error"]["code"], err) == (code, word, "")
    # The statement ended with the program: no session continues it, and no other has to wait for it.
    until(sql, f"NOT {session('gc')}")
    assert [row[0] for row in sql.execute("SELECT id FROM commit_requests ORDER BY id")] == [5, 6, 7, 8, 9, 10]
    sql.execute("SELECT pg_advisory_unlock_all()")
    _, out, _ = ending(start_program("gc", "commit-requests", "-o", "json"))
    assert json.loads(out)["commit_requests"]["deleted"] == 6


@pytest.mark.usefixtures("held_up")
def test_i16_ctrl_c_ends_a_command_whose_server_does_not_answer_and_cancels_nothing(
    start_program: StartProgram, sql: Session
) -> None:
    """A cancelled statement may be a commit that waits for a standby; a closed socket does not end that wait."""
    collecting = start_program("gc", "commit-requests")
    until(sql, session("gc", "wait_event = 'advisory'"))
    backend = sql.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'advisory'").fetchall()[0][0]
    os.kill(backend, signal.SIGSTOP)
    try:
        collecting.send_signal(signal.SIGINT)
        ended, out, err = ending(collecting)
    finally:
        os.kill(backend, signal.SIGCONT)
    assert (ended, out, err.splitlines()[-1]) == (-signal.SIGINT, "", "error: interrupted")
    until(sql, f"NOT {session('gc')}")


def test_ctrl_c_during_imports_ends_the_program_silently() -> None:
    interrupted_while_loading = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from pgcoord_cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", interrupted_while_loading], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
