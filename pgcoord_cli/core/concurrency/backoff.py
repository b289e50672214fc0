"""Pauses between attempts at an operation that failed: they double, and a random part is taken off each.

This is the only place in pgcoord that sleeps. A back-off does not wait for an event: it spreads attempts out, so that
many processes that failed together do not try again together. Code that waits *for* something blocks on a
notification, a socket or a condition (rule I7).
"""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Pauses in seconds: `first`, then twice as long each time, up to `last`; each is shortened by up to a half."""

    def __init__(self, first: float, last: float) -> None:
        self._first = first
        self._last = last
        self._next = first

    def reset(self) -> None:
        """Returns to the first pause, after an attempt that succeeded."""
        self._next = self._first

    def next_pause(self) -> float:
        """Returns the seconds to pause before the next attempt, and doubles the pause after it."""
        seconds, self._next = self._next, min(self._next * 2, self._last)
        return seconds * random.uniform(0.5, 1.0)

    async def pause(self) -> None:
        """Sleeps for the next pause."""
        await asyncio.sleep(self.next_pause())
