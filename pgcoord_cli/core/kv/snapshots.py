"""Reading keys and ranges in one PostgreSQL snapshot: as they are now, or as they were at an earlier version (rule I4).

**Now.** The first read of a transaction takes what is stored now, and with it the durable version. Data and version
come from one statement, since two statements would see two snapshots, and a commit between them would make the version
wrong for the data.

**At a version.** Every later read of the transaction sees that version. A single statement looks the replaced values of
the last seconds up in `kv_undo`. It also returns which versions can be read there: not those from before
`kv_undo_floor`, since some of their values are gone, and not those above the last version that this database has of the
term that they were read under, since a failover has lost them. Such a read raises TooOld. While the client has seen no
commit since the version, the read is tried as of now, which costs less; if the durable version turns out to be a later
one, it is sent again.

**Batches.** Reads of many transactions share a statement: those that arrive while one is in flight go out together in
the next one (`core.concurrency.batcher`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import psycopg

from pgcoord_cli.core.commits.codec import PAST_THE_LAST_KEY, Range
from pgcoord_cli.core.concurrency.batcher import Batcher
from pgcoord_cli.core.database.pool import Pool
from pgcoord_cli.db.binary import bool_array, bytea_array, int8, int8_array, integer
from pgcoord_cli.db.callback_connection import Answer, Row, read_answer
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, PgcoordError, Rejected, TooOld

BATCH_LIMIT = 500
"""Reads, of one or more keys and ranges each, that share a statement at most."""

RETRIES = 2
"""Attempts at a read whose failure is not raised: one for a lost connection, one for the first of its replacements."""

Rows = tuple[tuple[bytes, bytes], ...]
"""Keys with their values, in the order in which the range was read."""


Item = TypeVar("Item", bytes, "RangeRead")


class ReadVersion(NamedTuple):
    """A durable version, with the epoch and term of the same snapshot; the resolver judges a read by all three.

    `term_id` has 16 bytes; None: no leader was ever elected.
    """

    epoch: int
    term_id: bytes | None
    version: int


class RangeRead(NamedTuple):
    """A half-open range to read: about `limit` rows (None: all), from its end backwards if `reverse`."""

    begin: bytes
    end: bytes | None
    limit: int | None = None
    reverse: bool = False

    def up_to(self, key: bytes) -> Range:
        """Returns the part of the range that a read which stopped after `key` has seen."""
        return (key, self.end) if self.reverse else (self.begin, key + b"\0")


class Page(NamedTuple):
    """The rows of the part `seen` of a range; the whole range has been read unless `has_more`.

    Beyond `seen` nothing was read, so a write there is no conflict.
    """

    rows: Rows
    seen: Range
    has_more: bool


class ReadSet(NamedTuple):
    """Keys and ranges to read in one snapshot."""

    keys: tuple[bytes, ...] = ()
    ranges: tuple[RangeRead, ...] = ()


class Snapshot(NamedTuple):
    """The keys and ranges that were read of one version. Absent keys have None."""

    version: ReadVersion
    values: dict[bytes, bytes | None]
    pages: dict[RangeRead, Page]


class PendingRead:
    """A read that waits for its statement, of version `at` (None: of now), for one caller or several."""

    __slots__ = ("_callers", "_outcome", "at", "attempts", "is_sent", "read_set")

    def __init__(self, read_set: ReadSet, at: ReadVersion | None) -> None:
        self.read_set = read_set
        self.at = at
        self.attempts = 0
        self.is_sent = False
        self._callers: list[asyncio.Future[Snapshot]] = []
        self._outcome: Snapshot | Exception | None = None

    def join(self, read_set: ReadSet) -> None:
        """Adds to a read that has not been sent."""
        self.read_set = ReadSet(self.read_set.keys + read_set.keys, self.read_set.ranges + read_set.ranges)

    def snapshot(self) -> asyncio.Future[Snapshot]:
        """Returns a future for one caller: each has its own, so that one may be cancelled without the others."""
        caller: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._callers.append(caller)
        if self._outcome is not None:  # before the caller that began the read has continued
            self.settle(self._outcome)
        return caller

    def settle(self, outcome: Snapshot | Exception) -> None:
        """Hands the snapshot, or the error, to the callers that wait, and to those that come."""
        self._outcome = outcome
        for caller in self._callers:
            if caller.done():  # cancelled
                continue
            if isinstance(outcome, Exception):
                caller.set_exception(outcome)
            else:
                caller.set_result(outcome)


class SnapshotReader:
    """Reads snapshots for the transactions of one client, one statement in flight at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._batcher = Batcher(self._send, PendingRead.settle, BATCH_LIMIT)
        # The state of the last answer: reads of this very version and term are tried as of now.
        self._latest: ReadVersion | None = None

    async def read(self, read_set: ReadSet, at: ReadVersion | None = None) -> Snapshot:
        """Returns a snapshot that contains at least `read_set`, of version `at` (None: of now).

        Retries a read that failed, over a new connection if the old one was lost. Raises TooOld if the version can no
        longer be read, PgcoordError when the read has failed RETRIES times and once more, and UsageError in a forked
        child.
        """
        self._pool.require_own_process()
        read = PendingRead(read_set, at)
        self._batcher.add(read)
        with mapped_errors():
            return await read.snapshot()

    def start(self, read: PendingRead) -> None:
        """Sends a read with the next batch; other reads may join it until then. Its errors are those of psycopg."""
        self._pool.require_own_process()
        self._batcher.add(read)

    async def version_at(self, version: int) -> ReadVersion:
        """Returns the first version at or above `version` that a snapshot could see: versions of one batch are one.

        Raises TooOld if it can no longer be read, and Rejected if it was not committed yet.
        """
        answered: asyncio.Future[ReadVersion] = self._loop.create_future()
        self._pool.run(sql("kv", "version_at"), [int8(version)], partial(_on_version, answered, version))
        with mapped_errors():
            return await answered

    def _send(self, batch: list[PendingRead]) -> None:
        # The statement judges the versions of one term. After an election there may be reads of two: those go next.
        term_id = next((read.at.term_id for read in batch if read.at), None)
        self._batcher.add_first([read for read in batch if read.at and read.at.term_id != term_id])
        batch = [read for read in batch if not read.at or read.at.term_id == term_id]
        for read in batch:
            read.is_sent = True
        if all(read.at is None or read.at == self._latest for read in batch):
            self._send_now(batch)
        else:
            self._send_at(batch, term_id)

    def _send_now(self, batch: list[PendingRead]) -> None:
        # Each key and range once, however many reads of the batch have it.
        keys = list({key for read in batch for key in read.read_set.keys})
        ranges = list({interval for read in batch for interval in read.read_set.ranges})
        done = partial(self._on_now, batch, keys, ranges)
        # Most reads are of keys only, for which the server has a smaller plan to run.
        if ranges:
            self._pool.run(sql("kv", "read_snapshot"), [bytea_array(keys), *_bounds(ranges)], done)
        else:
            self._pool.run(sql("kv", "read_keys"), [bytea_array(keys)], done)

    def _send_at(self, batch: list[PendingRead], term_id: bytes | None) -> None:
        keys = _places((key, _number(read)) for read in batch for key in read.read_set.keys)
        ranges = _places((interval, _number(read)) for read in batch for interval in read.read_set.ranges)
        arguments = [
            bytea_array([key for key, _ in keys]),
            int8_array([version for _, version in keys]),
            *_bounds([interval for interval, _ in ranges]),
            int8_array([version for _, version in ranges]),
            term_id,
        ]
        done = partial(self._on_at, batch, keys, ranges)
        if ranges:
            self._pool.run(sql("kv", "read_at"), arguments, done)
        else:  # the server has a smaller plan to run
            self._pool.run(sql("kv", "read_keys_at"), [*arguments[:2], term_id], done)

    def _on_now(self, batch: list[PendingRead], keys: list[bytes], ranges: list[RangeRead], answer: Answer) -> None:
        # The next batch goes out before these callers continue, so that the server works in the meantime.
        self._batcher.succeeded()
        snapshot = read_answer(answer, partial(_snapshot_now, keys, ranges))
        if isinstance(snapshot, Exception):
            self._fail(batch, snapshot)
            return
        self._latest = snapshot.version
        for read in batch:
            if read.at is None or read.at == snapshot.version:
                read.settle(snapshot)
            else:
                self._batcher.add(read)  # a commit came between: now it is not of the latest version any more

    def _on_at(self, batch: list[PendingRead], keys: Places[bytes], ranges: Places[RangeRead], answer: Answer) -> None:
        self._batcher.succeeded()
        found = read_answer(answer, partial(_results_at, batch, keys, ranges))
        if isinstance(found, Exception):
            self._fail(batch, found)
            return
        self._latest, results = found
        for read, result in zip(batch, results, strict=True):
            read.settle(result)

    def _fail(self, batch: Sequence[PendingRead], error: Exception) -> None:
        for read in batch:
            if read.attempts < RETRIES and isinstance(error, psycopg.Error | ConnectionFailed):
                read.attempts += 1
                self._batcher.add(read)
            else:
                read.settle(error)


