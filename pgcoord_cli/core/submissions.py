"""Handing commit requests in, and finding out what became of them.

**Enqueue.** The request goes into the queue with a UUID of the client's and `synchronous_commit = off`: a pending
row that a crash loses was never acknowledged, and the UUID makes it harmless to submit it again.

**Wait.** A reply channel wakes the client, and it looks by itself once in a poll interval. What it believes is only
ever the status in the table, read together with the epoch in one snapshot, for all undecided requests at once
(rule I3). Waiting holds no pooled connection.

**Not found.** A request that is not in the table was lost in a crash, or was settled and then collected as garbage. It
is submitted again. It cannot apply twice: by the time the row of a commit is collected, its read version is below
the conflict floor. But it would then be called too old. So that answer counts only when the request was
enqueued at the first attempt, and enqueued for the last time, by the server's clock, less than half of the shortest
retention later, when it cannot have been collected yet. Otherwise the caller hears that the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count
from typing import NamedTuple
from uuid import UUID

import psycopg

from pgcoord_cli.core import channels
from pgcoord_cli.core.backoff import Backoff
from pgcoord_cli.core.grouping import Grouping
from pgcoord_cli.core.listener import Listener
from pgcoord_cli.core.pool import Opener, Pool
from pgcoord_cli.core.retention import SHORTEST_RETENTION
from pgcoord_cli.db.binary import bytea_array, int8_array, integer, text, timestamp, uuid_array
from pgcoord_cli.db.connection import mapped_errors, translate
from pgcoord_cli.db.lane import Row
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, OutcomeUnknown, PgcoordError

GROUP_LIMIT = 500
SURELY_KEPT = timedelta(seconds=SHORTEST_RETENTION / 2)


class Submission(NamedTuple):
    """A commit request on its way into the queue."""

    request_id: UUID
    epoch: int
    read_version: int
    payload: bytes


class Outcome(NamedTuple):
    """What the table says of a request; status None: it is not there."""

    status: str | None
    version: int | None
    reason: str | None


NOT_THERE = Outcome(None, None, None)


@dataclass
class Undecided:
    """A request whose outcome is waited for. Until it is `enqueued`, it means nothing that the table lacks it."""

    outcome: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    enqueued: bool = False

    def settle(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class Submitter:
    """Submits for many transactions at once, and tells each what became of its request."""

    def __init__(self, schema: str, pool: Pool, opener: Opener) -> None:
        self._queue_channel = channels.commits(schema).encode()
        self._reply_channel = channels.reply(schema, secrets.token_hex(6)).encode()
        self._pool = pool
        self._ask = asyncio.Event()
        self._listener = Listener(opener, lambda _channel: self._ask.set(), self._ask.set)
        self._group = Grouping(self._enqueue_group, GROUP_LIMIT)
        self._undecided: dict[UUID, Undecided] = {}
        self._asker: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._closed = False

    async def close(self) -> None:
        """Stops listening. Requests that are still waited for stay in the queue; their outcome is unknown."""
        self._closed = True
        self._ask.set()
        for undecided in self._undecided.values():
            undecided.settle(NOT_THERE)
        if self._asker:
            await self._asker
        await self._listener.close()

    async def submit(self, submission: Submission, seconds: float) -> Outcome:
        """Enqueues a request and waits until it is settled; OutcomeUnknown when that is not known in `seconds`."""
        why = "it was sent more than once, and may have been settled and forgotten in between"
        try:
            async with asyncio.timeout(seconds):
                if outcome := await self._until_settled(submission):
                    return outcome
        except TimeoutError:
            why = self._trouble or "no leader settled it in time"
        except ConnectionFailed as error:
            why = error.message
        finally:
            self._undecided.pop(submission.request_id, None)
        raise OutcomeUnknown(
            f"request {submission.request_id} was sent, but what became of it is not known: {why}",
            hint=f"ask again with: pgcoord commit show {submission.request_id}",
        )

    async def _until_settled(self, submission: Submission) -> Outcome | None:
        """What became of the request; None when that cannot be known any more."""
        await self._listener.listen(self._reply_channel.decode())
        first_enqueued_at: datetime | None = None
        doubtful = False
        while True:
            undecided = self._undecided[submission.request_id] = Undecided()
            attempts, enqueued_at = await self._enqueue(submission)
            undecided.enqueued = True
            first_enqueued_at = first_enqueued_at or enqueued_at
            doubtful = doubtful or attempts > 1 or enqueued_at - first_enqueued_at > SURELY_KEPT
            self._start_asker()
            outcome = await undecided.outcome
            if outcome.status is not None:
                return None if doubtful and outcome.status in ("too_old", "orphaned") else outcome

    async def _enqueue(self, submission: Submission) -> tuple[int, datetime]:
        """Enqueues over one connection after the other: ids apply once. How many it took, and the server's clock."""
        backoff = Backoff(0.05, 1.0)
        for attempts in count(1):
            if self._closed:
                break
            try:
                with mapped_errors():
                    return attempts, await self._group(submission)
            except ConnectionFailed as error:
                self._trouble = error.message
            await backoff.pause()
        raise ConnectionFailed("this client was closed")

    async def _enqueue_group(self, group: Sequence[Submission]) -> Sequence[datetime]:
        request_ids, epochs, read_versions, payloads = zip(*group, strict=True)
        columns = [uuid_array(request_ids), int8_array(epochs), int8_array(read_versions), bytea_array(payloads)]
        async with self._pool.lane() as lane:
            rows = await lane.fetch(sql("commits", "enqueue"), [*columns, self._reply_channel, self._queue_channel])
        return [timestamp(rows[0][1])] * len(group)

    def _start_asker(self) -> None:
        if self._asker is None or self._asker.done():
            self._asker = asyncio.create_task(self._ask_while_undecided())

    async def _ask_while_undecided(self) -> None:
        """Looks up every undecided request whenever a reply may have come, and once in a poll interval."""
        backoff = Backoff(0.05, 1.0)
        while self._undecided and not self._closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(channels.POLL_SECONDS):
                    await self._ask.wait()
            self._ask.clear()
            try:
                await self._look_up(dict(self._undecided))
                self._trouble = None
                backoff.reset()
            except (psycopg.Error, PgcoordError) as error:
                self._trouble = (translate(error) if isinstance(error, psycopg.Error) else error).message
                self._ask.set()
                await backoff.pause()

    async def _look_up(self, asked: Mapping[UUID, Undecided]) -> None:
        enqueued = {request_id for request_id, undecided in asked.items() if undecided.enqueued}
        async with self._pool.lane() as lane:
            rows = await lane.fetch(sql("commits", "ask"), [uuid_array(list(asked))])
        found = {UUID(bytes=row[1]): _outcome(row) for row in rows if row[1] is not None}
        for request_id in enqueued | found.keys():
            outcome = found.get(request_id, NOT_THERE)
            if outcome.status != "pending":
                asked[request_id].settle(outcome)


def _outcome(row: Row) -> Outcome:
    _, _, status, version, reason = row
    return Outcome(text(status), None if version is None else integer(version), text(reason))
