"""Synchronous reads of the key-value data, and the text form of keys and values on the command line.

Commands read with these functions; services use `core.kv.client`, which also writes. On the command line a key or value
is UTF-8 text, or hexadecimal with `--hex`. In output, bytes that are not text are hexadecimal, as the field `encoding`
of the record tells.
"""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

from psycopg import Connection, errors

from pgcoord_cli.core.commits.codec import MAX_KEY_BYTES, MAX_VALUE_BYTES, PAST_THE_LAST_KEY, is_text
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Rejected, TooOld, UnsuitableServer, UsageError


class Entry(NamedTuple):
    """A key, its value (None: absent), and the durable version of the snapshot that it was read in."""

    key: bytes
    value: bytes | None
    version: int


def read_key(conn: Connection[Any], key: bytes) -> Entry:
    """Reads one key."""
    row = conn.execute(sql("kv", "read_keys"), [[key]]).fetchone()
    assert row is not None  # one row even without the key, for epoch, term and version
    _, _, version, _, value = row
    return Entry(key, value, version)


def read_key_at(conn: Connection[Any], key: bytes, version: int) -> Entry:
    """Reads one key as it was at a version, or at the end of the batch that committed that version.

    Raises Rejected for a version that was not committed, TooOld for one that can no longer be read, UnsuitableServer on
    a standby, which has no replaced values.
    """
    try:
        with conn.transaction():
            conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            found = conn.execute(sql("kv", "version_at"), [version]).fetchone()
            assert found is not None  # the lease always has its row
            _, _, durable_version, readable_from, readable = found
            if version > durable_version:
                raise Rejected(
                    f"version {version} has not been committed", hint=f"the last version is {durable_version}"
                )
            if version != durable_version and (readable_from is None or version < readable_from):
                raise TooOld(f"version {version} can no longer be read", hint="read the present value")
            row = conn.execute(sql("kv", "read_keys_at"), [[key], [readable], None]).fetchone()
    except errors.FeatureNotSupported:  # unlogged tables
        raise UnsuitableServer(
            "a standby has no values of earlier versions", hint="read the present value, or connect to the primary"
        ) from None
    assert row is not None
    return Entry(key, row[-1], readable)


def read_range(
    conn: Connection[Any], begin: bytes, end: bytes | None, limit: int | None, *, reverse: bool
) -> tuple[int, list[Entry]]:
    """Reads a range in one snapshot; returns the durable version and the entries from `begin` up to but without `end`.

    At most `limit` entries (None: all), the last ones first if `reverse`.
    """
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        version = read_version(conn)
        statement = sql("kv", "read_range_reverse" if reverse else "read_range")
        rows = conn.execute(statement, [begin, PAST_THE_LAST_KEY if end is None else end, limit]).fetchall()
    return version, [Entry(key, value, version) for key, value in rows]


def read_version(conn: Connection[Any]) -> int:
    """Returns the durable version of the caller's snapshot."""
    _, version = conn.execute(sql("kv", "read_version")).fetchone() or (0, 0)
    return int(version)


def read_page(conn: Connection[Any], begin: bytes, end: bytes | None, limit: int, version: int) -> list[Entry]:
    """Reads the first `limit` keys of a range in the caller's transaction. `version` is that of its snapshot."""
    rows = conn.execute(sql("kv", "read_range"), [begin, PAST_THE_LAST_KEY if end is None else end, limit]).fetchall()
    return [Entry(key, value, version) for key, value in rows]


def parse_key(text: str, argument: str, *, as_hex: bool) -> bytes:
    """Returns the bytes of a key from the command line. Raises UsageError, which names the argument."""
    return _sized(parse_bytes(text, argument, as_hex=as_hex), argument, MAX_KEY_BYTES)


def parse_value(text: str, argument: str, *, as_hex: bool) -> bytes:
    """Returns the bytes of a value from the command line. Raises UsageError, which names the argument."""
    return _sized(parse_bytes(text, argument, as_hex=as_hex), argument, MAX_VALUE_BYTES)


def read_value(stream: BinaryIO, source: str, argument: str) -> bytes:
    """Returns all bytes of a stream as a value. Raises UsageError, which names argument and source, for too many."""
    data = stream.read(MAX_VALUE_BYTES + 1)  # one more shows that there are too many, however long the stream is
    if len(data) > MAX_VALUE_BYTES:
        raise UsageError(f"{argument}: {source} has more than {MAX_VALUE_BYTES} bytes, the limit of a value")
    return data


def prefix_range(prefix: bytes) -> tuple[bytes, bytes | None]:
    """Returns the half-open range of the keys that begin with a prefix; an end of None is past the last key."""
    # The last byte that can be increased is. Nothing follows a prefix of bytes 0xff only.
    stem = prefix.rstrip(b"\xff")
    return prefix, stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def parse_bytes(text: str, argument: str, *, as_hex: bool) -> bytes:
    """Returns the bytes of UTF-8 text or of hexadecimal digits. Raises UsageError, which names the argument."""
    try:
        return bytes.fromhex(text) if as_hex else text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{argument}: not UTF-8 text", hint="write it in hexadecimal, with --hex") from None
    except ValueError:
        raise UsageError(
            f"{argument}: {text!r} is not hexadecimal", hint="write two digits a byte, such as 00ff"
        ) from None


def counter(amount: int, argument: str) -> bytes:
    """Returns the operand of `add` for an amount: eight bytes little-endian, two's complement if it is negative.

    Raises UsageError, which names the argument, for an amount that does not fit.
    """
    if not -(1 << 63) <= amount < 1 << 63:
        raise UsageError(f"{argument}: {amount} does not fit into eight bytes")
    return (amount % (1 << 64)).to_bytes(8, "little")


def _sized(data: bytes, argument: str, limit: int) -> bytes:
    if len(data) > limit:
        raise UsageError(f"{argument}: {len(data)} bytes; the limit is {limit}")
    return data


def show(entry: Entry, *, as_hex: bool) -> dict[str, Any]:
    """Returns the entry as a record: as text if key and value both are text, and `as_hex` is not set, else as hex."""
    text = not as_hex and is_text(entry.key) and is_text(entry.value or b"")

    def shown(data: bytes) -> str:
        return data.decode("utf-8") if text else data.hex()

    return {
        "key": shown(entry.key),
        "value": None if entry.value is None else shown(entry.value),
        "version": entry.version,
        "encoding": "utf-8" if text else "hex",
    }
