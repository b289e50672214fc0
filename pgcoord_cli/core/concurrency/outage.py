"""Outages: a failure that repeats is logged once and counted, and its end is logged with the count.

A daemon without its server goes on trying to connect. The log then has one warning when that begins, one for each other
reason that follows (a server that restarts gives two or three), and one line at the end. Further attempts are logged at
DEBUG.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from threading import Lock
from typing import Any

MAX_REASONS = 5
"""Different reasons that are logged in one outage. Reasons with a changing part, such as a pid, never repeat."""


class Outage:
    """Logs the failures of one operation to `log`; threads may share it.

    A failure is logged as `trouble: reason`, the end as `recovery again` with the count; `fields` go with every record.
    With several `source`s, such as the slots of a worker, an outage lasts from the first failure of any of them until
    each that failed has succeeded.
    """

    def __init__(self, log: logging.Logger, trouble: str, recovery: str, **fields: Any) -> None:
        self._log = log
        self._trouble = trouble
        self._recovery = recovery
        self._fields = fields
        self._mutex = Lock()
        self._sources: set[Hashable] = set()
        self._reasons: set[str] = set()
        self._attempts = 0
        self._began = 0.0

    def failed(self, reason: str, *, source: Hashable = None, **fields: Any) -> None:
        """Counts a failure, and logs it: as a warning if this outage has not had that reason yet, else at DEBUG."""
        with self._mutex:
            attempts = self._count(source)
            is_new = reason not in self._reasons and len(self._reasons) < MAX_REASONS
            if is_new:
                self._reasons.add(reason)
        fields = self._fields | fields | {"attempts": attempts}
        if is_new:
            self._log.warning("%s: %s", self._trouble, reason, extra=fields)
        else:
            self._log.debug("%s: %s (attempt %d)", self._trouble, reason, attempts, extra=fields)

    def counted(self, *, source: Hashable = None) -> None:
        """Counts a failure that the caller has logged in words of its own."""
        with self._mutex:
            self._count(source)

    def _count(self, source: Hashable) -> int:
        if not self._sources:
            self._reasons, self._attempts, self._began = set(), 0, time.monotonic()
        self._sources.add(source)
        self._attempts += 1
        return self._attempts

    def ended(self, *, source: Hashable = None, **fields: Any) -> None:
        """Reports that `source` has succeeded. Logs the end of the outage if there was one that ends with this."""
        if source not in self._sources:  # nearly always: callers report every success
            return
        with self._mutex:
            self._sources.discard(source)
            if self._sources:
                return
            attempts, seconds = self._attempts, time.monotonic() - self._began
        fields = self._fields | fields | {"attempts": attempts, "seconds": round(seconds, 3)}
        count = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        self._log.info("%s again, after %s over %s", self._recovery, count, _duration(seconds), extra=fields)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
