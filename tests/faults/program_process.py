"""`pgcoord …` in separate processes, whose output is read line by line while they run."""

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
    """The lines of a pipe, read by a thread."""

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
        """Returns the next line as it was written, or None at the end. Fails after TIMEOUT."""
        try:
            line = self._queue.get(timeout=TIMEOUT)
        except Empty:
            raise AssertionError("no line came") from None
        if line is None:
            self._queue.put(None)
        return line

    def is_waiting(self) -> bool:
        """Returns whether `next` would return at once."""
        return not self._queue.empty()

    def rest(self) -> list[str]:
        """Returns all lines up to the end."""
        return list(iter(self.next, None))

    def close(self) -> None:
        """Closes the stream once the thread has read it to its end, because the thread uses it until then."""
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
        """Returns the next line of stdout."""
        line = self.stdout.next()
        assert line is not None, f"the process ended with {self.process.wait(TIMEOUT)}: {''.join(self.stderr.rest())}"
        return line

    def message(self, text: str) -> str:
        """Returns the next line of stderr that contains `text`."""
        for line in iter(self.stderr.next, None):
            if text in line:
                return line
        raise AssertionError(f"the process ended without the message {text!r}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Sends SIGSTOP to the process and waits until it has stopped."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def ended(self) -> tuple[int, list[str], str]:
        """Waits for the end. Returns the exit code, the unread lines of stdout and the unread text of stderr."""
        out, err = self.stdout.rest(), "".join(self.stderr.rest())
        assert "Traceback" not in err
        return self.process.wait(TIMEOUT), out, err

    def end(self, number: int) -> tuple[int, list[str], str]:
        """Sends a signal, and returns what `ended` returns."""
        self.signal(number)
        return self.ended()

    def remove(self) -> None:
        """Kills the process in any state."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        self.stdout.close()
        self.stderr.close()


Process = TypeVar("Process", bound=ProgramProcess)


@contextmanager
def starter(
    kind: Callable[[Sequence[str], dict[str, str]], Process], command: Sequence[str], settings: Callable[[], Settings]
) -> Iterator[Callable[..., Process]]:
    """Starts processes of a kind, by default on the test's database; kills those that are left at the end."""
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
    """Returns this process's environment with PGCOORD_DSN and without other settings of PostgreSQL."""
    # With PYTHONUNBUFFERED, a line that the program forgot to flush would arrive all the same.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PYTHONUNBUFFERED"))}
    return clean | {"PGCOORD_DSN": dsn, "PYTHONUTF8": "1"}
