"""How the program ends after a signal: by that signal, so that shells and service managers see it, or with a code."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.program_process import environment

if TYPE_CHECKING:
    from tests.conftest import StartProgram

Sql = psycopg.Connection[Any]

PROGRAM = f"{sys.executable} -m pgcoord_cli"


def has_session(sql: Sql, name: str) -> Any:
    return value(
        sql,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s",
        f"pgcoord/{name}",
    )


def read_to_end(terminal: int) -> bytes:
    """Reads what is written to a terminal, until its last process has ended."""
    shown = b""
    with suppress(OSError):  # Linux reports so that the other end is closed
        while select.select([terminal], [], [], TIMEOUT)[0] and (data := os.read(terminal, 65_536)):
            shown += data
    return shown


@pytest.mark.parametrize(
    ("words", "session"),
    [
        ("tail completion", "tail"),
        ("tail completion --exec --subscription s -- true", "tail"),
        ("leader run", "leader keeper"),
        ("leader status --watch", "leader status"),
        ("worker run", "worker"),
        ("lock run here -- sleep 60", "lock here"),
        ("lock run held --wait 1h -- true", "lock held"),
        ("kv watch key", "kv watch"),
        ("kv set key value --timeout 1h", "kv set"),
    ],
)
def test_i19_ctrl_c_ends_a_loop_of_a_shell(words: str, session: str, settings: Settings, sql: Sql) -> None:
    """A shell goes on with its loop if the command exits, with whatever code, instead of dying of SIGINT."""
    with acquire_leadership(settings.dsn, "held"):
        pid, terminal = pty.fork()
        if pid == 0:
            loop = f"for i in 1 2; do echo round $i; {PROGRAM} {words}; done; echo after the loop"
            os.execvpe("bash", ["bash", "-c", loop], environment(settings.dsn))
        until(lambda: has_session(sql, session))
        os.write(terminal, b"\x03")
        shown = read_to_end(terminal)
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    assert b"round 2" not in shown, shown
    assert b"after the loop" not in shown
    assert b"Traceback" not in shown
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_i19_lock_run_dies_with_its_command(number: signal.Signals, start_program: StartProgram, sql: Sql) -> None:
    running = start_program("lock", "run", "here", "--", "sh", "-c", "echo runs; exec sleep 60")
    assert running.stdout
    assert running.stdout.readline() == "runs\n"
    running.send_signal(number)
    assert running.wait(TIMEOUT) == -number


def test_i19_lock_run_passes_on_the_code_of_a_command_that_handles_the_signal(start_program: StartProgram) -> None:
    script = "trap 'exit 130' INT; echo runs; while :; do read -r line || sleep 1; done"
    running = start_program("lock", "run", "here", "--", "sh", "-c", script)
    assert running.stdout
    assert running.stdout.readline() == "runs\n"
    running.send_signal(signal.SIGINT)
    assert running.wait(TIMEOUT) == 130


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_i17_a_log_that_cannot_be_written_changes_no_exit_code(stderr: str, settings: Settings, sql: Sql) -> None:
    with subprocess.Popen(
        ["bash", "-c", f"exec {PROGRAM} leader run {stderr}"], env=environment(settings.dsn), stdin=subprocess.DEVNULL
    ) as leader:
        try:
            until(lambda: value(sql, "SELECT count(*) FROM leader_lease WHERE expires_at > clock_timestamp()"))
            leader.terminate()
            assert leader.wait(TIMEOUT) == 0
        finally:
            leader.kill()
