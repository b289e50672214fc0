"""`pgcoord dev` as a process: exit codes, stdout and stderr."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.embedded.installation import server_account
from pgcoord_cli.core.embedded.server import EmbeddedServer

Run = Callable[..., "subprocess.CompletedProcess[str]"]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root needs an account for the server")


@pytest.fixture
def place(place: Path) -> Iterator[Path]:
    """A PGCOORD_DEV_DIR; its servers are destroyed at the end."""
    yield place
    EmbeddedServer(place / "default").destroy()


@pytest.fixture
def run(place: Path) -> Run:
    """Runs `pgcoord dev …` on the server in `place`, without a terminal."""

    def call(*words: str, directory: Path = place, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*words), env=environment(directory), capture_output=True, text=True, timeout=60, check=False,
            **({"stdin": subprocess.DEVNULL} | options),
        )  # fmt: skip

    return call


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pgcoord_cli", "dev", *words]


def environment(directory: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "COLUMNS"))}
    return kept | {"PGCOORD_DEV_DIR": str(directory)}


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def query(dsn: str, statement: str) -> Any:
    with psycopg.connect(dsn) as conn:
        row = conn.execute(statement.encode()).fetchone()
        return row[0] if row else None


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute(statement.encode())


def is_alive(pid: int) -> bool:
    """Whether the process is running; a zombie is not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def kill(pid: int) -> None:
    """Sends SIGKILL; returns once the process has ended."""
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([descriptor], [], [])
    os.close(descriptor)


def test_round_trip(run: Run, place: Path) -> None:
    up = run("up", "-o", "json")
    told = document(up)
    assert (told["running"], told["started"]) == (True, True)
    assert told["migrations_applied"] == query(told["dsn"], "SELECT count(*) FROM pgcoord.schema_migrations") > 0
    assert told["data_directory"] == str(place / "default" / "data")
    assert f"export PGCOORD_DSN='{told['dsn']}'" in up.stderr.splitlines()

    assert run("dsn").stdout == told["dsn"] + "\n"
    assert document(run("dsn", "-o", "json")) == {"dsn": told["dsn"]}
    status = document(run("status", "-o", "json"))
    assert status == {name: told[name] for name in status}
    assert query(status["dsn"], "SELECT pg_backend_pid()") != status["pid"]
    assert is_alive(status["pid"])

    assert document(run("down", "-o", "json"))["stopped"] is True
    assert not is_alive(status["pid"])
    stopped = run("status", "-o", "json")
    assert stopped.returncode == 3
    assert json.loads(stopped.stdout) == status | {"running": False, "dsn": None, "pid": None, "source": None}
    again = document(run("down", "-o", "json"))
    assert (again["stopped"], again["destroyed"]) == (False, False)


def test_second_up_changes_nothing(run: Run) -> None:
    first, second = document(run("up", "-o", "json")), document(run("up", "-o", "json"))
    assert second == first | {"started": False, "migrations_applied": 0}


