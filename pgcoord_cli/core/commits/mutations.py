"""Mutations: the value that one leaves, and write sets, which hold the net effect of many. Pure.

**One mutation.** `apply` returns the value that a mutation leaves where another value was. The operations are those of
FoundationDB: arithmetic is on unsigned little-endian numbers of the operand's length, to which the stored value is cut
or zero-extended; on an absent key the bitwise operations, `min` and the byte comparisons leave the operand, and
`compare_and_clear` leaves nothing.

**Write sets.** A WriteSet takes mutations in commit order and holds their net effect, so that a whole batch becomes one
write. For each key it holds the value, if the mutations alone decide it, or else the mutations that need the stored
value: setting a key decides it, adding to it afterwards is computed at once, adding to a key that was not set before
needs the stored value. The leader reads the stored values of the `undecided` keys and computes them with `decide`; a
client that reads its own writes does the same for the key that it reads. Cleared ranges are joined where they meet, and
from the first cleared range on the keys are also kept in order, so that neither many ranges nor many keys make a batch
slow.

**Order of application.** Ranges are removed, then keys are removed, then keys are written. So a key that was set after
its range was cleared is simply one of the written keys.

**Versionstamps** are ten bytes that are known only at the commit: the version, eight bytes big-endian, and two bytes
for the order within the version, which are always zero since a version belongs to one transaction. The last four bytes
of the key or value template are the offset, little-endian, at which they go.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping

from sortedcontainers import SortedDict, SortedSet

from pgcoord_cli.core.commits.codec import MAX_VALUE_BYTES, VERSIONSTAMP_BYTES, Mutation, Op, Range, Request

Bytes = bytes | None
"""The value of a key, or None if the key is absent."""


def apply(op: Op, stored: Bytes, operand: bytes) -> Bytes:
    """Returns the value after one mutation of a key that held `stored`. Not for ranges and versionstamps."""
    if op == Op.SET:
        return operand
    return _FUNCTIONS[op](stored, operand)


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
    # As in FoundationDB, the stored number is cut to the operand's length before the comparison, not after it.
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
    """Returns the little-endian number in the first `length` bytes; missing bytes count as zero."""
    return int.from_bytes(stored[:length], "little")


_FUNCTIONS: dict[Op, Callable[[Bytes, bytes], Bytes]] = {
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
    """Returns the ten bytes of the commit with this version. They sort in commit order."""
    return version.to_bytes(8, "big") + b"\0\0"


def stamped(mutation: Mutation, version: int) -> Mutation:
    """Returns the plain mutation that a versionstamped one becomes at this commit version; any other unchanged."""
    if mutation.op == Op.SET_VERSIONSTAMPED_KEY:
        return Mutation(Op.SET, with_stamp(mutation.key, versionstamp(version)), mutation.operand)
    if mutation.op == Op.SET_VERSIONSTAMPED_VALUE:
        return Mutation(Op.SET, mutation.key, with_stamp(mutation.operand or b"", versionstamp(version)))
    return mutation


def with_stamp(template: bytes, stamp: bytes) -> bytes:
    """Returns a template with a versionstamp at its offset, and without the offset."""
    (offset,) = struct.unpack("<I", template[-4:])
    body = template[:-4]
    return body[:offset] + stamp + body[offset + VERSIONSTAMP_BYTES :]


class WriteSet:
    """The net effect of mutations, added in commit order. A key is either decided or undecided, never both."""

    def __init__(self) -> None:
        self._cleared: SortedDict | None = None  # made when first needed: most write sets clear no range
        self._decided: dict[bytes, Bytes] = {}
        self._undecided: dict[bytes, list[Mutation]] = {}
        # All keys in order, so that the keys in a range are found; made when they are first looked for.
        self._ordered: SortedSet | None = None

    def __bool__(self) -> bool:
        """Whether the write set changes anything."""
        return bool(self._cleared or self._decided or self._undecided)

    @property
    def ranges(self) -> list[Range]:
        """The ranges to remove first; they neither overlap nor touch."""
        return list(self._cleared.items()) if self._cleared else []

    @property
    def undecided(self) -> list[bytes]:
        """The keys whose new value depends on the stored one. Empty after `decide`."""
        return list(self._undecided)

    @property
    def removed(self) -> list[bytes]:
        """The keys to remove after the ranges."""
        return [key for key, value in self._decided.items() if value is None]

    @property
    def written(self) -> dict[bytes, bytes]:
        """The keys to write last, with their values."""
        return {key: value for key, value in self._decided.items() if value is not None}

    def add(self, mutation: Mutation) -> None:
        """Adds a mutation that applies after all added before. Versionstamped ones have to be `stamped` first."""
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
            # The range is removed before keys are written, so that this mutation finds the key absent.
            self._decided[key] = apply(op, None, operand or b"")
        else:
            self._undecided.setdefault(key, []).append(mutation)
        if self._ordered is not None:
            self._ordered.add(key)

    def _clear_range(self, begin: bytes, end: Bytes) -> None:
        if end is not None and begin >= end:
            return
        for key in list(self._keys_in(begin, end)):
            self._in_order.discard(key)
            self._decided.pop(key, None)
            self._undecided.pop(key, None)
        self._join(begin, end)

    @property
    def _in_order(self) -> SortedSet:
        if self._ordered is None:
            self._ordered = SortedSet((*self._decided, *self._undecided))
        return self._ordered

    def _keys_in(self, begin: bytes, end: Bytes) -> Iterator[bytes]:
        return iter(self._in_order.irange(begin, end, (True, False)))

    def _join(self, begin: bytes, end: Bytes) -> None:
        """Adds a cleared range, joined with those that it overlaps or touches."""
        if self._cleared is None:
            self._cleared = SortedDict()
        place = self._cleared.bisect_right(begin) - 1
        if place >= 0:
            before, its_end = self._cleared.peekitem(place)
            begin = before if its_end is None or begin <= its_end else begin
        # The end is included: a range that begins there touches this one.
        for touching in list(self._cleared.irange(begin, end)):
            its_end = self._cleared.pop(touching)
            end = None if end is None or its_end is None else max(end, its_end)
        self._cleared[begin] = end

    def _is_cleared(self, key: bytes) -> bool:
        if not self._cleared:
            return False
        place = self._cleared.bisect_right(key) - 1
        return place >= 0 and covers(self._cleared.peekitem(place), key)

    def decide(self, stored: Mapping[bytes, Bytes]) -> None:
        """Computes every undecided key from its stored value; a key that `stored` lacks counts as absent."""
        for key, mutations in self._undecided.items():
            self._decided[key] = _apply_all(mutations, stored.get(key))
        self._undecided.clear()

    def lookup(self, key: bytes) -> tuple[bool, Bytes]:
        """Returns whether the write set alone decides the value of `key`, and if so the value (None: absent)."""
        if key in self._decided:
            return True, self._decided[key]
        return key not in self._undecided and self._is_cleared(key), None

    def value(self, key: bytes, stored: Bytes) -> Bytes:
        """Returns the value of `key` after the write set is applied to its stored value."""
        decided, value = self.lookup(key)
        return value if decided else _apply_all(self._undecided.get(key, ()), stored)

    def over(self, rows: Mapping[bytes, bytes], begin: bytes, end: bytes | None) -> dict[bytes, bytes]:
        """Applies the write set to a range, and returns its keys and values, unordered.

        `rows` are all rows that are stored from `begin` up to but without `end`.
        """
        values = {key: self.value(key, rows.get(key)) for key in (*rows, *self._keys_in(begin, end))}
        return {key: value for key, value in values.items() if value is not None}

    def cleared_in(self, begin: bytes, end: bytes | None) -> Iterator[Range]:
        """Yields the parts of a range that cleared ranges cover, in order: there, nothing depends on stored rows."""
        if not self._cleared:
            return
        place = max(self._cleared.bisect_right(begin) - 1, 0)
        for cleared_begin in self._cleared.islice(place):
            if end is not None and cleared_begin >= end:
                return
            part_end = least_end(self._cleared[cleared_begin], end)
            if part_end is None or part_end > begin:
                yield max(cleared_begin, begin), part_end

    def decided_in(self, begin: bytes, end: bytes | None) -> Iterator[bytes]:
        """Yields the keys of a range whose value does not depend on the stored one, in order."""
        return (key for key in self._keys_in(begin, end) if key in self._decided)


def _apply_all(mutations: Iterable[Mutation], stored: Bytes) -> Bytes:
    for op, _, operand in mutations:
        stored = apply(op, stored, operand or b"")
    return stored


def fold(mutations: Iterable[Mutation]) -> WriteSet:
    """Returns the write set with the effect of the mutations applied one after the other."""
    result = WriteSet()
    for mutation in mutations:
        result.add(mutation)
    return result


def covers(interval: Range, key: bytes) -> bool:
    """Whether the key lies in the half-open range."""
    begin, end = interval
    return begin <= key and (end is None or key < end)


def least_end(one: bytes | None, other: bytes | None) -> bytes | None:
    """Returns the lesser of two ends of ranges; None is past the last key."""
    return other if one is None else one if other is None else min(one, other)


def writes_of(request: Request) -> tuple[list[bytes], list[Range]]:
    """Returns the keys and ranges that later reads conflict with. The request has gone through `with_stamps`."""
    mutations: Iterable[Mutation] = request.mutations
    if request.no_conflict:
        left_out = set(request.no_conflict)
        mutations = [mutation for place, mutation in enumerate(mutations) if place not in left_out]
    keys = [key for op, key, _ in mutations if op != Op.CLEAR_RANGE]
    ranges = [(key, end) for op, key, end in mutations if op == Op.CLEAR_RANGE]
    return keys, [*ranges, *request.write_ranges]


def with_stamps(request: Request, version: int) -> Request:
    """Returns the request with its versionstamped mutations made plain for this commit version."""
    # Most requests have none, and are returned as they are, without a copy.
    for mutation in request.mutations:
        if mutation.op >= Op.SET_VERSIONSTAMPED_KEY:
            break
    else:
        return request
    return request._replace(mutations=tuple(stamped(mutation, version) for mutation in request.mutations))
