"""Where a tail starts or ends. Pure."""

from __future__ import annotations

from bisect import bisect_right
from datetime import datetime, timedelta
from typing import NamedTuple

from pgcoord_cli.core.events.cursor import from_cursor
from pgcoord_cli.core.events.history import PassedEvent


class StartPosition(NamedTuple):
    """Where a tail starts or ends.

    `how` is `now`, `beginning`, `position` (`value` is an event id) or `time` (`value` is in milliseconds since
    1970-01-01 UTC; a negative one counts back from the server's clock).
    """

    how: str
    value: int = 0
    passed: PassedEvent | None = None

    @classmethod
    def now(cls) -> StartPosition:
        """Every event that becomes visible from now on."""
        return cls("now")

    @classmethod
    def beginning(cls) -> StartPosition:
        """The oldest event that garbage collection has left."""
        return cls("beginning")

    @classmethod
    def position(cls, event_id: int, passed: PassedEvent | None = None) -> StartPosition:
        """The first event after this id. `passed`, the last event up to it, tells whether that is still the same."""
        return cls("position", event_id, passed)

    @classmethod
    def cursor(cls, cursor: str) -> StartPosition:
        """The first event after a cursor, as events carry it and `pgcoord tail` prints it. Raises UsageError."""
        return cls("position", from_cursor(cursor, "cursor"))

    @classmethod
    def time(cls, when: datetime | timedelta) -> StartPosition:
        """The first event inserted at or after a time; a timedelta counts back from the server's clock."""
        if isinstance(when, timedelta):
            # At least 1 ms, since only a negative number counts back from the server's clock.
            return cls("time", -max(1, round(when.total_seconds() * 1000)))
        return cls("time", max(0, round(when.timestamp() * 1000)))


NOW = StartPosition.now()


class VisibleAtStart:
    """The ids that were visible when the tail started, which it leaves out: those up to `head` outside of `gaps`."""

    def __init__(self, head: int, gaps: list[tuple[int, int]]) -> None:
        self.head = head
        self._gaps = gaps

    def __contains__(self, event_id: int) -> bool:
        if event_id > self.head:
            return False
        place = bisect_right(self._gaps, event_id, key=lambda gap: gap[0]) - 1
        return place < 0 or event_id > self._gaps[place][1]
