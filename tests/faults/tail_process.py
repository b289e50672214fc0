"""`pgcoord tail` in processes of their own, read line by line; and what tests of tails ask the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

import psycopg

from pgcoord_cli.settings import Settings

PATIENCE = 30.0
"""Seconds after which a test that waits for something gives up. Nothing is asserted about shorter times."""

EXECUTION = "00000000-0000-0000-0000-000000000001"

Sql = psycopg.Connection[Any]
Record = dict[str, Any]


class Lines:
    """What comes out of a pipe, line by line, from a thread that always reads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._queue: Queue[str | None] = Queue()
        self._thread = Thread(target=self._read, args=[stream], daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._queue.put(line.decode())
        self._queue.put(None)

    def next(self) -> str | None:
        """The next line as it was written, None at the end."""
        try:
            line = self._queue.get(timeout=PATIENCE)
        except Empty:
            raise AssertionError("no line came") from None
        if line is None:
            self._queue.put(None)
        return line

    def is_waiting(self) -> bool:
        """Whether there is a line that nobody has taken yet, or the end."""
        return not self._queue.empty()

    def rest(self) -> list[str]:
        """Every line up to the end."""
        return list(iter(self.next, None))

    def join(self) -> None:
        self._thread.join(PATIENCE)


class TailProcess:
    """A running `pgcoord tail …`."""

    def __init__(self, words: tuple[str, ...], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgcoord_cli", "tail", *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout and self.process.stderr
        self.stdout, self.stderr = Lines(self.process.stdout), Lines(self.process.stderr)

    def line(self) -> str:
        """The next line on stdout."""
        line = self.stdout.next()
        assert line is not None, f"it ended with {self.process.wait(PATIENCE)}: {''.join(self.stderr.rest())}"
        return line

    def record(self, kind: str) -> Record:
        """The next record of that type, whatever comes before it; made for `-o json`."""
        while True:
            record = json.loads(self.line())
            if record["type"] == kind:
                return dict(record)

    def ids(self, number: int) -> list[int]:
        """The ids of the next events, whatever other records come between."""
        return [self.record("event")["event_id"] for _ in range(number)]

    def said(self, text: str) -> str:
        """The next line on stderr that holds `text`."""
        for line in iter(self.stderr.next, None):
            if text in line:
                return line
        raise AssertionError(f"it ended without ever saying {text!r}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Stops the process; returns when it stands still."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def ended(self) -> tuple[int, list[str], str]:
        """Once it has ended by itself: its exit code, the lines on stdout that are left, and what is left of stderr."""
        out, err = self.stdout.rest(), "".join(self.stderr.rest())
        assert "Traceback" not in err
        return self.process.wait(PATIENCE), out, err

    def end(self, number: int) -> tuple[int, list[str], str]:
        """The same, after a signal."""
        self.signal(number)
        return self.ended()

    def remove(self) -> None:
        """Ends the process, whatever state it is in."""
        self.process.kill()
        self.process.wait(PATIENCE)
        for lines, stream in ((self.stdout, self.process.stdout), (self.stderr, self.process.stderr)):
            assert stream
            lines.join()
            stream.close()


StartTail = Callable[..., TailProcess]


@contextmanager
def tail_starter(settings: Callable[[], Settings]) -> Iterator[StartTail]:
    """Starts tails, on the test's database unless the call names another; ends those that are left."""
    started: list[TailProcess] = []

    def start(*words: str, settings_: Settings | None = None) -> TailProcess:
        started.append(TailProcess(words, environment((settings_ or settings()).dsn)))
        return started[-1]

    try:
        yield start
    finally:
        for tail in started:
            tail.remove()


def environment(dsn: str) -> dict[str, str]:
    """The environment of a user whose PGCOORD_DSN names the test's database."""
    # Where Python is told not to buffer, a line that was not flushed would get through all the same.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PYTHONUNBUFFERED"))}
    return clean | {"PGCOORD_DSN": dsn, "PYTHONUTF8": "1"}


# -- the server's side


def add(sql: Sql, number: int = 1, table: str = "lease_events", **values: Any) -> list[int]:
    """Inserts events, as any service could; their ids."""
    kind = "event_type" if table == "lease_events" else "outcome"
    defaults = {"execution_id": EXECUTION, kind: "acquired" if table == "lease_events" else "success"}
    row = defaults | values
    rows = sql.execute(
        f"INSERT INTO pgcoord.{table} ({', '.join(row)})"
        f" SELECT {', '.join(['%s'] * len(row))} FROM generate_series(1, {number}) RETURNING event_id",
        [*row.values()],
    )
    return [event_id for (event_id,) in rows.fetchall()]


def add_and_roll_back(sql: Sql, number: int = 1, table: str = "lease_events") -> list[int]:
    """Draws ids that nobody will ever see."""
    with sql.transaction(force_rollback=True):
        return add(sql, number, table)


def value(sql: Sql, text: str, *parameters: object) -> Any:
    """The one value that a query gives."""
    row = sql.execute(text, parameters).fetchone()
    assert row
    return row[0]


def until(condition: Callable[[], object]) -> None:
    """Asks until the answer is yes."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"


def ticket(sql: Sql) -> int | None:
    """What the last tail of the lease events that went to sleep has drawn; None when none ever did."""
    number: int | None = value(sql, "SELECT pg_sequence_last_value('pgcoord.lease_events_asleep')")
    return number


def until_asleep(sql: Sql) -> None:
    """Returns when the first tail has shown everything and waits: where it starts has been settled by then."""
    until(lambda: ticket(sql) is not None)


def terminate(sql: Sql, application: str) -> int:
    """Ends the sessions of that application in this database, from the server's side; how many there were."""
    return sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database()",
        [application],
    ).rowcount


def until_gone(sql: Sql, application: str) -> None:
    """Returns when there is no session of that application in this database any more."""
    text = (
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = %s AND datname = current_database())"
    )
    until(lambda: value(sql, text, application))
