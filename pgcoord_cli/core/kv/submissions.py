"""Submitting commit requests, and finding out their outcomes.

**Enqueue.** A request goes into the queue under a UUID that the client made, with `synchronous_commit = off`: a pending
row that a crash loses was never acknowledged, and the UUID makes it harmless to submit the request again.

**Direct commit.** A request that is the only one of this client is committed without the leader where the database
agrees (`core.kv.direct_commit`). Where it does not agree, the same statement has put the request into the queue.

**Batches.** Many transactions commit at the same time, so the work is done for all of them: one statement at a time
submits what waits to be sent, batch by batch (`core.concurrency.batcher`), again after a lost connection; one statement
at a time asks for the outcomes of what was sent. Each follows from the answer to the one before or from a notification,
without a task in between. A commit waits for one future, and holds no pooled connection meanwhile.

**Outcomes.** A reply channel says when to ask; once in a poll interval the client asks without a notification. What
counts is only the status in the table, read together with the epoch in one snapshot, for all open requests at once
(rule I3). Where the server replicates synchronously, it counts only behind a *barrier* (rule I16): a row becomes
visible when the session that committed it is terminated, cancelled or restarted while it waits for the standby, and a
failover then loses it. The barrier is a commit of the client's own, which returns once the standbys have everything
before it.

**Missing rows.** A request that is not in the table was lost in a crash, or was settled and then collected as garbage.
It is submitted again. It cannot apply twice: by the time the row of a commit is collected, its read version is below
the conflict floor, so that it would be too_old. That answer therefore counts only when the request was enqueued at the
first attempt, and enqueued for the last time less than half of the shortest retention later, by the server's clock,
when it cannot have been collected yet. Otherwise the outcome is reported as unknown.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple
from uuid import UUID

import psycopg

from pgcoord_cli.core.commits.codec import Request
from pgcoord_cli.core.commits.requests import SHORTEST_RETENTION
from pgcoord_cli.core.concurrency.batcher import FIRST_PAUSE, LAST_PAUSE, Batcher
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.single_flight import SingleFlight
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.async_listener import AsyncListener
from pgcoord_cli.core.database.pool import CLOSED, Pool
from pgcoord_cli.core.kv import direct_commit
from pgcoord_cli.db.binary import bytea_array, int8, int8_array, integer, text, timestamp, uuid_array
from pgcoord_cli.db.callback_connection import Answer, Row, UnreadableAnswer, read_answer
from pgcoord_cli.db.connection import is_connection_lost, translate
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, OutcomeUnknown, PgcoordError

_log = logging.getLogger("pgcoord.kv")

BATCH_LIMIT = 128
"""Half of a busy client's requests: while the leader resolves one half, the client works at the other."""

BATCH_BYTES = 16_000_000
"""A batch ends with the payload that reaches this size, so that small requests do not wait behind a huge statement."""

SURELY_KEPT = timedelta(seconds=SHORTEST_RETENTION / 2)
SENT_TWICE = "it was sent more than once, and may have been settled and collected in between"


class Submission(NamedTuple):
    """A commit request to send: ids are the 16 bytes of UUIDs, `payload` is the encoding of `request`.

    `term_id` is the term under which `read_version` was read; None: no leader had ever been elected.
    """

    request_id: bytes
    epoch: int
    term_id: bytes | None
    read_version: int
    payload: bytes
    request: Request


class Outcome(NamedTuple):
    """What the table says of a request; status None: it cannot be known, and `reason` says why."""

    status: str | None
    version: int | None
    reason: str | None


# An instance of its own, seeded by the operating system: a program's random.seed must not make ids repeat.
_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)


def new_request_id() -> bytes:
    """A UUID of version 7 (RFC 9562) as its 16 bytes: the time in milliseconds, then random bits.

    Ids of about the same time are neighbours in the index, however long the history. Nothing else depends on the clock.
    """
    milliseconds = time.time_ns() // 1_000_000
    bits = _random.getrandbits(80) & ~(0xF << 76 | 0x3 << 62)
    return ((milliseconds & (1 << 48) - 1) << 80 | 0x7 << 76 | 0x2 << 62 | bits).to_bytes(16, "big")


