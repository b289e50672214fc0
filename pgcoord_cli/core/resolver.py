"""The resolver: drains the queue of commit requests under one leadership.

**A batch** is claimed (the oldest pending requests, no locks), decided in memory, folded into one write set, and
applied in one PostgreSQL transaction that is sent as a whole, so that a leader that freezes leaves none open half
way: remove ranges, remove keys, write keys, and at the end `settle_commits`, which sets the statuses, checks the
fence, advances the durable version and wakes the clients. Either all of it happens or nothing (rules I2, I5).

**Deciding.** In queue order: a payload that cannot be decoded is `rejected`; a read version below the conflict floor
is `too_old`; one from the future is `rejected` (a database restored from a backup has them); a request whose reads
were written since is a `conflict`; any other gets the next version and its writes enter the window at once, so
that later requests of the same batch are checked against it.

**When PostgreSQL refuses a batch** for a reason that lies in the data, the window is rebuilt and the same requests are
tried one by one; the one that is refused alone is `rejected` with PostgreSQL's reason (rule I6). When it undoes a
batch because somebody else was in the way, the window is rebuilt and the batch is claimed again.

**When the fate of a batch is unknown**, because the connection broke, nothing is retried: the leadership ends, and
whoever leads next, perhaps this very process, starts from what the database holds.

**The queue floor.** Ids become visible out of order, so "above the last id seen" would miss requests. The resolver
notes the last id drawn and the transactions that hold a row-exclusive lock on the queue; those are the only ones that
can still bring an id up to there to light. When all of them are gone, and a claim made after that has been
settled, every id up to the noted one is settled for ever, and claims start above it. So a claim costs what is
new, not what is stored; raising the floor costs something too, so that a few hundred settled requests are let be. After
a restart, a prepared transaction goes by another name than before, so each of those counts (`core.writers`).

**Plans.** Every statement here looks rows up by index, whatever the statistics say, so the session has them planned
once and for that (`session.plan_once`): planning anew cost more than all else in a small batch, and a plan made while
a table was empty must not scan it when it is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import psycopg
from psycopg import Connection

from pgcoord_cli.core import codec, mutations
from pgcoord_cli.core.codec import Mutation, Op, Range, Request, Undecodable
from pgcoord_cli.core.conflicts import ConflictWindow
from pgcoord_cli.core.lease import Term
from pgcoord_cli.core.mutations import WriteSet
from pgcoord_cli.core.writers import Writers
from pgcoord_cli.db.binary import bytea_array, int4, int8, int8_array, text_array
from pgcoord_cli.db.pipeline import Pipeline, Statement
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Fenced

BATCH_LIMIT = 1_000
BATCH_BYTES = 50_000_000
"""A batch ends with the payload that reaches this; PostgreSQL takes no statement of more than a gigabyte."""

OBSERVE_AFTER = 200
"""So many settled requests above the queue floor cost a claim less than raising the floor would."""

CONFLICT_WINDOW = timedelta(seconds=6)
"""How long after a commit its writes can still be checked against; older reads are too_old.

A second more than a transaction may take, so that one that was just in time can wait for its turn. Not much more,
since a new leader has to read all commits of this time before it begins.
"""

FENCED = "PC001"
ALREADY_SETTLED = "PC002"
IN_THE_WAY = (ALREADY_SETTLED, "40001", "40P01")  # the latter two: serialization failure, deadlock


class Claimed(NamedTuple):
    """A pending request as the leader sees it; `claimed_at` is the server's clock."""

    id: int
    epoch: int
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


def writes_of(request: Request) -> tuple[list[bytes], list[Range]]:
    """The keys and the ranges that later reads are checked against; of a request whose versionstamps are in. Pure."""
    keys = [key for op, key, _ in request.mutations if op != Op.CLEAR_RANGE]
    ranges = [(key, end) for op, key, end in request.mutations if op == Op.CLEAR_RANGE]
    return keys, [*ranges, *request.write_ranges]


def stored_writes(payload: bytes, version: int) -> tuple[list[bytes], list[Range]]:
    """The same of a stored commit, from its payload and its version. Pure."""
    keys: list[bytes] = []
    stored, ranges = codec.decode_stored(payload)
    for op, key, operand in stored:
        if op == Op.CLEAR_RANGE:
            ranges.append((key, operand))
        elif op == Op.SET_VERSIONSTAMPED_KEY:
            keys.append(mutations.stamped(Mutation(Op(op), key, operand), version).key)
        else:
            keys.append(key)
    return keys, ranges


def with_stamps(request: Request, version: int) -> Request:
    """The request as its commit version makes it: versionstamped mutations have become plain ones. Pure."""
    for mutation in request.mutations:
        if mutation.op >= Op.SET_VERSIONSTAMPED_KEY:
            break
    else:
        return request
    return request._replace(mutations=tuple(mutations.stamped(m, version) for m in request.mutations))