Places = dict[tuple[Item, int | None], int]
"""What a statement reads, each key or range with its version (None: now), and its place among the arguments, from 1."""


def _places(wanted: Iterable[tuple[Item, int | None]]) -> Places[Item]:
    places: Places[Item] = {}
    for item in wanted:
        places.setdefault(item, len(places) + 1)
    return places


def _number(read: PendingRead) -> int | None:
    return read.at.version if read.at else None


def _bounds(ranges: Sequence[RangeRead]) -> list[bytes]:
    # A comparison with null would be null, so that a range without an end has one past every key.
    return [
        bytea_array([interval.begin for interval in ranges]),
        bytea_array([PAST_THE_LAST_KEY if interval.end is None else interval.end for interval in ranges]),
        int8_array([interval.limit for interval in ranges]),
        bool_array([interval.reverse for interval in ranges]),
    ]


def _first(rows: list[Row]) -> Row:
    # Even without a single key found, each statement returns one row with epoch and version.
    if not rows:
        raise PgcoordError("the table leader_lease has no row", hint="restore the table from a backup")
    return rows[0]


def _results_at(
    batch: list[PendingRead], keys: Places[bytes], ranges: Places[RangeRead], rows: list[Row]
) -> tuple[ReadVersion, list[Snapshot | TooOld]]:
    """Returns the present version, and for each read its snapshot, or why its version cannot be read."""
    state, found = _State.of(_first(rows)), _Found.of(rows)
    return state.version, [
        (read.at and state.refusal(read.at.version)) or found.snapshot(read, read.at or state.version, keys, ranges)
        for read in batch
    ]


