"""`pgcoord lock run` in processes of their own, around commands that tell who they are; and looking at locks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from os import killpg
from pathlib import Path
from signal import SIGKILL

from pgcoord_cli.settings import Settings
from tests.faults.tail_process import PATIENCE, Lines, Sql, TailProcess, environment, until, value

FAMILY = ("sh", "-c", "sleep 600 & echo $$ $!; wait")
"""A command with a child of its own: it prints the process ids of both."""

STUBBORN = ("sh", "-c", "trap '' TERM; sleep 600 & echo $$ $!; while :; do wait; done")
"""The same, but both of them stay when they are asked to end."""

HERE = "database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND locktype = 'advisory'"


class LockProcess(TailProcess):
    """A running `pgcoord lock run …`; what its command prints comes out of its stdout.

    Its stdout ends when nobody has it open any more: neither the command nor anything that the command started.
    """

    def __init__(self, words: Sequence[str], settings: Settings) -> None:
        self.family: tuple[int, ...] = ()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgcoord_cli", "lock", "run", *words],
            env=environment(settings.dsn), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout and self.process.stderr
        self.stdout, self.stderr = Lines(self.process.stdout), Lines(self.process.stderr)

    def has_family(self) -> tuple[int, ...]:
        """The process ids of FAMILY, once it runs."""
        self.family = tuple(map(int, self.line().split()))
        return self.family

    def remove(self) -> None:
        """Ends the process and whatever it left behind."""
        for pid in self.family[:1]:
            with suppress(ProcessLookupError):
                killpg(pid, SIGKILL)
        super().remove()


StartLock = Callable[..., LockProcess]


@contextmanager
def lock_starter(settings: Callable[[], Settings]) -> Iterator[StartLock]:
    """Starts `pgcoord lock run` on the test's database unless the call names another; ends those that are left."""
    started: list[LockProcess] = []

    def start(*words: str, settings_: Settings | None = None) -> LockProcess:
        started.append(LockProcess(words, settings_ or settings()))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.remove()


def is_running(pid: int) -> bool:
    """Whether the process is there, and not only what is kept of it until somebody asks for its exit code."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def until_waiting(sql: Sql, number: int = 1) -> None:
    """Returns when that many sessions of this database wait for an advisory lock."""
    until(lambda: value(sql, f"SELECT count(*) FROM pg_locks WHERE NOT granted AND {HERE}") == number)


def until_free(sql: Sql) -> None:
    """Returns when no session of this database has or wants an advisory lock."""
    until(lambda: not value(sql, f"SELECT count(*) FROM pg_locks WHERE {HERE}"))


def end_holder(sql: Sql) -> None:
    """Ends the sessions of this database that hold an advisory lock; returns when they have ended."""
    query = f"SELECT count(pg_terminate_backend(pid, {PATIENCE * 1000:.0f})) FROM pg_locks WHERE granted AND {HERE}"
    assert value(sql, query)
