"""Reading keys and ranges in one snapshot, together with the durable version of that very snapshot (rule I4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psycopg

from pgcoord_cli.core.codec import PAST_THE_LAST_KEY, Range
from pgcoord_cli.core.grouping import Grouping
from pgcoord_cli.core.pool import Pool
from pgcoord_cli.db.binary import bool_array, bytea_array, int8_array, integer
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.lane import Lane
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed

GROUP_LIMIT = 500

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


class Wanted(NamedTuple):
    """Keys and ranges to read in one snapshot."""

    keys: tuple[bytes, ...] = ()
    ranges: tuple[RangeRead, ...] = ()


class Snapshot(NamedTuple):
    """What one snapshot of PostgreSQL holds of what was wanted; an absent key has None."""

    epoch: int
    version: int
    values: dict[bytes, bytes | None]
    rows: dict[RangeRead, Rows]


class SnapshotReader:
    """Reads for many transactions at once: what is wanted while a statement is in flight shares the next one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._group = Grouping(self._read_group, GROUP_LIMIT)

    async def read(self, wanted: Wanted) -> Snapshot:
        """A snapshot that holds at least what is wanted; whoever asked at the same time shares it.

        What fails is tried once more, over a new connection where the old one broke; raises PgcoordError after that.
        """
        try:
            return await self._group(wanted)
        except (psycopg.Error, ConnectionFailed):
            with mapped_errors():
                return await self._group(wanted)

    async def _read_group(self, group: Sequence[Wanted]) -> Sequence[Snapshot]:
        keys = list({key for wanted in group for key in wanted.keys})
        ranges = list({interval for wanted in group for interval in wanted.ranges})
        async with self._pool.lane() as lane:
            snapshot = await (_read_all(lane, keys, ranges) if ranges else _read_keys(lane, keys))
        return [snapshot] * len(group)


async def _read_keys(lane: Lane, keys: list[bytes]) -> Snapshot:
    found = await lane.fetch(sql("kv", "read_keys"), [bytea_array(keys)])
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    values.update((key, value) for _, _, key, value in found if key is not None)
    return Snapshot(integer(found[0][0]), integer(found[0][1]), values, {})


async def _read_all(lane: Lane, keys: list[bytes], ranges: list[RangeRead]) -> Snapshot:
    """Keys and ranges in one statement, hence in one snapshot."""
    bounds = [
        bytea_array([interval.begin for interval in ranges]),
        bytea_array([PAST_THE_LAST_KEY if interval.end is None else interval.end for interval in ranges]),
        int8_array([interval.limit for interval in ranges]),
        bool_array([interval.reverse for interval in ranges]),
    ]
    found = await lane.fetch(sql("kv", "read_snapshot"), [bytea_array(keys), *bounds])
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    rows: dict[int, list[tuple[bytes, bytes]]] = {}
    for _, _, part, key, value in found:
        if key is not None and value is not None:
            if place := integer(part):
                rows.setdefault(place, []).append((key, value))
            else:
                values[key] = value
    in_order = {
        interval: tuple(sorted(rows.get(place, ()), reverse=interval.reverse))
        for place, interval in enumerate(ranges, start=1)
    }
    return Snapshot(integer(found[0][0]), integer(found[0][1]), values, in_order)
