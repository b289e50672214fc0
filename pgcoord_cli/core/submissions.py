"""Handing commit requests in, and finding out what became of them.

**Enqueue.** The request goes into the queue with a UUID of the client's and `synchronous_commit = off`: a pending
row that a crash loses was never acknowledged, and the UUID makes it harmless to submit it again.

**Wait.** A reply channel wakes the client, and it looks by itself once in a poll interval. What it believes is only
ever the status in the table, read together with the epoch in one snapshot, for all undecided requests at once (rule I3).
Waiting holds no pooled connection.

**Not found.** A request that is not in the table was lost in a crash, or was settled and then collected as garbage. It
is submitted again only while it is younger, by the server's clock, than half of the shortest retention, when it
cannot have been collected yet. Later its outcome is unknown, and that is what the caller hears.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import psycopg

from pgcoord_cli.core import channels
from pgcoord_cli.core.backoff import Backoff
from pgcoord_cli.core.grouping import Grouping
from pgcoord_cli.core.listener import Listener
from pgcoord_cli.core.pool import Opener, Pool
from pgcoord_cli.core.retention import SHORTEST_RETENTION
from pgcoord_cli.db.connection import is_connection_lost, mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, OutcomeUnknown

GROUP_LIMIT = 500
LOST_FOR_GOOD = timedelta(seconds=SHORTEST_RETENTION / 2)


class Submission(NamedTuple):
    """A commit request on its way into the queue."""

    request_id: UUID
    epoch: int
    read_version: int
    payload: bytes


class Outcome(NamedTuple):
    """What the table says of a request; status None: it is not there. `asked_at` is the server's clock."""

    asked_at: datetime
    status: str | None
    version: int | None
    reason: str | None


class Submitter:
    """Submits for many transactions at once, and tells each what became of its request."""

    def __init__(self, schema: str, pool: Pool, opener: Opener) -> None:
        self._queue_channel = channels.commits(schema)
        self._reply_channel = channels.reply(schema, secrets.token_hex(6))
        self._pool = pool
        self._ask = asyncio.Event()
        self._listener = Listener(opener, lambda _channel: self._ask.set(), self._ask.set)
        self._group = Grouping(self._enqueue_group, GROUP_LIMIT)
        self._undecided: dict[UUID, asyncio.Future[Outcome]] = {}
        self._asker: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stops listening. Requests that are still waited for stay in the queue."""
        self._undecided.clear()
        self._ask.set()
        if self._asker:
            await self._asker
        await self._listener.close()

    async def submit(self, submission: Submission, seconds: float) -> Outcome:
        """Enqueues a request and waits until it is settled; OutcomeUnknown when that is not known in `seconds`."""
        why = "no leader settled it in time"
        try:
            async with asyncio.timeout(seconds):
                return await self._until_settled(submission)
        except TimeoutError:
            pass
        except ConnectionFailed as error:
            why = error.message
        finally:
            self._undecided.pop(submission.request_id, None)
        raise OutcomeUnknown(
            f"request {submission.request_id} was sent, but what became of it is not known: {why}",
            hint=f"ask again with: pgcoord commit show {submission.request_id}",
        )

    async def _until_settled(self, submission: Submission) -> Outcome:
        await self._listener.listen(self._reply_channel)
        first_enqueued_at: datetime | None = None
        while True:
            self._undecided[submission.request_id] = asyncio.get_running_loop().create_future()
            enqueued_at = await self._enqueue(submission)
            first_enqueued_at = first_enqueued_at or enqueued_at
            self._start_asker()
            outcome = await self._undecided[submission.request_id]
            if outcome.status is not None:
                return outcome
            if outcome.asked_at - first_enqueued_at > LOST_FOR_GOOD:
                raise TimeoutError

    async def _enqueue(self, submission: Submission) -> datetime:
        """When the request was enqueued, by the server's clock. Tried again over a new connection: ids apply once."""
        backoff = Backoff(0.05, 1.0)
        while True:
            with suppress(ConnectionFailed), mapped_errors():
                return await self._group(submission)
            await backoff.pause()

    async def _enqueue_group(self, group: Sequence[Submission]) -> Sequence[datetime]:
        columns = [list(column) for column in zip(*group, strict=True)]
        async with self._pool.connection() as conn:
            cursor = await conn.execute(sql("commits", "enqueue"), [*columns, self._reply_channel, self._queue_channel])
            row = await cursor.fetchone()
        assert row is not None
        return [row[1]] * len(group)

    def _start_asker(self) -> None:
        if self._asker is None or self._asker.done():
            self._asker = asyncio.create_task(self._ask_while_undecided())

    async def _ask_while_undecided(self) -> None:
        """Looks up every undecided request whenever a reply may have come, and once in a poll interval."""
        backoff = Backoff(0.05, 1.0)
        while self._undecided:
            with suppress(TimeoutError):
                async with asyncio.timeout(channels.POLL_SECONDS):
                    await self._ask.wait()
            self._ask.clear()
            try:
                await self._look_up(list(self._undecided))
                backoff.reset()
            except (psycopg.Error, ConnectionFailed) as error:
                if isinstance(error, psycopg.Error) and not is_connection_lost(error):
                    raise
                self._ask.set()
                await backoff.pause()

    async def _look_up(self, request_ids: list[UUID]) -> None:
        async with self._pool.connection() as conn:
            cursor = await conn.execute(sql("commits", "ask"), [request_ids])
            rows = await cursor.fetchall()
        asked_at = rows[0][1]
        found = {row[2]: Outcome(asked_at, *row[3:]) for row in rows if row[2] is not None}
        for request_id in request_ids:
            outcome = found.get(request_id, Outcome(asked_at, None, None, None))
            future = self._undecided.get(request_id)
            if outcome.status != "pending" and future is not None and not future.done():
                future.set_result(outcome)
