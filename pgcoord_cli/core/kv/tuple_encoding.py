"""The tuple encoding of FoundationDB: tuples as bytes that sort like the tuples. Pure.

A packed tuple is the concatenation of its elements. Each begins with a type code; what follows keeps the order:

| code | element | what follows |
|---|---|---|
| 00 | None | nothing; within a nested tuple ff, since a plain 00 ends that tuple |
| 01, 02 | bytes, str | the bytes, or the UTF-8, with each 00 written as 00 ff; then 00 |
| 05 | tuple | its elements; then 00 |
| 0c-13 | negative int | 8 to 1 bytes, big-endian, of the number plus 2^(8n) - 1 |
| 14 | 0 | nothing |
| 15-1c | positive int | 1 to 8 bytes, big-endian |
| 0b, 1d | longer int | the number of bytes, up to 255 (inverted for 0b), then the bytes as above |
| 20, 21 | SingleFloat, float | 4 or 8 bytes, big-endian; all bits inverted if the sign is set, otherwise the sign bit |
| 26, 27 | False, True | nothing |
| 30 | UUID | 16 bytes |
| 33 | Versionstamp | 10 bytes of the transaction, 2 bytes that the caller chose, big-endian |

Elements of different types sort by type code, and a tuple sorts before those that it is the beginning of. -0.0 sorts
before 0.0, although Python takes them for equal; negative NaNs sort first among floats and other NaNs last.

Neither `pack` nor `unpack` recurses, so that no depth of nesting exhausts the stack of the interpreter.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import total_ordering
from typing import Any, TypeAlias
from uuid import UUID

from pgcoord_cli.core.commits.codec import STAMP_OFFSET_BYTES, VERSIONSTAMP_BYTES
from pgcoord_cli.core.kv.checks import as_bytes

NULL, BYTES, TEXT, NESTED = 0x00, 0x01, 0x02, 0x05
LONG_NEGATIVE, ZERO, LONG_POSITIVE = 0x0B, 0x14, 0x1D
SINGLE, DOUBLE = 0x20, 0x21
FALSE, TRUE = 0x26, 0x27
UUID_CODE, VERSIONSTAMP = 0x30, 0x33

END, ESCAPE = b"\x00", b"\xff"
"""What ends strings and nested tuples, and what follows a zero byte that does not."""

MAX_SHORT_BYTES = 8
"""Bytes of the longest integer whose length is told by its type code."""
MAX_INTEGER_BYTES = 255
"""Bytes of the longest integer: its length is one byte."""
MAX_USER_VERSION = 0xFFFF
UUID_BYTES = 16
STAMP_ELEMENT_BYTES = VERSIONSTAMP_BYTES + 2

_NOT_KNOWN = b"\xff" * VERSIONSTAMP_BYTES
"""Stands for the transaction of an incomplete versionstamp. No commit has such a version."""


@dataclass(frozen=True, order=True, slots=True)
class SingleFloat:
    """A float of 4 bytes. The value is rounded to what fits; raises ValueError if it is too large for that."""

    value: float

    def __post_init__(self) -> None:
        try:
            (rounded,) = struct.unpack(">f", struct.pack(">f", self.value))
        except OverflowError:
            raise ValueError(f"{self.value!r} is too large for a float of 4 bytes") from None
        except struct.error:
            raise TypeError(f"a SingleFloat holds a number, not {self.value!r}") from None
        object.__setattr__(self, "value", rounded)


@total_ordering
@dataclass(frozen=True, slots=True)
class Versionstamp:
    """The place of a key in the order of commits: the ten bytes of a transaction, and a number within it.

    `Versionstamp()` is incomplete: `pack_with_versionstamp` leaves room for it, and the commit fills it in.
    `user_version`, from 0 to 65535, orders the keys of one transaction. Incomplete ones sort last. Raises ValueError
    for a transaction of another length than ten bytes and for a number out of range.
    """

    transaction: bytes | None = None
    user_version: int = 0

    def __post_init__(self) -> None:
        if self.transaction is not None:
            if not isinstance(self.transaction, bytes):
                raise TypeError(f"the transaction of a Versionstamp is bytes or None, not {self.transaction!r}")
            if len(self.transaction) != VERSIONSTAMP_BYTES or self.transaction == _NOT_KNOWN:
                raise ValueError(
                    f"the transaction of a Versionstamp has {VERSIONSTAMP_BYTES} bytes that are not all ff, as "
                    f"Transaction.versionstamp, or is None while it is not known; not {self.transaction.hex(' ')!r}"
                )
        if not isinstance(self.user_version, int):
            raise TypeError(f"the user version of a Versionstamp is an int, not {self.user_version!r}")
        if not 0 <= self.user_version <= MAX_USER_VERSION:
            raise ValueError(f"the user version of a Versionstamp is 0 to {MAX_USER_VERSION}, not {self.user_version}")

    @property
    def is_complete(self) -> bool:
        """Whether the transaction is known."""
        return self.transaction is not None

    def completed(self, transaction: bytes) -> Versionstamp:
        """Returns the stamp that an incomplete one became, given `Transaction.versionstamp` after the commit.

        Raises ValueError if it is complete already.
        """
        if self.is_complete:
            raise ValueError(f"{self!r} is complete already")
        return Versionstamp(transaction, self.user_version)

    @classmethod
    def from_bytes(cls, data: bytes) -> Versionstamp:
        """Returns the stamp of twelve bytes; ten ff at their beginning make it incomplete. Raises ValueError."""
        if len(data) != STAMP_ELEMENT_BYTES:
            raise ValueError(f"a Versionstamp has {STAMP_ELEMENT_BYTES} bytes, not {len(data)}")
        transaction = bytes(data[:VERSIONSTAMP_BYTES])
        user_version = int.from_bytes(data[VERSIONSTAMP_BYTES:], "big")
        return cls(None if transaction == _NOT_KNOWN else transaction, user_version)

    def __bytes__(self) -> bytes:
        return (self.transaction or _NOT_KNOWN) + self.user_version.to_bytes(2, "big")

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Versionstamp):
            return NotImplemented
        return bytes(self) < bytes(other)


Element: TypeAlias = (
    "bytes | bytearray | memoryview | str | int | float | bool | UUID | SingleFloat | Versionstamp"
    " | tuple[Element, ...] | list[Any] | None"
)
"""What a tuple may hold. `unpack` returns bytes for a bytearray or memoryview, and a tuple for a list."""

Elements: TypeAlias = tuple[Element, ...] | list[Any]
"""What is packed: a tuple, or a list in its place."""


def pack(elements: Elements, prefix: bytes = b"") -> bytes:
    """Returns the prefix and the packed tuple.

    Raises TypeError for an element of another type, ValueError for one that has no encoding: an incomplete
    Versionstamp, an integer of more than 255 bytes, text with a lone surrogate. Both name the element.
    """
    packer = _Packer(prefix)
    packer.add(elements)
    if packer.incomplete:
        where = _path(packer.incomplete[0][1])
        raise ValueError(f"{where} is an incomplete Versionstamp: use pack_with_versionstamp")
    return bytes(packer.packed)


def pack_with_versionstamp(elements: Elements, prefix: bytes = b"") -> bytes:
    """Returns the template for `set_versionstamped_key`: prefix, packed tuple, and the offset of its versionstamp.

    The tuple, or a tuple in it, holds exactly one incomplete Versionstamp. Raises ValueError otherwise, and as `pack`.
    """
    packer = _Packer(prefix)
    packer.add(elements)
    if len(packer.incomplete) != 1:
        found = ", ".join(_path(path) for _, path in packer.incomplete) or "none"
        raise ValueError(f"a versionstamped key needs exactly one incomplete Versionstamp; the tuple has: {found}")
    offset = packer.incomplete[0][0]
    return bytes(packer.packed) + offset.to_bytes(STAMP_OFFSET_BYTES, "little")


def range_of(elements: Elements, prefix: bytes = b"") -> tuple[bytes, bytes]:
    """Returns the begin and end of the keys of all longer tuples that begin with these elements.

    The key of the tuple itself is not among them. Raises TypeError and ValueError as `pack`.
    """
    packed = pack(elements, prefix)
    return packed + b"\x00", packed + b"\xff"


def unpack(packed: bytes | bytearray | memoryview, start: int = 0) -> tuple[Any, ...]:
    """Returns the tuple that is packed in the bytes from `start` on.

    Raises ValueError, with the position of the byte, if they are no packed tuple. An integer with more bytes than it
    needs, which some writers produce, is accepted.
    """
    return _Unpacker(as_bytes(packed, "a packed tuple"), start).elements()


def _path(path: tuple[int, ...]) -> str:
    return "element " + "".join(f"[{place}]" for place in path)


class _Packer:
    """Appends elements to a prefix, and records the incomplete versionstamps."""

    def __init__(self, prefix: bytes) -> None:
        self.packed = bytearray(as_bytes(prefix, "a prefix"))
        self.incomplete: list[tuple[int, tuple[int, ...]]] = []
        """The offset of each incomplete versionstamp, and its path."""

    def add(self, elements: Elements) -> None:
        """Appends all elements, with the nested tuples."""
        if not isinstance(elements, tuple | list):
            raise TypeError(f"a tuple is packed, not {type(elements).__name__}: write (element,) for one element")
        open_tuples = [iter(elements)]
        path = [-1]
        while open_tuples:
            for element in open_tuples[-1]:
                path[-1] += 1
                if isinstance(element, tuple | list):
                    self.packed.append(NESTED)
                    open_tuples.append(iter(element))
                    path.append(-1)
                    break
                self._add_one(element, path)
            else:
                open_tuples.pop()
                path.pop()
                if open_tuples:
                    self.packed += END

    def _add_one(self, element: object, path: list[int]) -> None:
        if element is None:
            # Within a nested tuple, a zero byte that is not escaped ends the tuple.
            self.packed += END + ESCAPE if len(path) > 1 else END
            return
        for kind, encode in _ENCODERS:
            if isinstance(element, kind):
                try:
                    self.packed += encode(element)
                except ValueError as error:
                    raise ValueError(f"{_path(tuple(path))}: {error}") from None
                break
        else:
            raise TypeError(f"{_path(tuple(path))} is of type {type(element).__name__}, which has no tuple encoding")
        if isinstance(element, Versionstamp) and not element.is_complete:
            self.incomplete.append((len(self.packed) - STAMP_ELEMENT_BYTES, tuple(path)))


def _bool(element: bool) -> bytes:
    return bytes([TRUE if element else FALSE])


def _integer(element: int) -> bytes:
    length = (element.bit_length() + 7) // 8
    if length > MAX_INTEGER_BYTES:
        raise ValueError(f"an integer of {length} bytes is longer than {MAX_INTEGER_BYTES}")
    # Inverts a negative number, so that the greater one has the greater bytes.
    digits = (element if element >= 0 else element + (1 << 8 * length) - 1).to_bytes(length, "big")
    if length <= MAX_SHORT_BYTES:
        return bytes([ZERO + length if element >= 0 else ZERO - length]) + digits
    return (bytes([LONG_POSITIVE, length]) if element >= 0 else bytes([LONG_NEGATIVE, length ^ 0xFF])) + digits


def _double(element: float) -> bytes:
    return bytes([DOUBLE]) + _ordered(struct.pack(">d", element))


def _single(element: SingleFloat) -> bytes:
    return bytes([SINGLE]) + _ordered(struct.pack(">f", element.value))


def _ordered(number: bytes) -> bytes:
    """Changes the bits of a big-endian float so that they sort like the numbers."""
    if number[0] & 0x80:
        return bytes(each ^ 0xFF for each in number)
    return bytes([number[0] | 0x80]) + number[1:]


def _from_ordered(ordered: bytes) -> bytes:
    """Reverts `_ordered`."""
    if ordered[0] & 0x80:
        return bytes([ordered[0] & 0x7F]) + ordered[1:]
    return bytes(each ^ 0xFF for each in ordered)


def _string(element: bytes) -> bytes:
    return bytes([BYTES]) + _terminated(bytes(element))


def _text(element: str) -> bytes:
    return bytes([TEXT]) + _terminated(element.encode("utf-8"))


def _terminated(data: bytes) -> bytes:
    return data.replace(END, END + ESCAPE) + END


_ENCODERS: tuple[tuple[Any, Callable[[Any], bytes]], ...] = (
    (bool, _bool),  # before int, of which it is a kind
    (int, _integer),
    (str, _text),
    ((bytes, bytearray, memoryview), _string),
    (float, _double),
    (SingleFloat, _single),
    (UUID, lambda element: bytes([UUID_CODE]) + element.bytes),
    (Versionstamp, lambda element: bytes([VERSIONSTAMP]) + bytes(element)),
)


class _Unpacker:
    """Reads elements from a position on."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._at = start

    def elements(self) -> tuple[Any, ...]:
        """Returns all elements up to the end of the bytes."""
        outermost: list[Any] = []
        # The tuples that are open, from the outermost to the innermost, and where the nested ones began.
        open_tuples, began = [outermost], [self._at]
        while self._at < len(self._data):
            code_at = self._at
            code = self._take(1, code_at)[0]
            if code == NESTED:
                open_tuples.append([])
                began.append(code_at)
            elif code == NULL and len(open_tuples) > 1 and not self._skip_escape():
                nested = tuple(open_tuples.pop())
                began.pop()
                open_tuples[-1].append(nested)
            else:
                open_tuples[-1].append(self._element(code, code_at))
        if len(open_tuples) > 1:
            raise ValueError(f"the nested tuple at byte {began[-1]} has no end")
        return tuple(outermost)

    def _element(self, code: int, code_at: int) -> Any:
        if LONG_NEGATIVE <= code <= LONG_POSITIVE:
            return self._integer(code, code_at)
        if code not in _DECODERS:
            raise ValueError(f"the byte {code:02x} at {code_at} is no type code of an element")
        return _DECODERS[code](self, code_at)

    def _skip_escape(self) -> bool:
        """Whether an escape comes next; the position moves past it."""
        escaped = self._data.startswith(ESCAPE, self._at)
        self._at += escaped
        return escaped

    def _take(self, length: int, code_at: int) -> bytes:
        taken = self._data[self._at : self._at + length]
        if len(taken) < length:
            raise ValueError(
                f"the element at byte {code_at} ends after {len(taken)} of the {length} bytes that follow its type"
            )
        self._at += length
        return taken

    def _integer(self, code: int, code_at: int) -> int:
        length = abs(code - ZERO)
        if length > MAX_SHORT_BYTES:
            length = self._take(1, code_at)[0] ^ (0xFF if code == LONG_NEGATIVE else 0)
        number = int.from_bytes(self._take(length, code_at), "big")
        return number if code >= ZERO else number - (1 << 8 * length) + 1

    def string(self, code_at: int) -> bytes:
        """Reads up to the zero byte that is not escaped."""
        parts: list[bytes] = []
        while True:
            end = self._data.find(END, self._at)
            if end < 0:
                raise ValueError(f"the string at byte {code_at} has no end")
            parts.append(self._data[self._at : end])
            self._at = end + 1
            if not self._skip_escape():
                return END.join(parts)

    def text(self, code_at: int) -> str:
        """Reads UTF-8 up to the zero byte that is not escaped."""
        try:
            return self.string(code_at).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the text at byte {code_at} is not UTF-8: {error.reason}") from None

    def double(self, code_at: int) -> float:
        """Reads a float of 8 bytes."""
        number: float = struct.unpack(">d", _from_ordered(self._take(8, code_at)))[0]
        return number

    def single(self, code_at: int) -> SingleFloat:
        """Reads a float of 4 bytes."""
        return SingleFloat(struct.unpack(">f", _from_ordered(self._take(4, code_at)))[0])

    def uuid(self, code_at: int) -> UUID:
        """Reads a UUID."""
        return UUID(bytes=self._take(UUID_BYTES, code_at))

    def versionstamp(self, code_at: int) -> Versionstamp:
        """Reads a versionstamp, complete or not."""
        return Versionstamp.from_bytes(self._take(STAMP_ELEMENT_BYTES, code_at))


_DECODERS: dict[int, Callable[[_Unpacker, int], Any]] = {
    NULL: lambda _unpacker, _code_at: None,
    BYTES: _Unpacker.string,
    TEXT: _Unpacker.text,
    SINGLE: _Unpacker.single,
    DOUBLE: _Unpacker.double,
    FALSE: lambda _unpacker, _code_at: False,
    TRUE: lambda _unpacker, _code_at: True,
    UUID_CODE: _Unpacker.uuid,
    VERSIONSTAMP: _Unpacker.versionstamp,
}
