"""Single flight: an operation that runs once at a time, at once after a success, and after a pause following a failure.

It replaces a task that loops. A caller that has work checks `is_idle`, calls `begin`, starts the operation, and reports
its end with `succeeded` or `failed`. Both call `again` once the next operation may begin, so that work that arrived in
the meantime is taken up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pgcoord_cli.core.concurrency.backoff import Backoff


class SingleFlight:
    """Idle at first. While failures follow each other, pauses grow from `first` to `last` seconds."""

    def __init__(self, again: Callable[[], None], first: float, last: float) -> None:
        self.is_idle = True
        self._again = again
        self._backoff = Backoff(first, last)
        self._pause: asyncio.TimerHandle | None = None
        self._is_closed = False

    def begin(self) -> None:
        """Marks an operation as running."""
        self.is_idle = False

    def succeeded(self) -> None:
        """Reports success: resets the back-off and admits the next operation."""
        self._backoff.reset()
        self._admit()

    def failed(self) -> None:
        """Reports failure: admits the next operation after a pause."""
        self._pause = asyncio.get_running_loop().call_later(self._backoff.next_pause(), self._admit)

    def close(self) -> None:
        """Admits nothing from now on, and cancels a pause that is running."""
        self.is_idle = False
        self._is_closed = True
        if self._pause:
            self._pause.cancel()

    def _admit(self) -> None:
        if not self._is_closed:
            self.is_idle = True
            self._again()
