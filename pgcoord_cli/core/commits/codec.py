"""The encoding of a commit request: what the transaction read, and what it writes. Pure.

One byte of format version, then a MessagePack array of four, in version 3 of five:

    [read_keys, read_ranges, write_ranges, mutations, no_conflict]

    read_keys     [key, …]                  keys that were read
    read_ranges   [[begin, end], …]         half-open ranges that were read; an end of nil is past the last key
    write_ranges  [[begin, end], …]         ranges that conflict with reads like writes, without being written
    mutations     [[op, key, operand], …]   in the order in which they apply
    no_conflict   [place, …]                places in `mutations`, from 0, of those that conflict with no read

Version 2 knows all operations; version 1, which this program still reads, only set, clear and clear_range. Version 3 is
written only where `no_conflict` is not empty, so that leaders that do not know it can settle all other requests.

Keys, bounds and operands are binary. `docs/wire-format.md` describes the format for other languages. A payload that
cannot be decoded raises Undecodable with a reason; the leader settles that one request as `rejected` (rule I6).
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

FORMAT_VERSION = 2
NO_CONFLICT_VERSION = 3
"""The format version of requests with `no_conflict`."""

VERSIONSTAMP_BYTES = 10
STAMP_OFFSET_BYTES = 4
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

MAX_KEY_BYTES = 2_600
"""Longest key: an entry of a PostgreSQL B-tree holds it even if its bytes do not compress, with some room to spare."""

PAST_THE_LAST_KEY = b"\xff" * (MAX_KEY_BYTES + 1)
"""Greater than every key: stands for the end of a range without one, in statements that need an end."""

MAX_VALUE_BYTES = 100_000
MAX_TRANSACTION_BYTES = 10_000_000
"""Longest value, and longest payload: the limits of FoundationDB."""

Range = tuple[bytes, bytes | None]
"""A half-open range of keys: the first one, and the one after the last (None: past the last key)."""


class Op(IntEnum):
    """The operation of a mutation. The numbers are part of the wire format."""

    SET = 0
    CLEAR = 1
    CLEAR_RANGE = 2
    ADD = 3
    BIT_AND = 4
    BIT_OR = 5
    BIT_XOR = 6
    APPEND_IF_FITS = 7
    MAX = 8
    MIN = 9
    BYTE_MAX = 10
    BYTE_MIN = 11
    COMPARE_AND_CLEAR = 12
    SET_VERSIONSTAMPED_KEY = 13
    SET_VERSIONSTAMPED_VALUE = 14


_OPERATIONS = {op.value: op for op in Op}

LAST_OPERATION = {
    1: Op.CLEAR_RANGE,
    FORMAT_VERSION: Op.SET_VERSIONSTAMPED_VALUE,
    NO_CONFLICT_VERSION: Op.SET_VERSIONSTAMPED_VALUE,
}
"""The last operation of each format version; an operation is known if its number is not greater."""


class Mutation(NamedTuple):
    """One write. `operand` is the value or number; of clear_range the end (None: past the last key); of clear, None."""

    op: Op
    key: bytes
    operand: bytes | None


class Request(NamedTuple):
    """The contents of a commit request: what the transaction read, and what it writes."""

    read_keys: tuple[bytes, ...]
    read_ranges: tuple[Range, ...]
    write_ranges: tuple[Range, ...]
    mutations: tuple[Mutation, ...]
    no_conflict: tuple[int, ...] = ()
    """Places of the mutations that do not count as writes when other requests are checked for conflicts."""


class Undecodable(ValueError):
    """A payload, or a part of a request, is not valid. The text is the reason, for the client that sent it."""


class KeyTooLong(Undecodable):
    """A key is longer than MAX_KEY_BYTES, or the bound of a range by more than one byte."""


class ValueTooLong(Undecodable):
    """A value or operand is longer than MAX_VALUE_BYTES."""


class TooManyBytes(Undecodable):
    """The whole payload is longer than MAX_TRANSACTION_BYTES."""


def encode(request: Request) -> bytes:
    """Encodes a request whose keys, ranges and mutations were checked one by one. Raises TooManyBytes."""
    if request.no_conflict:
        payload = bytes([NO_CONFLICT_VERSION]) + bytes(msgpack.packb(request))
    else:
        payload = bytes([FORMAT_VERSION]) + bytes(msgpack.packb(request[:4]))
    if len(payload) > MAX_TRANSACTION_BYTES:
        raise TooManyBytes(f"the transaction has more than {MAX_TRANSACTION_BYTES} bytes")
    return payload


def decode(payload: bytes) -> Request:
    """Decodes a payload from any client, and checks its shape, sizes and operations. Raises Undecodable."""
    if not payload:
        raise Undecodable("the payload is empty")
    last_operation = LAST_OPERATION.get(payload[0])
    if last_operation is None:
        raise Undecodable(f"format version {payload[0]} is unknown")
    if len(payload) > MAX_TRANSACTION_BYTES:  # before unpacking, which would take memory in proportion
        raise TooManyBytes(f"the transaction has more than {MAX_TRANSACTION_BYTES} bytes")
    request = _request(_unpack(payload[1:]), 5 if payload[0] >= NO_CONFLICT_VERSION else 4)
    check(request)
    # A leader of that version would misread them, so they are not accepted under its number.
    if any(mutation.op > last_operation for mutation in request.mutations):
        raise Undecodable(f"format version {payload[0]} has only the operations up to {last_operation}")
    return request


def decode_stored(payload: bytes) -> tuple[list[tuple[int, bytes, bytes | None]], list[Range]]:
    """Decodes the write ranges of a committed payload, and its mutations without those of `no_conflict`.

    The payload was checked before it was committed.
    A new leader decodes all commits of the last seconds before it begins; this takes a quarter of the time of `decode`.
    """
    _, _, write_ranges, stored, *no_conflict = msgpack.unpackb(payload[1:])
    if no_conflict:
        left_out = set(no_conflict[0])
        stored = [mutation for place, mutation in enumerate(stored) if place not in left_out]
    return stored, [(begin, end) for begin, end in write_ranges]


def _unpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body, use_list=False)
    except Exception as error:  # noqa: BLE001 - msgpack raises a dozen unrelated kinds
        raise Undecodable(f"the payload is not MessagePack: {str(error) or type(error).__name__}") from None


def _request(fields: Any, count: int) -> Request:
    if not isinstance(fields, tuple) or len(fields) != count:
        raise Undecodable(f"the payload is not an array of {count} fields")
    keys, reads, writes, mutations, *no_conflict = map(_array, fields)
    return Request(
        tuple(map(_key, keys)),
        tuple(map(_range, reads)),
        tuple(map(_range, writes)),
        tuple(map(_mutation, mutations)),
        tuple(_place(place, len(mutations)) for place in (no_conflict[0] if no_conflict else ())),
    )


def _place(place: Any, count: int) -> int:
    if type(place) is not int or not 0 <= place < count:
        raise Undecodable("a mutation without conflict is not the place of a mutation")
    return place


def _array(field: Any) -> tuple[Any, ...]:
    if not isinstance(field, tuple):
        raise Undecodable("a field of the payload is not an array")
    return field


def _key(key: Any) -> bytes:
    if not isinstance(key, bytes):
        raise Undecodable("a key is not binary")
    return key


def _range(item: Any) -> Range:
    if not isinstance(item, tuple) or len(item) != 2:
        raise Undecodable("a range is not an array of two")
    begin, end = item
    return _key(begin), None if end is None else _key(end)


def _mutation(item: Any) -> Mutation:
    if not isinstance(item, tuple) or len(item) != len(Mutation._fields):
        raise Undecodable("a mutation is not an array of three")
    op, key, operand = item
    if type(op) is not int:  # not printed in the reason: it may be nested so deeply that `repr` fails
        raise Undecodable("the kind of a mutation is not a number")
    known = _OPERATIONS.get(op)
    if known is None:
        raise Undecodable(f"mutation {op} is unknown")
    return Mutation(known, _key(key), None if operand is None else _key(operand))


def check(request: Request) -> None:
    """Checks every key, range and mutation of a request. Raises Undecodable for one that cannot be applied."""
    for key in request.read_keys:
        check_key(key)
    for begin, end in (*request.read_ranges, *request.write_ranges):
        check_range(begin, end)
    for mutation in request.mutations:
        check_mutation(mutation)


def check_key(key: bytes) -> None:
    """Raises KeyTooLong for a key of more than MAX_KEY_BYTES, and Undecodable for one that is not bytes."""
    _key(key)
    if len(key) > MAX_KEY_BYTES:
        raise KeyTooLong(f"a key of {len(key)} bytes is longer than {MAX_KEY_BYTES}")


def check_range(begin: bytes, end: bytes | None) -> None:
    """Raises Undecodable for a range whose begin is greater than its end, KeyTooLong for a bound that is too long."""
    _check_bound(begin)
    if end is not None:
        _check_bound(end)
        if begin > end:
            raise Undecodable("a range begins after its end")


def _check_bound(bound: bytes) -> None:
    # One byte more than a key: the range of a single key ends before the key with a zero byte appended.
    if len(_key(bound)) > MAX_KEY_BYTES + 1:
        raise KeyTooLong(f"the bound of a range, of {len(bound)} bytes, is longer than {MAX_KEY_BYTES + 1}")


def check_mutation(mutation: Mutation) -> None:
    """Raises Undecodable, or a subclass that names the limit, for a mutation that cannot be applied."""
    op, key, operand = mutation
    if op == Op.CLEAR_RANGE:
        check_range(key, operand)
        return
    if op == Op.SET_VERSIONSTAMPED_KEY:
        _check_stamp_offset(key, "key")
        check_key(key[:-STAMP_OFFSET_BYTES])  # the offset is not part of the key that is written
    else:
        check_key(key)
    if op == Op.SET_VERSIONSTAMPED_VALUE:
        _check_stamp_offset(operand or b"", "value")
    if op != Op.CLEAR and operand is None:
        raise Undecodable(f"{op.name.lower()} has no operand")
    if operand is not None and len(operand) > MAX_VALUE_BYTES:
        raise ValueTooLong(f"a value of {len(operand)} bytes is longer than {MAX_VALUE_BYTES}")


def _check_stamp_offset(template: bytes, what: str) -> None:
    """Checks the last four bytes: the offset, little-endian, at which the ten bytes of the stamp fit into the rest."""
    room = len(template) - STAMP_OFFSET_BYTES
    offset = int.from_bytes(template[-STAMP_OFFSET_BYTES:], "little")
    if offset + VERSIONSTAMP_BYTES > room:
        raise Undecodable(f"there is no room for a versionstamp at offset {offset} of a {what} of {max(room, 0)} bytes")


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8 without control characters other than tab, line feed and carriage return."""
    try:
        return not _CONTROL.search(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False
