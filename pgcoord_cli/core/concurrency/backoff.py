"""Pauses that double, with jitter, between attempts at something that failed.

This is the one place where pgcoord sleeps. A back-off waits for nothing: it only spreads attempts out. Whoever
waits *for* something waits on a notification, a socket or a condition (rule I7).
"""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Pauses from `first` seconds on, doubling up to `last`, each shortened at random by up to a half."""

    def __init__(self, first: float, last: float) -> None:
        self._first = first
        self._last = last
        self._next = first

    def reset(self) -> None:
        """Something worked: begin small again."""
        self._next = self._first

    def next_pause(self) -> float:
        """The seconds to pause now; makes the next pause longer."""
        seconds, self._next = self._next, min(self._next * 2, self._last)
        return jittered(seconds)

    async def pause(self) -> None:
        """Waits, and makes the next pause longer."""
        await asyncio.sleep(self.next_pause())


def jittered(seconds: float) -> float:
    """A pause shortened at random by up to a half, so that many who failed together do not come back together."""
    return seconds * random.uniform(0.5, 1.0)
