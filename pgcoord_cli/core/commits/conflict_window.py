"""The conflict window: which keys and ranges were written at which version. Pure.

The resolver asks one question of a transaction: was anything that it read written after its read version? The window
answers it from the writes of the commits above its *floor*. It keeps nothing at or below the floor, so a transaction
whose read version is below the floor cannot be checked, and is always too old.

**Shape.** Single keys are in a dictionary, from key to the version that wrote it last. Their order is kept beside it
from the first range read on, so that a workload that reads only keys does not pay for it. Written ranges form a step
function over the key space: `_steps[boundary]` is the version that last wrote the keys from that boundary up to the
next one. Versions only grow, so writing a range is an assignment and needs no maximum.

**Invariant.** For every key k, `max(_keys.get(k, 0), step at k)` is the greatest version above the floor that wrote k,
if there is one; otherwise it is at or below the floor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sortedcontainers import SortedDict, SortedSet

from pgcoord_cli.core.commits.codec import Range


class ConflictWindow:
    """The writes of the commits above `floor`. Versions are commit versions, which grow with every `record`."""

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self._keys: dict[bytes, int] = {}
        self._ordered: SortedSet | None = None
        self._steps = SortedDict({b"": 0})
        # Without written ranges, which is the common case, a key costs one dictionary lookup and no search in `_steps`.
        self._no_ranges = True
        # The keys of each commit, oldest first, so that raising the floor touches only the commits that it drops.
        self._history: deque[tuple[int, list[bytes]]] = deque()

    def __len__(self) -> int:
        """Returns the number of entries kept: keys, and steps of which there is at least one."""
        return len(self._keys) + len(self._steps)

    def conflicts(self, read_version: int, keys: Iterable[bytes], ranges: Iterable[Range]) -> bool:
        """Whether any of the keys or ranges was written after `read_version`.

        The caller has checked that `read_version` is not below the floor; below it, the answer means nothing.
        """
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
        if self._ordered is None:  # from now on `record` keeps the order
            self._ordered = SortedSet(self._keys)
        points = max((self._keys[key] for key in self._ordered.irange(begin, end, (True, False))), default=0)
        # The step that `begin` lies in may start before it, and still holds for the keys from `begin` on.
        first = self._steps.peekitem(self._steps.bisect_right(begin) - 1)[0]
        steps = max(self._steps[boundary] for boundary in self._steps.irange(first, end, (True, False)))
        return int(max(points, steps))

    def record(self, version: int, keys: Iterable[bytes], ranges: Iterable[Range]) -> None:
        """Adds the writes of the commit with `version`, which is greater than every version recorded before."""
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
        # First of all: the keys from `end` on keep the version of the step that is about to be overwritten.
        if end is not None and end not in self._steps:
            self._steps[end] = self._step_at(end)
        for boundary in list(self._steps.irange(begin, end, (True, False))):
            del self._steps[boundary]
        self._steps[begin] = version

    def raise_floor(self, floor: int) -> None:
        """Drops the writes at or below `floor`; transactions that read below it are too old. It never goes down."""
        if floor <= self.floor:
            return
        self.floor = floor
        while self._history and self._history[0][0] <= floor:
            version, keys = self._history.popleft()
            for key in keys:
                # A key that a later commit wrote again has that commit's version, and stays.
                if self._keys.get(key) == version:
                    self._remove(key)
        self._merge_old_steps(floor)

    def _remove(self, key: bytes) -> None:
        del self._keys[key]
        if self._ordered is not None:
            self._ordered.discard(key)

    def _merge_old_steps(self, floor: int) -> None:
        """Joins neighbouring steps whose versions are both at or below the floor.

        No read version below the floor is checked, so the two give the same answer to every question that is asked.
        """
        before_is_old = False
        for boundary, version in list(self._steps.items()):
            is_old = version <= floor
            if is_old and before_is_old:
                del self._steps[boundary]
            before_is_old = is_old
