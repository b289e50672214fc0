"""Handing commit requests in, and finding out what became of them.

**Enqueue.** The request goes into the queue with a UUID of the client's and `synchronous_commit = off`: a pending
row that a crash loses was never acknowledged, and the UUID makes it harmless to submit it again.

**Alone.** A request with nobody beside it, in this client or elsewhere, is committed without the leader if the database
agrees (`core.kv.direct_commit`). If not, the same statement has put it into the queue.

**Together.** Many transactions commit at once, so the work is done for all of them: one statement at a time sends
what waits to be sent, group by group and, where a connection is lost, again over the next; one statement at a time asks
what became of what was sent. Each follows from the answer to the one before, or from a notification, without a task in
between; a commit itself only waits for one future, and holds no pooled connection meanwhile.

**Ask.** A reply channel tells when to ask, and one asks unasked once in a poll interval. What is believed is only
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
import random
import secrets
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple
from uuid import UUID

import psycopg

from pgcoord_cli.core.commits.codec import Request
from pgcoord_cli.core.commits.requests import SHORTEST_RETENTION
from pgcoord_cli.core.concurrency.single_flight import SingleFlight
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import Listener
from pgcoord_cli.core.database.pool import CLOSED, Pool
from pgcoord_cli.core.kv import direct_commit
from pgcoord_cli.db.binary import bytea_array, int8, int8_array, integer, text, timestamp, uuid_array
from pgcoord_cli.db.connection import is_connection_lost, translate
from pgcoord_cli.db.lane import Answer, Row
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, OutcomeUnknown, PgcoordError

GROUP_LIMIT = 128
"""Half of a busy client's requests: while the leader works at one half, the client works at the other."""

GROUP_BYTES = 16_000_000
"""A group ends with the payload that reaches this: nobody waits behind a statement of a gigabyte."""

SURELY_KEPT = timedelta(seconds=SHORTEST_RETENTION / 2)
SENT_TWICE = "it was sent more than once, and may have been settled and forgotten in between"

FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0
"""Seconds before a statement that failed is tried again."""


class Submission(NamedTuple):
    """A commit request on its way; `request_id` is the 16 bytes of a UUID, `payload` what `request` is on the wire."""

    request_id: bytes
    epoch: int
    read_version: int
    payload: bytes
    request: Request


class Outcome(NamedTuple):
    """What the table says of a request; status None: that cannot be known, and `reason` says why."""

    status: str | None
    version: int | None
    reason: str | None


_chance = random.Random()  # seeded by the operating system; its own, so that no program's random.seed repeats ids
os.register_at_fork(after_in_child=_chance.seed)


def new_request_id() -> bytes:
    """A UUID of version 7 (RFC 9562) as its 16 bytes: by time, then random.

    Ids of one time lie side by side in the index, however long the history; nothing else depends on the clock.
    """
    milliseconds = time.time_ns() // 1_000_000
    chance = _chance.getrandbits(80) & ~(0xF << 76 | 0x3 << 62)
    return ((milliseconds & (1 << 48) - 1) << 80 | 0x7 << 76 | 0x2 << 62 | chance).to_bytes(16, "big")


