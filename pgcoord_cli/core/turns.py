"""Turns: transactions of one process that read and then write the same contended key do so one after the other.

Optimistic transactions that all change one key at once win one at a time, and every loser has cost as much as a
winner. A process cannot help what others do, but its own need not compete.

**Hot.** A key is hot for a second after a transaction that read it first, and wrote it, conflicted. It stays hot while
somebody waits for it.

**Taking a turn.** A transaction whose first read is of a hot key waits, in order of arrival, until the one before it
has ended; so it reads what that one wrote. It has one turn at most, and takes it before it has anything, so that no two
ever wait for each other. A turn lasts half a second at most: after that the next one goes, whatever became of it.

**Not needed.** A transaction that had a turn and succeeded without writing the key was only reading. The key is cold
from then on, and everybody who waits goes: readers of a key that is rarely written must not queue for it.

None of this decides anything: a turn that is missing, or passed on too early, costs a conflict, never a lost update.
"""

from __future__ import annotations

import asyncio
from collections import deque

HOT_SECONDS = 1.0
TURN_SECONDS = 0.5
MANY_KEYS = 1_000


class Turn:
    """The part of one attempt at a transaction in this. It has to be ended."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._queue: Queue | None = None
        self.key: bytes | None = None
        """What the transaction read first, if that was a single key."""

    async def take(self, key: bytes) -> None:
        """Before the first read: waits for the turn if the key is hot."""
        self.key = key
        queue = self._turns.queue_of(key)
        if queue and await queue.wait_for(self):
            self._queue = queue

    def end(self, *, wrote_key: bool, conflicted: bool) -> None:
        """The attempt is over; it wrote the key of the turn or not, and it conflicted or not."""
        if self.key is None:
            return
        if conflicted and wrote_key:
            self._turns.heat(self.key)
        elif self._queue and not conflicted and not wrote_key:
            self._turns.cool(self.key)
        if self._queue:
            self._queue.leave(self)


class Turns:
    """The hot keys of one client."""

    def __init__(self) -> None:
        self._queues: dict[bytes, Queue] = {}

    def queue_of(self, key: bytes) -> Queue | None:
        """The queue of a key, as long as it is hot."""
        queue = self._queues.get(key)
        if queue and queue.is_over():
            queue = None
            del self._queues[key]
        return queue

    def heat(self, key: bytes) -> None:
        """Somebody has just lost a commit over this key."""
        if len(self._queues) >= MANY_KEYS:
            self._queues = {hot: queue for hot, queue in self._queues.items() if not queue.is_over()}
        self._queues.setdefault(key, Queue()).heat()

    def cool(self, key: bytes) -> None:
        """Nobody needs to wait for this key."""
        if queue := self._queues.pop(key, None):
            queue.dissolve()


class Queue:
    """Who has the turn of one key, and who waits for it."""

    def __init__(self) -> None:
        self._hot_until = 0.0
        self._holder: Turn | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[Turn, asyncio.Future[bool]]] = deque()

    def heat(self) -> None:
        """For a while from now on."""
        self._hot_until = asyncio.get_running_loop().time() + HOT_SECONDS

    def is_over(self) -> bool:
        """Whether nobody has the turn, waits for it, or lost a commit of late."""
        return self._holder is None and not self._waiting and asyncio.get_running_loop().time() > self._hot_until

    async def wait_for(self, turn: Turn) -> bool:
        """True when the turn has come; False when the queue has been dissolved."""
        if self._holder is None:
            self._give_to(turn)
            return True
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, future))
        try:
            return await future
        except asyncio.CancelledError:
            self.leave(turn)  # it may have come in the same moment
            raise

    def _give_to(self, turn: Turn) -> None:
        self._holder = turn
        self._timer = asyncio.get_running_loop().call_later(TURN_SECONDS, self.leave, turn)

    def leave(self, turn: Turn) -> None:
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
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(False)
