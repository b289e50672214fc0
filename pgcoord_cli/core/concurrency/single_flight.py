"""A gate: what is done again and again, one at a time, and after a failure only after a pause.

It replaces a task that loops: whoever has something to do looks whether it is open, shuts it, and opens it when the
answer is there; then it calls `again`, for what has come up meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pgcoord_cli.core.concurrency.backoff import Backoff


class SingleFlight:
    """Open at first. Pauses grow from `first` to `last` seconds while one failure follows the other."""

    def __init__(self, again: Callable[[], None], first: float, last: float) -> None:
        self.is_open = True
        self._again = again
        self._backoff = Backoff(first, last)
        self._pause: asyncio.TimerHandle | None = None
        self._is_closed = False

    def shut(self) -> None:
        """Somebody is under way."""
        self.is_open = False

    def open(self) -> None:
        """He is through, and all went well."""
        self._backoff.reset()
        self._reopen()

    def open_later(self) -> None:
        """He failed."""
        self._pause = asyncio.get_running_loop().call_later(self._backoff.next_pause(), self._reopen)

    def close(self) -> None:
        """Nobody goes through any more."""
        self.is_open = False
        self._is_closed = True
        if self._pause:
            self._pause.cancel()

    def _reopen(self) -> None:
        if not self._is_closed:
            self.is_open = True
            self._again()
