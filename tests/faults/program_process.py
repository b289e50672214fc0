"""`pgcoord …` in processes of their own, read line by line while they run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Thread
from typing import IO, TypeVar

from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT


class Lines:
    """What comes out of a pipe, line by line, from a thread that always reads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
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
            line = self._queue.get(timeout=TIMEOUT)
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

    def close(self) -> None:
        """Once whoever writes has ended: the stream must not be closed under the thread that reads it."""
        self._thread.join(TIMEOUT)
        self._stream.close()


class ProgramProcess:
    """A running `pgcoord …`, which reads nothing from its stdin."""

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgcoord_cli", *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout and self.process.stderr
        self.stdout, self.stderr = Lines(self.process.stdout), Lines(self.process.stderr)

    def line(self) -> str:
        """The next line on stdout."""
        line = self.stdout.next()
        assert line is not None, f"it ended with {self.process.wait(TIMEOUT)}: {''.join(self.stderr.rest())}"
        return line

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
        return self.process.wait(TIMEOUT), out, err

    def end(self, number: int) -> tuple[int, list[str], str]:
        """The same, after a signal."""
        self.signal(number)
        return self.ended()

    def remove(self) -> None:
        """Ends the process, whatever state it is in."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        self.stdout.close()
        self.stderr.close()


Process = TypeVar("Process", bound=ProgramProcess)


@contextmanager
def starter(
    kind: Callable[[Sequence[str], dict[str, str]], Process], command: Sequence[str], settings: Callable[[], Settings]
) -> Iterator[Callable[..., Process]]:
    """Starts such processes, on the test's database unless the call names another; ends those that are left."""
    started: list[Process] = []

    def start(*words: str, settings_: Settings | None = None) -> Process:
        started.append(kind([*command, *words], environment((settings_ or settings()).dsn)))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.remove()


def environment(dsn: str) -> dict[str, str]:
    """The environment of a user whose PGCOORD_DSN names the test's database."""
    # Where Python is told not to buffer, a line that was not flushed would get through all the same.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PYTHONUNBUFFERED"))}
    return clean | {"PGCOORD_DSN": dsn, "PYTHONUTF8": "1"}
