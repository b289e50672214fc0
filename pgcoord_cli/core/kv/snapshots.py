"""Reading keys and ranges in one snapshot, together with the durable version of that very snapshot (rule I4)."""

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
RETRIES = 2

Rows = tuple[tuple[bytes, bytes], ...]


class RangeRead(NamedTuple):
    """A half-open range to read: at most `limit` rows, from its end if `reverse`."""

    begin: bytes
    end: bytes | None
    limit: int | None = None
    reverse: bool = False

    def seen(self, rows: Rows) -> Range:
        """The part of the range that `rows` speak of: where the limit was reached, it ends at the last of them."""
        if self.limit is None or len(rows) < self.limit or not rows:
            return self.begin, self.end
        last = rows[-1][0]
        return (last, self.end) if self.reverse else (self.begin, last + b"\0")


class ReadSet(NamedTuple):
    """Keys and ranges to read in one snapshot."""

    keys: tuple[bytes, ...] = ()
    ranges: tuple[RangeRead, ...] = ()


class Snapshot(NamedTuple):
    """What one snapshot of PostgreSQL holds of what was wanted; an absent key has None."""

    epoch: int
    term_id: bytes | None
    version: int
    values: dict[bytes, bytes | None]
    rows: dict[RangeRead, Rows]


class PendingRead(NamedTuple):
    """A read that waits for the next statement, and the future of its snapshot."""

    wanted: ReadSet
    snapshot: asyncio.Future[Snapshot]


class SnapshotReader:
    """Reads for many transactions at once: the reads that arrive while a statement is in flight share the next one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._batcher = Batcher(self._send, _fail, BATCH_LIMIT)

    async def read(self, wanted: ReadSet) -> Snapshot:
        """Returns a snapshot that holds at least what is wanted; reads of the same batch share it.

        A read that fails is retried: over a new connection where the old one broke, and over another where the new one
        was terminated while it was being opened. Raises PgcoordError after that.
        """
        for _ in range(RETRIES):
            with suppress(psycopg.Error, ConnectionFailed):
                return await self._read_once(wanted)
        with mapped_errors():
            return await self._read_once(wanted)

    def _read_once(self, wanted: ReadSet) -> asyncio.Future[Snapshot]:
        read = PendingRead(wanted, self._loop.create_future())
        self._batcher.add(read)
        return read.snapshot

    def _send(self, batch: list[PendingRead]) -> None:
        keys = list({key for read in batch for key in read.wanted.keys})
        ranges = list({interval for read in batch for interval in read.wanted.ranges})
        done = partial(self._on_answer, batch, keys, ranges)
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
            if not read.snapshot.done():
                read.snapshot.set_result(found)


def _fail(batch: list[PendingRead], error: Exception) -> None:
    for read in batch:
        if not read.snapshot.done():
            read.snapshot.set_exception(error)


def _bounds(ranges: list[RangeRead]) -> list[bytes]:
    return [
        bytea_array([interval.begin for interval in ranges]),
        bytea_array([PAST_THE_LAST_KEY if interval.end is None else interval.end for interval in ranges]),
        int8_array([interval.limit for interval in ranges]),
        bool_array([interval.reverse for interval in ranges]),
    ]


def _snapshot(keys: list[bytes], ranges: list[RangeRead], answer: Answer) -> Snapshot | Exception:
    """What an answer says. An exception is returned, not raised: others wait for the same statement."""
    if isinstance(answer, Exception):
        return answer
    if not answer:
        return PgcoordError("leader_lease has lost its row", hint="restore it from a backup")
    return _understood(keys, ranges, answer)


def _understood(keys: list[bytes], ranges: list[RangeRead], found: list[Row]) -> Snapshot:
    epoch, term_id, version = integer(found[0][0]), found[0][1], integer(found[0][2])
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    if not ranges:
        values.update((key, value) for _, _, _, key, value in found if key is not None)
        return Snapshot(epoch, term_id, version, values, {})
    rows: dict[int, list[tuple[bytes, bytes]]] = {}
    for _, _, _, part, key, value in found:
        if key is not None and value is not None:
            if place := integer(part):
                rows.setdefault(place, []).append((key, value))
            else:
                values[key] = value
    in_order = {
        interval: tuple(sorted(rows.get(place, ()), reverse=interval.reverse))
        for place, interval in enumerate(ranges, start=1)
    }
    return Snapshot(epoch, term_id, version, values, in_order)
