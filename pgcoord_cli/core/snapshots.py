"""Reading keys and ranges in one snapshot, together with the durable version of that very snapshot (rule I4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection

from pgcoord_cli.core.codec import Range
from pgcoord_cli.core.grouping import Grouping
from pgcoord_cli.core.pool import Pool
from pgcoord_cli.db.connection import mapped_errors
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

    def only(self, wanted: Wanted) -> Snapshot:
        """The part that one reader asked for."""
        values = {key: self.values[key] for key in wanted.keys}
        return self._replace(values=values, rows={interval: self.rows[interval] for interval in wanted.ranges})

    def agrees_with(self, earlier: Snapshot) -> bool:
        """Whether everything that the earlier snapshot holds is the same here."""
        return all(self.values[key] == value for key, value in earlier.values.items()) and all(
            self.rows[interval] == rows for interval, rows in earlier.rows.items()
        )


class SnapshotReader:
    """Reads for many transactions at once: what is wanted while a statement is in flight shares the next one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._group = Grouping(self._read_group, GROUP_LIMIT)

    async def read(self, wanted: Wanted) -> Snapshot:
        """What one snapshot holds. A broken connection is replaced once; raises ConnectionFailed after that."""
        with mapped_errors():
            try:
                return await self._group(wanted)
            except (psycopg.OperationalError, ConnectionFailed):
                return await self._group(wanted)

    async def _read_group(self, group: Sequence[Wanted]) -> Sequence[Snapshot]:
        keys = list({key for wanted in group for key in wanted.keys})
        ranges = list({interval for wanted in group for interval in wanted.ranges})
        async with self._pool.connection() as conn:
            snapshot = await (_read_all(conn, keys, ranges) if ranges else _read_keys(conn, keys))
        return [snapshot.only(wanted) for wanted in group]


async def _read_keys(conn: AsyncConnection[Any], keys: list[bytes]) -> Snapshot:
    """One statement, hence one snapshot."""
    cursor = conn.cursor(binary=True)
    await cursor.execute(sql("kv", "read_keys"), [keys])
    return _snapshot(keys, await cursor.fetchall(), {})


async def _read_all(conn: AsyncConnection[Any], keys: list[bytes], ranges: list[RangeRead]) -> Snapshot:
    """Several statements in one snapshot, sent together."""
    await conn.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
    cursors = [conn.cursor(binary=True) for _ in ranges]
    key_cursor = conn.cursor(binary=True)
    async with conn.pipeline(), conn.transaction():
        await key_cursor.execute(sql("kv", "read_keys"), [keys])
        for cursor, (begin, end, limit, reverse) in zip(cursors, ranges, strict=True):
            await cursor.execute(sql("kv", "read_range_reverse" if reverse else "read_range"), [begin, end, limit])
    rows = {interval: tuple(await cursor.fetchall()) for interval, cursor in zip(ranges, cursors, strict=True)}
    return _snapshot(keys, await key_cursor.fetchall(), rows)


def _snapshot(keys: list[bytes], found: Sequence[Any], rows: dict[RangeRead, Rows]) -> Snapshot:
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    values.update((key, value) for _, _, key, value in found if key is not None)
    return Snapshot(found[0][0], found[0][1], values, rows)
