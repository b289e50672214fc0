"""Writing in a transaction: one method for each mutation, with FoundationDB's meaning.

The asyncio transaction (`core.kv.transaction`) and the blocking one (`core.kv.blocking`) share these methods. None of
them waits: a mutation is checked and buffered, and takes effect at the commit. `core.commits.mutations` applies them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from pgcoord_cli.core.commits.codec import Op
from pgcoord_cli.core.kv.checks import as_bytes, as_slice
from pgcoord_cli.core.kv.reading import prefix_range


class WriteMethods(ABC):
    """The writing methods of a transaction.

    Keys, values and operands are bytes; a bytearray or memoryview is copied. Each method raises TypeError for anything
    else, and KeyTooLarge, ValueTooLarge or Rejected for an argument that no commit would accept; nothing is buffered
    then.
    """

    # Python would otherwise iterate by calling __getitem__ with 0, 1, 2 and so on; `key in transaction` would not end.
    __iter__ = None

    @abstractmethod
    def mutate(self, op: Op, key: bytes, operand: bytes | None) -> None:
        """Checks and buffers one mutation."""

    @abstractmethod
    def add_write_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes transactions that read from `begin` up to but without `end` conflict with this one."""

    @abstractmethod
    def next_write_no_write_conflict_range(self) -> None:
        """Makes the next mutation no reason for a conflict: transactions that read what it writes may commit."""

    def add_write_conflict_key(self, key: bytes) -> None:
        """Makes transactions that read a key conflict with this one, as if it had written the key."""
        key = as_bytes(key, "a key")
        self.add_write_conflict_range(key, key + b"\0")

    def set(self, key: bytes, value: bytes) -> None:
        """Sets a key to a value."""
        self.mutate(Op.SET, key, value)

    def clear(self, key: bytes) -> None:
        """Removes a key."""
        self.mutate(Op.CLEAR, key, None)

    def clear_range(self, begin: bytes, end: bytes | None) -> None:
        """Removes every key from `begin` up to but without `end` (None: to the last key)."""
        self.mutate(Op.CLEAR_RANGE, begin, end)

    def clear_range_startswith(self, prefix: bytes) -> None:
        """Removes every key that begins with a prefix; with b"", every key."""
        self.clear_range(*prefix_range(as_bytes(prefix, "a prefix")))

    def __setitem__(self, key: bytes, value: bytes) -> None:
        """`transaction[key] = value` is `set`."""
        self.set(key, value)

    def __delitem__(self, item: bytes | slice) -> None:
        """`del transaction[key]` is `clear`, `del transaction[begin:end]` is `clear_range`.

        A begin that is left out is the first key, an end that is left out the last one. Raises ValueError for a step
        other than 1 and -1.
        """
        if isinstance(item, slice):
            begin, end, _ = as_slice(item)
            self.clear_range(begin, end)
        else:
            self.clear(item)

    def add(self, key: bytes, operand: bytes) -> None:
        """Adds an unsigned little-endian number; the result has the operand's length. An absent key counts as zero."""
        self.mutate(Op.ADD, key, operand)

    def bit_and(self, key: bytes, operand: bytes) -> None:
        """Applies a bitwise AND; the result has the operand's length. An absent key is set to the operand."""
        self.mutate(Op.BIT_AND, key, operand)

    def bit_or(self, key: bytes, operand: bytes) -> None:
        """Applies a bitwise OR; the result has the operand's length. An absent key is set to the operand."""
        self.mutate(Op.BIT_OR, key, operand)

    def bit_xor(self, key: bytes, operand: bytes) -> None:
        """Applies a bitwise XOR; the result has the operand's length. An absent key is set to the operand."""
        self.mutate(Op.BIT_XOR, key, operand)

    def append_if_fits(self, key: bytes, operand: bytes) -> None:
        """Appends the operand, unless the value would become longer than MAX_VALUE_BYTES."""
        self.mutate(Op.APPEND_IF_FITS, key, operand)

    def max(self, key: bytes, operand: bytes) -> None:
        """Sets the greater of two unsigned little-endian numbers, of the operand's length. Absent counts as zero."""
        self.mutate(Op.MAX, key, operand)

    def min(self, key: bytes, operand: bytes) -> None:
        """Sets the smaller of two unsigned little-endian numbers, of the operand's length. Absent: the operand."""
        self.mutate(Op.MIN, key, operand)

    def byte_max(self, key: bytes, operand: bytes) -> None:
        """Sets the lexically greater of two byte strings. An absent key is set to the operand."""
        self.mutate(Op.BYTE_MAX, key, operand)

    def byte_min(self, key: bytes, operand: bytes) -> None:
        """Sets the lexically smaller of two byte strings. An absent key is set to the operand."""
        self.mutate(Op.BYTE_MIN, key, operand)

    def compare_and_clear(self, key: bytes, operand: bytes) -> None:
        """Removes the key if its value equals the operand."""
        self.mutate(Op.COMPARE_AND_CLEAR, key, operand)

    def set_versionstamped_key(self, template: bytes, value: bytes) -> None:
        """Sets a key with the versionstamp at the offset in the last four bytes of the template, little-endian."""
        self.mutate(Op.SET_VERSIONSTAMPED_KEY, template, value)

    def set_versionstamped_value(self, key: bytes, template: bytes) -> None:
        """Sets a value with the versionstamp at the offset in the last four bytes of the template, little-endian."""
        self.mutate(Op.SET_VERSIONSTAMPED_VALUE, key, template)
