"""Checks of a transaction's arguments where they enter: types as TypeError, limits as Rejected. Pure.

A value of another type that got into a request would fail only when many requests are encoded together, far from the
call that passed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Mutation, Op, Undecodable
from pgcoord_cli.core.kv.key_selector import KeySelector
from pgcoord_cli.errors import KeyTooLarge, Rejected, TransactionTooLarge, ValueTooLarge

_LIMITS: dict[type[Undecodable], type[Rejected]] = {
    codec.KeyTooLong: KeyTooLarge,
    codec.ValueTooLong: ValueTooLarge,
    codec.TooManyBytes: TransactionTooLarge,
}


@contextmanager
def limits_checked() -> Iterator[None]:
    """Translates an Undecodable that the block raises into the Rejected of the limit that was exceeded."""
    try:
        yield
    except Undecodable as error:
        raise rejection(error) from None


def rejection(error: Undecodable) -> Rejected:
    """Returns the Rejected of the limit that was exceeded, or a plain Rejected for a range that runs backwards."""
    return _LIMITS.get(type(error), Rejected)(str(error))


def as_bytes(value: object, what: str) -> bytes:
    """Returns `value` if it is bytes, or a copy of a bytearray or memoryview. Raises TypeError, which names `what`."""
    if type(value) is bytes:
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    advice = "; encode it, for example with .encode()" if isinstance(value, str) else ""
    raise TypeError(f"{what} must be bytes, not {type(value).__name__}{advice}")


def as_key(key: object) -> bytes:
    """Returns a key as bytes. Raises TypeError, and KeyTooLarge."""
    key = as_bytes(key, "a key")
    try:
        codec.check_key(key)
    except Undecodable as error:
        raise rejection(error) from None
    return key


def as_end(end: object) -> bytes | None:
    """Returns the end of a range as bytes, or None for past the last key. Raises TypeError."""
    return None if end is None else as_bytes(end, "the end of a range")


def as_range(begin: object, end: object) -> codec.Range:
    """Returns the bounds of a range as bytes. Raises TypeError, KeyTooLarge, and Rejected if the end comes first."""
    interval = as_bytes(begin, "the begin of a range"), as_end(end)
    with limits_checked():
        codec.check_range(*interval)
    return interval


def as_selector(selector: object) -> KeySelector:
    """Returns a key selector with its key as bytes. Raises TypeError."""
    if not isinstance(selector, KeySelector):
        raise TypeError(f"a KeySelector is needed, not {type(selector).__name__}")
    if not isinstance(selector.offset, int):
        raise TypeError(f"the offset of a KeySelector must be a number, not {type(selector.offset).__name__}")
    return selector._replace(key=as_bytes(selector.key, "the key of a KeySelector"))


def as_bound(bound: object, what: str) -> bytes | KeySelector:
    """Returns the bound of a range, with its key as bytes. Raises TypeError, which names `what`."""
    return as_selector(bound) if isinstance(bound, KeySelector) else as_bytes(bound, what)


def as_slice(item: slice) -> tuple[Any, Any, bool]:
    """Returns begin, end and whether to read backwards, of `[begin:end:step]`. Raises ValueError for another step.

    A begin that is left out is b"", and an end that is left out None, past the last key. The bounds are not checked.
    """
    if item.step not in (None, 1, -1):
        raise ValueError(f"the step of a range of keys is 1, or -1 for descending order, not {item.step!r}")
    return b"" if item.start is None else item.start, item.stop, item.step == -1


def as_mutation(op: Op, key: object, operand: object) -> Mutation:
    """Returns a mutation with its key and operand as bytes. Raises TypeError, and Rejected for what cannot be applied.

    The operand of `clear` is None, and that of `clear_range` is the end of the range.
    """
    key = as_bytes(key, "a key")
    if op == Op.CLEAR_RANGE:
        operand = as_end(operand)
    elif op != Op.CLEAR:
        operand = as_bytes(operand, "a value")
    else:
        operand = None
    mutation = Mutation(op, key, operand)
    try:
        codec.check_mutation(mutation)
    except Undecodable as error:
        raise rejection(error) from None
    return mutation
