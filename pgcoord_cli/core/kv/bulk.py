"""Loading many keys from JSON lines, and exporting them.

**Load.** Lines are written in batches, one transaction each. The same transaction writes the progress, the number of
bytes that are done, under a reserved key that contains the digest of the file, so that progress and data never
disagree. A load of a file with the same contents continues after the stored progress; when all lines are loaded, the
progress is removed. Keys that begin with 0xff are reserved for this, and an export leaves them out.

**Export.** All pages are read in one snapshot; a page begins after the last key of the page before it.
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
from pgcoord_cli.core.kv.client import Database, Transaction, open_database
from pgcoord_cli.core.kv.reading import Entry
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import Settings

RESERVED = b"\xff"
"""First byte of the keys that neither a load nor an export takes."""

PAGE = 1_000
"""Keys that an export reads with one statement."""


class Source(NamedTuple):
    """An open file of JSON lines, and the key of its progress, None if a load of it cannot be resumed.

    `size` is in bytes, None if it is not known.
    """

    stream: IO[bytes]
    name: str
    progress_key: bytes | None
    size: int | None


class Loaded(NamedTuple):
    """The keys and transactions that this call wrote, and the byte offset at which it began."""

    loaded: int
    transactions: int
    resumed_at: int


class Line(NamedTuple):
    """One line: a key, its value, and the byte offset after the line."""

    key: bytes
    value: bytes
    end: int


def open_source(name: str) -> Source:
    """Opens a file whose load can be resumed. Raises UsageError with the system's reason if it cannot be read."""
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
    """Loads a file, at most `batch_size` lines in a transaction, and waits `seconds` for a leader and for each commit.

    Calls `advance` with the number of bytes done since the last call. Raises UsageError, which names the line, for one
    that is not valid, NoLeader, and what a commit raises.
    """
    async with await open_database(settings, "kv load") as database:
        await database.wait_for_leader(seconds)
        resumed_at = done = await _resume(database, source)
        advance(done)
        loaded = transactions = 0
        for batch in _batches(source, done, batch_size):
            await database.run(partial(_write, source, batch), commit_seconds=seconds)
            advance(batch[-1].end - done)
            done, loaded, transactions = batch[-1].end, loaded + len(batch), transactions + 1
        if source.progress_key:
            await database.run(partial(_remove_progress, source.progress_key), commit_seconds=seconds)
    return Loaded(loaded, transactions, resumed_at)


async def _resume(database: Database, source: Source) -> int:
    """Moves the stream to the byte offset that an earlier load of the same contents committed, and returns it."""
    stored = await database.transaction().get(source.progress_key) if source.progress_key else None
    start = int(stored or 0)
    if start:
        source.stream.seek(start)
    return start


async def _write(source: Source, batch: list[Line], transaction: Transaction) -> None:
    for line in batch:
        transaction.set(line.key, line.value)
    if source.progress_key:
        transaction.set(source.progress_key, b"%d" % batch[-1].end)


async def _remove_progress(key: bytes, transaction: Transaction) -> None:
    transaction.clear(key)


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
            yield _parse(text, end, f"{source.name}, line {number}" + (f" after byte {start}" if start else ""))


def _parse(text: bytes, end: int, place: str) -> Line:
    try:
        record = json.loads(text)
        encoding = record.get("encoding", "utf-8")
        key, value = record["key"], record["value"]
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"FILE: {place}: not a JSON object with a string key and a string value",
            hint='write a line as {"key": "greeting", "value": "hello", "encoding": "utf-8"}',
        ) from None
    if encoding not in ("utf-8", "hex"):
        raise UsageError(f"FILE: {place}: the encoding {encoding!r} is neither utf-8 nor hex")
    as_hex = encoding == "hex"
    parsed = reading.parse_key(key, f"FILE: {place}", as_hex=as_hex)
    if parsed.startswith(RESERVED):
        raise UsageError(f"FILE: {place}: keys that begin with 0xff are reserved")
    return Line(parsed, reading.parse_value(value, f"FILE: {place}", as_hex=as_hex), end)


def export(conn: Connection[Any], begin: bytes, end: bytes | None) -> Iterator[Entry]:
    """Yields the entries from `begin` up to but without `end` (None: to the last key) of one snapshot, in key order."""
    last = min(end, RESERVED) if end is not None else RESERVED
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        version = reading.read_version(conn)
        while page := reading.read_page(conn, begin, last, PAGE, version):
            yield from page
            begin = page[-1].key + b"\0"  # the next possible key
