"""Batching: items that arrive while a statement is in flight go out together in the next one.

There is no timer and no task. The first item of a batch schedules the send for the next step of the event loop, so that
callers of the same step share it; while a batch is in flight, items collect. The busier the connection, the larger the
batches become by themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pgcoord_cli.core.concurrency.single_flight import SingleFlight

Item = TypeVar("Item")

FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0
"""Seconds between a batch that failed and the next one."""


class Batcher(Generic[Item]):
    """Hands items to `send` in batches, one batch in flight at a time.

    `send` starts the work and returns; the owner then reports its end by `succeeded`, `failed` or `is_at_fault`. A
    `send` that raises is at fault as well: the items of that batch are sent one by one, and an item that is at fault by
    itself goes to `refuse` with the error; the others are not affected. A batch ends at `limit` items, or with the item
    at which the sizes that `size_of` gives reach `size_limit`.
    """

    def __init__(
        self,
        send: Callable[[list[Item]], None],
        refuse: Callable[[Item, Exception], None],
        limit: int,
        size_of: Callable[[Item], int] = lambda _item: 0,
        size_limit: int = 1,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._refuse = refuse
        self._limit = limit
        self._size_of = size_of
        self._size_limit = size_limit
        self._waiting: deque[Item] = deque()
        self._one_by_one = 0
        self._flight = SingleFlight(self._send_next, FIRST_PAUSE, LAST_PAUSE)

    @property
    def is_idle(self) -> bool:
        """Whether no batch is in flight and none failed a moment ago."""
        return self._flight.is_idle

    def add(self, item: Item) -> None:
        """Sends an item with the next batch."""
        self._waiting.append(item)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._send_next)

    def add_first(self, items: Sequence[Item]) -> None:
        """Puts the items of a batch that failed in front of all others, in their order, for the next batch."""
        self._waiting.extendleft(reversed(items))

    def succeeded(self) -> None:
        """Reports that the batch in flight has ended; the next one is sent at once."""
        self._flight.succeeded()

    def failed(self) -> None:
        """Reports that the batch in flight has failed; the next one is sent after a pause."""
        self._flight.failed()

    def is_at_fault(self, batch: Sequence[Item], error: Exception) -> None:
        """Reports that the batch in flight cannot be sent because of what is in it; `error` says why."""
        if len(batch) > 1:
            self.add_first(batch)
            self._one_by_one += len(batch)
        else:
            for item in batch:
                self._refuse(item, error)
        # In a step of its own: hundreds of items that are refused one after the other must not nest as many calls.
        self._loop.call_soon(self._flight.succeeded)

    def close(self) -> None:
        """Sends nothing from now on."""
        self._flight.close()

    def _send_next(self) -> None:
        if not (self._waiting and self._flight.is_idle):
            return
        self._flight.begin()
        batch = self._next_batch()
        try:
            self._send(batch)
        except Exception as error:  # noqa: BLE001 - the fault of an item; the batches after it must go on
            self.is_at_fault(batch, error)

    def _next_batch(self) -> list[Item]:
        batch: list[Item] = []
        room = self._size_limit
        limit = 1 if self._one_by_one else self._limit
        while self._waiting and len(batch) < limit and room > 0:
            item = self._waiting.popleft()
            batch.append(item)
            room -= self._size_of(item)
        self._one_by_one = max(0, self._one_by_one - 1)
        return batch
