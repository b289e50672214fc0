"""Reading a range page by page, merged with the transaction's own writes.

Only as much is read as the caller gets: each page asks for the rows that are still missing, and its end says how far
the stored rows are known. Own writes can hide stored rows, so that a page may yield fewer than it asked for; then the
next one follows. Parts of the range that the transaction has cleared are not read at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import islice
from typing import NamedTuple

from pgcoord_cli.core.commits.codec import Range
from pgcoord_cli.core.kv.own_writes import OwnWrites, Part
from pgcoord_cli.core.kv.snapshots import RangeRead, ReadSet, Snapshot

PARTS_AT_ONCE = 100
"""Parts between cleared ranges that a scan without a limit reads by one statement."""


class ScannedPage(NamedTuple):
    """Rows in the order of the scan, and the ranges that they depend on."""

    rows: Sequence[tuple[bytes, bytes]]
    conflicts: Sequence[Range]


class RangeScan:
    """One scan: at most `limit` rows (None: all), about `page_rows` a page (None: no more pages than needed)."""

    def __init__(
        self,
        read: Callable[[ReadSet], Awaitable[Snapshot]],
        own: OwnWrites,
        limit: int | None,
        page_rows: int | None,
        *,
        reverse: bool,
    ) -> None:
        self._read = read
        self._own = own
        self._missing = limit
        self._page_rows = page_rows
        self._reverse = reverse

    async def pages(self, begin: bytes, end: bytes | None) -> AsyncIterator[ScannedPage]:
        """Yields pages until the range or the limit ends. Raises Rejected at a key that cannot be read yet."""
        parts = self._own.parts(begin, end, reverse=self._reverse)
        # With a limit, or page by page, the parts further on may never be needed.
        at_once = PARTS_AT_ONCE if self._rows_wanted() is None else 1
        while chunk := list(islice(parts, at_once)):
            async for page in self._read_parts(chunk):
                yield page
                if self._missing == 0:
                    return

    async def _read_parts(self, chunk: Sequence[Part]) -> AsyncIterator[ScannedPage]:
        reads = [self._range_read(part.begin, part.end) for part in chunk if not part.is_cleared]
        found = (await self._read(ReadSet((), tuple(reads)))).pages if reads else {}
        stored = iter(reads)
        for part in chunk:
            if part.is_cleared:
                yield self._page((), (part.begin, part.end), is_cleared=True)
                continue
            page = found[next(stored)]
            yield self._page(page.rows, page.seen)
            while page.has_more and self._missing != 0:
                rest = self._range_read(*self._rest((part.begin, part.end), page.seen))
                page = (await self._read(ReadSet((), (rest,)))).pages[rest]
                yield self._page(page.rows, page.seen)

    def _range_read(self, begin: bytes, end: bytes | None) -> RangeRead:
        return RangeRead(begin, end, self._rows_wanted(), self._reverse)

    def _rows_wanted(self) -> int | None:
        wanted = [rows for rows in (self._missing, self._page_rows) if rows is not None]
        return min(wanted, default=None)

    def _rest(self, part: Range, seen: Range) -> Range:
        if self._reverse:
            return part[0], seen[0]
        assert seen[1] is not None  # a page with more after it ends somewhere
        return seen[1], part[1]

    def _page(self, stored: Sequence[tuple[bytes, bytes]], seen: Range, *, is_cleared: bool = False) -> ScannedPage:
        rows = self._own.over(stored, seen, reverse=self._reverse)
        if self._missing is not None:
            if len(rows) >= self._missing:  # what lies beyond the last row does not matter
                rows = rows[: self._missing]
                seen = RangeRead(*seen, None, self._reverse).up_to(rows[-1][0])
            self._missing -= len(rows)
        self._own.check_readable(seen)
        return ScannedPage(rows, () if is_cleared else list(self._own.conflicts(seen)))