def _snapshot_now(keys: list[bytes], ranges: list[RangeRead], found: list[Row]) -> Snapshot:
    epoch, term_id, number, *_ = _first(found)
    version = ReadVersion(integer(epoch), term_id, integer(number))
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    if not ranges:
        values.update((key, value) for _, _, _, key, value in found if key is not None)
        return Snapshot(version, values, {})
    # By the undecoded number of the part, since there are many rows and few parts.
    rows: defaultdict[bytes | None, dict[bytes, bytes]] = defaultdict(dict)
    for _, _, _, part, key, value in found:
        if key is not None and value is not None:
            rows[part][key] = value
    values.update(rows[int8(0)])  # the single keys
    pages = {interval: _page(interval, rows[int8(place)], {}) for place, interval in enumerate(ranges, start=1)}
    return Snapshot(version, values, pages)


def _page(interval: RangeRead, rows: Mapping[bytes, bytes], replaced: Mapping[bytes, bytes | None]) -> Page:
    """Returns the rows of a range with the values that some of them had before; None: absent."""
    # A statement merges its parts in any order.
    if replaced:
        values = sorted({**rows, **replaced}.items(), reverse=interval.reverse)
        before = tuple((key, value) for key, value in values if value is not None)
    else:
        before = tuple(sorted(rows.items(), reverse=interval.reverse))
    has_more = interval.limit is not None and len(rows) >= interval.limit
    if has_more:  # cut off after the last of the rows, and replaced values are those up to there
        last = min(rows, default=b"") if interval.reverse else max(rows, default=b"")
        return Page(before, interval.up_to(last), True)
    return Page(before, (interval.begin, interval.end), False)


