"""Hot keys: transactions of one process that read and then write the same contended key run one after the other.

Of optimistic transactions that all change one key at once, one commits at a time, and each of the others has cost as
much as the one that commits. The transactions of other processes are out of reach, but those of one process need not
compete with each other.

**Hot.** After a transaction that read a key first, and wrote it, has conflicted, the key is hot for HOT_SECONDS, for
transactions that run the same work. A transaction that only reads the key is usually other work, and never waits. The
key stays hot while transactions wait for it.

**Tickets.** Each attempt at a transaction has a ticket. If the first key that it reads is hot, the ticket joins the
key's queue, and the attempt waits, in order of arrival, until the one before it has ended; so it reads the value that
the one before it wrote. An attempt waits at most TICKET_SECONDS and holds the key at most as long; then the next one is
admitted, whatever the state of the holder. A transaction that is started inside the work of another has no ticket: it
could wait for a key that its own parent holds.

**Only read.** An attempt that held the key and committed without writing it was only reading, although it ran the same
work. The key is cold from then on, and all that wait for it are admitted at once.

None of this decides the outcome of a commit: an attempt that is not queued, or is admitted too early, costs a conflict,
never a lost update.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, Self

HOT_SECONDS = 1.0
"""Seconds for which a key stays hot after the last conflict over it."""

TICKET_SECONDS = 0.5
"""Seconds after which an attempt stops waiting for a key, and after which it loses a key that it holds."""

MANY_KEYS = 1_000
"""Entries of the table of hot keys, which bounds its memory."""

_in_attempt = ContextVar("pgcoord.ticket", default=False)


@contextmanager
def inside_attempt() -> Iterator[None]:
    """Within the block, transactions that this thread starts have no ticket, as if they were started by an attempt."""
    token = _in_attempt.set(True)
    try:
        yield
    finally:
        _in_attempt.reset(token)


class Ticket:
    """The place of one attempt in the queue of the key that it reads first; a context manager around the attempt.

    `kind` is equal for attempts that run the same work (`kind_of`). A ticket is for one attempt.
    """

    __slots__ = ("_hot_keys", "_queue", "_token", "key", "kind")

    def __init__(self, hot_keys: HotKeys, kind: object) -> None:
        self._token: Token[bool]
        self._hot_keys = hot_keys
        self._queue: Queue | None = None
        self.kind = kind
        self.key: bytes | None = None
        """The key that the transaction read first; None if its first read was of a range or a snapshot read."""

    def __enter__(self) -> Self:
        # Tasks that the work starts copy the context, so that their transactions have no ticket either.
        self._token = _in_attempt.set(True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        _in_attempt.reset(self._token)
        if self._queue:
            self._queue.release(self)

    async def acquire(self, key: bytes) -> None:
        """Waits for `key` if it is hot for this kind of work. Call it before the first read.

        Returns without the key after TICKET_SECONDS, or when the key has become cold.
        """
        self.key = key
        queue = self._hot_keys.queue_of(key, self.kind)
        if queue and await queue.acquire(self):
            self._queue = queue

    def conflicted(self) -> None:
        """Reports that the attempt wrote the key and ended in a conflict: the key is hot from now on."""
        if self.key is not None:
            self._hot_keys.mark_hot(self.key, self.kind)

    def only_read(self) -> None:
        """Reports that the attempt committed without writing the key: if it held the key, the key is cold."""
        # Only an attempt that held the key may have made others wait for nothing.
        if self.key is not None and self._queue:
            self._hot_keys.mark_cold(self.key)


class HotKeys:
    """The hot keys of one client, each with its queue; at most MANY_KEYS."""

    def __init__(self) -> None:
        self._queues: dict[bytes, Queue] = {}

    def ticket(self, work: Callable[..., Any]) -> Ticket | None:
        """Returns a ticket for one attempt at `work`, or None inside another attempt."""
        return None if _in_attempt.get() else Ticket(self, kind_of(work))

    def queue_of(self, key: bytes, kind: object) -> Queue | None:
        """Returns the queue of a key, or None if the key is not hot for this kind of work."""
        queue = self._queues.get(key)
        # Entries of cold keys are removed when they are next looked up, so that no key needs a timer.
        if queue and queue.is_cold():
            queue = None
            del self._queues[key]
        return queue if queue and kind in queue.kinds else None

    def mark_hot(self, key: bytes, kind: object) -> None:
        """Makes a key hot for this kind of work. At MANY_KEYS entries a cold key is evicted, or this key is ignored."""
        if key not in self._queues and len(self._queues) >= MANY_KEYS:
            self._evict_one()
        if key in self._queues or len(self._queues) < MANY_KEYS:
            self._queues.setdefault(key, Queue()).mark_hot(kind)

    def _evict_one(self) -> None:
        """Evicts the oldest entry if it is cold, or else moves it to the end.

        One entry is looked at per call, so that a full table costs each conflict the same; the next call looks at the
        next entry.
        """
        key, queue = next(iter(self._queues.items()))
        del self._queues[key]
        if not queue.is_cold():
            self._queues[key] = queue

    def mark_cold(self, key: bytes) -> None:
        """Makes a key cold, and admits every attempt that waits for it."""
        if queue := self._queues.pop(key, None):
            queue.release_all()


class Queue:
    """The queue of one hot key: the ticket that holds the key, and the tickets that wait for it, oldest first."""

    def __init__(self) -> None:
        self.kinds: set[object] = set()
        """The kinds of work for which the key is hot."""
        self._hot_until = 0.0
        self._holder: Ticket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[Ticket, asyncio.Future[bool]]] = deque()

    def mark_hot(self, kind: object | None = None) -> None:
        """Keeps the key hot for HOT_SECONDS from now on, and for `kind` from now on if one is given."""
        self._hot_until = asyncio.get_running_loop().time() + HOT_SECONDS
        if kind is not None:
            self.kinds.add(kind)

    def is_cold(self) -> bool:
        """Whether no ticket holds the key or waits for it, and the last conflict is longer ago than HOT_SECONDS."""
        return self._holder is None and not self._waiting and asyncio.get_running_loop().time() > self._hot_until

    async def acquire(self, ticket: Ticket) -> bool:
        """Waits until the ticket holds the key. False after TICKET_SECONDS, or when the key has become cold."""
        if self._holder is None:
            self._admit(ticket)
            return True
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((ticket, future))
        timer = loop.call_later(TICKET_SECONDS, _settle, future, False)
        try:
            return await future
        except asyncio.CancelledError:
            # The future may have been set in the same step of the event loop: then the ticket holds the key already.
            self.release(ticket)
            raise
        finally:
            timer.cancel()

    def _admit(self, ticket: Ticket) -> None:
        self._holder = ticket
        # A transaction that computes for long, or never ends, delays the others by no more than this.
        self._timer = asyncio.get_running_loop().call_later(TICKET_SECONDS, self.release, ticket)

    def release(self, ticket: Ticket) -> None:
        """Passes the key to the next ticket that still waits. Does nothing if `ticket` does not hold the key."""
        # The key may have been passed on when the holder's time was over; its end must not release another's.
        if self._holder is not ticket:
            return
        if self._timer:
            self._timer.cancel()
        self._holder = None
        while self._waiting and self._holder is None:
            # A conflict is what the queue prevents, so tickets that wait are the evidence that the key is contended.
            self.mark_hot()
            waiting, future = self._waiting.popleft()
            if not future.done():  # done: timed out or cancelled
                self._admit(waiting)
                future.set_result(True)

    def release_all(self) -> None:
        """Admits every ticket that waits, without giving it the key."""
        while self._waiting:
            _settle(self._waiting.popleft()[1], False)


def _settle(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)


def kind_of(work: Callable[..., Any]) -> object:
    """Returns what is equal for the closures, bound methods and partial calls of one function.

    For other callables it is their class.
    """
    # Programs make a new closure or partial call for each transaction, so the callable itself would never be equal.
    # A decorator's wrapper has the same code for every function, so the function that it wraps decides.
    while isinstance(work, partial) or hasattr(work, "__wrapped__"):
        work = work.func if isinstance(work, partial) else work.__wrapped__
    return getattr(work, "__code__", type(work))
