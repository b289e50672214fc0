"""Handing commit requests in, and finding out what became of them.

**Enqueue.** The request goes into the queue with a UUID of the client's and `synchronous_commit = off`: a pending
row that a crash loses was never acknowledged, and the UUID makes it harmless to submit it again.

**Two tasks.** Many transactions commit at once, so the work is done for all of them together: one task sends
what waits to be sent, group by group and, where a connection is lost, again over the next; one asks what became of
what was sent. A commit itself only waits for one future, and holds no pooled connection meanwhile.

**Ask.** A reply channel wakes the asking task, and it looks by itself once in a poll interval. What it believes is only
ever the status in the table, read together with the epoch in one snapshot, for all undecided requests at once
(rule I3).

**Not found.** A request that is not in the table was lost in a crash, or was settled and then collected as garbage. It
is submitted again. It cannot apply twice: by the time the row of a commit is collected, its read version is below
the conflict floor. But it would then be called too old. So that answer counts only when the request was
enqueued at the first attempt, and enqueued for the last time, by the server's clock, less than half of the shortest
retention later, when it cannot have been collected yet. Otherwise the caller hears that the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import psycopg

from pgcoord_cli.core import channels
from pgcoord_cli.core.backoff import Backoff
from pgcoord_cli.core.listener import Listener
from pgcoord_cli.core.pool import Pool
from pgcoord_cli.core.retention import SHORTEST_RETENTION
from pgcoord_cli.db.binary import bytea_array, int8_array, integer, text, timestamp, uuid_array
from pgcoord_cli.db.connection import translate
from pgcoord_cli.db.lane import Row
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, OutcomeUnknown, PgcoordError

GROUP_LIMIT = 128
"""Half of a busy client's requests: while the leader works at one half, the client works at the other."""

SURELY_KEPT = timedelta(seconds=SHORTEST_RETENTION / 2)
SENT_TWICE = "it was sent more than once, and may have been settled and forgotten in between"

CLOSED = "this client was closed"


class Submission(NamedTuple):
    """A commit request on its way into the queue; `request_id` is the 16 bytes of a UUID."""

    request_id: bytes
    epoch: int
    read_version: int
    payload: bytes


class Outcome(NamedTuple):
    """What the table says of a request; status None: that cannot be known, and `reason` says why."""

    status: str | None
    version: int | None
    reason: str | None


def new_request_id() -> bytes:
    """A UUID of version 7 (RFC 9562) as its 16 bytes: by time, then random.

    Ids of one time lie side by side in the index, however long the history; nothing else depends on the clock.
    """
    milliseconds = time.time_ns() // 1_000_000
    chance = int.from_bytes(os.urandom(10), "big") & ~(0xF << 76 | 0x3 << 62)
    return ((milliseconds & (1 << 48) - 1) << 80 | 0x7 << 76 | 0x2 << 62 | chance).to_bytes(16, "big")