def test_data_outlives_down(run: Run) -> None:
    dsn = document(run("up", "-o", "json", "--no-migrate"))["dsn"]
    execute(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    run("down")
    assert document(run("up", "-o", "json", "--no-migrate"))["started"] is True
    assert query(dsn, "SELECT answer FROM kept") == 42


def test_no_migrate_applies_no_migration(run: Run) -> None:
    told = document(run("up", "--no-migrate", "-o", "json"))
    assert told["migrations_applied"] == 0
    assert query(told["dsn"], "SELECT to_regnamespace('pgcoord')") is None


def test_schema_option_names_the_schema_to_migrate(run: Run) -> None:
    told = document(run("up", "--schema", "other", "-o", "json"))
    assert query(told["dsn"], "SELECT to_regclass('other.schema_migrations')") is not None
    assert query(told["dsn"], "SELECT to_regnamespace('pgcoord')") is None


def test_two_ups_at_once_start_one_server(place: Path) -> None:
    calls = [
        subprocess.Popen(command("up", "-o", "json"), env=environment(place), text=True, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [json.loads(call.communicate(timeout=60)[0]) for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert told[0]["pid"] == told[1]["pid"]
    assert sorted(each["started"] for each in told) == [False, True]
    assert min(each["migrations_applied"] for each in told) == 0


def test_up_recovers_from_a_killed_postmaster(run: Run) -> None:
    first = document(run("up", "-o", "json"))
    execute(first["dsn"], "CREATE TABLE kept AS SELECT 42 AS answer")
    kill(first["pid"])
    assert (Path(first["data_directory"]) / "postmaster.pid").exists()
    assert run("status").returncode == 3
    second = document(run("up", "-o", "json"))
    assert second["started"] is True
    assert second["pid"] != first["pid"]
    assert query(second["dsn"], "SELECT answer FROM kept") == 42


@pytest.mark.parametrize("words", [("dsn",), ("status",)])
def test_exit_3_when_not_running(run: Run, place: Path, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 3
    assert "pgcoord dev up" in done.stderr
    assert list(place.iterdir()) == [], "looking must make nothing"


def test_dsn_when_not_running_is_an_error_document(run: Run) -> None:
    done = run("dsn", "-o", "json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "condition_false"


def test_dsn_survives_the_shell(run: Run, place: Path) -> None:
    odd = place / 'it\'s a $HOME, "50 %"'
    exported = run("up", "--no-migrate", directory=odd).stderr.splitlines()[-1]
    try:
        # sh splits what `export NAME=$(…)` yields at spaces: the string must have none.
        by_command = f"export PGCOORD_DSN=$({' '.join(command('dsn'))})"
        for line in (exported, by_command):
            seen = subprocess.check_output(
                ["sh", "-c", f'{line}; printf %s "$PGCOORD_DSN"'], text=True, env=environment(odd)
            )
            assert query(seen, "SELECT current_setting('data_directory')") == str(odd / "default" / "data")
    finally:
        assert run("down", "--destroy", "--yes", directory=odd).returncode == 0


def test_server_version_is_kept_and_not_changed(run: Run) -> None:
    assert document(run("up", "--no-migrate", "--server-version", "16", "-o", "json"))["version"] == 16
    run("down")
    other = run("up", "--no-migrate", "--server-version", "18")
    assert other.returncode == 2
    assert "16" in other.stderr
    told = document(run("up", "--no-migrate", "-o", "json"))
    assert told["version"] == 16
    assert query(told["dsn"], "SELECT current_setting('server_version_num')::int / 10000") == 16


def test_destroy_without_yes_is_refused_without_a_terminal(run: Run, place: Path) -> None:
    run("up", "--no-migrate")
    refused = run("down", "--destroy")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert run("status").returncode == 0, "a refused call must not even stop the server"
    assert document(run("down", "--destroy", "--yes", "-o", "json"))["destroyed"] is True
    assert list(place.iterdir()) == []
    assert document(run("down", "--destroy", "--yes", "-o", "json"))["destroyed"] is False


@pytest.mark.parametrize(("answer", "code", "remains"), [(b"n\n", 1, True), (b"\x04", 130, True), (b"y\n", 0, False)])
def test_destroy_asks_at_the_terminal(place: Path, run: Run, answer: bytes, code: int, remains: bool) -> None:
    run("up", "--no-migrate")
    keyboard, terminal = pty.openpty()
    try:
        with subprocess.Popen(
            command("down", "--destroy", "-o", "json"), env=environment(place),
            stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as call:  # fmt: skip
            assert call.stderr is not None
            assert select.select([call.stderr], [], [], 30)[0], "it has to ask"
            os.write(keyboard, answer)
            out, _ = call.communicate(timeout=60)
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert call.returncode == code
    assert (place / "default" / "data").exists() == remains
    assert (b"destroyed" in out) != remains


@as_root
def test_a_directory_that_the_account_cannot_enter_is_named(run: Run, place: Path) -> None:
    account = server_account()
    assert account is not None
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    done = run("up", directory=closed / "below")
    assert done.returncode == 1
    assert f"account {account.name} cannot enter {closed} (mode 0700)" in done.stderr
    assert "PGCOORD_DEV_DIR" in done.stderr
    assert list(closed.iterdir()) == []
    assert closed.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_an_error_without_traceback(run: Run, place: Path) -> None:
    (place / "file").touch()
    done = run("up", directory=place / "file")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {place / 'file'}")
    assert "Traceback" not in done.stderr


def test_help_does_not_load_the_driver() -> None:
    probe = "import sys; from pgcoord_cli import cli; cli.run(['dev', '--help']); sys.exit('psycopg' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True, stdout=subprocess.DEVNULL)
