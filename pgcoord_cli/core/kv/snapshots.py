"""Reading keys and ranges in one PostgreSQL snapshot, together with the durable version of that snapshot (rule I4).

Data and durable version come from one statement, since two statements would see two snapshots, and a commit between
them would make the version wrong for the data. Reads of many transactions share a statement: those that arrive while
one is in flight go out together in the next one (`core.concurrency.batcher`).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import psycopg

from pgcoord_cli.core.commits.codec import PAST_THE_LAST_KEY, Range
from pgcoord_cli.core.concurrency.batcher import Batcher
from pgcoord_cli.core.database.pool import Pool
from pgcoord_cli.db.binary import bool_array, bytea_array, int8_array, integer
from pgcoord_cli.db.callback_connection import Answer, Row
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, PgcoordError

BATCH_LIMIT = 500
"""Reads, of one or more keys and ranges each, that share a statement at most."""

RETRIES = 2
"""Attempts at a read whose failure is not raised: one for a lost connection, one for the first of its replacements."""

Rows = tuple[tuple[bytes, bytes], ...]
"""Keys with their values, in the order in which the range was read."""


class RangeRead(NamedTuple):
    """A half-open range to read: at most `limit` rows (None: all), from its end backwards if `reverse`."""

    begin: bytes
    end: bytes | None
    limit: int | None = None
    reverse: bool = False

    def seen(self, rows: Rows) -> Range:
        """Returns the part of the range that `rows` determine: if they reach the limit, it ends at the last of them.

        Beyond that row nothing was read, so a write there is no conflict.
        """
        if self.limit is None or len(rows) < self.limit or not rows:
            return self.begin, self.end
        last = rows[-1][0]
        return (last, self.end) if self.reverse else (self.begin, last + b"\0")


class ReadSet(NamedTuple):
    """Keys and ranges to read in one snapshot."""

    keys: tuple[bytes, ...] = ()
    ranges: tuple[RangeRead, ...] = ()


class Snapshot(NamedTuple):
    """The keys and ranges that were read in one snapshot, and what they were read under. Absent keys have None.

    `epoch`, `term_id` (16 bytes; None: no leader was ever elected) and `version`, the durable version, are those of the
    same snapshot: the resolver judges the read by all three.
    """

    epoch: int
    term_id: bytes | None
    version: int
    values: dict[bytes, bytes | None]
    rows: dict[RangeRead, Rows]


class PendingRead(NamedTuple):
    """A read that waits for its statement, and the future of its snapshot."""

    read_set: ReadSet
    snapshot: asyncio.Future[Snapshot]


class SnapshotReader:
    """Reads snapshots for the transactions of one client, one statement in flight at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._batcher = Batcher(self._send, _fail, BATCH_LIMIT)

    async def read(self, read_set: ReadSet) -> Snapshot:
        """Returns a snapshot that contains at least `read_set`; reads of the same batch share it.

        Retries a read that failed, over a new connection if the old one was lost. Raises PgcoordError when it has
        failed RETRIES times and once more.
        """
        for _ in range(RETRIES):
            with suppress(psycopg.Error, ConnectionFailed):
                return await self._read_once(read_set)
        with mapped_errors():
            return await self._read_once(read_set)

    def _read_once(self, read_set: ReadSet) -> asyncio.Future[Snapshot]:
        read = PendingRead(read_set, self._loop.create_future())
        self._batcher.add(read)
        return read.snapshot

    def _send(self, batch: list[PendingRead]) -> None:
        # Each key and range once, however many reads of the batch have it.
        keys = list({key for read in batch for key in read.read_set.keys})
        ranges = list({interval for read in batch for interval in read.read_set.ranges})
        done = partial(self._on_answer, batch, keys, ranges)
        # Most reads are of keys only, for which the server has a smaller plan to run.
        if ranges:
            self._pool.run(sql("kv", "read_snapshot"), [bytea_array(keys), *_bounds(ranges)], done)
        else:
            self._pool.run(sql("kv", "read_keys"), [bytea_array(keys)], done)

    def _on_answer(self, batch: list[PendingRead], keys: list[bytes], ranges: list[RangeRead], answer: Answer) -> None:
        # The next batch goes out before these callers continue, so that the server works in the meantime.
        self._batcher.succeeded()
        found = _snapshot(keys, ranges, answer)
        if isinstance(found, Exception):
            _fail(batch, found)
            return
        for read in batch:
            if not read.snapshot.done():  # done: its caller was cancelled
                read.snapshot.set_result(found)


def _fail(batch: list[PendingRead], error: Exception) -> None:
    for read in batch:
        if not read.snapshot.done():
            read.snapshot.set_exception(error)


def _bounds(ranges: list[RangeRead]) -> list[bytes]:
    # A comparison with null would be null, so that a range without an end has one past every key.
    return [
        bytea_array([interval.begin for interval in ranges]),
        bytea_array([PAST_THE_LAST_KEY if interval.end is None else interval.end for interval in ranges]),
        int8_array([interval.limit for interval in ranges]),
        bool_array([interval.reverse for interval in ranges]),
    ]


def _snapshot(keys: list[bytes], ranges: list[RangeRead], answer: Answer) -> Snapshot | Exception:
    """Reads an answer. Returns an error instead of raising it, so that the caller can hand it to the whole batch."""
    if isinstance(answer, Exception):
        return answer
    # Even without a single key found, the statement returns one row with epoch and version.
    if not answer:
        return PgcoordError("the table leader_lease has no row", hint="restore the table from a backup")
    return _parsed(keys, ranges, answer)


def _parsed(keys: list[bytes], ranges: list[RangeRead], found: list[Row]) -> Snapshot:
    epoch, term_id, version = integer(found[0][0]), found[0][1], integer(found[0][2])
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    if not ranges:
        values.update((key, value) for _, _, _, key, value in found if key is not None)
        return Snapshot(epoch, term_id, version, values, {})
    rows: dict[int, list[tuple[bytes, bytes]]] = {}
    for _, _, _, part, key, value in found:
        if key is not None and value is not None:
            if place := integer(part):  # 0 is the part of the single keys
                rows.setdefault(place, []).append((key, value))
            else:
                values[key] = value
    # The statement merges its parts in any order.
    in_order = {
        interval: tuple(sorted(rows.get(place, ()), reverse=interval.reverse))
        for place, interval in enumerate(ranges, start=1)
    }
    return Snapshot(epoch, term_id, version, values, in_order)