class _State(NamedTuple):
    """What can be read: `version`, and earlier ones from `readable_from` (None: none) up to `readable_to`."""

    version: ReadVersion
    readable_from: int | None
    readable_to: int

    @classmethod
    def of(cls, row: Row) -> _State:
        epoch, term_id, version, readable_to, readable_from, *_ = row
        lowest = None if readable_from is None else integer(readable_from)
        return cls(ReadVersion(integer(epoch), term_id, integer(version)), lowest, integer(readable_to))

    def refusal(self, version: int) -> TooOld | None:
        """Returns why a version cannot be read, or None if it can."""
        if version > self.readable_to:
            return TooOld(f"read version {version} was lost with its term", hint="run the transaction again")
        if version != self.version.version and (self.readable_from is None or version < self.readable_from):
            return TooOld(f"version {version} can no longer be read", hint="run the transaction again")
        return None


class _Found(NamedTuple):
    """The rows of a `read_at`, by the places of what was read."""

    values: dict[int, bytes | None]
    rows: dict[int, dict[bytes, bytes]]
    replaced: dict[int, dict[bytes, bytes | None]]

    @classmethod
    def of(cls, answer: list[Row]) -> _Found:
        found = cls({}, {}, {})
        for *_, part, key, value in answer:
            if part is None:  # nothing was asked for but the version
                continue
            place = integer(part)
            if place < 0:
                found.values[-place] = value
            elif key is not None:
                if place % 2:
                    found.replaced.setdefault(place // 2, {})[key] = value
                elif value is not None:
                    found.rows.setdefault(place // 2, {})[key] = value
        return found

    def snapshot(
        self, read: PendingRead, version: ReadVersion, keys: Places[bytes], ranges: Places[RangeRead]
    ) -> Snapshot:
        """Returns what one read of the batch asked for."""
        number = _number(read)
        values = {key: self.values[keys[key, number]] for key in read.read_set.keys}
        pages = {interval: self._page(interval, ranges[interval, number]) for interval in read.read_set.ranges}
        return Snapshot(version, values, pages)

    def _page(self, interval: RangeRead, place: int) -> Page:
        return _page(interval, self.rows.get(place, {}), self.replaced.get(place, {}))


def _on_version(answered: asyncio.Future[ReadVersion], wanted: int, answer: Answer) -> None:
    version = read_answer(answer, partial(_version_at, wanted))
    if answered.done():  # its caller was cancelled
        return
    if isinstance(version, Exception):
        answered.set_exception(version)
    else:
        answered.set_result(version)


def _version_at(wanted: int, rows: list[Row]) -> ReadVersion:
    epoch, term_id, durable, readable_from, version = _first(rows)
    state = _State.of((epoch, term_id, durable, durable, readable_from))
    if wanted > state.readable_to:
        raise Rejected(f"version {wanted} has not been committed", hint=f"the last version is {state.readable_to}")
    if error := state.refusal(wanted):
        raise error
    return state.version._replace(version=integer(version))
