"""The bytes of a commit request: what was read, what is to be written. Pure.

One byte of format version, then a MessagePack array of four:

    [read_keys, read_ranges, write_ranges, mutations]

    read_keys     [key, …]                  keys that were read
    read_ranges   [[begin, end], …]         half-open ranges that were read; an end of nil is past the last key
    write_ranges  [[begin, end], …]         ranges that count as written without being so
    mutations     [[op, key, operand], …]   in the order in which they apply

Keys, bounds and operands are binary. `docs/wire-format.md` says the same for other languages. Whatever cannot be
decoded raises Undecodable with a reason; the leader answers that one request with `rejected` (rule I6).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

FORMAT_VERSION = 1

MAX_KEY_BYTES = 2_600
"""What a B-tree entry of PostgreSQL takes, whatever the key's bytes, with some room to spare."""

MAX_VALUE_BYTES = 100_000
MAX_TRANSACTION_BYTES = 10_000_000

Range = tuple[bytes, bytes | None]


class Op(IntEnum):
    """What a mutation does. Numbers are part of the wire format."""

    SET = 0
    CLEAR = 1
    CLEAR_RANGE = 2


class Mutation(NamedTuple):
    """One change. `operand` is the value, or the end of a cleared range (None: past the last key)."""

    op: Op
    key: bytes
    operand: bytes | None


class Request(NamedTuple):
    """What a transaction asks to have committed."""

    read_keys: tuple[bytes, ...]
    read_ranges: tuple[Range, ...]
    write_ranges: tuple[Range, ...]
    mutations: tuple[Mutation, ...]


class Undecodable(ValueError):
    """The payload is not a request that this program understands; the text says why."""


def encode(request: Request) -> bytes:
    """The payload of a request. The caller has checked sizes with `check`."""
    return bytes([FORMAT_VERSION]) + bytes(msgpack.packb(request))


def decode(payload: bytes) -> Request:
    """The request in a payload, its shape and sizes checked; raises Undecodable."""
    if not payload:
        raise Undecodable("the payload is empty")
    if payload[0] != FORMAT_VERSION:
        raise Undecodable(f"format version {payload[0]} is unknown")
    if len(payload) > MAX_TRANSACTION_BYTES:
        raise Undecodable(f"the transaction has more than {MAX_TRANSACTION_BYTES} bytes")
    request = _request(_unpack(payload[1:]))
    check(request)
    return request


def _unpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body, use_list=False)
    except Exception as error:  # noqa: BLE001 - msgpack raises a dozen unrelated kinds
        raise Undecodable(f"the payload is not MessagePack: {str(error) or type(error).__name__}") from None


def _request(fields: Any) -> Request:
    if not isinstance(fields, tuple) or len(fields) != len(Request._fields):
        raise Undecodable("the payload is not an array of four")
    keys, reads, writes, mutations = (_array(field) for field in fields)
    return Request(
        tuple(_key(key) for key in keys),
        tuple(_range(item) for item in reads),
        tuple(_range(item) for item in writes),
        tuple(_mutation(item) for item in mutations),
    )


def _array(field: Any) -> tuple[Any, ...]:
    if not isinstance(field, tuple):
        raise Undecodable("an array was expected")
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
    if type(op) is not int:  # it may be nested so deeply that even printing it fails
        raise Undecodable("the kind of a mutation is not a number")
    try:
        known = Op(op)
    except ValueError:
        raise Undecodable(f"mutation {op} is unknown") from None
    return Mutation(known, _key(key), None if operand is None else _key(operand))


def check(request: Request) -> None:
    """Undecodable unless every key, range and value is one that PostgreSQL and the resolver can take."""
    for key in request.read_keys:
        check_key(key)
    for begin, end in (*request.read_ranges, *request.write_ranges):
        check_range(begin, end)
    for mutation in request.mutations:
        check_mutation(mutation)


def check_key(key: bytes) -> None:
    """Undecodable when the key is longer than an index entry may be, or no bytes at all."""
    _key(key)
    if len(key) > MAX_KEY_BYTES:
        raise Undecodable(f"a key of {len(key)} bytes is longer than {MAX_KEY_BYTES}")


def check_range(begin: bytes, end: bytes | None) -> None:
    """Undecodable when the range runs backwards or a bound is too long."""
    check_key(begin)
    if end is not None:
        check_key(end)
        if begin > end:
            raise Undecodable("a range begins after its end")


def check_mutation(mutation: Mutation) -> None:
    """Undecodable when the mutation's key, range or value cannot be applied."""
    if mutation.op == Op.CLEAR_RANGE:
        check_range(mutation.key, mutation.operand)
        return
    check_key(mutation.key)
    if mutation.op == Op.SET and mutation.operand is None:
        raise Undecodable("a set has no value")
    if mutation.operand is not None and len(mutation.operand) > MAX_VALUE_BYTES:
        raise Undecodable(f"a value of {len(mutation.operand)} bytes is longer than {MAX_VALUE_BYTES}")
