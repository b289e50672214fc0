"""What a tail reports besides events: lost and regained connections, changed filters, and gaps that hold it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pgcoord_cli.core.events.tail_connection import BlockingTransaction


class Notice(NamedTuple):
    """A report of a tail: `disconnected`, `connected`, `filters_changed` or `held_up`, with the cursor at that moment.

    `held_event_id` and `holders`, the transactions that may still commit that event, are those of `held_up`.
    """

    type: str
    cursor: str
    message: str
    held_event_id: int | None = None
    holders: tuple[BlockingTransaction, ...] = ()


OnNotice = Callable[[Notice], None]


def ignore_notice(_notice: Notice) -> None:
    """Default `report`: ignores notices."""