def decide(window: ConflictWindow, durable_version: int, batch: Iterable[Claimed]) -> list[Verdict]:
    """One verdict a request, in order; committed writes enter `window`. Reads no clock and no database."""
    verdicts = []
    version = durable_version
    for claimed in batch:
        verdict = _judge(window, version, claimed)
        if verdict.request:
            version += 1
            request = with_stamps(verdict.request, version)
            window.record(version, *writes_of(request))
            verdict = Verdict(claimed.id, "committed", version, None, request)
        verdicts.append(verdict)
    return verdicts


def _judge(window: ConflictWindow, durable_version: int, claimed: Claimed) -> Verdict:
    if claimed.read_version < window.floor:
        return Verdict(claimed.id, "too_old", reason=f"read at {claimed.read_version}, checkable from {window.floor}")
    if claimed.read_version > durable_version:
        return Verdict(claimed.id, "rejected", reason=f"read version {claimed.read_version} was never committed")
    try:
        request = codec.decode(claimed.payload)
    except Undecodable as error:
        return Verdict(claimed.id, "rejected", reason=str(error))
    if window.conflicts(claimed.read_version, request.read_keys, request.read_ranges):
        return Verdict(claimed.id, "conflict")
    return Verdict(claimed.id, "committed", request=request)


def rebuild(
    floor: int, durable_version: int, commits: Sequence[tuple[int, int, bytes, datetime]]
) -> tuple[ConflictWindow, Marks]:
    """The window as a leader that never stopped would have it, from stored commits in version order. Pure.

    A commit is its id, version, payload and time. Versions are dense, so what is missing shows: below the last gap
    nothing can be checked.
    """
    whole_from = durable_version - _dense_tail([version for _, version, _, _ in commits], durable_version)
    window, marks = ConflictWindow(max(floor, whole_from)), Marks()
    for request_id, version, payload, resolved_at in commits:
        if version > window.floor:
            window.record(version, *stored_writes(payload, version))
            marks.add(resolved_at, version, request_id)
    return window, marks


