"""A child process in a process group of its own, that can be waited for and ended with everything it started."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread

from pgcoord_cli.core.concurrency.wakeup import Wakeup

GRACE_SECONDS = 10.0
"""How long a group may take to end when it is asked to, before it is killed."""


class ProcessGroup:
    """A command and its descendants. Raises OSError when the command cannot be started."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        stdout: int | None = None,
        stdin: int | None = None,
    ) -> None:
        """`stdout` and `stdin` are descriptors of the command; None: this process's own."""
        self._child = subprocess.Popen(
            command, env=dict(environment), stdin=stdin, stdout=stdout, start_new_session=True
        )
        self._ended = Wakeup()
        self._reaper = Thread(target=self._reap, daemon=True)
        self._reaper.start()

    def _reap(self) -> None:
        self._child.wait()
        self._ended.set()

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._child.returncode

    def fileno(self) -> int:
        """Becomes readable when the command has ended."""
        return self._ended.fileno()

    def wait(self, wakeup: Wakeup, seconds: float) -> None:
        """Blocks until the command has ended, the wake-up is set, or the time is up."""
        poll = select.poll()
        poll.register(self._ended.fileno(), select.POLLIN)
        poll.register(wakeup.fileno(), select.POLLIN)
        if self.exit_code is None:
            poll.poll(max(0.0, seconds) * 1000)
        wakeup.clear()

    def close(self) -> None:
        """Ends what is left of the group at once, and gives back what this process holds of it."""
        if self.exit_code is None:
            self.end(0.0)
        self._reaper.join()
        self._ended.close()

    def end(self, grace: float = GRACE_SECONDS) -> None:
        """Asks the whole group to end, and kills what is left of it after the grace."""
        self.signal(signal.SIGTERM)
        self._ended.wait(grace)
        self.signal(signal.SIGKILL)
        self._child.wait()

    def signal(self, number: int) -> None:
        """Sends a signal to the whole group, or to what is left of it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, number)
