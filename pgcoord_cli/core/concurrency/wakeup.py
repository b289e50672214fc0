"""A wake-up that a thread waits for, and that another thread or a signal handler sets.

No wait in pgcoord is a sleep loop (rule I7). A waiting thread blocks in the kernel on a pipe, alone or together with a
socket (`core.database.listener`) or a child process (`process_group`); `set` writes a byte into the pipe, which is
safe in signal handlers and from any thread.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress


class Wakeup:
    """A flag that can be waited for in poll(2) beside other descriptors."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        """The end of the pipe that becomes readable when the flag is set."""
        return self._reader

    def set(self) -> None:
        """Wakes the waiter now, or at its next wait."""
        with suppress(OSError):  # the pipe is full, so that the waiter wakes anyway; or it has been closed
            os.write(self._writer, b"!")

    def wait(self, seconds: float) -> None:
        """Blocks until the flag is set or the time is up, and clears the flag."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        self.clear()

    def clear(self) -> None:
        """Clears the flag."""
        with suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass

    def __del__(self) -> None:
        # For an iterator that its caller drops, as a loop over it does at `break`.
        self.close()

    def close(self) -> None:
        """Closes the pipe; repeated calls do nothing."""
        descriptors, self._reader, self._writer = (self._reader, self._writer), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)
