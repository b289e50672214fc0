"""How long a tail has been at one gap."""

from __future__ import annotations

import math
import time

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.database.channels import POLL_SECONDS

STALL_SECONDS = 2.0
"""How long a tail stays at one gap before it reports what holds it up."""

FIRST_RECHECK = 0.005
"""Seconds until the first read again at a gap, or while a listed transaction is open; they double up to the poll."""


class StallDetector:
    """How long a tail has been at one gap: spaces its reads out, and detects once a gap that it is held up."""

    def __init__(self) -> None:
        self._rechecks = Backoff(FIRST_RECHECK, POLL_SECONDS)
        self._begins_at: float | None = None

    @property
    def is_known(self) -> bool:
        """Whether `has_begun` has returned True for the gap at which the tail is now."""
        return self._begins_at == math.inf

    def record(self, *, has_moved: bool, is_at_gap: bool) -> None:
        """Records the result of a read."""
        if has_moved:
            self._rechecks.reset()
        # A gap at which the tail arrives by moving is another gap, and gets its own STALL_SECONDS.
        if has_moved or not is_at_gap:
            self._begins_at = None
        if is_at_gap and self._begins_at is None:
            self._begins_at = time.monotonic() + STALL_SECONDS

    def next_recheck(self) -> float:
        """Returns the seconds until the next read, which double from call to call until the tail moves."""
        return self._rechecks.next_pause()

    def has_begun(self) -> bool:
        """Returns True once for each gap that stayed for STALL_SECONDS."""
        begun = self._begins_at is not None and time.monotonic() >= self._begins_at
        if begun:
            self._begins_at = math.inf
        return begun
