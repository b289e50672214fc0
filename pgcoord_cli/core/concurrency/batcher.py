"""Many callers, few statements: what waits while a statement is in flight goes out together in the next one.

There is no timer and no task: a lone caller is sent in the next step of the event loop, together with whoever calls in
the same one, and the busier the connection, the larger the groups become by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Calls `send` with lists of items, one list at a time, and hands each caller the result of its own item.

    `send` gets the items, and what to call later with as many results or with one error.
    """

    def __init__(
        self, send: Callable[[Sequence[Item], Callable[[Sequence[Result] | Exception], None]], None], limit: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._limit = limit
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._is_sending = False

    def __call__(self, item: Item) -> asyncio.Future[Result]:
        """The result of one item, or what went wrong with its group."""
        future: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) == 1:
            self._loop.call_soon(self._send_next)
        return future

    def _send_next(self) -> None:
        if self._waiting and not self._is_sending:
            self._is_sending = True
            group, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            try:
                self._send([item for item, _ in group], partial(self._on_results, group))
            except Exception as error:  # noqa: BLE001 - theirs, and nobody else's
                self._on_results(group, error)

    def _on_results(
        self, group: list[tuple[Item, asyncio.Future[Result]]], results: Sequence[Result] | Exception
    ) -> None:
        self._is_sending = False
        self._send_next()  # first, so that the server has something to do meanwhile
        for place, (_, future) in enumerate(group):
            if future.done():
                continue
            if isinstance(results, Exception):
                future.set_exception(results)
            else:
                future.set_result(results[place])
