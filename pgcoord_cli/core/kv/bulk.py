"""Many keys at once: loading them from JSON lines, and exporting them.

**Load.** Lines are written in batches, a transaction each. The same transaction writes, under a reserved key that names
the file's contents, how many bytes of it are done, so that the mark and the data can never disagree. A load of the
same contents goes on behind the mark; when everything is loaded, the mark is removed. Keys that begin with 0xff are
reserved for such marks, and an export leaves them out.

**Export.** One snapshot, read a page at a time: a page begins behind the last key of the one before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.kv import reading
from pgcoord_cli.core.kv.client import Database, Transaction, connect
from pgcoord_cli.core.kv.reading import Entry
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import Settings

RESERVED = b"\xff"
PAGE = 1_000


class Source(NamedTuple):
    """An open file of JSON lines. `mark` is the key of its progress, None where it cannot be resumed; size in bytes."""

    stream: IO[bytes]
    name: str
    mark: bytes | None
    size: int | None


class Loaded(NamedTuple):
    """How many keys this call wrote, in how many transactions, and at which byte it went on."""

    loaded: int
    transactions: int
    resumed_at: int


class Line(NamedTuple):
    """One line: a key, its value, and the position behind it."""

    key: bytes
    value: bytes
    end: int


def open_source(name: str) -> Source:
    """Opens the file of that name, whose load can be resumed. Raises UsageError when it cannot be read."""
    path = Path(name)
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Source(path.open("rb"), name, RESERVED + b"pgcoord/load/" + digest.encode(), path.stat().st_size)
    except OSError as error:
        raise UsageError(f"FILE: cannot read {name!r}: {error.strerror}") from None


async def load(
    settings: Settings, source: Source, batch_size: int, seconds: float, advance: Callable[[int], None]
) -> Loaded:
    """Loads all of it; `advance` hears of bytes done. Raises UsageError naming a bad line, and what commits raise."""
    async with await connect(settings, "kv load") as database:
        resumed_at = done = await _resume(database, source)
        advance(done)
        loaded = transactions = 0
        for batch in _batches(source, done, batch_size):
            await database.run(partial(_write, source, batch), commit_seconds=seconds)
            advance(batch[-1].end - done)
            done, loaded, transactions = batch[-1].end, loaded + len(batch), transactions + 1
        if source.mark:
            await database.run(partial(_remove_mark, source.mark), commit_seconds=seconds)
    return Loaded(loaded, transactions, resumed_at)


async def _resume(database: Database, source: Source) -> int:
    """The position behind what an earlier load of the same contents has committed; the stream is moved there."""
    mark = await database.transaction().get(source.mark) if source.mark else None
    start = int(mark or 0)
    if start:
        source.stream.seek(start)
    return start


async def _write(source: Source, batch: list[Line], transaction: Transaction) -> None:
    for line in batch:
        transaction.set(line.key, line.value)
    if source.mark:
        transaction.set(source.mark, b"%d" % batch[-1].end)


async def _remove_mark(mark: bytes, transaction: Transaction) -> None:
    transaction.clear(mark)


def _batches(source: Source, start: int, size: int) -> Iterator[list[Line]]:
    batch: list[Line] = []
    for line in _lines(source, start):
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _lines(source: Source, start: int) -> Iterator[Line]:
    end = start
    for number, text in enumerate(source.stream, start=1):
        end += len(text)
        if text.strip():
            yield _parse(text, end, f"{source.name}, line {number}" + (" after the mark" if start else ""))


def _parse(text: bytes, end: int, place: str) -> Line:
    try:
        record = json.loads(text)
        encoding = record.get("encoding", "utf-8")
        key, value = record["key"], record["value"]
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"FILE: {place}: not a record with a key and a value",
            hint='a line looks like {"key": "greeting", "value": "hello", "encoding": "utf-8"}',
        ) from None
    if encoding not in ("utf-8", "hex"):
        raise UsageError(f"FILE: {place}: the encoding {encoding!r} is neither utf-8 nor hex")
    as_hex = encoding == "hex"
    parsed = reading.parse_key(key, f"FILE: {place}", as_hex=as_hex)
    if parsed.startswith(RESERVED):
        raise UsageError(f"FILE: {place}: keys that begin with 0xff are reserved")
    return Line(parsed, reading.parse_value(value, f"FILE: {place}", as_hex=as_hex), end)


def export(conn: Connection[Any], begin: bytes, end: bytes | None) -> Iterator[Entry]:
    """Every key from `begin` up to but without `end`, all of one snapshot, in key order."""
    last = min(end, RESERVED) if end is not None else RESERVED
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        version = reading.read_version(conn)
        while page := reading.read_page(conn, begin, last, PAGE, version):
            yield from page
            begin = page[-1].key + b"\0"
