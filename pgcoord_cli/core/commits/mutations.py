"""What mutations mean, alone and folded together. Pure.

**Alone.** `apply` gives the value that one mutation leaves where another was. Meanings are FoundationDB's: arithmetic
is on unsigned little-endian numbers of the operand's length, to which the stored value is cut or zero-extended; on an
absent key the bitwise operations, `min` and the byte comparisons leave the operand, `compare_and_clear` leaves
nothing.

**Folded.** A WriteSet takes mutations in commit order and holds their net effect, so that a whole batch becomes one
write. For each key it keeps the value, if the mutations decide it, or else those that wait for the stored value:
setting a key decides it, adding to it afterwards is worked out at once, adding to a key that nobody set waits. The
leader reads the stored values of `undecided` keys and settles them with `decide`; a client that reads its own writes
does the same for the key it asks about. Cleared ranges are joined where they meet, and from the first on the
keys are in order beside, so that neither many ranges nor many keys make a batch slow.

**Applied** in three steps: ranges are removed, keys are removed, keys are written. So a key that was set after its
range was cleared is simply among the written ones.

**Versionstamps** are ten bytes that only the commit knows: the version, eight bytes big-endian, and two bytes for the
order within it, which is always zero since a version belongs to one transaction. The operand or key says by its last
four bytes, little-endian, where they go.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping

from sortedcontainers import SortedDict, SortedSet

from pgcoord_cli.core.commits.codec import MAX_VALUE_BYTES, VERSIONSTAMP_BYTES, Mutation, Op, Range, Request

Bytes = bytes | None
"""A value, or None where there is none."""


def apply(op: Op, stored: Bytes, operand: bytes) -> Bytes:
    """The value after one mutation of a key that held `stored`. Not for ranges and versionstamps."""
    if op == Op.SET:
        return operand
    return _MEANINGS[op](stored, operand)


def _add(stored: Bytes, operand: bytes) -> Bytes:
    length = len(operand)
    total = _number(stored or b"", length) + int.from_bytes(operand, "little")
    return (total % (1 << 8 * length)).to_bytes(length, "little")


def _bitwise(operate: Callable[[int, int], int]) -> Callable[[Bytes, bytes], Bytes]:
    def mutate(stored: Bytes, operand: bytes) -> Bytes:
        if stored is None:
            return operand
        length = len(operand)
        return operate(_number(stored, length), int.from_bytes(operand, "little")).to_bytes(length, "little")

    return mutate


def _append_if_fits(stored: Bytes, operand: bytes) -> Bytes:
    joined = (stored or b"") + operand
    return joined if len(joined) <= MAX_VALUE_BYTES else stored


def _max(stored: Bytes, operand: bytes) -> Bytes:
    # The whole stored number is cut to the operand's length before the two are compared.
    length = len(operand)
    return max(_number(stored or b"", length), int.from_bytes(operand, "little")).to_bytes(length, "little")


def _min(stored: Bytes, operand: bytes) -> Bytes:
    if stored is None:
        return operand
    length = len(operand)
    return min(_number(stored, length), int.from_bytes(operand, "little")).to_bytes(length, "little")


def _byte_max(stored: Bytes, operand: bytes) -> Bytes:
    return operand if stored is None else max(stored, operand)


def _byte_min(stored: Bytes, operand: bytes) -> Bytes:
    return operand if stored is None else min(stored, operand)


def _compare_and_clear(stored: Bytes, operand: bytes) -> Bytes:
    return None if stored == operand else stored


def _clear(_stored: Bytes, _operand: bytes) -> Bytes:
    return None


def _number(stored: bytes, length: int) -> int:
    """The little-endian number in the first `length` bytes; what is missing counts as zero."""
    return int.from_bytes(stored[:length], "little")


_MEANINGS: dict[Op, Callable[[Bytes, bytes], Bytes]] = {
    Op.CLEAR: _clear,
    Op.ADD: _add,
    Op.BIT_AND: _bitwise(lambda a, b: a & b),
    Op.BIT_OR: _bitwise(lambda a, b: a | b),
    Op.BIT_XOR: _bitwise(lambda a, b: a ^ b),
    Op.APPEND_IF_FITS: _append_if_fits,
    Op.MAX: _max,
    Op.MIN: _min,
    Op.BYTE_MAX: _byte_max,
    Op.BYTE_MIN: _byte_min,
    Op.COMPARE_AND_CLEAR: _compare_and_clear,
}


def versionstamp(version: int) -> bytes:
    """The ten bytes that name the commit with this version."""
    return version.to_bytes(8, "big") + b"\0\0"


def stamped(mutation: Mutation, version: int) -> Mutation:
    """The plain mutation that a versionstamped one is once its commit has a version; any other as it is."""
    if mutation.op == Op.SET_VERSIONSTAMPED_KEY:
        return Mutation(Op.SET, _with_stamp(mutation.key, version), mutation.operand)
    if mutation.op == Op.SET_VERSIONSTAMPED_VALUE:
        return Mutation(Op.SET, mutation.key, _with_stamp(mutation.operand or b"", version))
    return mutation


def _with_stamp(template: bytes, version: int) -> bytes:
    (offset,) = struct.unpack("<I", template[-4:])
    body = template[:-4]
    return body[:offset] + versionstamp(version) + body[offset + VERSIONSTAMP_BYTES :]


class WriteSet:
    """The net effect of mutations, taken in commit order."""

    def __init__(self) -> None:
        self._cleared: SortedDict | None = None  # made when first needed: most write sets clear no range
        self._decided: dict[bytes, Bytes] = {}
        self._undecided: dict[bytes, list[Mutation]] = {}
        self._ordered: SortedSet | None = None

    def __bool__(self) -> bool:
        return bool(self._cleared or self._decided or self._undecided)

    @property
    def ranges(self) -> list[Range]:
        """Ranges to remove first; they neither overlap nor touch."""
        return list(self._cleared.items()) if self._cleared else []

    @property
    def undecided(self) -> list[bytes]:
        """Keys whose value depends on what is stored."""
        return list(self._undecided)

    @property
    def removed(self) -> list[bytes]:
        """Keys to remove after the ranges."""
        return [key for key, value in self._decided.items() if value is None]

    @property
    def written(self) -> dict[bytes, bytes]:
        """Keys to write last, with their values."""
        return {key: value for key, value in self._decided.items() if value is not None}

    def add(self, mutation: Mutation) -> None:
        """Takes in one more mutation, later than all before it. Versionstamped ones have to be `stamped` before."""
        op, key, operand = mutation
        if op == Op.CLEAR_RANGE:
            self._clear_range(key, operand)
            return
        if op in (Op.SET, Op.CLEAR):
            self._undecided.pop(key, None)
            self._decided[key] = operand if op == Op.SET else None
        elif key in self._decided:
            self._decided[key] = apply(op, self._decided[key], operand or b"")
        elif key not in self._undecided and self._is_cleared(key):
            self._decided[key] = apply(op, None, operand or b"")
        else:
            self._undecided.setdefault(key, []).append(mutation)
        if self._ordered is not None:
            self._ordered.add(key)

    def _clear_range(self, begin: bytes, end: Bytes) -> None:
        if end is not None and begin >= end:
            return
        if self._ordered is None:
            self._ordered = SortedSet((*self._decided, *self._undecided))
        for key in list(self._ordered.irange(begin, end, (True, False))):
            self._ordered.discard(key)
            self._decided.pop(key, None)
            self._undecided.pop(key, None)
        self._join(begin, end)

    def _join(self, begin: bytes, end: Bytes) -> None:
        """Adds a range to the cleared ones, made one with those that it meets."""
        if self._cleared is None:
            self._cleared = SortedDict()
        place = self._cleared.bisect_right(begin) - 1
        if place >= 0:
            before, its_end = self._cleared.peekitem(place)
            begin = before if its_end is None or begin <= its_end else begin
        for met in list(self._cleared.irange(begin, end)):
            its_end = self._cleared.pop(met)
            end = None if end is None or its_end is None else max(end, its_end)
        self._cleared[begin] = end

    def _is_cleared(self, key: bytes) -> bool:
        if not self._cleared:
            return False
        place = self._cleared.bisect_right(key) - 1
        return place >= 0 and covers(self._cleared.peekitem(place), key)

    def decide(self, stored: Mapping[bytes, Bytes]) -> None:
        """Works out every undecided key from what is stored under it."""
        for key, waiting in self._undecided.items():
            self._decided[key] = _apply_all(waiting, stored.get(key))
        self._undecided.clear()

    def lookup(self, key: bytes) -> tuple[bool, Bytes]:
        """Whether the write set alone says what `key` holds, and if so its value (None: nothing)."""
        if key in self._decided:
            return True, self._decided[key]
        return key not in self._undecided and self._is_cleared(key), None

    def value(self, key: bytes, stored: Bytes) -> Bytes:
        """What `key` holds once the write set is applied to what is stored."""
        decided, value = self.lookup(key)
        return value if decided else _apply_all(self._undecided.get(key, ()), stored)

    def over(self, rows: Mapping[bytes, bytes], begin: bytes, end: bytes | None) -> dict[bytes, bytes]:
        """What `rows`, all that is stored in the range, look like once this write set is applied. Unordered."""
        touched = (key for key in (*self._decided, *self._undecided) if covers((begin, end), key))
        values = {key: self.value(key, rows.get(key)) for key in (*rows, *touched)}
        return {key: value for key, value in values.items() if value is not None}


def _apply_all(mutations: Iterable[Mutation], stored: Bytes) -> Bytes:
    for op, _, operand in mutations:
        stored = apply(op, stored, operand or b"")
    return stored


def fold(mutations: Iterable[Mutation]) -> WriteSet:
    """One write set that does what the mutations do one after the other."""
    result = WriteSet()
    for mutation in mutations:
        result.add(mutation)
    return result


def covers(interval: Range, key: bytes) -> bool:
    """Whether the half-open range holds the key."""
    begin, end = interval
    return begin <= key and (end is None or key < end)


def writes_of(request: Request) -> tuple[list[bytes], list[Range]]:
    """The keys and the ranges that later reads are checked against; of a request whose versionstamps are in. Pure."""
    keys = [key for op, key, _ in request.mutations if op != Op.CLEAR_RANGE]
    ranges = [(key, end) for op, key, end in request.mutations if op == Op.CLEAR_RANGE]
    return keys, [*ranges, *request.write_ranges]


def with_stamps(request: Request, version: int) -> Request:
    """The request as its commit version makes it: versionstamped mutations have become plain ones. Pure."""
    for mutation in request.mutations:
        if mutation.op >= Op.SET_VERSIONSTAMPED_KEY:
            break
    else:
        return request
    return request._replace(mutations=tuple(stamped(mutation, version) for mutation in request.mutations))
