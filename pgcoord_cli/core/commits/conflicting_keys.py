"""The keys over which the most requests conflicted lately: `pgcoord commit explain --hot`.

Only the newest requests are read, in the order of their ids: no index has the status of settled requests, and a table
of years must not be read for this. For each conflict among them, the keys that it read and that a commit wrote after
its read version are counted, once each. A commit that is not among the newest requests is not known; of a conflict with
such a commit the key is counted if the request read nothing else, because no other key can be the reason.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Range, Request, Undecodable, is_text
from pgcoord_cli.core.commits.mutations import with_stamps, writes_of
from pgcoord_cli.core.commits.requests import Status
from pgcoord_cli.db.sqlfiles import sql

PAGE = 500
"""Requests that one statement reads."""

MAX_REQUESTS = 10_000
"""Requests that are read at most."""

PAST_THE_LAST_ID = (1 << 63) - 1


class ConflictingKey(NamedTuple):
    """A key, the number of conflicts over it, and when the last of those requests was enqueued."""

    key: bytes
    conflicts: int
    last_at: datetime

    def record(self) -> dict[str, Any]:
        """Returns the key as text, or as hexadecimal if it is not text, and the counts."""
        text = is_text(self.key)
        return {
            "key": self.key.decode() if text else self.key.hex(),
            "conflicts": self.conflicts,
            "last_at": self.last_at,
            "encoding": "utf-8" if text else "hex",
        }


class Conflicts(NamedTuple):
    """The conflicting keys, most conflicts first, of `conflicts` conflicts among the `requests` newest requests.

    `is_cut`: older requests of the wanted time were not read.
    """

    keys: list[ConflictingKey]
    conflicts: int
    requests: int
    is_cut: bool


class _Settled(NamedTuple):
    """A commit or a conflict."""

    version: int
    """The commit version, or the read version of a conflict."""
    is_conflict: bool
    created_at: datetime
    request: Request


def conflicting_keys(conn: Connection[Any], seconds: float | None, limit: int) -> Conflicts:
    """Returns the `limit` keys with the most conflicts among requests of the last `seconds` (None: of any time)."""
    settled: list[_Settled] = []
    requests = 0
    is_cut = False
    for row in _newest(conn, seconds):
        if requests == MAX_REQUESTS:
            is_cut = True
            break
        requests += 1
        settled += _decoded(row)
    counts: Counter[bytes] = Counter()
    last_at: dict[bytes, datetime] = {}
    written = _Writes()
    # Oldest first, so that a conflict is compared with what was committed before it only.
    for each in reversed(settled):
        if each.is_conflict:
            keys = written.reasons(each.request, each.version)
            counts.update(keys)
            last_at |= dict.fromkeys(keys, each.created_at)
        else:
            written.add(each.request, each.version)
    found = [ConflictingKey(key, count, last_at[key]) for key, count in counts.most_common(limit)]
    return Conflicts(found, sum(each.is_conflict for each in settled), requests, is_cut)


def _newest(conn: Connection[Any], seconds: float | None) -> Iterator[tuple[Any, ...]]:
    """Yields the rows of requests, newest first, until one that is older than wanted."""
    last_id = PAST_THE_LAST_ID
    while True:
        page = conn.execute(sql("commits", "newest_requests"), [last_id, PAGE, seconds]).fetchall()
        for row in page:
            if not row[5]:
                return
            yield row
        if len(page) < PAGE:
            return
        last_id = page[-1][0]


def _decoded(row: tuple[Any, ...]) -> Iterator[_Settled]:
    """Yields the request of a row, unless it is neither a commit nor a conflict, or cannot be decoded."""
    _, status, read_version, commit_version, created_at, _, payload = row
    if payload is None:
        return
    try:
        request = codec.decode(payload)
    except Undecodable:
        return
    is_conflict = status == Status.CONFLICT
    yield _Settled(read_version if is_conflict else commit_version, is_conflict, created_at, request)


class _Writes:
    """What the commits so far wrote: the last version of each key, the keys in order, and ranges in version order."""

    def __init__(self) -> None:
        self._versions: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._ranges: list[tuple[int, Range]] = []

    def add(self, request: Request, version: int) -> None:
        """Records the writes of a commit."""
        keys, ranges = writes_of(with_stamps(request, version))
        for key in keys:
            if key not in self._versions:
                insort(self._keys, key)
            self._versions[key] = max(version, self._versions.get(key, 0))
        for each in ranges:
            insort(self._ranges, (version, each), key=lambda written: written[0])

    def reasons(self, request: Request, read_version: int) -> list[bytes]:
        """Returns the keys that the request read and a commit above the read version wrote.

        Of a range that was read, these are the keys that were written in it; of a range that was written, the keys that
        were read in it, or else its begin.
        """
        keys = {key for key in request.read_keys if self._is_written(key, read_version)}
        for interval in request.read_ranges:
            keys |= {key for key in self._keys_in(interval) if self._versions[key] > read_version}
            keys |= {max(begin, interval[0]) for begin, _ in self._overlapping(interval, read_version)}
        if not keys and len(request.read_keys) == 1 and not request.read_ranges:
            keys = set(request.read_keys)
        return sorted(keys)

    def _is_written(self, key: bytes, read_version: int) -> bool:
        if self._versions.get(key, 0) > read_version:
            return True
        return any(True for _ in self._overlapping((key, key + b"\0"), read_version))

    def _keys_in(self, interval: Range) -> list[bytes]:
        begin, end = interval
        first = bisect_left(self._keys, begin)
        return self._keys[first : None if end is None else bisect_left(self._keys, end)]

    def _overlapping(self, interval: Range, read_version: int) -> Iterable[Range]:
        begin, end = interval
        start = bisect_right(self._ranges, read_version, key=lambda written: written[0])
        for _, written in self._ranges[start:]:
            if (written[1] is None or begin < written[1]) and (end is None or written[0] < end):
                yield written
