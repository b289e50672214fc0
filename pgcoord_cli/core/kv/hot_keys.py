"""Turns: transactions of one process that read and then write the same contended key do so one after the other.

Optimistic transactions that all change one key at once win one at a time, and every loser has cost as much as a
winner. A process cannot help what others do, but its own need not compete.

**Hot.** A key is hot for a second after a transaction that read it first, and wrote it, conflicted; for transactions
that run the same work. What merely reads the key is other work, and never waits. It stays hot while somebody waits.

**Taking a turn.** A transaction of such work whose first read is of the hot key waits, in order of arrival, until the
one before it has ended; so it reads what that one wrote. It waits half a second at most, and a turn lasts that long at
most: then the next one goes, whatever became of it. Within a turn, a transaction inside a transaction takes none.

**Not needed.** A transaction that had a turn and committed without writing the key was only reading, although it ran
the same work. The key is cold from then on, and everybody who waits goes.

None of this decides anything: a turn that is missing, or passed on too early, costs a conflict, never a lost update.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, Self

HOT_SECONDS = 1.0
TURN_SECONDS = 0.5
MANY_KEYS = 1_000

_is_inside = ContextVar("pgcoord.turn", default=False)


class Ticket:
    """The part of one attempt at a transaction in this. `kind` is the same for those that run the same work."""

    __slots__ = ("_outside", "_queue", "_turns", "key", "kind")

    def __init__(self, turns: HotKeys, kind: object) -> None:
        self._outside: Token[bool]
        self._turns = turns
        self._queue: Queue | None = None
        self.kind = kind
        self.key: bytes | None = None
        """What the transaction read first, if that was a single key."""

    def __enter__(self) -> Self:
        """Around the attempt: what runs inside takes no turn, and in the end this one's is passed on."""
        self._outside = _is_inside.set(True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        _is_inside.reset(self._outside)
        if self._queue:
            self._queue.leave(self)

    async def take(self, key: bytes) -> None:
        """Before the first read: waits for the turn if the key is hot."""
        self.key = key
        queue = self._turns.queue_of(key, self.kind)
        if queue and await queue.wait_for(self):
            self._queue = queue

    def lost(self) -> None:
        """The attempt conflicted, and had written the key."""
        if self.key is not None:
            self._turns.heat(self.key, self.kind)

    def was_not_needed(self) -> None:
        """The attempt succeeded without writing the key."""
        if self.key is not None and self._queue:
            self._turns.cool(self.key)


class HotKeys:
    """The hot keys of one client."""

    def __init__(self) -> None:
        self._queues: dict[bytes, Queue] = {}

    def turn(self, work: Callable[..., Any]) -> Ticket | None:
        """The part of an attempt at this work; None for one inside of another."""
        return None if _is_inside.get() else Ticket(self, kind_of(work))

    def queue_of(self, key: bytes, kind: object) -> Queue | None:
        """The queue of a key, as long as it is hot for this kind."""
        queue = self._queues.get(key)
        if queue and queue.is_over():
            queue = None
            del self._queues[key]
        return queue if queue and kind in queue.kinds else None

    def heat(self, key: bytes, kind: object) -> None:
        """Somebody has just lost a commit over this key. Where a great many are hot, one more is let be."""
        if key not in self._queues and len(self._queues) >= MANY_KEYS:
            self._forget_one()
        if key in self._queues or len(self._queues) < MANY_KEYS:
            self._queues.setdefault(key, Queue()).heat(kind)

    def _forget_one(self) -> None:
        """The oldest, if it is cold; otherwise the next one comes next."""
        key, queue = next(iter(self._queues.items()))
        del self._queues[key]
        if not queue.is_over():
            self._queues[key] = queue

    def cool(self, key: bytes) -> None:
        """Nobody needs to wait for this key."""
        if queue := self._queues.pop(key, None):
            queue.dissolve()


class Queue:
    """Who has the turn of one key, and who waits for it."""

    def __init__(self) -> None:
        self.kinds: set[object] = set()
        """For which kinds of work the key is hot."""
        self._hot_until = 0.0
        self._holder: Ticket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[Ticket, asyncio.Future[bool]]] = deque()

    def heat(self, kind: object | None = None) -> None:
        """For a while from now on."""
        self._hot_until = asyncio.get_running_loop().time() + HOT_SECONDS
        if kind is not None:
            self.kinds.add(kind)

    def is_over(self) -> bool:
        """Whether nobody has the turn, waits for it, or lost a commit of late."""
        return self._holder is None and not self._waiting and asyncio.get_running_loop().time() > self._hot_until

    async def wait_for(self, turn: Ticket) -> bool:
        """True when the turn has come; False when the queue was dissolved, or that takes too long."""
        if self._holder is None:
            self._give_to(turn)
            return True
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((turn, future))
        timer = loop.call_later(TURN_SECONDS, _settle, future, False)
        try:
            return await future
        except asyncio.CancelledError:
            self.leave(turn)  # it may have come in the same moment
            raise
        finally:
            timer.cancel()

    def _give_to(self, turn: Ticket) -> None:
        self._holder = turn
        self._timer = asyncio.get_running_loop().call_later(TURN_SECONDS, self.leave, turn)

    def leave(self, turn: Ticket) -> None:
        """Passes the turn on, if it is still this one's."""
        if self._holder is not turn:
            return
        if self._timer:
            self._timer.cancel()
        self._holder = None
        while self._waiting and self._holder is None:
            self.heat()
            waiting, future = self._waiting.popleft()
            if not future.done():
                self._give_to(waiting)
                future.set_result(True)

    def dissolve(self) -> None:
        """Lets everybody go."""
        while self._waiting:
            _settle(self._waiting.popleft()[1], False)


def _settle(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)


def kind_of(work: Callable[..., Any]) -> object:
    """What the many closures over one function, its methods and partial calls have in common."""
    while isinstance(work, partial):
        work = work.func
    return getattr(work, "__code__", type(work))
