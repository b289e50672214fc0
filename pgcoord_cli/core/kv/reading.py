"""Reading the key-value data synchronously, and keys as people write them.

Commands read with these; services use `core.kv.client`, which also writes. On the command line a key or value is UTF-8
text, or hexadecimal under `--hex`. On the way out, bytes that are not text are shown as hexadecimal, and the record's
`encoding` says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.commits.codec import MAX_KEY_BYTES, MAX_VALUE_BYTES, PAST_THE_LAST_KEY, is_text
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import UsageError


class Entry(NamedTuple):
    """A key, its value (None: no such key), and the durable version of the snapshot it was read in."""

    key: bytes
    value: bytes | None
    version: int


def read_key(conn: Connection[Any], key: bytes) -> Entry:
    """What one key holds."""
    row = conn.execute(sql("kv", "read_keys"), [[key]]).fetchone()
    assert row is not None
    return Entry(key, row[4], row[2])


def read_range(
    conn: Connection[Any], begin: bytes, end: bytes | None, limit: int | None, *, reverse: bool
) -> tuple[int, list[Entry]]:
    """The durable version, and the keys from `begin` up to but without `end`, of one snapshot."""
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        version = read_version(conn)
        statement = sql("kv", "read_range_reverse" if reverse else "read_range")
        rows = conn.execute(statement, [begin, PAST_THE_LAST_KEY if end is None else end, limit]).fetchall()
    return version, [Entry(key, value, version) for key, value in rows]


def read_version(conn: Connection[Any]) -> int:
    """The durable version of the caller's snapshot."""
    _, version = conn.execute(sql("kv", "read_version")).fetchone() or (0, 0)
    return int(version)


def read_page(conn: Connection[Any], begin: bytes, end: bytes | None, limit: int, version: int) -> list[Entry]:
    """The first keys of a range, within the caller's transaction, whose snapshot has that version."""
    rows = conn.execute(sql("kv", "read_range"), [begin, PAST_THE_LAST_KEY if end is None else end, limit]).fetchall()
    return [Entry(key, value, version) for key, value in rows]


def parse_key(text: str, argument: str, *, as_hex: bool) -> bytes:
    """The bytes of a key on the command line; UsageError naming the argument."""
    return _sized(parse_bytes(text, argument, as_hex=as_hex), argument, MAX_KEY_BYTES)


def parse_value(text: str, argument: str, *, as_hex: bool) -> bytes:
    """The bytes of a value on the command line; UsageError naming the argument."""
    return _sized(parse_bytes(text, argument, as_hex=as_hex), argument, MAX_VALUE_BYTES)


def parse_bytes(text: str, argument: str, *, as_hex: bool) -> bytes:
    """UTF-8 text, or hexadecimal digits, as bytes; UsageError naming the argument."""
    try:
        return bytes.fromhex(text) if as_hex else text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{argument}: not UTF-8 text", hint="give it in hexadecimal, with --hex") from None
    except ValueError:
        raise UsageError(f"{argument}: {text!r} is not hexadecimal", hint="two digits a byte, like 00ff") from None


def counter(amount: int, argument: str) -> bytes:
    """The operand that adds `amount`, eight bytes little-endian, a negative one as two's complement."""
    if not -(1 << 63) <= amount < 1 << 63:
        raise UsageError(f"{argument}: {amount} does not fit into eight bytes")
    return (amount % (1 << 64)).to_bytes(8, "little")


def _sized(data: bytes, argument: str, limit: int) -> bytes:
    if len(data) > limit:
        raise UsageError(f"{argument}: {len(data)} bytes are more than the {limit} that fit")
    return data


def show(entry: Entry, *, as_hex: bool) -> dict[str, Any]:
    """The entry as a record: text where both key and value are text, hexadecimal otherwise."""
    text = not as_hex and is_text(entry.key) and is_text(entry.value or b"")

    def shown(data: bytes) -> str:
        return data.decode("utf-8") if text else data.hex()

    return {
        "key": shown(entry.key),
        "value": None if entry.value is None else shown(entry.value),
        "version": entry.version,
        "encoding": "utf-8" if text else "hex",
    }
