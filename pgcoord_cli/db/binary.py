"""PostgreSQL's binary format, for the types that the statements of `pipeline` and `callback_connection` carry. Pure.

An array of one dimension is a header (number of dimensions, a flag for nulls, element type, length, lower bound), and
then each element with its length before it; a length of -1 is a null. Numbers are big-endian.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from struct import Struct

_ARRAY = Struct("!iiIii")
_LENGTH = Struct("!i")
_INT8 = Struct("!q")
_FLOAT8 = Struct("!d")
_INT8_ELEMENT = Struct("!iq")

BYTEA_OID, INT8_OID, UUID_OID, BOOL_OID, TEXT_OID = 17, 20, 2950, 16, 25
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_NULL = _LENGTH.pack(-1)


def _array(oid: int, count: int, elements: Iterable[bytes]) -> bytes:
    if count == 0:  # no dimensions, so that the header ends before the length
        return _ARRAY.pack(0, 0, oid, 0, 0)[:12]
    return _ARRAY.pack(1, 1, oid, count, 1) + b"".join(elements)


def bytea_array(values: Sequence[bytes | None]) -> bytes:
    """Encodes a `bytea[]`; None is null."""
    pack = _LENGTH.pack
    return _array(BYTEA_OID, len(values), [_NULL if v is None else pack(len(v)) + v for v in values])


def bytea_columns(pairs: Iterable[tuple[bytes, bytes | None]]) -> list[bytes]:
    """Encodes pairs as two `bytea[]` of equal length, the first items and the second items, for `unnest`."""
    firsts, seconds = tuple(zip(*pairs, strict=True)) or ((), ())
    return [bytea_array(firsts), bytea_array(seconds)]


def int8_array(values: Sequence[int | None]) -> bytes:
    """Encodes a `bigint[]`; None is null."""
    pack = _INT8_ELEMENT.pack
    return _array(INT8_OID, len(values), [_NULL if v is None else pack(8, v) for v in values])


def uuid_array(values: Sequence[bytes | None]) -> bytes:
    """Encodes a `uuid[]` from the 16 bytes of each; None is null."""
    length = _LENGTH.pack(16)
    return _array(UUID_OID, len(values), [_NULL if value is None else length + value for value in values])


def bool_array(values: Sequence[bool]) -> bytes:
    """Encodes a `boolean[]`."""
    length = _LENGTH.pack(1)
    return _array(BOOL_OID, len(values), [length + bytes([value]) for value in values])


def text_array(values: Sequence[str | None]) -> bytes:
    """Encodes a `text[]` as UTF-8, the client encoding of every session; None is null."""
    pack = _LENGTH.pack
    encoded = [None if value is None else value.encode() for value in values]
    return _array(TEXT_OID, len(values), [_NULL if v is None else pack(len(v)) + v for v in encoded])


def int4(value: int) -> bytes:
    """Encodes an `integer`."""
    return _LENGTH.pack(value)


def int8(value: int) -> bytes:
    """Encodes a `bigint`."""
    return _INT8.pack(value)


def float8(value: float) -> bytes:
    """Encodes a `double precision`."""
    return _FLOAT8.pack(value)


def integer(data: bytes | None) -> int:
    """Decodes a `bigint` or `integer` that is not null."""
    assert data is not None
    return int.from_bytes(data, "big", signed=True)


def timestamp(data: bytes | None) -> datetime:
    """Decodes a `timestamptz` that is not null: microseconds since 2000-01-01 UTC."""
    return _EPOCH + timedelta(microseconds=integer(data))


def text(data: bytes | None) -> str | None:
    """Decodes a `text`; null is None."""
    return None if data is None else data.decode()
