"""`pgcoord lock run` in processes of their own, around commands that tell who they are; and looking at locks."""

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
"""A command with a child of its own: it prints the process ids of both."""

STUBBORN = ("sh", "-c", "trap '' TERM; sleep 600 & echo $$ $!; while :; do wait; done")
"""The same, but both of them stay when they are asked to end."""

HERE = "database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND locktype = 'advisory'"


class LockProcess(ProgramProcess):
    """A running `pgcoord lock run …`; what its command prints comes out of its stdout.

    Its stdout ends when nobody has it open any more: neither the command nor anything that the command started.
    """

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        super().__init__(words, environment)
        self.family: tuple[int, ...] = ()

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


def lock_starter(settings: Callable[[], Settings]) -> AbstractContextManager[StartLock]:
    """Starts `pgcoord lock run …`."""
    return starter(LockProcess, ["lock", "run"], settings)


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
    query = f"SELECT count(pg_terminate_backend(pid, {TIMEOUT * 1000:.0f})) FROM pg_locks WHERE granted AND {HERE}"
    assert value(sql, query)