class PendingCommit:
    """A request whose outcome is not known yet. Its absence from the table has a meaning only once it is `enqueued`."""

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
    def may_be_enqueued(self) -> bool:
        """Whether an earlier attempt may have put it into the queue."""
        return self.doubtful or self.first_enqueued_at is not None

    def note_enqueued(self, enqueued_at: datetime) -> None:
        """Records that the server enqueued the request at `enqueued_at` (server clock)."""
        self.enqueued = True
        if self.first_enqueued_at is None:
            self.first_enqueued_at = enqueued_at
        elif enqueued_at - self.first_enqueued_at > SURELY_KEPT:
            self.doubtful = True

    def settle(self, outcome: Outcome) -> None:
        """Completes the wait with an outcome.

        If the request may already have been settled and collected, `too_old` and `orphaned` are ambiguous and are
        reported as unknown.
        """
        if not self.outcome.done():
            ambiguous = self.doubtful and outcome.status in ("too_old", "orphaned")
            self.outcome.set_result(Outcome(None, None, SENT_TWICE) if ambiguous else outcome)


class Submitter:
    """Submits the requests of many transactions together, and completes each with its outcome."""

    def __init__(self, schema: str, pool: Pool, listener: AsyncListener) -> None:
        self._queue_channel = channels.commits(schema).encode()
        self._reply_channel = channels.reply(schema, secrets.token_hex(6)).encode()
        self._pool = pool
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._pending: dict[bytes, PendingCommit] = {}
        self._direct_backoff = direct_commit.DirectCommitBackoff()
        self._batcher = Batcher(self._send, self._refuse, BATCH_LIMIT, _payload_bytes, BATCH_BYTES)
        self._asking = SingleFlight(self._ask, FIRST_PAUSE, LAST_PAUSE)
        self._has_news = False
        self._ask_for_all = False
        self._timer: asyncio.TimerHandle | None = None
        self._listening: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._outage = Outage(_log, "commits wait for the server", "commits are sent")
        self._closed = False

    async def close(self) -> None:
        """Stops. Requests whose outcome is not known stay in the queue; their callers get OutcomeUnknown."""
        self._closed = True
        self._give_up(list(self._pending.values()), CLOSED)
        if self._timer:
            self._timer.cancel()
        self._batcher.close()
        self._asking.close()
        if self._listening:
            self._listening.cancel()  # it may be waiting for a server that is down
            await asyncio.gather(self._listening, return_exceptions=True)

    def begin(self, submission: Submission, seconds: float) -> PendingCommit:
        """Submits a request with the next batch; its outcome is waited for up to `seconds`.

        Raises ConnectionFailed if the client was closed, and UsageError in a forked child.
        """
        self._pool.require_own_process()
        if self._closed:
            raise ConnectionFailed(CLOSED, hint="nothing was written")
        return self._submit(PendingCommit(submission, self._loop, seconds))

    def begin_again(self, earlier: PendingCommit, seconds: float) -> PendingCommit:
        """Submits a request again whose outcome is unknown: under the same id, so that it applies at most once.

        Raises UsageError in a forked child.
        """
        self._pool.require_own_process()
        commit = PendingCommit(earlier.submission, self._loop, seconds)
        commit.sent = earlier.sent
        commit.first_enqueued_at = earlier.first_enqueued_at
        # Without an answer to the earlier attempt, it is not known how long ago the request may have been enqueued.
        commit.doubtful = earlier.doubtful or earlier.first_enqueued_at is None
        if self._closed:
            self._give_up([commit], CLOSED)
            return commit
        return self._submit(commit)

    def _submit(self, commit: PendingCommit) -> PendingCommit:
        self._pending[commit.submission.request_id] = commit
        self._batcher.add(commit)
        self._set_timer(commit.deadline)
        return commit

    async def outcome(self, commit: PendingCommit) -> Outcome:
        """Waits for the outcome of a request.

        Raises OutcomeUnknown when the outcome is not known in time, and ConnectionFailed when the request could not
        even be sent in that time; then it never will be.
        """
        request = commit.submission.request_id
        try:
            outcome = await commit.outcome
        finally:
            if self._pending.get(request) is commit:
                del self._pending[request]
        if outcome.status is not None:
            return outcome
        if not commit.sent:
            raise ConnectionFailed(f"the commit was not sent: {outcome.reason}", hint="nothing was written")
        request_id = UUID(bytes=request)
        raise OutcomeUnknown(
            f"request {request_id} was sent, but its outcome is not known: {outcome.reason}",
            hint=f"ask again with: pgcoord commit show {request_id}",
        )

    # -- the timer

    def _set_timer(self, deadline: float) -> None:
        """Wakes at the first deadline or after a poll interval, whichever comes first."""
        at = min(deadline, self._loop.time() + channels.POLL_SECONDS)
        if self._timer is None or self._timer.when() > at:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        late = [commit for commit in self._pending.values() if commit.deadline <= now]
        self._give_up(late, self._trouble or self._listener.trouble or "no leader settled it in time")
        # Notifications only wake (rule I7): one that was lost costs a poll interval, not the outcome.
        self._ask_for_all = True
        self._on_news()
        waiting = [commit.deadline for commit in self._pending.values() if not commit.outcome.done()]
        if waiting and not self._closed:
            self._listener.keep(self._reply_channel.decode())
            self._set_timer(min(waiting))

    def _give_up(self, commits: Sequence[PendingCommit], why: str) -> None:
        for commit in commits:
            commit.settle(Outcome(None, None, why))

    def _note_trouble(self, error: Exception) -> Exception:
        trouble = translate(error) if isinstance(error, psycopg.Error) else error
        self._trouble = trouble.message if isinstance(trouble, PgcoordError) else str(trouble)
        # Any other error is the answer to its commits, and the end of this client is no outage.
        if isinstance(trouble, ConnectionFailed | OutcomeUnknown) and not self._closed:
            self._outage.failed(self._trouble)
        return trouble

    # -- sending

    def _send(self, batch: list[PendingCommit]) -> None:
        batch = [commit for commit in batch if not commit.outcome.done()]
        if not batch:
            self._batcher.succeeded()
        elif not self._listener.keep(self._reply_channel.decode()):
            self._listening = asyncio.create_task(self._listen_and_send(batch))
        elif self._may_commit_directly(batch[0]):
            self._commit_directly(batch[0])
        else:
            self._enqueue(batch)

    async def _listen_and_send(self, batch: list[PendingCommit]) -> None:
        # Before the first request is sent: a reply on a channel that is not listened to costs a poll interval.
        try:
            await self._listener.listen(self._reply_channel.decode(), self._on_news)
        except Exception as error:  # noqa: BLE001 - raised where the commit is waited for
            # Not the fault of one commit: sent one by one, each of them would fail for the same reason.
            trouble = self._note_trouble(error)
            for commit in batch:
                self._refuse(commit, trouble)
            self._batcher.failed()
        else:
            # Through the batcher, which isolates a commit that cannot be turned into a statement.
            self._batcher.add_first(batch)
            self._batcher.succeeded()

    def _refuse(self, commit: PendingCommit, error: Exception) -> None:
        """Ends a commit that cannot be turned into a statement, or whose statement fails for another reason than the
        connection.

        If an earlier attempt may have enqueued it, its outcome is unknown.
        """
        if commit.may_be_enqueued:
            commit.settle(Outcome(None, None, str(error)))
        elif not commit.outcome.done():
            commit.outcome.set_exception(error)

    def _may_commit_directly(self, commit: PendingCommit) -> bool:
        return (
            len(self._pending) == 1
            and not commit.may_be_enqueued
            and self._direct_backoff.admits(self._loop.time())
            and len(commit.submission.payload) <= direct_commit.MAX_BYTES
            and direct_commit.is_plain(commit.submission.request)
        )

    def _commit_directly(self, commit: PendingCommit) -> None:
        request_id, epoch, term_id, read_version, _, request = commit.submission
        read_under = [int8(epoch), term_id, int8(read_version)]
        parameters = [request_id, *read_under, *direct_commit.columns(request), self._reply_channel]
        commit.sent = True
        self._pool.run(sql("commits", "commit_directly"), parameters, partial(self._on_direct_answer, commit))

    def _on_direct_answer(self, commit: PendingCommit, answer: Answer) -> None:
        if isinstance(answer, psycopg.Error) and not is_connection_lost(answer):
            self._log_refusal(answer)
            # Nothing was written. Whether the request is at fault is decided by the leader.
            self._direct_backoff.refused(answer.sqlstate, self._loop.time())
            commit.sent = commit.may_be_enqueued
            self._batcher.add_first([commit])
            self._batcher.succeeded()
            return
        decided = read_answer(answer, _direct_answer)
        if isinstance(decided, Exception):
            self._on_send_failed([commit], decided)
            return
        version, enqueued_at = decided
        self._on_enqueued([commit], enqueued_at)
        if version is None:
            _log.debug("a direct commit falls back to the queue: another commit is in progress")
            self._direct_backoff.fell_back(self._loop.time())
        else:
            commit.settle(Outcome("committed", version, None))

    def _log_refusal(self, error: psycopg.Error) -> None:
        reason = translate(error).message
        if error.sqlstate in direct_commit.PERMANENT:
            _log.info("all commits of this client go through the queue: no direct commit is possible: %s", reason)
        else:
            _log.debug("a direct commit falls back to the queue: %s", reason, extra={"sqlstate": error.sqlstate})

    def _enqueue(self, batch: list[PendingCommit]) -> None:
        submissions = [commit.submission for commit in batch]
        request_ids, epochs, term_ids, read_versions, payloads, _ = zip(*submissions, strict=True)
        columns = [uuid_array(request_ids), int8_array(epochs), uuid_array(term_ids)]
        columns += [int8_array(read_versions), bytea_array(payloads), self._reply_channel, self._queue_channel]
        again = any(commit.may_be_enqueued for commit in batch)
        statement = sql("commits", "enqueue_again" if again else "enqueue")
        for commit in batch:
            commit.sent = True
        self._pool.run(statement, columns, partial(self._on_enqueue_answer, batch))

    def _on_enqueue_answer(self, batch: Sequence[PendingCommit], answer: Answer) -> None:
        enqueued_at = read_answer(answer, _enqueued_at)
        if isinstance(enqueued_at, Exception):
            self._on_send_failed(batch, enqueued_at)
            return
        # What was enqueued before may be settled already, and its notification gone.
        may_be_settled = any(commit.may_be_enqueued for commit in batch)
        self._on_enqueued(batch, enqueued_at)
        if may_be_settled:
            self._on_news()

    def _on_enqueued(self, batch: Sequence[PendingCommit], enqueued_at: datetime) -> None:
        self._outage.ended()
        for commit in batch:
            commit.note_enqueued(enqueued_at)
        self._batcher.succeeded()

    def _on_send_failed(self, batch: Sequence[PendingCommit], error: Exception) -> None:
        """Sends the batch again after a lost connection, which leaves open whether it arrived.

        The same after an answer that cannot be read, and after a direct commit that replication did not confirm: the
        table then has its outcome. Any other error means that nothing was enqueued, because of what is in the batch.
        """
        trouble = self._note_trouble(error)
        if isinstance(trouble, ConnectionFailed | OutcomeUnknown | UnreadableAnswer):
            for commit in batch:
                # Any other error is that no connection was there that it could have been sent over.
                if not isinstance(error, psycopg.Error | UnreadableAnswer):
                    commit.sent = commit.may_be_enqueued
                commit.doubtful = commit.sent
            self._batcher.add_first(batch)
            self._batcher.failed()
        else:
            for commit in batch:
                commit.sent = commit.may_be_enqueued
            self._batcher.is_at_fault(batch, trouble)

    # -- asking

    def _on_news(self) -> None:
        """Some requests may have been settled."""
        self._has_news = True
        self._ask()

    def _ask(self) -> None:
        """Asks for the settled requests; once in a poll interval for all of them, to find those that are missing."""
        if not (self._has_news and self._pending and self._asking.is_idle):
            return
        self._asking.begin()
        self._has_news = False
        ask_for_all, self._ask_for_all = self._ask_for_all, False
        asked = [request_id for request_id, commit in self._pending.items() if commit.sent]
        # Only what was enqueued before this statement is sent can be found missing by it.
        missing = {key: commit for key, commit in self._pending.items() if ask_for_all and commit.enqueued}
        try:
            parameters = [uuid_array(asked), bytes([ask_for_all])]
            self._pool.run(sql("commits", "ask"), parameters, partial(self._on_asked, missing))
        except Exception as error:  # noqa: BLE001 - its caller is a timer or a notification, and later ones must go on
            self._on_ask_failed(error)

    def _on_asked(self, missing: dict[bytes, PendingCommit], answer: Answer) -> None:
        found = read_answer(answer, _statuses)
        if isinstance(found, Exception):
            self._on_ask_failed(found)
            return
        if self._batcher.is_idle:
            self._trouble = None
            self._outage.ended()
        self._send_again(commit for request_id, commit in missing.items() if request_id not in found.outcomes)
        settled = {request_id: outcome for request_id, outcome in found.outcomes.items() if outcome}
        if settled and found.needs_barrier:
            self._pool.run(sql("commits", "barrier"), [], partial(self._on_barrier, settled))
        else:
            self._on_confirmed(settled)

    def _on_ask_failed(self, error: Exception) -> None:
        self._note_trouble(error)
        self._has_news = True
        self._asking.failed()

    def _on_barrier(self, settled: dict[bytes, Outcome], answer: Answer) -> None:
        """Settles what the standbys have confirmed. A row can be visible, and lost in a failover, before that."""
        if isinstance(answer, Exception):
            self._on_ask_failed(answer)
        else:
            self._on_confirmed(settled)

    def _on_confirmed(self, settled: dict[bytes, Outcome]) -> None:
        for request_id, outcome in settled.items():
            self._settle(request_id, outcome)
        self._asking.succeeded()

    def _settle(self, request_id: bytes, outcome: Outcome) -> None:
        if commit := self._pending.get(request_id):
            commit.settle(outcome)

    def _send_again(self, missing: Iterable[PendingCommit]) -> None:
        for commit in missing:
            commit.enqueued = False
            self._batcher.add(commit)


def _payload_bytes(commit: PendingCommit) -> int:
    return len(commit.submission.payload)


class _Statuses(NamedTuple):
    """What the table says of requests: their outcomes (None: pending), and whether those need a barrier."""

    outcomes: dict[bytes, Outcome | None]
    needs_barrier: bool


def _statuses(rows: list[Row]) -> _Statuses:
    outcomes = {
        request_id: None if status == b"pending" else _outcome(status, version, reason)
        for _, request_id, status, version, reason, _ in rows
        if request_id is not None
    }
    return _Statuses(outcomes, rows[0][5] == b"\x01")


def _outcome(status: bytes | None, version: bytes | None, reason: bytes | None) -> Outcome:
    return Outcome(text(status), None if version is None else integer(version), text(reason))


def _enqueued_at(rows: list[Row]) -> datetime:
    return timestamp(rows[0][1])


def _direct_answer(rows: list[Row]) -> tuple[int | None, datetime]:
    """Reads the version, or None if the request was enqueued instead, and the time of that decision."""
    version, answered_at = rows[0]
    return None if version is None else integer(version), timestamp(answered_at)
