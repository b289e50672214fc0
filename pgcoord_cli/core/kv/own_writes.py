"""The writes of one transaction as its own reads see them. Pure.

A read sees the stored rows with the transaction's writes applied. Three kinds of keys differ in what such a read needs:

- *Decided*: set or cleared by the transaction. The stored value does not matter: it is neither read nor checked for
  conflicts.
- *Undecided*: changed by a mutation of the stored value, which is read, and conflicts.
- *Unreadable*: its value or its very name holds the versionstamp of the commit, which is not known yet. Any read that
  would depend on it is refused. A key whose name will hold the stamp lies somewhere in the range that all stamps span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pgcoord_cli.core.commits.codec import VERSIONSTAMP_BYTES, Mutation, Op, Range
from pgcoord_cli.core.commits.mutations import Bytes, WriteSet, fold, least_end, with_stamp
from pgcoord_cli.errors import Rejected


class Part(NamedTuple):
    """A part of a range to read; `is_cleared`: own writes alone decide it."""

    begin: bytes
    end: bytes | None
    is_cleared: bool


class OwnWrites:
    """The mutations of a transaction, in order, and their effect."""

    def __init__(self) -> None:
        self.mutations: list[Mutation] = []
        self._write_set: WriteSet | None = None
        self._unreadable: list[Range] = []

    def __bool__(self) -> bool:
        return bool(self.mutations)

    def add(self, mutation: Mutation) -> None:
        """Adds a mutation that has been checked."""
        self.mutations.append(mutation)
        if mutation.op >= Op.SET_VERSIONSTAMPED_KEY:
            self._unreadable.append(_stamped_range(mutation))
        else:
            if self._unreadable and mutation.op in (Op.SET, Op.CLEAR, Op.CLEAR_RANGE):
                self._make_readable(_written_range(mutation))
            # Once folded, it is kept up to date, so that reads between many writes do not fold them all again.
            if self._write_set is not None:
                self._write_set.add(mutation)

    @property
    def _effect(self) -> WriteSet:
        """The net effect of the mutations, without versionstamped ones. Folded at the first read after a write."""
        if self._write_set is None:
            self._write_set = fold(m for m in self.mutations if m.op < Op.SET_VERSIONSTAMPED_KEY)
        return self._write_set

    def lookup(self, key: bytes) -> tuple[bool, Bytes]:
        """Returns whether the writes alone decide a key, and its value then. Raises Rejected if it is unreadable."""
        if not self.mutations:
            return False, None
        self.check_readable((key, key + b"\0"))
        return self._effect.lookup(key)

    def value(self, key: bytes, stored: Bytes) -> Bytes:
        """Returns the value of a key that the writes leave, given its stored value."""
        return self._effect.value(key, stored) if self.mutations else stored

    def parts(self, begin: bytes, end: bytes | None, *, reverse: bool) -> Iterator[Part]:
        """Yields the parts of a range, from its end backwards if `reverse`: those that were cleared, and the others."""
        parts = _alternating(self._effect.cleared_in(begin, end) if self.mutations else iter(()), begin, end)
        return iter(reversed(list(parts))) if reverse else parts

    def over(self, rows: Sequence[tuple[bytes, bytes]], part: Range, *, reverse: bool) -> Sequence[tuple[bytes, bytes]]:
        """Returns the rows of a part as the writes leave them, in the order of the read; `rows` are all stored ones."""
        if not self.mutations:
            return rows
        return sorted(self._effect.over(dict(rows), *part).items(), reverse=reverse)

    def conflicts(self, part: Range) -> Iterator[Range]:
        """Yields what a read of this part depends on: all of it, without the keys that the writes decide."""
        begin, end = part
        for key in self._effect.decided_in(begin, end) if self.mutations else ():
            if begin < key:
                yield begin, key
            begin = key + b"\0"
        if end is None or begin < end:
            yield begin, end

    def check_readable(self, part: Range) -> None:
        """Raises Rejected if a part of the key space contains an unreadable key."""
        if any(_overlap(part, unreadable) for unreadable in self._unreadable):
            raise Rejected("the value contains the versionstamp of this commit: it can be read only after the commit")

    def _make_readable(self, written: Range) -> None:
        self._unreadable = [rest for unreadable in self._unreadable for rest in _without(unreadable, written)]


def _stamped_range(mutation: Mutation) -> Range:
    """Returns the keys that a versionstamped mutation may write: one, or those between the least and greatest stamp."""
    if mutation.op == Op.SET_VERSIONSTAMPED_VALUE:
        return mutation.key, mutation.key + b"\0"
    least, greatest = (with_stamp(mutation.key, bytes([fill]) * VERSIONSTAMP_BYTES) for fill in (0, 255))
    return least, greatest + b"\0"


def _written_range(mutation: Mutation) -> Range:
    return mutation.key, mutation.operand if mutation.op == Op.CLEAR_RANGE else mutation.key + b"\0"


def _alternating(cleared: Iterator[Range], begin: bytes, end: bytes | None) -> Iterator[Part]:
    for cleared_begin, cleared_end in cleared:
        if begin < cleared_begin:
            yield Part(begin, cleared_begin, False)
        yield Part(cleared_begin, cleared_end, True)
        if cleared_end is None:
            return
        begin = cleared_end
    if end is None or begin < end:
        yield Part(begin, end, False)


def _overlap(one: Range, other: Range) -> bool:
    end = least_end(one[1], other[1])
    return end is None or max(one[0], other[0]) < end


def _without(whole: Range, cut: Range) -> Sequence[Range]:
    """Returns what is left of a range without another one."""
    if not _overlap(whole, cut):
        return [whole]
    before, after = (whole[0], cut[0]), (cut[1], whole[1])
    rest: list[Range] = [before] if whole[0] < cut[0] else []
    if after[0] is not None and (after[1] is None or after[0] < after[1]):
        rest.append((after[0], after[1]))
    return rest
