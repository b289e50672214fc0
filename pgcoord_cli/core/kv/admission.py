"""Admission: under contention, attempts at transactions of one process wait for a slot before they start.

**Slots.** Each attempt that `Database.run` makes takes a slot for its kind of work (`hot_keys.kind_of`), and gives it
back when it has ended. As long as few attempts of a kind conflict, there is no limit to its slots and no attempt waits.
When many conflict, `core.kv.conflict_limit` limits how many are in flight at once. Other kinds of work are not
affected: each kind has its own slots.

**Order.** Attempts wait in order of arrival. A transaction that has conflicted and is run again goes before those that
have not been run yet: it arrived before them, and it would otherwise wait for the whole queue once for each conflict.

**Time.** An attempt counts for at most SLOT_SECONDS; then the next one is admitted, whatever the state of the holder.
So work that sleeps, or waits for another transaction of its kind, delays the others by no more than this.

**Nested transactions** never wait: their parent may hold the slot that they would wait for. A transaction that the work
of another starts has no ticket (`hot_keys.Ticket`), and takes no slot.

**Memory.** A kind of work is forgotten when none of its attempts is in flight or waits; if it was limited, not before
KEPT_SECONDS later, so that the next burst of calls need not find its limit anew.

None of this decides the outcome of a commit: an attempt that is admitted too early costs a conflict, never a lost
update.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

from pgcoord_cli.core.kv.conflict_limit import ConflictLimit
from pgcoord_cli.errors import Conflict

SLOT_SECONDS = 0.5
"""Seconds after which an attempt no longer counts as being in flight."""

KEPT_SECONDS = 1.0
"""Seconds for which the limit of a kind of work is kept at least, once none of its attempts is in flight."""


class Admission:
    """The slots of one client, for each kind of work that is in flight."""

    def __init__(self) -> None:
        self._kinds: dict[object, KindOfWork] = {}

    def slot(self, kind: object, *, run_again: bool) -> Slot:
        """Returns the slot of one attempt; `run_again`: an earlier attempt at the same transaction has conflicted."""
        return Slot(self, kind, run_again=run_again)

    def kind(self, kind: object) -> KindOfWork:
        """Returns what is known of a kind of work."""
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = KindOfWork()
        return found

    def forget_if_idle(self, kind: object) -> None:
        """Removes a kind of work of which no attempt is in flight or waits: at once, or later if it is limited."""
        found = self._kinds.get(kind)
        if not found or not found.is_idle or found.is_kept:
            return
        if found.limit is None:
            found.close()
            del self._kinds[kind]
        else:
            # One timer at a time: calls that follow each other end one by one, thousands of them a second.
            found.is_kept = True
            asyncio.get_running_loop().call_later(KEPT_SECONDS, self._on_kept, kind)

    def _on_kept(self, kind: object) -> None:
        found = self._kinds[kind]
        found.is_kept = False
        if found.is_idle:
            found.close()
            del self._kinds[kind]


class Slot:
    """The place of one attempt among those in flight; an asynchronous context manager around the attempt."""

    __slots__ = ("_admission", "_kind", "_work", "run_again", "window")

    def __init__(self, admission: Admission, kind: object, *, run_again: bool) -> None:
        self._admission = admission
        self._kind = kind
        self._work = admission.kind(kind)
        self.run_again = run_again
        self.window = 0

    async def __aenter__(self) -> Self:
        try:
            await self._work.acquire(self)
        except asyncio.CancelledError:
            self._admission.forget_if_idle(self._kind)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Only these outcomes say something about contention; any other error would have ended the attempt anyway.
        if error is None or isinstance(error, Conflict):
            self._work.note(self, conflicted=error is not None)
        self._work.release(self)
        self._admission.forget_if_idle(self._kind)


class KindOfWork:
    """The attempts of one kind that are in flight, and those that wait."""

    def __init__(self) -> None:
        self._limit = ConflictLimit()
        self.is_kept = False
        """Whether a timer of `Admission` decides when it is forgotten."""
        # The slots that count, oldest first, with the time at which each stops to count.
        self._in_flight: dict[Slot, float] = {}
        self._run_again: deque[tuple[Slot, asyncio.Future[None]]] = deque()
        self._waiting: deque[tuple[Slot, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def limit(self) -> int | None:
        """How many attempts may be in flight; None: any number."""
        return self._limit.limit

    @property
    def is_idle(self) -> bool:
        """Whether no attempt is in flight or waits."""
        return not (self._in_flight or self._run_again or self._waiting)

    async def acquire(self, slot: Slot) -> None:
        """Waits until the attempt may start."""
        queue = self._run_again if slot.run_again else self._waiting
        if not queue and self._limit.admits(len(self._in_flight)):
            self._admit(slot)
            return
        future: asyncio.Future[None] = self._loop.create_future()
        queue.append((slot, future))
        self._set_timer()
        try:
            await future
        except asyncio.CancelledError:
            # The future may have been set in the same step of the event loop: then the slot is held already.
            self.release(slot)
            raise

    def note(self, slot: Slot, *, conflicted: bool) -> None:
        """Counts the outcome of an attempt, which may change the limit."""
        self._limit.note(slot.window, len(self._in_flight), conflicted=conflicted)

    def release(self, slot: Slot) -> None:
        """Gives a slot back; admits those that may start now."""
        self._in_flight.pop(slot, None)
        self._admit_waiting()

    def close(self) -> None:
        """Cancels the timer."""
        if self._timer:
            self._timer.cancel()

    def _admit(self, slot: Slot) -> None:
        slot.window = self._limit.window
        self._in_flight[slot] = self._loop.time() + SLOT_SECONDS

    def _admit_waiting(self) -> None:
        while (queue := self._run_again or self._waiting) and self._limit.admits(len(self._in_flight)):
            slot, future = queue.popleft()
            if not future.done():  # done: cancelled
                self._admit(slot)
                future.set_result(None)

    def _set_timer(self) -> None:
        # One timer for all: only the slot that is oldest can stop to count next, and only those that wait need it.
        if self._timer is None and self._in_flight:
            self._timer = self._loop.call_at(next(iter(self._in_flight.values())), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._in_flight and next(iter(self._in_flight.values())) <= now:
            del self._in_flight[next(iter(self._in_flight))]
        self._admit_waiting()
        if self._run_again or self._waiting:
            self._set_timer()
