"""The resolver: drains the queue of commit requests under one leadership.

**A batch** is claimed (the oldest pending requests, no locks), decided in memory, folded into one write set, and
applied in one PostgreSQL transaction that is sent as a whole, so that a leader that freezes leaves none open half
way: `write_data`, and at the end `settle_commits`, which sets the statuses, checks the fence, advances the durable
version and wakes the clients. Either all of it happens or nothing (rules I2, I5).

**Deciding.** In queue order. A payload that cannot be decoded is `rejected`. A read version below the conflict floor is
`too_old`. So is one that was read under another term, unless `leader_history` has that very term and the read version
is at most its last version: a failover to a standby that lagged, or a restored backup, has lost what was read, and
gives its versions to other commits (rule I2). A read version above the durable version of the present term is
`rejected`. A request whose reads were written since is a `conflict`. Any other gets the next version, and its writes
enter the window at once, so that later requests of the same batch are checked against it.

**When PostgreSQL refuses a batch** for a reason that lies in the data, the window is rebuilt and the same requests are
tried one by one; the one that is refused alone is `rejected` with PostgreSQL's reason (rule I6). When it undoes a
batch because somebody else was in the way, the window is rebuilt and the batch is claimed again.

**When the fate of a batch is unknown**, because the connection broke, nothing is retried: the leadership ends, and
whoever leads next, perhaps this very process, starts from what the database holds.

**Lone commits.** While the resolver works, no client commits by itself (`core.kv.direct_commit`); before it begins to, it takes
in what such clients have committed. It rests, and lets them, once it has settled a single request and nothing
else was there: many at once are better served by a leader. To look at the queue without having been called is no work
yet.

**The queue floor.** Ids become visible out of order, so "above the last id seen" would miss requests. The resolver
notes the last id drawn and the transactions that hold a row-exclusive lock on the queue; those are the only ones that
can still bring an id up to there to light. When all of them are gone, and a claim made after that has been
settled, every id up to the noted one is settled for ever, and claims start above it. So a claim costs what is
new, not what is stored; raising the floor costs something too, so that a few hundred settled requests are let be. After
a restart, a prepared transaction goes by another name than before, so each of those counts (`core.database.open_transactions`).

**Plans.** Every statement here looks rows up by index, whatever the statistics say, so the session has them planned
once and for that (`session.plan_once`): planning anew cost more than all else in a small batch, and a plan made while
a table was empty must not scan it when it is full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core.commits import codec, mutations
from pgcoord_cli.core.commits.codec import Request, Undecodable
from pgcoord_cli.core.commits.conflict_window import ConflictWindow
from pgcoord_cli.core.commits.mutations import WriteSet
from pgcoord_cli.core.commits.recent_commits import RecentCommits, StoredCommit
from pgcoord_cli.core.database.open_transactions import OpenTransactions
from pgcoord_cli.core.leader.lease import Term
from pgcoord_cli.db.binary import bytea_array, bytea_columns, int4, int8, int8_array, text_array
from pgcoord_cli.db.pipeline import BoundStatement, Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Fenced

BATCH_LIMIT = 1_000
BATCH_BYTES = 50_000_000
"""A batch ends with the payload that reaches this; PostgreSQL takes no statement of more than a gigabyte."""

OBSERVE_AFTER = 200
"""So many settled requests above the queue floor cost a claim less than raising the floor would."""

NOTE_AFTER = 200
"""So many commits that clients made alone are a stretch that a successor should not have to read."""

LOCK_OUT_WITHIN, LOCK_OUT_AGAIN = b"2s", b"20ms"
"""How long the leader waits for a commit that a client is making by itself; and then, as long as that was in vain."""

FENCED = "PC001"
ALREADY_SETTLED = "PC002"
COMMITTED_SINCE = "PC003"
IN_THE_WAY = (ALREADY_SETTLED, COMMITTED_SINCE, "40001", "40P01")  # the last two: serialization failure, deadlock


class Claimed(NamedTuple):
    """A pending request as the leader sees it; `claimed_at` is the server's clock.

    `read_limit` is the last version that could be read under the term that the client read under; None: it is the
    present term, whose last version is the durable version; -1: this database does not know that term.
    """

    id: int
    read_limit: int | None
    read_version: int
    payload: bytes
    claimed_at: datetime


class Verdict(NamedTuple):
    """What becomes of one request. `request` is there when it was committed."""

    id: int
    status: str
    version: int | None = None
    reason: str | None = None
    request: Request | None = None


def decide(window: ConflictWindow, durable_version: int, batch: Iterable[Claimed]) -> list[Verdict]:
    """One verdict a request, in order; committed writes enter `window`. Reads no clock and no database."""
    verdicts = []
    version = durable_version
    for claimed in batch:
        verdict = _judge(window, version, claimed)
        if verdict.request:
            version += 1
            request = mutations.with_stamps(verdict.request, version)
            window.record(version, *mutations.writes_of(request))
            verdict = Verdict(claimed.id, "committed", version, None, request)
        verdicts.append(verdict)
    return verdicts


def _judge(window: ConflictWindow, durable_version: int, claimed: Claimed) -> Verdict:
    if claimed.read_version < window.floor:
        return Verdict(claimed.id, "too_old", reason=f"read at {claimed.read_version}, checkable from {window.floor}")
    # A failover to a standby that lagged, or a restored backup: other commits have got, or will get, these versions.
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
    """Resolves requests over `conn` for as long as `term` lasts. Raises Fenced when it is over."""

    def __init__(self, conn: Connection[Any], term: Term, abandon: int | None = None) -> None:
        """`abandon` is a descriptor; when it becomes readable, an answer that has not come is not waited for."""
        self._conn = conn
        self._pipeline = Pipeline(conn, abandon=abandon)
        self._term = term
        self._floor = QueueFloor(term.queue_floor_id)
        self._above_floor = 0
        self._one_by_one_up_to = 0
        self._is_working = False
        self._keeps_out = False
        self._lock_out_within = LOCK_OUT_WITHIN
        self.has_more = True
        """Whether the last claim left something behind: otherwise a notification will come for what is new."""
        self._recent = self._load(term.conflict_floor, term.window_start_id)
        self._unnoted = 0

    @property
    def durable_version(self) -> int:
        """The version of the last commit that is known of."""
        return self._recent.durable_version

    def _load(self, floor: int, start_id: int) -> RecentCommits:
        """What was committed above a floor, as it is stored (rule I8)."""
        cursor = self._conn.cursor(binary=True)
        _, durable_version = cursor.execute(sql("kv", "read_version")).fetchone() or (0, floor)
        rows = cursor.execute(sql("commits", "window_commits"), [start_id, floor]).fetchall()
        return RecentCommits(floor, durable_version, start_id, [StoredCommit(*row) for row in rows])

    def resolve_batch(self, limit: int = BATCH_LIMIT, *, expected: bool = True) -> int:
        """Claims and settles one batch; returns how many requests it had.

        `expected`: whether there is likely to be one. If not, a look comes first, which is in nobody's way.
        """
        if self._one_by_one_up_to:
            limit = 1
        floor_before = self._floor.id
        batch = self._claim(limit, expected=expected)
        self.has_more = len(batch) == limit or sum(len(claimed.payload) for claimed in batch) >= BATCH_BYTES
        if not batch or batch[-1].id >= self._one_by_one_up_to:
            self._one_by_one_up_to = 0
        if batch:
            self._recent.expire(batch[0].claimed_at)
            verdicts = decide(self._recent.window, self._recent.durable_version, batch)
            if not self._settle(verdicts, batch[0].claimed_at):
                self.has_more = True
                return len(batch)
            self._floor.settled_up_to(batch[-1].id)
        if not self.has_more:
            self._floor.everything_settled()
            if len(batch) <= 1:
                self._rest()
        self._above_floor = 0 if self._floor.id > floor_before else self._above_floor + len(batch)
        if self._above_floor > OBSERVE_AFTER:
            self._observe_writers()
        self._note_floors()
        return len(batch)

    def _observe_writers(self) -> None:
        """For the next claim, and after the clients have been told: nobody waits for this."""
        if not self._floor.is_clear:
            self._floor.observe(*self._pipeline.fetch(sql("commits", "queue_writers"), [])[0])

    def _claim(self, limit: int, *, expected: bool) -> list[Claimed]:
        # Of a payload that is too large, one byte more than may be shows that it is.
        arguments = [int8(self._floor.id), int4(limit), int8(BATCH_BYTES), int4(codec.MAX_TRANSACTION_BYTES + 1)]
        arguments.append(self._term.term_id.bytes)
        claim = (sql("commits", "claim"), arguments)
        if self._keeps_out:
            rows = self._pipeline.run([claim])[0]
        elif expected or self._is_working or self._look(claim):
            rows = self._begin_work(claim)
        else:
            rows = []
        return [Claimed(*row) for row in rows]

    def _begin_work(self, claim: BoundStatement) -> list[tuple[Any, ...]]:
        """Keeps lone commits out, and claims; one of them that does not end must not stop everybody else."""
        self._is_working = True
        try:
            rows = self._look(claim, (sql("commits", "lock_out_lone_commits"), [self._lock_out_within]))
            self._keeps_out, self._lock_out_within = True, LOCK_OUT_WITHIN
        except psycopg.errors.LockNotAvailable:
            self._lock_out_within = LOCK_OUT_AGAIN
            rows = self._look(claim)
        return rows

    def _rest(self) -> None:
        """Until there is more to do, clients may commit alone."""
        self._is_working = False
        if self._keeps_out:
            self._keeps_out = False
            self._pipeline.fetch(sql("commits", "let_lone_commits_in"), [])

    def _look(self, claim: BoundStatement, *before: BoundStatement) -> list[tuple[Any, ...]]:
        """What a claim finds, once what was committed without the leader is in the window."""
        known = [int8(self._recent.last_id), int8(self._recent.durable_version)]
        *_, commits, rows = self._pipeline.run([*before, (sql("commits", "window_commits"), known), claim])
        if not self._recent.add_stored([StoredCommit(*commit) for commit in commits]):
            self._recent = self._load(self._recent.window.floor, self._window_start_id())
        self._above_floor += len(commits)
        self._unnoted += len(commits)
        return rows

    def _note_floors(self) -> None:
        """A batch notes them with it. Where all commit alone there is none, and a successor would have to read far."""
        if self._unnoted > NOTE_AFTER:
            self._unnoted = 0
            term = [int8(self._term.epoch), self._term.term_id.bytes]
            if not self._pipeline.fetch(sql("lease", "raise_floors"), [*term, *self._floors()]):
                raise Fenced("this leadership is over")

    def _settle(self, verdicts: Sequence[Verdict], now: datetime) -> bool:
        """Applies a batch; False when it was undone and has to be claimed again."""
        start_id = self._window_start_id()
        try:
            self._apply(verdicts)
        except psycopg.Error as error:
            if error.sqlstate not in IN_THE_WAY and not _lies_in_the_data(error):
                raise
            self._recent = self._load(self._recent.window.floor, start_id)
            if error.sqlstate not in IN_THE_WAY:
                self._isolate(verdicts, error)
            return False
        if committed := [verdict.id for verdict in verdicts if verdict.version is not None]:
            self._recent.add_durable(now, _last_version(verdicts, self._recent.durable_version), committed)
        self._unnoted = 0
        return True

    def _window_start_id(self) -> int:
        """No commit of the window, nor any to come, has an id at or below this."""
        return min([self._floor.id, *(period.first_id - 1 for period in self._recent.periods)])

    def _floors(self) -> list[bytes]:
        return [*map(int8, [self._recent.window.floor, self._window_start_id(), self._floor.id])]

    def _apply(self, verdicts: Sequence[Verdict]) -> None:
        """One transaction, sent as one unit: a pipeline without BEGIN is atomic up to its end."""
        write_set = self._folded(verdicts)
        statements: list[BoundStatement] = []
        if write_set:
            writes = [*bytea_columns(write_set.ranges), bytea_array(write_set.removed)]
            writes += bytea_columns(write_set.written.items())
            statements.append((sql("commits", "write_data"), writes))
        statements.append((sql("commits", "settle"), self._settlement(verdicts)))
        with fence_shown():
            self._pipeline.run(statements)

    def _folded(self, verdicts: Sequence[Verdict]) -> WriteSet:
        """The net effect of the batch. If anybody wrote after what is read here was read, its settlement fails."""
        write_set = mutations.fold(m for verdict in verdicts if verdict.request for m in verdict.request.mutations)
        if undecided := write_set.undecided:
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
        """Has the requests of a refused batch tried one by one; a single one is rejected with the reason."""
        if len(verdicts) > 1:
            self._one_by_one_up_to = verdicts[-1].id
            return
        reason = error.diag.message_primary or type(error).__name__
        self._apply([Verdict(verdicts[0].id, "rejected", reason=reason)])


@contextmanager
def fence_shown() -> Iterator[None]:
    """Within the block, PostgreSQL's word that this leadership is over leaves as Fenced."""
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate == FENCED:
            raise Fenced(error.diag.message_primary or "this leadership is over") from None
        raise


