"""Delivering data to a command, piece by piece, each at least once: `pgcoord tail --exec`, `pgcoord kv watch -- CMD`.

The command gets a batch of events, or the value after a change, on its standard input, and reports by its exit code
that it has handled all of it. A caller with a position moves it only then. What the command failed on is delivered
again, whole, after a pause; so is a batch during which this process was killed, by the next tail of that position. A
command may therefore see an event twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from tempfile import TemporaryFile
from typing import IO

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.process_group import ProcessGroup
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.errors import CommandNotExecutable, CommandNotFound, PgcoordError

_log = logging.getLogger("pgcoord.delivery")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds between attempts to deliver the same."""

POLL_SECONDS = 3600.0
"""How long a wait for the command lasts; its end and a signal wake it before."""


class Delivery:
    """Runs one command for each delivery. `signal` may be called from a signal handler.

    After `attempts` failures in a row it gives up; None: never. `what` is delivered, in log messages.
    """

    def __init__(self, command: Sequence[str], attempts: int | None, what: str) -> None:
        self._command = command
        self._attempts = attempts
        self._what = what
        self._outage = Outage(_log, command[0], "delivering", command=command[0])
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._wakeup = Wakeup()
        self._signals: list[int] = []
        self._stopping = False

    def signal(self, number: int) -> None:
        """Forwards a signal to the command; no further attempt begins."""
        self._stopping = True
        self._signals.append(number)
        self._wakeup.set()

    def close(self) -> None:
        """Releases the descriptors."""
        self._wakeup.close()

    def deliver(self, data: bytes, variables: Mapping[str, str] | None = None) -> int | None:
        """Runs the command until it exits with 0; returns 0, or its last exit code once all attempts have failed.

        `variables` are added to its environment. Returns None if a signal ended the delivery before that. Raises
        CommandNotFound, CommandNotExecutable.
        """
        environment = os.environ | (variables or {})
        self._backoff.reset()
        # A file, which is read from the start at each attempt, and fills up however slowly the command reads.
        with TemporaryFile() as batch:
            batch.write(data)
            attempt = 0
            while not self._stopping:
                batch.seek(0)
                batch.flush()
                if (code := self._run(batch, environment)) == 0:
                    self._outage.ended()
                    return 0
                attempt += 1
                if self._stopping:
                    return None
                if attempt == self._attempts:
                    return code
                self._outage.failed(f"exited with {code}; {self._what} is delivered again")
                self._wakeup.wait(self._backoff.next_pause())
        return None

    def _run(self, batch: IO[bytes], environment: Mapping[str, str]) -> int:
        with closing(self._start(batch, environment)) as group:
            while group.exit_code is None:
                group.wait(self._wakeup, POLL_SECONDS)
                while self._signals:
                    group.signal(self._signals.pop(0))
            return group.exit_code if group.exit_code >= 0 else 128 - group.exit_code

    def _start(self, batch: IO[bytes], environment: Mapping[str, str]) -> ProcessGroup:
        name = self._command[0]
        try:
            return ProcessGroup(self._command, environment, stdin=batch.fileno())
        except FileNotFoundError as error:
            raise CommandNotFound(f"cannot run {name}: {error.strerror}", hint="is it in PATH?") from None
        except PermissionError as error:
            raise CommandNotExecutable(f"cannot run {name}: {error.strerror}", hint=f"try: chmod +x {name}") from None
        except OSError as error:
            raise PgcoordError(f"cannot run {name}: {error.strerror}") from None
