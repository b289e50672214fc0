"""What mutations mean, alone and folded together. Pure.

`fold` turns the mutations of a whole batch, in commit order, into one write set whose application leaves the same
data as applying them one by one. A write set is applied in three steps: ranges are removed, keys are removed, keys
are written. So a key that is set after its range was cleared is simply among the written ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pgcoord_cli.core.codec import Mutation, Op, Range


class WriteSet:
    """The net effect of mutations: `ranges` to remove, then keys to remove, then keys to write."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self._final: dict[bytes, bytes | None] = {}

    @property
    def removed(self) -> list[bytes]:
        """Keys to remove after the ranges."""
        return [key for key, value in self._final.items() if value is None]

    @property
    def written(self) -> dict[bytes, bytes]:
        """Keys to write last, with their values."""
        return {key: value for key, value in self._final.items() if value is not None}

    def add(self, mutation: Mutation) -> None:
        """Takes in one more mutation, later than all before it."""
        if mutation.op == Op.SET:
            self._final[mutation.key] = mutation.operand
        elif mutation.op == Op.CLEAR:
            self._final[mutation.key] = None
        else:
            self._clear_range((mutation.key, mutation.operand))

    def _clear_range(self, cleared: Range) -> None:
        self.ranges.append(cleared)
        for key in [key for key in self._final if covers(cleared, key)]:
            del self._final[key]

    def lookup(self, key: bytes) -> tuple[bool, bytes | None]:
        """Whether the write set says what `key` holds, and if so its value (None: nothing)."""
        if key in self._final:
            return True, self._final[key]
        return any(covers(cleared, key) for cleared in self.ranges), None

    def over(self, rows: Mapping[bytes, bytes], begin: bytes, end: bytes | None) -> dict[bytes, bytes]:
        """What `rows`, all that is stored in the range, look like once this write set is applied. Unordered."""
        kept = {key: value for key, value in rows.items() if not self.lookup(key)[0]}
        inside = {key: value for key, value in self.written.items() if covers((begin, end), key)}
        return kept | inside


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
