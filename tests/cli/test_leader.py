"""`pgcoord leader status` as terms begin and end, once and with --watch."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

if TYPE_CHECKING:
    from tests.conftest import Cli, StartLeader


FOREVER = "24d"
"""An interval longer than the test, so that only notifications cause documents."""


@dataclass
class Watch:
    """A process of `pgcoord leader status --watch`, and the lines that it prints."""

    process: subprocess.Popen[str]
    _lines: Queue[str] = field(default_factory=Queue)

    def __post_init__(self) -> None:
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)

    def line(self) -> str:
        """Returns the next line; fails after a timeout."""
        try:
            return self._lines.get(timeout=TIMEOUT)
        except Empty:
            raise AssertionError("nothing more was printed") from None

    def until(self, *, held: bool) -> Any:
        """Returns the next document that fulfils the condition; each line has to be one complete document."""
        while (document := json.loads(self.line()))["leader"]["held"] is not held:
            pass
        return document

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal; returns the exit code and stderr."""
        self.process.send_signal(number)
        assert self.process.stderr
        return self.process.wait(TIMEOUT), self.process.stderr.read()


StartWatch = Callable[..., Watch]


@pytest.fixture
def watch(settings: Settings) -> Iterator[StartWatch]:
    """Starts watches; ends those that still run at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> Watch:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgcoord_cli", "leader", "status", "--watch", *words],
            env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return Watch(process)

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream
            stream.close()


def environment(settings: Settings) -> dict[str, str]:
    unwanted = ("PG", "NO_COLOR", "PYTHONUNBUFFERED")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)} | {
        "PGCOORD_DSN": settings.dsn
    }


def hold(sql: psycopg.Connection[Any], expires_in: str) -> None:
    """Stores a lease of a leader that does not exist."""
    sql.execute(
        """
        UPDATE leader_lease
           SET epoch = 7, term_id = gen_random_uuid(), leader_addr = 'west-1', durable_version = 3,
               acquired_at = clock_timestamp(), renewed_at = clock_timestamp(),
               expires_at = clock_timestamp() + %s::interval
        """,
        [expires_in],
    )


# Once


def test_a_lease_is_held_until_it_expires(cli: Cli, sql: psycopg.Connection[Any]) -> None:
    hold(sql, "1 hour")
    sql.execute(
        """
        INSERT INTO commit_requests (request_id, epoch, read_version, payload, created_at)
        SELECT gen_random_uuid(), 7, 3, '', clock_timestamp() - interval '5 seconds' FROM generate_series(1, 2)
        """
    )
    document = json.loads(cli("leader", "status", "-o", "json").stdout)
    assert document["leader"]["held"] is True
    assert (document["leader"]["leader_addr"], document["leader"]["durable_version"]) == ("west-1", 3)
    assert 3_000 < document["leader"]["expires_in_seconds"] <= 3_600
    assert document["queue"]["pending"] == 2
    assert document["queue"]["oldest_pending_seconds"] >= 5
    hold(sql, "-1 second")
    ended = cli("leader", "status", "-o", "json")
    document = json.loads(ended.stdout)
    assert (ended.returncode, document["leader"]["held"]) == (3, False)
    assert document["leader"]["expires_in_seconds"] == 0
    assert ended.stderr.startswith("error: no leader")
    assert "hint: start a leader with: pgcoord leader run" in ended.stderr


CLOCK = """
import datetime, time
ahead = {seconds}
now = time.time
time.time = lambda: now() + ahead
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(time.time(), tz)
    utcnow = now
datetime.datetime = Shifted
"""


@pytest.mark.parametrize("seconds", [-86_400, 86_400])
def test_i12_the_clock_of_the_client_has_no_effect(
    seconds: int, cli: Cli, sql: psycopg.Connection[Any], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK.format(seconds=seconds))
    wrong_clock = {"PYTHONPATH": str(tmp_path)}
    hold(sql, "1 hour")
    status = cli("leader", "status", "-o", "json", env=wrong_clock)
    assert status.returncode == 0
    assert 3_000 < json.loads(status.stdout)["leader"]["expires_in_seconds"] <= 3_600
    for age in ("30 minutes", "90 minutes"):
        sql.execute(
            """
            INSERT INTO commit_requests (request_id, epoch, read_version, payload, status, resolved_at)
            VALUES (gen_random_uuid(), 0, 0, '', 'conflict', clock_timestamp() - %s::interval)
            """,
            [age],
        )
    collected = json.loads(cli("gc", "commit-requests", "--older-than", "1h", "-o", "json", env=wrong_clock).stdout)
    assert collected["commit_requests"]["deleted"] == 1


# Watching


def test_a_watch_reports_every_change_of_the_leader(watch: StartWatch, start_leader: StartLeader) -> None:
    watching = watch("--interval", FOREVER, "-o", "json")
    watching.until(held=False)
    leader = start_leader("west-1")
    elected = watching.until(held=True)
    assert (elected["leader"]["leader_addr"], elected["leader"]["epoch"]) == ("west-1", 1)
    leader.end()
    watching.until(held=False)
    assert watching.end(signal.SIGINT) == (-signal.SIGINT, "")


def test_a_watch_reports_after_every_interval(watch: StartWatch, sql: psycopg.Connection[Any]) -> None:
    watching = watch("--interval", "10ms", "-o", "json")
    watching.until(held=False)
    hold(sql, "1 hour")  # without a notification
    watching.until(held=True)
    assert watching.end(signal.SIGTERM) == (-signal.SIGTERM, "")


def test_a_watch_in_table_format_prints_one_status_after_the_other(watch: StartWatch) -> None:
    watching = watch("--interval", "10ms")
    seen = [watching.line() for _ in range(60)]
    assert sum("leader_addr" in line for line in seen) > 1
    assert not any("\x1b" in line for line in seen)
    assert watching.end(signal.SIGINT) == (-signal.SIGINT, "")


def test_a_watch_whose_reader_has_closed_the_pipe_ends_silently(settings: Settings) -> None:
    for words in ("", " -o json"):
        line = f"{sys.executable} -m pgcoord_cli leader status --watch --interval 10ms{words} | head -1"
        done = subprocess.run(
            ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
            env=environment(settings), capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
        assert len(done.stdout.splitlines()) == 1


def test_a_watch_on_a_terminal_redraws_in_place(settings: Settings) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", "leader", "status", "--watch", "--interval", "10ms"],
        env=environment(settings) | {"TERM": "xterm"}, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while shown.count(b"\x1b[2J\x1b[H") < 3:
        shown += os.read(ours, 65_536)
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # Linux reports so that the other end is closed
        while os.read(ours, 65_536):
            pass
    assert process.wait(TIMEOUT) == -signal.SIGINT
    os.close(ours)


def test_i17_a_watch_rides_out_a_lost_session(watch: StartWatch, sql: psycopg.Connection[Any]) -> None:
    watching = watch("--interval", FOREVER, "-o", "json")
    watching.until(held=False)
    deadline = time.monotonic() + TIMEOUT
    while not sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgcoord/leader status'"
        " AND datname = current_database()"
    ).fetchall():
        assert time.monotonic() < deadline
    watching.until(held=False)
    code, err = watching.end(signal.SIGTERM)
    assert (code, err.count("the status is unknown: "), err.count("the status is known again")) == (
        -signal.SIGTERM,
        1,
        1,
    )