class Resolver:
    """Resolves requests over `conn` for as long as `term` lasts. Raises Fenced when it is over."""

    def __init__(self, conn: Connection[Any], term: Term) -> None:
        self._conn = conn
        self._pipeline = Pipeline(conn)
        self._term = term
        self._durable_version = term.durable_version
        self._floor = QueueFloor(term.queue_floor_id)
        self._above_floor = 0
        self._one_by_one_up_to = 0
        self.has_more = True
        """Whether the last claim left something behind: otherwise a notification will come for what is new."""
        self._load_window(term.conflict_floor, term.window_start_id)

    @property
    def durable_version(self) -> int:
        """The version of the last commit under this term, or the one it continued from."""
        return self._durable_version

    def _load_window(self, floor: int, start_id: int) -> None:
        """Builds the window from the requests that are stored (rule I8)."""
        cursor = self._conn.cursor(binary=True).execute(sql("commits", "window_commits"), [start_id, floor])
        self._window, self._marks = rebuild(floor, self._durable_version, cursor.fetchall())

    def resolve_batch(self, limit: int = BATCH_LIMIT) -> int:
        """Claims and settles one batch; returns how many requests it had."""
        if self._one_by_one_up_to:
            limit = 1
        floor_before = self._floor.id
        batch = self._claim(limit)
        self.has_more = len(batch) == limit or sum(len(claimed.payload) for claimed in batch) >= BATCH_BYTES
        if not batch or batch[-1].id >= self._one_by_one_up_to:
            self._one_by_one_up_to = 0
        if batch:
            self._window.raise_floor(self._marks.forget(batch[0].claimed_at - CONFLICT_WINDOW))
            verdicts = decide(self._window, self._durable_version, batch)
            if not self._settle(verdicts, batch[0].claimed_at):
                self.has_more = True
                return len(batch)
            self._floor.settled_up_to(batch[-1].id)
        if not self.has_more:
            self._floor.everything_settled()
        self._above_floor = 0 if self._floor.id > floor_before else self._above_floor + len(batch)
        if self._above_floor > OBSERVE_AFTER:
            self._observe_writers()
        return len(batch)

    def _observe_writers(self) -> None:
        """For the next claim, and after the clients have been told: nobody waits for this."""
        if not self._floor.is_clear:
            self._floor.observe(*self._pipeline.fetch(sql("commits", "queue_writers"), [])[0])

    def _claim(self, limit: int) -> list[Claimed]:
        # Of a payload that is too large, one byte more than may be shows that it is.
        arguments = [int8(self._floor.id), int4(limit), int8(BATCH_BYTES), int4(codec.MAX_TRANSACTION_BYTES + 1)]
        return [Claimed(*row) for row in self._pipeline.fetch(sql("commits", "claim"), arguments)]

    def _settle(self, verdicts: Sequence[Verdict], now: datetime) -> bool:
        """Applies a batch; False when it was undone and has to be claimed again."""
        start_id = self._window_start_id()
        try:
            self._apply(verdicts)
        except psycopg.Error as error:
            if error.sqlstate not in IN_THE_WAY and not _lies_in_the_data(error):
                raise
            self._load_window(self._window.floor, start_id)
            if error.sqlstate not in IN_THE_WAY:
                self._isolate(verdicts, error)
            return False
        self._durable_version = _last_version(verdicts, self._durable_version)
        if committed := [verdict.id for verdict in verdicts if verdict.version is not None]:
            self._marks.add(now, self._durable_version, min(committed))
        return True

    def _window_start_id(self) -> int:
        """No commit of the window, nor any to come, has an id at or below this."""
        return min([self._floor.id, *(mark.first_id - 1 for mark in self._marks)])

    def _apply(self, verdicts: Sequence[Verdict]) -> None:
        """One transaction, sent as one unit: a pipeline without BEGIN is atomic up to its end."""
        write_set = self._folded(verdicts)
        statements: list[Statement] = []
        if write_set.ranges:
            statements.append((sql("commits", "delete_ranges"), _bytea_columns(write_set.ranges)))
        if write_set.removed:
            statements.append((sql("commits", "delete_keys"), [bytea_array(write_set.removed)]))
        if write_set.written:
            statements.append((sql("commits", "upsert_keys"), _bytea_columns(write_set.written.items())))
        statements.append((sql("commits", "settle"), self._settlement(verdicts)))
        with fence_shown():
            self._pipeline.run(statements)

    def _folded(self, verdicts: Sequence[Verdict]) -> WriteSet:
        """The net effect of the batch. Nobody else writes under this leadership, so what is read here still holds."""
        write_set = mutations.fold(m for verdict in verdicts if verdict.request for m in verdict.request.mutations)
        if undecided := write_set.undecided:
            cursor = self._conn.cursor(binary=True)
            write_set.decide(dict(cursor.execute(sql("commits", "stored_values"), [undecided]).fetchall()))
        return write_set

    def _settlement(self, verdicts: Sequence[Verdict]) -> list[bytes]:
        version_after = _last_version(verdicts, self._durable_version)
        floors = [self._window.floor, self._window_start_id(), self._floor.id]
        ids, statuses, versions, reasons, _ = zip(*verdicts, strict=True)
        return [
            int8(self._term.epoch),
            self._term.term_id.bytes,
            *map(int8, [self._durable_version, version_after, *floors]),
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


class Mark(NamedTuple):
    """A stretch of commits: the last began at `committed_at` and has `version`; none has an id below `first_id`."""

    committed_at: datetime
    version: int
    first_id: int


class Marks:
    """When the commits of the window were made, in stretches of half a second. Iterates oldest first."""

    GRAIN = timedelta(seconds=0.5)

    def __init__(self) -> None:
        self._marks: deque[Mark] = deque()
        self._stretch_began: datetime | None = None
        self._forgotten = 0

    def __iter__(self) -> Iterator[Mark]:
        return iter(self._marks)

    def add(self, committed_at: datetime, version: int, first_id: int) -> None:
        """Notes commits up to `version`, none with an id below `first_id`."""
        if self._marks and self._stretch_began and committed_at - self._stretch_began < self.GRAIN:
            last = self._marks.pop()
            first_id = min(first_id, last.first_id)
        else:
            self._stretch_began = committed_at
        self._marks.append(Mark(committed_at, version, first_id))

    def forget(self, before: datetime) -> int:
        """Drops the stretches that ended before a time; returns the last version that was ever dropped, or 0."""
        while self._marks and self._marks[0].committed_at < before:
            self._forgotten = self._marks.popleft().version
        return self._forgotten


class QueueFloor:
    """Below or at `id` nothing is pending, now or later. The module's docstring says why. Pure."""

    def __init__(self, floor_id: int) -> None:
        self.id = floor_id
        self._last_id = floor_id
        self._writers: Writers | None = None
        self.is_clear = False
        """Whether nobody is left who could write up to the last id that was noted."""

    def observe(self, last_id: int, writers: Iterable[str]) -> None:
        """Before a claim: notes who may still write up to the last id, or sees that they are gone."""
        if self._writers is None:
            self._last_id, self._writers = last_id, Writers(writers)
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


def _dense_tail(versions: Sequence[int], last: int) -> int:
    """How many of the versions, which ascend, lead up to `last` without a gap."""
    count = 0
    for version in reversed(versions):
        if version != last - count:
            break
        count += 1
    return count


def _last_version(verdicts: Sequence[Verdict], otherwise: int) -> int:
    return max((verdict.version for verdict in verdicts if verdict.version is not None), default=otherwise)


def _bytea_columns(pairs: Iterable[tuple[bytes, bytes | None]]) -> list[bytes]:
    """Pairs turned into the two parallel arrays that `unnest` takes."""
    firsts, seconds = zip(*pairs, strict=True)
    return [bytea_array(firsts), bytea_array(seconds)]
