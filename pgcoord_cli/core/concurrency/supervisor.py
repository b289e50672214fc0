"""Keeping a daemon alive: attempts that follow each other until the daemon is asked to stop (rule I17).

An attempt is a stretch of the daemon's work: a candidacy and the term that it wins, a worker's session, a tick. When it
ends in trouble, the same trouble is reported once, not at every attempt; the pause before the next attempt doubles up
to `last` seconds while attempts fail early, and starts over after one that held for HEALTHY_SECONDS. Whether trouble
passes (a restart, a cancelled statement, a locked table) or stays (a missing right, a renamed schema) makes no
difference: somewhere a right may be given back. Only the very first session of a daemon may end it, which is left to
the caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.errors import PgcoordError

HEALTHY_SECONDS = 10.0
FIRST_PAUSE, LAST_PAUSE = 1.0, 10.0

T = TypeVar("T")


class Supervisor:
    """Runs attempts until `is_over`, which is asked before each one, and in a pause whenever `wakeup` is set.

    `on_trouble` gets the text of trouble that differs from the one before, `on_recovery` the number of attempts that
    failed and the seconds that they took. `outage` logs both, and may be shared with other supervisors. No attempt
    begins, and no pause goes on, after `deadline`, a time of `time.monotonic()`.
    """

    def __init__(
        self,
        wakeup: Wakeup,
        is_over: Callable[[], bool],
        on_trouble: Callable[[str], None] = lambda _trouble: None,
        on_recovery: Callable[[int, float], None] = lambda _attempts, _seconds: None,
        outage: Outage | None = None,
        first: float = FIRST_PAUSE,
        last: float = LAST_PAUSE,
        deadline: float = math.inf,
    ) -> None:
        self._wakeup = wakeup
        self._is_asked_to_stop = is_over
        self._deadline = deadline
        self._on_trouble = on_trouble
        self._on_recovery = on_recovery
        self._outage = outage
        self._backoff = Backoff(first, last)
        self._trouble: str | None = None
        self._failed = 0
        self._failing_since = 0.0

    @property
    def is_in_trouble(self) -> bool:
        """Whether the last attempt failed, and `recovered` has not been called since."""
        return self._trouble is not None

    def run(self, attempt: Callable[[], str | None]) -> None:
        """Calls `attempt` until it is over. It returns what its trouble was, "" when it has reported that, or None."""
        while not self._is_over():
            began = time.monotonic()
            trouble = attempt()
            if trouble is None:
                self.recovered()
            else:
                self._note(trouble, began)
            if trouble is None or time.monotonic() - began >= HEALTHY_SECONDS:
                self._backoff.reset()
            self._pause(began)

    def recovered(self) -> None:
        """Reports the end of a trouble; an attempt that lasts calls this as soon as it works again."""
        if self._trouble is not None:
            if self._outage:
                self._outage.ended(source=self)
            self._on_recovery(self._failed, time.monotonic() - self._failing_since)
        self._trouble, self._failed = None, 0

    def _is_over(self) -> bool:
        return self._is_asked_to_stop() or time.monotonic() >= self._deadline

    def _note(self, trouble: str, began: float) -> None:
        if self._trouble is None:
            self._failing_since = began
        if self._outage:
            self._outage.failed(trouble, source=self) if trouble else self._outage.counted(source=self)
        if trouble and trouble != self._trouble:
            self._on_trouble(trouble)
        self._trouble = trouble
        self._failed += 1

    def _pause(self, began: float) -> None:
        """Blocks for the next pause, counted from the attempt's begin, so that none follows a long attempt."""
        until = min(began + self._backoff.next_pause(), self._deadline)
        while not self._is_over() and (seconds := until - time.monotonic()) > 0:
            self._wakeup.wait(seconds)  # in a loop, since a thread of the attempt may have set the wake-up


def retry_until(
    deadline: float, attempt: Callable[[Callable[[], None]], T], outage: Outage, fatal: tuple[type[PgcoordError], ...]
) -> T:
    """Repeats `attempt`, as a Supervisor does, until it succeeds, and returns its result.

    It gets a function to call as soon as it works again. Raises `fatal` errors at once, any other error at `deadline`,
    a time of `time.monotonic()`.
    """
    results: list[T] = []
    failures: list[PgcoordError] = []

    def attempt_once() -> str | None:
        try:
            results.append(attempt(supervisor.recovered))
        except fatal:
            raise
        except PgcoordError as error:
            failures[:] = [error]
            return error.reason
        return None

    with closing(Wakeup()) as wakeup:
        supervisor = Supervisor(wakeup, lambda: bool(results), outage=outage, deadline=deadline)
        supervisor.run(attempt_once)
    if not results and not failures:  # the time was up before the first attempt
        attempt_once()
    if not results:
        raise failures[0]
    return results[0]
