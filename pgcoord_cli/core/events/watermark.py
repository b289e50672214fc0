"""How far a reader of an outbox may go without stepping over an event that still comes. Pure.

**The trouble.** Ids are drawn in order but become visible in the order of the commits, so that 8 may be there while 7
is still on its way, or will never come because its transaction was rolled back.

**The rule.** Ids that follow on each other without a gap are delivered at once. At a gap, the last id in sight says
that all before it have been drawn. Every transaction that draws an id is announced, by a lock, from before it does so
until it has ended and what it wrote can be seen. So whoever still owes an id below that one is in any list of the
announced that is made *after* it came in sight. Once nobody of that list is left, one more reading shows all that will
ever be there up to that id.

A reading is a list of the announced writers, or None, and the rows that were read after it was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pgcoord_cli.core.database.open_transactions import OpenTransactions


class Watermark:
    """Where a reader stands, and what it may deliver of each reading."""

    def __init__(self, position: int) -> None:
        self.position = position
        """The reader has passed this id and every one before it."""
        self._in_sight = position
        self._settled = position
        self._suspects: tuple[int, OpenTransactions] | None = None

    @property
    def is_at_gap(self) -> bool:
        """Whether something lies beyond the position that must not be delivered yet."""
        return self._in_sight > self.position

    @property
    def wants_list(self) -> bool:
        """Whether there is a gap and nobody has been asked yet who may still fill it: read again at once."""
        return self.is_at_gap and self._suspects is None

    def advance(self, ids: Sequence[int], writers: Iterable[str] | None, *, is_whole: bool = True) -> int:
        """How many of `ids`, which are those beyond the position in order, may be delivered; moves past them.

        A reading that is not whole ends with the last of `ids` although there may be more.
        """
        settled = self._settled_through(writers)
        count = self._count_deliverable(ids, settled)
        if count:
            self.position = ids[count - 1]
        if is_whole:
            self.position = max(self.position, settled)
        if ids:
            self.saw(ids[-1])
        if self._suspects and self._suspects[0] <= self.position:
            self._suspects = None
        return count

    def _count_deliverable(self, ids: Sequence[int], settled: int) -> int:
        if ids and ids[-1] - self.position == len(ids):
            return len(ids)  # no gap at all: most of what there is to read
        last = self.position
        for count, event_id in enumerate(ids):
            if event_id > last + 1 and event_id > settled:
                return count
            last = event_id
        return len(ids)

    def saw(self, event_id: int) -> None:
        """Notes an id that has been drawn."""
        self._in_sight = max(self._in_sight, event_id)

    def _settled_through(self, writers: Iterable[str] | None) -> int:
        """The id up to which a reading made after this list is complete, as is every later one that has a list."""
        if writers is None or not self.is_at_gap:
            return self.position
        if self._suspects is None:
            self._suspects = self._in_sight, OpenTransactions(writers)
        else:
            self._suspects[1].keep(writers)
        through, suspects = self._suspects
        if not suspects:
            self._settled, self._suspects = through, None
        return max(self.position, self._settled)