class PendingCommit:
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
        self._reply_channel = channels.reply(schema, secrets.token_hex(6)).encode()
        self._pool = pool
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._undecided: dict[bytes, PendingCommit] = {}
        self._unsent: deque[PendingCommit] = deque()
        self._is_listening = False
        self._solitude = direct_commit.DirectCommitBackoff()
        self._sending = SingleFlight(self._send, FIRST_PAUSE, LAST_PAUSE)
        self._asking = SingleFlight(self._ask, FIRST_PAUSE, LAST_PAUSE)
        self._has_news = False
        self._look_at_all = False
        self._clock: asyncio.TimerHandle | None = None
        self._listening: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._closed = False

    async def close(self) -> None:
        """Stops. Requests that are still waited for stay in the queue; their outcome is unknown."""
        self._closed = True
        self._give_up(list(self._undecided.values()), CLOSED)
        if self._clock:
            self._clock.cancel()
        self._sending.close()
        self._asking.close()
        if self._listening:
            self._listening.cancel()  # it may be waiting for a server that is down
            await asyncio.gather(self._listening, return_exceptions=True)

    async def submit(self, submission: Submission, seconds: float) -> Outcome:
        """Enqueues a request and waits until it is settled; OutcomeUnknown when that is not known in `seconds`.

        ConnectionFailed when it could not even be sent in that time: then it never will be.
        """
        if self._closed:
            raise ConnectionFailed(CLOSED, hint="nothing was written")
        undecided = PendingCommit(submission, self._loop, seconds)
        self._undecided[submission.request_id] = undecided
        self._unsent.append(undecided)
        self._set_clock(undecided.deadline)
        if len(self._unsent) == 1:
            self._loop.call_soon(self._send)  # together with whatever else commits in this step of the loop
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

    # -- the clock

    def _set_clock(self, deadline: float) -> None:
        """The next look without a notification, or the first deadline, whichever comes first."""
        at = min(deadline, self._loop.time() + channels.POLL_SECONDS)
        if self._clock is None or self._clock.when() > at:
            if self._clock:
                self._clock.cancel()
            self._clock = self._loop.call_at(at, self._on_clock)

    def _on_clock(self) -> None:
        self._clock = None
        now = self._loop.time()
        late = [undecided for undecided in self._undecided.values() if undecided.deadline <= now]
        self._give_up(late, self._trouble or self._listener.trouble or "no leader settled it in time")
        self._look_at_all = True
        self._on_news()
        waiting = [undecided.deadline for undecided in self._undecided.values() if not undecided.outcome.done()]
        if waiting and not self._closed:
            self._set_clock(min(waiting))

    def _give_up(self, these: Sequence[PendingCommit], why: str) -> None:
        for undecided in these:
            undecided.settle(Outcome(None, None, why))

    def _note_trouble(self, error: Exception) -> Exception:
        trouble = translate(error) if isinstance(error, psycopg.Error) else error
        self._trouble = trouble.message if isinstance(trouble, PgcoordError) else str(trouble)
        return trouble

    # -- sending

    def _send(self) -> None:
        """Sends the next group of what waits to be sent, unless one is under way: ids apply once."""
        if self._unsent and self._sending.is_open:
            self._sending.shut()
            if self._is_listening:
                self._hand_in(self._next_group())
            else:
                self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        """Before anything is sent for the first time: a reply that nobody hears costs a poll interval."""
        try:
            await self._listener.listen(self._reply_channel.decode(), self._on_news)
        except Exception as error:  # noqa: BLE001 - it is raised again where the commit is waited for
            self._not_sent(self._next_group(), error)
            self._sending.open_later()
        else:
            self._is_listening = True
            self._sending.open()

    def _next_group(self) -> list[PendingCommit]:
        group: list[PendingCommit] = []
        room = GROUP_BYTES
        while self._unsent and len(group) < GROUP_LIMIT and room > 0:
            undecided = self._unsent.popleft()
            if not undecided.outcome.done():
                group.append(undecided)
                room -= len(undecided.submission.payload)
        return group

    def _hand_in(self, group: list[PendingCommit]) -> None:
        if not group:
            self._sending.open()
        elif self._is_alone(group[0]):
            self._commit_alone(group[0])
        else:
            self._enqueue(group)

    def _is_alone(self, undecided: PendingCommit) -> bool:
        return (
            len(self._undecided) == 1
            and not undecided.sent_before
            and self._solitude.is_likely(self._loop.time())
            and len(undecided.submission.payload) <= direct_commit.MOST_BYTES
            and direct_commit.is_plain(undecided.submission.request)
        )

    def _commit_alone(self, undecided: PendingCommit) -> None:
        request_id, epoch, read_version, _, request = undecided.submission
        undecided.sent = True
        parameters = [request_id, int8(epoch), int8(read_version), *direct_commit.columns(request), self._reply_channel]
        self._pool.run(sql("commits", "commit_alone"), parameters, partial(self._on_alone, undecided))

    def _on_alone(self, undecided: PendingCommit, answer: Answer) -> None:
        if isinstance(answer, psycopg.Error) and not is_connection_lost(answer):
            # Nothing was written; whether the request is at fault is for the leader to say.
            self._solitude.failed(answer.sqlstate, self._loop.time())
            undecided.sent = undecided.sent_before
            self._unsent.appendleft(undecided)
            self._sending.open()
            return
        self._on_enqueued([undecided], answer)
        if not isinstance(answer, Exception):
            if answer[0][0] is None:
                self._solitude.was_wrong(self._loop.time())
            else:
                undecided.settle(Outcome("committed", integer(answer[0][0]), None))

    def _enqueue(self, group: list[PendingCommit]) -> None:
        submissions = [undecided.submission for undecided in group]
        request_ids, epochs, read_versions, payloads, _ = zip(*submissions, strict=True)
        columns = [uuid_array(request_ids), int8_array(epochs), int8_array(read_versions), bytea_array(payloads)]
        again = any(undecided.sent_before for undecided in group)
        statement = sql("commits", "enqueue_again" if again else "enqueue")
        for undecided in group:
            undecided.sent = True
        columns += [self._reply_channel, self._queue_channel]
        self._pool.run(statement, columns, partial(self._on_enqueued, group))

    def _on_enqueued(self, group: Sequence[PendingCommit], answer: Answer) -> None:
        if isinstance(answer, Exception):
            self._not_sent(group, answer)
            self._sending.open_later()
            return
        enqueued_at = timestamp(answer[0][1])
        for undecided in group:
            undecided.arrived(enqueued_at)
        self._sending.open()

    def _not_sent(self, group: Sequence[PendingCommit], error: Exception) -> None:
        """A lost connection leaves it open what arrived, so the group is sent again.

        Anything else is the answer, unless the request had been sent before and may have arrived then.
        """
        trouble = self._note_trouble(error)
        for undecided in group:
            if not isinstance(error, psycopg.Error):  # there was no connection that it could have gone over
                undecided.sent = undecided.sent_before
            if isinstance(trouble, ConnectionFailed):
                undecided.doubtful = undecided.sent
            elif undecided.sent_before:
                undecided.settle(Outcome(None, None, self._trouble))
            elif not undecided.outcome.done():
                undecided.outcome.set_exception(trouble)
        self._unsent.extendleft(reversed(group))

    # -- asking

    def _on_news(self) -> None:
        """Something may have been settled."""
        self._has_news = True
        self._ask()

    def _ask(self) -> None:
        """Asks for what is settled; once in a poll interval for everything, and sends again what is not there."""
        if not (self._has_news and self._undecided and self._asking.is_open):
            return
        self._asking.shut()
        self._has_news = False
        whole, self._look_at_all = self._look_at_all, False
        asked = [key for key, undecided in self._undecided.items() if undecided.sent]
        missing = {key: undecided for key, undecided in self._undecided.items() if whole and undecided.enqueued}
        self._pool.run(sql("commits", "ask"), [uuid_array(asked), bytes([whole])], partial(self._on_asked, missing))

    def _on_asked(self, missing: dict[bytes, PendingCommit], answer: Answer) -> None:
        if isinstance(answer, Exception):
            self._note_trouble(answer)
            self._has_news = True
            self._asking.open_later()
            return
        if self._sending.is_open:
            self._trouble = None
        for _, request_id, status, version, reason in answer:
            if request_id is not None:
                missing.pop(request_id, None)
                if status != b"pending":
                    self._settle(request_id, _outcome((status, version, reason)))
        self._send_again(missing.values())
        self._asking.open()

    def _settle(self, request_id: bytes, outcome: Outcome) -> None:
        if undecided := self._undecided.get(request_id):
            undecided.settle(outcome)

    def _send_again(self, missing: Iterable[PendingCommit]) -> None:
        for undecided in missing:
            undecided.enqueued = False
            self._unsent.append(undecided)
        self._send()


def _outcome(columns: Row) -> Outcome:
    status, version, reason = columns
    return Outcome(text(status), None if version is None else integer(version), text(reason))
