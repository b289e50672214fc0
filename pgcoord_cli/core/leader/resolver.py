"""The resolver: settles the queue of commit requests during one term.

**A batch** is claimed (the oldest pending requests, without row locks), decided in memory, folded into one write set,
and applied in one PostgreSQL transaction. The transaction is sent as a whole, so that a leader that freezes leaves none
open half way: `write_data`, and last `settle_commits`, which sets the statuses, checks the fence, advances the durable
version and notifies the clients. All of it takes effect or nothing (rules I2, I5).

**Deciding** is done in queue order. A read version below the conflict floor is `too_old`. So is one that was read under
another term, unless `leader_history` has that very term and the read version is at most its last version: a failover
to a standby that lagged, or a restored backup, has lost what was read, and gives its versions to other commits
(rule I2). A read version above the durable version of the present term is `rejected`, and so is a payload that cannot
be decoded. A request whose reads were written since its read version is a `conflict`. Any other gets the next version,
and its writes enter the window at once, so that later requests of the same batch are checked against them.

**When PostgreSQL refuses a batch** because of its data, the window is rebuilt and the same requests are tried one by
one; the request that is refused by itself is `rejected` with PostgreSQL's reason (rule I6). When a batch is rolled back
because of a concurrent transaction, the window is rebuilt and the batch is claimed again.

**When the outcome of a batch is unknown**, because the connection was lost, nothing is retried: the term ends, and the
next leader, which may be this process, starts from what the database holds.

**Direct commits.** While the resolver is busy, it blocks direct commits (`core.kv.direct_commit`); before its first
batch it adds those that were made meanwhile to its window. It admits them again once a claim has found at most one
request and left none: many at once are better served by the leader. A claim that no notification caused does not make
the resolver busy unless it finds a request.

**The queue floor.** Ids become visible out of order, so a claim of the ids above the last one seen would miss requests.
The resolver notes the last id that was drawn and the transactions that hold a row-exclusive lock on the queue: only
these can still make an id up to that one visible. When all of them have ended, and a claim made after that has been
settled, every id up to the noted one is settled for good, and claims start above it. So a claim costs what is new, not
what is stored. Raising the floor has a cost too, so up to OBSERVE_AFTER settled requests may lie above it. After a
restart of the server a prepared transaction has another name than before, so each of those counts as noted
(`core.database.open_transactions`).

**Plans.** Every statement here looks rows up by index, whatever the statistics say, so the session plans each once and
for that (`session.plan_once`): planning anew cost more than all else in a small batch, and a plan made while a table
was empty must not scan it when it is full.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from time import monotonic
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.commits import codec, mutations
from pgcoord_cli.core.commits.codec import Request, Undecodable
from pgcoord_cli.core.commits.conflict_window import ConflictWindow
from pgcoord_cli.core.commits.mutations import WriteSet
from pgcoord_cli.core.commits.recent_commits import RecentCommits, StoredCommit
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.database.open_transactions import OpenTransactions
from pgcoord_cli.core.leader.lease import Term
from pgcoord_cli.db.binary import bytea_array, bytea_columns, int4, int8, int8_array, text_array
from pgcoord_cli.db.pipeline import BoundStatement, Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Fenced

_log = logging.getLogger("pgcoord.resolver")

BATCH_LIMIT = 1_000
BATCH_BYTES = 50_000_000
"""A batch ends with the payload that reaches this; PostgreSQL takes no statement of more than a gigabyte."""

OBSERVE_AFTER = 200
"""Settled requests above the queue floor from which on the floor is raised. Fewer cost a claim less than raising it."""

STORE_FLOORS_AFTER = 200
"""Direct commits after which the floors are stored without a batch, so that the next leader need not read them all."""

KEEP_UNDO_SECONDS = 1.0
"""Seconds between two looks at whether the older part of the replaced values can be emptied."""

BLOCK_TIMEOUT, BLOCK_RETRY_TIMEOUT = b"2s", b"20ms"
"""How long the leader waits for a direct commit in progress, and how long after a wait that has timed out."""

FENCED = "PC001"
ALREADY_SETTLED = "PC002"
COMMITTED_SINCE = "PC003"
RETRYABLE = (ALREADY_SETTLED, COMMITTED_SINCE, "40001", "40P01")  # the last two: serialization failure, deadlock


class Claimed(NamedTuple):
    """A pending request; `claimed_at` is by the server's clock.

    `read_limit` is the last version of the term that the client read under. None: it is the present term, whose last
    version is the durable version. -1: this database does not know that term.
    """

    id: int
    read_limit: int | None
    read_version: int
    payload: bytes
    claimed_at: datetime


class Verdict(NamedTuple):
    """The decision on one request, with its final status. `request` is set if that is committed."""

    id: int
    status: str
    version: int | None = None
    reason: str | None = None
    request: Request | None = None


def decide(window: ConflictWindow, durable_version: int, batch: Iterable[Claimed]) -> list[Verdict]:
    """Returns one verdict for each request, in order, and adds committed writes to `window`. Pure."""
    verdicts = []
    version = durable_version
    for claimed in batch:
        verdict = _decide_one(window, version, claimed)
        if verdict.request:
            version += 1  # dense, as later readers of the table expect (rule I5)
            # Stamped before they are recorded: only now it is known which key a stamped key is.
            request = mutations.with_stamps(verdict.request, version)
            window.record(version, *mutations.writes_of(request))
            verdict = Verdict(claimed.id, "committed", version, None, request)
        verdicts.append(verdict)
    return verdicts


def _decide_one(window: ConflictWindow, durable_version: int, claimed: Claimed) -> Verdict:
    # Before all else, because below the floor no check of conflicts is possible (rule I4).
    if claimed.read_version < window.floor:
        return Verdict(claimed.id, "too_old", reason=f"read at {claimed.read_version}, checkable from {window.floor}")
    # After a failover to a standby that lagged, or a restore, other commits have got or will get these versions.
    if claimed.read_limit is not None and claimed.read_version > claimed.read_limit:
        return Verdict(claimed.id, "too_old", reason=f"read version {claimed.read_version} was lost with its term")
    if claimed.read_version > durable_version:
        return Verdict(claimed.id, "rejected", reason=f"read version {claimed.read_version} was never committed")
    try:
        request = codec.decode(claimed.payload)
    except Undecodable as error:
        return Verdict(claimed.id, "rejected", reason=str(error))
    if window.conflicts(claimed.read_version, request.read_keys, request.read_ranges):
        return Verdict(claimed.id, "conflict")
    return Verdict(claimed.id, "committed", request=request)


class Resolver:
    """Settles commit requests over `conn` during `term`. Raises Fenced once the term has ended, and psycopg.Error."""

    def __init__(self, conn: Connection[Any], term: Term, abandon: int | None = None) -> None:
        """`abandon` is a descriptor: when it becomes readable, the connection is closed instead of waiting on."""
        self._conn = conn
        self._pipeline = Pipeline(conn, abandon=abandon)
        self._term = term
        self._floor = QueueFloor(term.queue_floor_id)
        self._above_floor = 0
        self._one_by_one_up_to = 0
        self._is_busy = False
        self._blocks_direct_commits = False
        self._block_timeout = BLOCK_TIMEOUT
        self.has_more = True
        """Whether the last claim may have left requests; if not, a notification comes with the next one."""
        self._recent = self._load(term.conflict_floor, term.window_start_id)
        self._direct_commits_since_floors = 0
        self._undo_trouble = Outage(_log, "replaced values are kept without end", "replaced values are emptied")
        self._keep_undo()

    @property
    def durable_version(self) -> int:
        """The version of the last commit that this resolver knows."""
        return self._recent.durable_version

    def _load(self, floor: int, start_id: int) -> RecentCommits:
        """Reads the stored commits above a floor and a request id (rule I8)."""
        cursor = self._conn.cursor(binary=True)
        _, durable_version = cursor.execute(sql("kv", "read_version")).fetchone() or (0, floor)
        rows = cursor.execute(sql("commits", "window_commits"), [start_id, floor]).fetchall()
        return RecentCommits(floor, durable_version, start_id, [StoredCommit(*row) for row in rows])

    def resolve_batch(self, limit: int = BATCH_LIMIT, *, expected: bool = True) -> int:
        """Claims and settles one batch of at most `limit` requests; returns how many it had.

        `expected`: a notification announced requests. Without one, direct commits are blocked only if some are found.
        """
        if self._one_by_one_up_to:
            limit = 1
        floor_before = self._floor.id
        batch = self._claim(limit, expected=expected)
        # A claim that reached a limit may have left requests whose notification came before it.
        self.has_more = len(batch) == limit or sum(len(claimed.payload) for claimed in batch) >= BATCH_BYTES
        if not batch or batch[-1].id >= self._one_by_one_up_to:
            self._one_by_one_up_to = 0
        if batch:
            # The age of commits is measured by the server's clock (rule I12).
            self._recent.expire(batch[0].claimed_at)
            verdicts = decide(self._recent.window, self._recent.durable_version, batch)
            if not self._settle(verdicts, batch[0].claimed_at):
                self.has_more = True
                return len(batch)
            self._floor.settled_up_to(batch[-1].id)
        if not self.has_more:
            self._floor.everything_settled()
            if len(batch) <= 1:
                self._admit_direct_commits()
        self._above_floor = 0 if self._floor.id > floor_before else self._above_floor + len(batch)
        # Here, for the next claim, and not before this one: the clients have been notified and do not wait for it.
        if self._above_floor > OBSERVE_AFTER:
            self._observe_writers()
        self._store_floors()
        if monotonic() - self._undo_kept_at > KEEP_UNDO_SECONDS:
            self._keep_undo()
        return len(batch)

    def _observe_writers(self) -> None:
        """Reads, before the next claim, which transactions may still enqueue requests with earlier ids."""
        if not self._floor.is_clear:
            self._floor.observe(*self._pipeline.fetch(sql("commits", "queue_writers"), [])[0])

    def _claim(self, limit: int, *, expected: bool) -> list[Claimed]:
        # One byte more than the limit is enough to see that a payload is too large.
        arguments = [int8(self._floor.id), int4(limit), int8(BATCH_BYTES), int4(codec.MAX_TRANSACTION_BYTES + 1)]
        arguments.append(self._term.term_id.bytes)
        claim = (sql("commits", "claim"), arguments)
        if self._blocks_direct_commits:
            rows = self._pipeline.run([claim])[0]
        # A claim that finds requests is made again once direct commits are blocked, because others were made meanwhile.
        elif expected or self._is_busy or self._add_direct_commits(claim):
            rows = self._block_direct_commits(claim)
        else:
            rows = []
        return [Claimed(*row) for row in rows]

    def _block_direct_commits(self, claim: BoundStatement) -> list[tuple[Any, ...]]:
        """Waits for a direct commit in progress, blocks further ones, and claims; returns the claimed rows."""
        self._is_busy = True
        try:
            rows = self._add_direct_commits(claim, (sql("commits", "block_direct_commits"), [self._block_timeout]))
            self._blocks_direct_commits, self._block_timeout = True, BLOCK_TIMEOUT
        except psycopg.errors.LockNotAvailable:
            _log.debug("a direct commit holds up a batch, which goes on without the lock", extra=self._fields())
            # A direct commit that does not end must not stop the queue. The batch goes on without the lock: if the
            # direct commit comes first after all, the settlement fails and the batch is claimed again.
            self._block_timeout = BLOCK_RETRY_TIMEOUT
            rows = self._add_direct_commits(claim)
        return rows

    def _admit_direct_commits(self) -> None:
        """Lets clients make direct commits until there are requests in the queue again."""
        self._is_busy = False
        if self._blocks_direct_commits:
            self._blocks_direct_commits = False
            self._pipeline.fetch(sql("commits", "admit_direct_commits"), [])

    def _add_direct_commits(self, claim: BoundStatement, *before: BoundStatement) -> list[tuple[Any, ...]]:
        """Runs `before`, reads the direct commits since the last claim, and claims, all in one unit.

        Adds those commits to the window; returns the claimed rows.
        """
        known = [int8(self._recent.last_id), int8(self._recent.durable_version)]
        *_, commits, rows = self._pipeline.run([*before, (sql("commits", "window_commits"), known), claim])
        # A gap in the versions means a commit that is no longer stored: the window is rebuilt with a higher floor.
        if not self._recent.add_stored([StoredCommit(*commit) for commit in commits]):
            self._recent = self._load(self._recent.window.floor, self._window_start_id())
        self._above_floor += len(commits)
        self._direct_commits_since_floors += len(commits)
        return rows

    def _keep_undo(self) -> None:
        """Empties the older part of the replaced values if it is time to. Raises Fenced if the term has ended."""
        self._undo_kept_at = monotonic()
        # A lock that is not free within its short limit: the next call tries again.
        with mapped_fence(), suppress(psycopg.errors.LockNotAvailable):
            term = [int8(self._term.epoch), self._term.term_id.bytes]
            ((missing,),) = self._pipeline.fetch(sql("commits", "keep_undo"), term)
            if missing:
                self._undo_trouble.failed(f"{missing}; the schema owner can grant it: pgcoord migrate grant --operator")
            elif missing is not None:
                self._undo_trouble.ended()

    def _store_floors(self) -> None:
        """Stores the floors after many direct commits. Raises Fenced if the term has ended."""
        # Each batch stores them with its settlement; where all commits are direct there is no batch.
        if self._direct_commits_since_floors > STORE_FLOORS_AFTER:
            self._direct_commits_since_floors = 0
            term = [int8(self._term.epoch), self._term.term_id.bytes]
            if not self._pipeline.fetch(sql("lease", "raise_floors"), [*term, *self._floors()]):
                raise Fenced(f"the term of epoch {self._term.epoch} has ended")

    def _settle(self, verdicts: Sequence[Verdict], now: datetime) -> bool:
        """Applies a batch. Returns False if it was rolled back and has to be claimed again."""
        start_id = self._window_start_id()
        try:
            self._apply(verdicts)
        except psycopg.Error as error:
            if error.sqlstate not in RETRYABLE and not _is_about_data(error):
                raise  # the outcome may be unknown: the term ends
            self._log_rollback(len(verdicts), error)
            # The writes of the batch are in the window, but were not made (rule I8).
            self._recent = self._load(self._recent.window.floor, start_id)
            if error.sqlstate not in RETRYABLE:
                self._isolate(verdicts, error)
            return False
        if committed := [verdict.id for verdict in verdicts if verdict.version is not None]:
            self._recent.add_durable(now, _last_version(verdicts, self._recent.durable_version), committed)
        self._direct_commits_since_floors = 0
        return True

    def _window_start_id(self) -> int:
        """Returns an id below those of all commits of the window and of all commits to come."""
        return min([self._floor.id, *(period.first_id - 1 for period in self._recent.periods)])

    def _floors(self) -> list[bytes]:
        return [*map(int8, [self._recent.window.floor, self._window_start_id(), self._floor.id])]

    def _apply(self, verdicts: Sequence[Verdict]) -> None:
        """Writes the data and settles the requests, in one transaction. Raises Fenced and psycopg.Error."""
        write_set = self._folded(verdicts)
        statements: list[BoundStatement] = []
        if write_set:
            writes = [*bytea_columns(write_set.ranges), bytea_array(write_set.removed)]
            writes += [*bytea_columns(write_set.written.items()), int8(self._recent.durable_version)]
            statements.append((sql("commits", "write_data"), writes))
        statements.append((sql("commits", "settle"), self._settlement(verdicts)))
        # Without BEGIN, all statements of one unit are one transaction that needs no further message to commit.
        with mapped_fence():
            self._pipeline.run(statements)

    def _folded(self, verdicts: Sequence[Verdict]) -> WriteSet:
        """Returns the net effect of the batch, reading the stored values that mutations depend on."""
        write_set = mutations.fold(m for verdict in verdicts if verdict.request for m in verdict.request.mutations)
        if undecided := write_set.undecided:
            # The settlement names the version that it follows, so it fails if a commit comes after this read.
            cursor = self._conn.cursor(binary=True)
            write_set.decide(dict(cursor.execute(sql("commits", "stored_values"), [undecided]).fetchall()))
        return write_set

    def _settlement(self, verdicts: Sequence[Verdict]) -> list[bytes]:
        version_before = self._recent.durable_version
        version_after = _last_version(verdicts, version_before)
        ids, statuses, versions, reasons, _ = zip(*verdicts, strict=True)
        return [
            int8(self._term.epoch),
            self._term.term_id.bytes,
            *(int8(version_before), int8(version_after), *self._floors()),
            *(int8_array(ids), text_array(statuses), int8_array(versions), text_array(reasons)),
        ]

    def _isolate(self, verdicts: Sequence[Verdict], error: psycopg.Error) -> None:
        """Makes the next claims single requests; rejects the request if the batch was a single one already."""
        if len(verdicts) > 1:
            self._one_by_one_up_to = verdicts[-1].id
            return
        reason = error.diag.message_primary or type(error).__name__
        self._apply([Verdict(verdicts[0].id, "rejected", reason=reason)])
        _log.info("request %d is rejected: %s", verdicts[0].id, reason, extra=self._fields(request=verdicts[0].id))

    def _log_rollback(self, requests: int, error: psycopg.Error) -> None:
        """Logs why a batch was rolled back. Whether it is claimed again or taken apart depends on the error."""
        # Not a warning: both are part of the protocol, and clients decide how often they happen.
        reason = error.diag.message_primary or type(error).__name__
        fields = self._fields(requests=requests, sqlstate=error.sqlstate)
        _log.debug("a batch of %d was rolled back: %s", requests, reason, extra=fields)

    def _fields(self, **fields: Any) -> dict[str, Any]:
        return {"epoch": self._term.epoch} | fields


@contextmanager
def mapped_fence() -> Iterator[None]:
    """Translates SQLSTATE PC001, that the term has ended, into Fenced."""
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate == FENCED:
            raise Fenced(error.diag.message_primary or "the term has ended") from None
        raise


class QueueFloor:
    """No request with an id up to `id` is pending, now or later. The module's docstring gives the protocol. Pure."""

    def __init__(self, floor_id: int) -> None:
        self.id = floor_id
        self._last_id = floor_id
        self._writers: OpenTransactions | None = None
        self.is_clear = False
        """Whether the transactions that could enqueue ids up to the noted one have all ended."""

    def observe(self, last_id: int, writers: Iterable[str]) -> None:
        """Called before a claim. Notes the last id and its open `writers`, or drops those that have ended."""
        if self._writers is None:
            self._last_id, self._writers = last_id, OpenTransactions(writers)
        else:
            self._writers.keep(writers)
        self.is_clear = not self._writers

    def everything_settled(self) -> None:
        """Called when all requests of a claim that reached no limit are settled."""
        self.settled_up_to(self._last_id)

    def settled_up_to(self, last_settled: int) -> None:
        """Called when all requests of a claim up to this id are settled."""
        # Clear before the claim: had a writer ended after it, its request would not have been in the claim.
        if self.is_clear and last_settled >= self._last_id:
            self.id = max(self.id, self._last_id)
            self._writers, self.is_clear = None, False


def _is_about_data(error: psycopg.Error) -> bool:
    """Returns whether PostgreSQL refused the data: classes 22 (data), 23 (constraints) and 54 (limits)."""
    return (error.sqlstate or "").startswith(("22", "23", "54"))


def _last_version(verdicts: Sequence[Verdict], otherwise: int) -> int:
    return max((verdict.version for verdict in verdicts if verdict.version is not None), default=otherwise)
