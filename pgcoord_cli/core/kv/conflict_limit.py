"""How many attempts at one kind of work may be in flight at once, as their conflicts decide.

**Why.** An optimistic transaction that conflicts has cost as much as one that commits. Each transaction in flight
conflicts with those that commit meanwhile, so beyond some number of attempts in flight most of them are wasted, and a
client commits less with more callers.

**Windows.** Outcomes are counted in windows of as many attempts as may be in flight, and at least SAMPLE. An attempt
counts in the window in which it was admitted; what was admitted before the last decision says nothing about it. At the
end of a window the share of attempts that conflicted decides:

- more than MAX_SHARE: the limit shrinks by that share, by no more than a half, and not below FEWEST;
- otherwise it grows by a sixteenth, and at least by one.

**No limit** is where every kind of work starts, and where it returns once its limit has grown to LIFTED. The first
window with too many conflicts sets a limit from the number that was in flight.

**FEWEST** attempts are always admitted: conflicts with other processes do not become fewer with the limit, and a client
that yielded to them without bound would come to a stop.

Pure: `core.kv.admission` admits the attempts and reports their outcomes.
"""

from __future__ import annotations

SAMPLE = 16
"""Outcomes that a decision needs at least."""

MAX_SHARE = 0.25
"""The share of attempts that may conflict before the limit shrinks: a third of an attempt wasted for each commit."""

FEWEST = 4
LIFTED = 1024


class ConflictLimit:
    """The limit for one kind of work."""

    __slots__ = ("_attempts", "_conflicts", "_limit", "window")

    def __init__(self) -> None:
        self._limit: float | None = None
        self.window = 0
        """The number of the window in which an attempt that is admitted now counts."""
        self._attempts = 0
        self._conflicts = 0

    @property
    def limit(self) -> int | None:
        """How many attempts may be in flight; None: any number."""
        return None if self._limit is None else int(self._limit)

    def admits(self, in_flight: int) -> bool:
        """Whether one more attempt may start beside `in_flight` others."""
        return self._limit is None or in_flight < int(self._limit)

    def note(self, window: int, in_flight: int, *, conflicted: bool) -> None:
        """Counts the outcome of an attempt that was admitted in `window` and was one of `in_flight` at its end."""
        if window != self.window:
            return
        self._attempts += 1
        self._conflicts += conflicted
        allowed = in_flight if self._limit is None else self._limit
        if self._attempts >= max(SAMPLE, allowed):
            self._decide(allowed, self._conflicts / self._attempts)

    def _decide(self, allowed: float, share: float) -> None:
        if share > MAX_SHARE:
            self._limit = max(FEWEST, allowed * max(0.5, 1 - share))
        elif self._limit is not None:
            grown = self._limit + max(1.0, self._limit / 16)
            self._limit = grown if grown < LIFTED else None
        self.window += 1
        self._attempts = self._conflicts = 0
