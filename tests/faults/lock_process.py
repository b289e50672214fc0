"""`pgcoord lock run` in separate processes, with commands that print their process ids, and queries of locks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from os import killpg
from pathlib import Path
from signal import SIGKILL

from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.program_process import ProgramProcess, starter
from tests.faults.tail_process import Sql

FAMILY = ("sh", "-c", "sleep 600 & echo $$ $!; wait")
"""A command that starts a child and prints the process ids of both."""

STUBBORN = ("sh", "-c", "trap '' TERM; sleep 600 & echo $$ $!; while :; do wait; done")
"""The same, but both processes ignore SIGTERM."""

HERE = "database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND locktype = 'advisory'"


class LockProcess(ProgramProcess):
    """A running `pgcoord lock run …`, whose stdout is also that of its command.

    Its stdout ends when no process has it open any more: neither the command nor one that the command started.
    """

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        super().__init__(words, environment)
        self.family: tuple[int, ...] = ()

    def has_family(self) -> tuple[int, ...]:
        """Waits until FAMILY runs, and returns its process ids."""
        self.family = tuple(map(int, self.line().split()))
        return self.family

    def remove(self) -> None:
        """Kills the process and the processes of its command."""
        for pid in self.family[:1]:
            with suppress(ProcessLookupError):
                killpg(pid, SIGKILL)
        super().remove()


StartLock = Callable[..., LockProcess]


def lock_starter(settings: Callable[[], Settings]) -> AbstractContextManager[StartLock]:
    """Starts `pgcoord lock run …`."""
    return starter(LockProcess, ["lock", "run"], settings)


def is_running(pid: int) -> bool:
    """Returns whether the process exists and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def until_waiting(sql: Sql, number: int = 1) -> None:
    """Waits until that many sessions of this database wait for an advisory lock."""
    until(lambda: value(sql, f"SELECT count(*) FROM pg_locks WHERE NOT granted AND {HERE}") == number)


def until_free(sql: Sql) -> None:
    """Waits until no session of this database holds or waits for an advisory lock."""
    until(lambda: not value(sql, f"SELECT count(*) FROM pg_locks WHERE {HERE}"))


def end_holder(sql: Sql) -> None:
    """Terminates the sessions of this database that hold an advisory lock, and waits for their end."""
    query = f"SELECT count(pg_terminate_backend(pid, {TIMEOUT * 1000:.0f})) FROM pg_locks WHERE granted AND {HERE}"
    assert value(sql, query)
