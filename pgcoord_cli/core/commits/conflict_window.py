"""The conflict window: who wrote what, since when. Pure.

The resolver asks one question of a transaction: has anything that it read been written after its read version? The
window answers from the writes of the commits above its *floor*. Below the floor it knows nothing, so a transaction
that read there is too old, always.

**Shape.** Single keys are in a dictionary, from key to the version that wrote it last. Their order is kept beside it
from the first read of a range on; where only keys are read, nobody pays for it. Written ranges form a step
function over the key space: `_steps[boundary]` is the version that last wrote the keys from that boundary to the
next. Versions only grow, so writing a range is an assignment, never a maximum.

**Invariant.** For every key k, `max(_keys.get(k, 0), step at k)` is the greatest version above the floor that wrote
k, if there is one; otherwise it is at or below the floor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sortedcontainers import SortedDict, SortedSet

from pgcoord_cli.core.commits.codec import Range


class ConflictWindow:
    """Writes of the commits above `floor`. Versions are those of commits; they grow with every `record`."""

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self._keys: dict[bytes, int] = {}
        self._ordered: SortedSet | None = None
        self._steps = SortedDict({b"": 0})
        self._no_ranges = True  # the common case, and much the cheaper one
        self._history: deque[tuple[int, list[bytes]]] = deque()

    def __len__(self) -> int:
        return len(self._keys) + len(self._steps)

    def conflicts(self, read_version: int, keys: Iterable[bytes], ranges: Iterable[Range]) -> bool:
        """Whether any of the keys or ranges was written after `read_version`, which is not below the floor."""
        return any(self._written(key) > read_version for key in keys) or any(
            self._written_within(interval) > read_version for interval in ranges
        )

    def _written(self, key: bytes) -> int:
        point = self._keys.get(key, 0)
        return point if self._no_ranges else max(point, self._step_at(key))

    def _step_at(self, key: bytes) -> int:
        return int(self._steps.peekitem(self._steps.bisect_right(key) - 1)[1])

    def _written_within(self, interval: Range) -> int:
        begin, end = interval
        if end is not None and begin >= end:
            return 0
        if self._ordered is None:
            self._ordered = SortedSet(self._keys)
        points = max((self._keys[key] for key in self._ordered.irange(begin, end, (True, False))), default=0)
        first = self._steps.peekitem(self._steps.bisect_right(begin) - 1)[0]
        steps = max(self._steps[boundary] for boundary in self._steps.irange(first, end, (True, False)))
        return int(max(points, steps))

    def record(self, version: int, keys: Iterable[bytes], ranges: Iterable[Range]) -> None:
        """Takes in the writes of the commit that got `version`, greater than all before."""
        written = list(keys)
        self._keys.update(dict.fromkeys(written, version))
        if self._ordered is not None:
            self._ordered.update(written)
        for interval in ranges:
            self._assign(version, interval)
        self._history.append((version, written))

    def _assign(self, version: int, interval: Range) -> None:
        begin, end = interval
        if end is not None and begin >= end:
            return
        self._no_ranges = False
        if end is not None and end not in self._steps:
            self._steps[end] = self._step_at(end)
        for boundary in list(self._steps.irange(begin, end, (True, False))):
            del self._steps[boundary]
        self._steps[begin] = version

    def raise_floor(self, floor: int) -> None:
        """Forgets the writes at or below `floor`; transactions that read below it are too old from now on."""
        if floor <= self.floor:
            return
        self.floor = floor
        while self._history and self._history[0][0] <= floor:
            version, keys = self._history.popleft()
            for key in keys:
                if self._keys.get(key) == version:
                    self._forget(key)
        self._merge_old_steps(floor)

    def _forget(self, key: bytes) -> None:
        del self._keys[key]
        if self._ordered is not None:
            self._ordered.discard(key)

    def _merge_old_steps(self, floor: int) -> None:
        """Joins neighbouring steps that are both at or below the floor: nobody can ask about either."""
        before_is_old = False
        for boundary, version in list(self._steps.items()):
            is_old = version <= floor
            if is_old and before_is_old:
                del self._steps[boundary]
            before_is_old = is_old