class Undecided:
    """A request whose outcome is waited for. Until it is `enqueued`, it means nothing that the table lacks it."""

    __slots__ = ("deadline", "doubtful", "enqueued", "first_enqueued_at", "outcome", "sent", "submission")

    def __init__(self, submission: Submission, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self.submission = submission
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self.deadline = loop.time() + seconds
        self.sent = False
        self.enqueued = False
        self.first_enqueued_at: datetime | None = None
        self.doubtful = False

    @property
    def sent_before(self) -> bool:
        """Whether it may be in the queue already."""
        return self.doubtful or self.first_enqueued_at is not None

    def arrived(self, enqueued_at: datetime) -> None:
        """It is in the queue, by the server's clock since then."""
        self.enqueued = True
        if self.first_enqueued_at is None:
            self.first_enqueued_at = enqueued_at
        elif enqueued_at - self.first_enqueued_at > SURELY_KEPT:
            self.doubtful = True

    def settle(self, outcome: Outcome) -> None:
        """Tells whoever waits. A late answer that a first, collected outcome would explain as well is no answer."""
        if not self.outcome.done():
            unsure = self.doubtful and outcome.status in ("too_old", "orphaned")
            self.outcome.set_result(Outcome(None, None, SENT_TWICE) if unsure else outcome)


class Submitter:
    """Submits for many transactions at once, and tells each what became of its request."""

    def __init__(self, schema: str, pool: Pool, listener: Listener) -> None:
        self._queue_channel = channels.commits(schema).encode()
        self._reply_channel = channels.reply(schema, secrets.token_hex(6))
        self._pool = pool
        self._listener = listener
        self._undecided: dict[bytes, Undecided] = {}
        self._unsent: deque[Undecided] = deque()
        self._news = asyncio.Event()
        self._look_at_all = False
        self._sender: asyncio.Task[None] | None = None
        self._asker: asyncio.Task[None] | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._trouble: str | None = None
        self._closed = False

    async def close(self) -> None:
        """Stops. Requests that are still waited for stay in the queue; their outcome is unknown."""
        self._closed = True
        self._give_up(list(self._undecided.values()), CLOSED)
        if self._clock:
            self._clock.cancel()
        tasks = [task for task in (self._sender, self._asker) if task]
        for task in tasks:
            task.cancel()  # it may be waiting for a server that is down
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, submission: Submission, seconds: float) -> Outcome:
        """Enqueues a request and waits until it is settled; OutcomeUnknown when that is not known in `seconds`.

        ConnectionFailed when it could not even be sent in that time: then it never will be.
        """
        undecided = Undecided(submission, asyncio.get_running_loop(), seconds)
        self._undecided[submission.request_id] = undecided
        self._unsent.append(undecided)
        self._set_to_work(undecided.deadline)
        try:
            outcome = await undecided.outcome
        finally:
            del self._undecided[submission.request_id]
        if outcome.status is not None:
            return outcome
        if not undecided.sent:
            raise ConnectionFailed(f"the commit was not sent: {outcome.reason}", hint="nothing was written")
        request_id = UUID(bytes=submission.request_id)
        raise OutcomeUnknown(
            f"request {request_id} was sent, but what became of it is not known: {outcome.reason}",
            hint=f"ask again with: pgcoord commit show {request_id}",
        )

    # -- the tasks and the clock

    def _set_to_work(self, deadline: float) -> None:
        if self._closed:
            self._give_up(list(self._unsent), CLOSED)
        elif self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        if self._clock is None or self._clock.when() > deadline:
            self._set_clock()

    def _set_clock(self) -> None:
        """The next look without a notification, or the first deadline."""
        if self._clock:
            self._clock.cancel()
        loop = asyncio.get_running_loop()
        deadlines = (undecided.deadline for undecided in self._undecided.values())
        self._clock = loop.call_at(min(loop.time() + channels.POLL_SECONDS, *deadlines), self._on_clock)

    def _on_clock(self) -> None:
        self._clock = None
        now = asyncio.get_running_loop().time()
        late = [undecided for undecided in self._undecided.values() if undecided.deadline <= now]
        self._give_up(late, self._trouble or self._listener.trouble or "no leader settled it in time")
        self._look_at_all = True
        self._news.set()
        if self._undecided and not self._closed:
            self._start_asker()
            self._set_clock()

    def _give_up(self, these: Sequence[Undecided], why: str) -> None:
        for undecided in these:
            undecided.settle(Outcome(None, None, why))

    def _note_trouble(self, error: Exception) -> Exception:
        trouble = translate(error) if isinstance(error, psycopg.Error) else error
        self._trouble = trouble.message if isinstance(trouble, PgcoordError) else str(trouble)
        return trouble

    # -- sending

    async def _send(self) -> None:
        """Sends whatever waits to be sent, over one connection after the other: ids apply once."""
        backoff = Backoff(0.05, 1.0)
        while self._unsent and not self._closed:
            if not (group := self._next_group()):
                return
            try:
                await self._listener.listen(self._reply_channel, self._news.set)
                again = any(undecided.sent_before for undecided in group)
                enqueued_at = await self._enqueue_group(group, again=again)
            except Exception as error:  # noqa: BLE001 - it is raised again where the commit is waited for
                self._not_sent(group, self._note_trouble(error))
                await backoff.pause()
                continue
            backoff.reset()
            for undecided in group:
                undecided.arrived(enqueued_at)
            self._start_asker()

    def _next_group(self) -> list[Undecided]:
        group: list[Undecided] = []
        while self._unsent and len(group) < GROUP_LIMIT:
            undecided = self._unsent.popleft()
            if not undecided.outcome.done():
                group.append(undecided)
        return group

    async def _enqueue_group(self, group: Sequence[Undecided], *, again: bool) -> datetime:
        submissions = [undecided.submission for undecided in group]
        request_ids, epochs, read_versions, payloads = zip(*submissions, strict=True)
        columns = [uuid_array(request_ids), int8_array(epochs), int8_array(read_versions), bytea_array(payloads)]
        async with self._pool.lane() as lane:
            statement = sql("commits", "enqueue_again" if again else "enqueue")
            for undecided in group:
                undecided.sent = True
            rows = await lane.fetch(statement, [*columns, self._reply_channel.encode(), self._queue_channel])
        return timestamp(rows[0][1])

    def _not_sent(self, group: Sequence[Undecided], trouble: Exception) -> None:
        """A lost connection leaves it open what arrived, so the group is sent again.

        Anything else is the answer, unless the request had been sent before and may have arrived then.
        """
        for undecided in group:
            if isinstance(trouble, ConnectionFailed):
                undecided.doubtful = undecided.sent
            elif undecided.sent_before:
                undecided.settle(Outcome(None, None, self._trouble))
            elif not undecided.outcome.done():
                undecided.outcome.set_exception(trouble)
        self._unsent.extendleft(reversed(group))

    # -- asking

    def _start_asker(self) -> None:
        if self._asker is None or self._asker.done():
            self._asker = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Asks for what is settled whenever a reply may have come, and for everything once in a poll interval."""
        backoff = Backoff(0.05, 1.0)
        while self._undecided and not self._closed:
            await self._news.wait()
            self._news.clear()
            whole, self._look_at_all = self._look_at_all, False
            try:
                await self._look_up(whole=whole)
                self._trouble = None
                backoff.reset()
            except (psycopg.Error, PgcoordError) as error:
                self._note_trouble(error)
                self._news.set()
                await backoff.pause()

    async def _look_up(self, *, whole: bool) -> None:
        """One snapshot; in the `whole` of it, what is not there although it was enqueued before is sent again."""
        asked = [key for key, undecided in self._undecided.items() if undecided.sent_before]
        missing = {key: undecided for key, undecided in self._undecided.items() if whole and undecided.enqueued}
        async with self._pool.lane() as lane:
            rows = await lane.fetch(sql("commits", "ask"), [uuid_array(asked), bytes([whole])])
        for _, request_id, status, version, reason in rows:
            if request_id is not None:
                missing.pop(request_id, None)
                if status != b"pending":
                    self._settle(request_id, _outcome((status, version, reason)))
        self._send_again(missing.values())

    def _settle(self, request_id: bytes, outcome: Outcome) -> None:
        if undecided := self._undecided.get(request_id):
            undecided.settle(outcome)

    def _send_again(self, missing: Iterable[Undecided]) -> None:
        for undecided in missing:
            undecided.enqueued = False
            self._unsent.append(undecided)
            self._set_to_work(undecided.deadline)


def _outcome(columns: Row) -> Outcome:
    status, version, reason = columns
    return Outcome(text(status), None if version is None else integer(version), text(reason))
