"""The watermark: how far a reader of an outbox may go without skipping an event that may still be committed. Pure.

**The problem.** Event ids are drawn in ascending order but become visible in commit order. Id 8 may be visible while 7
is still uncommitted; 7 appears later, or never, if its transaction rolls back.

**The rule.** Ids that are contiguous after the position are delivered at once. At a gap, the highest visible id proves
that every id below it has been drawn. A transaction that draws an id holds a lock from before the draw until it has
ended and its rows are visible (`core.events.outbox`). Therefore any transaction that may still commit an id below the
highest visible one is in every list of open transactions made *after* that id was visible. When all transactions of
such a list have ended, one more read shows every event that will ever exist up to that id, and the watermark advances
to it.

A reading is a list of the open transactions (or None) and the rows that were read after that list was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pgcoord_cli.core.database.open_transactions import OpenTransactions


class Watermark:
    """The position of one reader, and the decision which events of each reading it may deliver."""

    def __init__(self, position: int) -> None:
        self.position = position
        """Every event up to this id has been delivered, or can no longer be committed."""
        self._highest_drawn = position
        # Every id up to here is visible or never will be. Applied only to readings that come with a list of their own.
        self._complete_through = position
        # The id that the watermark advances to once these transactions have ended.
        self._pending: tuple[int, OpenTransactions] | None = None

    @property
    def is_at_gap(self) -> bool:
        """Whether an id above the position has been drawn that must not be delivered yet."""
        return self._highest_drawn > self.position

    @property
    def needs_list(self) -> bool:
        """Whether there is a gap without a list of open transactions; the caller reads again at once, with a list."""
        return self.is_at_gap and self._pending is None

    def advance(self, ids: Sequence[int], open_transactions: Iterable[str] | None, *, is_whole: bool = True) -> int:
        """Advances over a reading and returns how many of `ids`, counted from the first, may be delivered.

        `ids` are the visible ids above the position, ascending. `open_transactions` was listed before they were read;
        None if it was not listed. `is_whole` is False if the reading ended at a limit, so that more ids may follow.
        """
        # Before note_drawn below: this list was made before `ids` were visible, and proves nothing about gaps below
        # ids that this very reading is the first to show.
        complete_through = self._update_complete_through(open_transactions)
        count = self._count_deliverable(ids, complete_through)
        if count:
            self.position = ids[count - 1]
        # Only a whole reading shows that no visible id lies between the last of `ids` and `complete_through`.
        if is_whole:
            self.position = max(self.position, complete_through)
        if ids:
            self.note_drawn(ids[-1])
        # The gap was filled by commits before all listed transactions ended; the next gap needs a newer list.
        if self._pending and self._pending[0] <= self.position:
            self._pending = None
        return count

    def _count_deliverable(self, ids: Sequence[int], complete_through: int) -> int:
        # Without any gap, the common case in a catch-up, the loop below is not needed.
        if ids and ids[-1] - self.position == len(ids):
            return len(ids)
        last = self.position
        for count, event_id in enumerate(ids):
            if event_id > last + 1 and event_id > complete_through:
                return count
            last = event_id
        return len(ids)

    def note_drawn(self, event_id: int) -> None:
        """Records that an id, and so every lower one, has been drawn from the sequence."""
        self._highest_drawn = max(self._highest_drawn, event_id)

    def _update_complete_through(self, open_transactions: Iterable[str] | None) -> int:
        """Returns the id up to which a reading made after this list is complete."""
        # Without its own list a reading may not cross a gap, even one that an earlier list has settled: the caller
        # reads the floor of garbage collection together with the list, and a gap may be collected events.
        if open_transactions is None or not self.is_at_gap:
            return self.position
        if self._pending is None:
            self._pending = self._highest_drawn, OpenTransactions(open_transactions)
        else:
            self._pending[1].keep(open_transactions)
        through, transactions = self._pending
        if not transactions:
            self._complete_through, self._pending = through, None
        return max(self.position, self._complete_through)