class QueueFloor:
    """Below or at `id` nothing is pending, now or later. The module's docstring says why. Pure."""

    def __init__(self, floor_id: int) -> None:
        self.id = floor_id
        self._last_id = floor_id
        self._writers: OpenTransactions | None = None
        self.is_clear = False
        """Whether nobody is left who could write up to the last id that was noted."""

    def observe(self, last_id: int, writers: Iterable[str]) -> None:
        """Before a claim: notes who may still write up to the last id, or sees that they are gone."""
        if self._writers is None:
            self._last_id, self._writers = last_id, OpenTransactions(writers)
        else:
            self._writers.keep(writers)
        self.is_clear = not self._writers

    def everything_settled(self) -> None:
        """After a claim that held all there was, and its settlement."""
        self.settled_up_to(self._last_id)

    def settled_up_to(self, last_settled: int) -> None:
        """After a claim whose last request was this id, and its settlement."""
        if self.is_clear and last_settled >= self._last_id:
            self.id = max(self.id, self._last_id)
            self._writers, self.is_clear = None, False


def _lies_in_the_data(error: psycopg.Error) -> bool:
    """Whether PostgreSQL refused what was to be written, rather than when or by whom: classes 22, 23 and 54."""
    return (error.sqlstate or "").startswith(("22", "23", "54"))


def _last_version(verdicts: Sequence[Verdict], otherwise: int) -> int:
    return max((verdict.version for verdict in verdicts if verdict.version is not None), default=otherwise)
