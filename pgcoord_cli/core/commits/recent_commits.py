"""The commits of the last seconds, as the resolver knows them: what each wrote, and when. Pure.

The conflict window (`core.commits.conflict_window`) says what was written since when. Beside it are periods of the time, by which the
window is kept to its length, and of the request ids, by which the next leader finds the same commits again.

Commits come from two sides. Those that the resolver decides are in the window as soon as they are decided, and noted
here when they are durable. Those that clients made by themselves (`core.kv.direct_commit`), and on beginning all of them, are
taken in as the table has them. Their versions are dense, so what is missing shows. One that cannot be read is as good
as missing: nothing below it can be checked, but the leader leads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from pgcoord_cli.core.commits import codec, mutations
from pgcoord_cli.core.commits.codec import Mutation, Op, Range, Undecodable
from pgcoord_cli.core.commits.conflict_window import ConflictWindow

CONFLICT_WINDOW = timedelta(seconds=6)
"""How long after a commit its writes can still be checked against; older reads are too_old.

A second more than a transaction may take, so that one that was just in time can wait for its turn. Not much more,
since a new leader has to read all commits of this time before it begins.
"""


class StoredCommit(NamedTuple):
    """A committed request as the table has it; `resolved_at` is the server's clock."""

    id: int
    version: int
    payload: bytes
    resolved_at: datetime


def stored_writes(payload: bytes, version: int) -> tuple[list[bytes], list[Range]]:
    """The keys and the ranges that a stored commit wrote, from its payload and its version."""
    keys: list[bytes] = []
    stored, ranges = codec.decode_stored(payload)
    for op, key, operand in stored:
        if op == Op.CLEAR_RANGE:
            ranges.append((key, operand))
        elif op == Op.SET_VERSIONSTAMPED_KEY:
            keys.append(mutations.stamped(Mutation(Op(op), key, operand), version).key)
        else:
            keys.append(key)
    if not all(isinstance(key, bytes) for key in (*keys, *(begin for begin, _ in ranges))):
        raise Undecodable("a key is not binary")
    return keys, ranges


class RecentCommits:
    """The commits above `floor` up to `durable_version`; `commits` are those that are stored, by version.

    All of them have ids above `start_id`. It is the window that a leader that never stopped would have (rule I8); below
    the last gap nothing can be checked.
    """

    def __init__(self, floor: int, durable_version: int, start_id: int, commits: Sequence[StoredCommit]) -> None:
        last = max(durable_version, commits[-1].version if commits else 0)
        whole_from = last - _dense_suffix([commit.version for commit in commits], last)
        self.window = ConflictWindow(max(floor, whole_from))
        self.periods = CommitPeriods()
        self.durable_version = self.window.floor
        self.last_id = max([start_id, *(commit.id for commit in commits)])
        """Whoever commits alone from now on has an id above this: it read, and then drew one, after these commits."""
        self._record([commit for commit in commits if commit.version > self.window.floor])

    def _record(self, commits: Sequence[StoredCommit]) -> None:
        for request_id, version, payload, resolved_at in commits:
            try:
                self.window.record(version, *stored_writes(payload, version))
            except Exception:  # noqa: BLE001 - somebody has tampered with it, in whatever way
                self.window.raise_floor(version)  # what it wrote is not known, so that nothing older can be judged
            self.periods.add(resolved_at, version, request_id)
            self.durable_version = version
            self.last_id = max(self.last_id, request_id)

    def add_stored(self, commits: Sequence[StoredCommit]) -> bool:
        """Takes in what was committed since; False, and nothing, when one is missing between."""
        if [commit.version - self.durable_version for commit in commits] != list(range(1, len(commits) + 1)):
            return False
        self._record(commits)
        if commits:
            self.expire(commits[-1].resolved_at)
        return True

    def add_durable(self, committed_at: datetime, version: int, ids: Sequence[int]) -> None:
        """The requests with these ids, whose writes are in the window, are durable up to `version`."""
        self.durable_version = version
        self.last_id = max(self.last_id, *ids)
        self.periods.add(committed_at, version, min(ids))

    def expire(self, now: datetime) -> None:
        """Lets go of what was committed before the time that the window covers."""
        self.window.raise_floor(self.periods.forget(now - CONFLICT_WINDOW))


class CommitPeriod(NamedTuple):
    """A stretch of commits: the last began at `committed_at` and has `version`; none has an id below `first_id`."""

    committed_at: datetime
    version: int
    first_id: int


class CommitPeriods:
    """When the commits of the window were made, in stretches of half a second. Iterates oldest first."""

    LENGTH = timedelta(seconds=0.5)

    def __init__(self) -> None:
        self._periods: deque[CommitPeriod] = deque()
        self._period_began: datetime | None = None
        self._forgotten = 0

    def __iter__(self) -> Iterator[CommitPeriod]:
        return iter(self._periods)

    def add(self, committed_at: datetime, version: int, first_id: int) -> None:
        """Notes commits up to `version`, none with an id below `first_id`."""
        if self._periods and self._period_began and committed_at - self._period_began < self.LENGTH:
            last = self._periods.pop()
            first_id = min(first_id, last.first_id)
        else:
            self._period_began = committed_at
        self._periods.append(CommitPeriod(committed_at, version, first_id))

    def forget(self, before: datetime) -> int:
        """Drops the stretches that ended before a time; returns the last version that was ever dropped, or 0."""
        while self._periods and self._periods[0].committed_at < before:
            self._forgotten = self._periods.popleft().version
        return self._forgotten


def _dense_suffix(versions: Sequence[int], last: int) -> int:
    """How many of the versions, which ascend, lead up to `last` without a gap."""
    count = 0
    for version in reversed(versions):
        if version != last - count:
            break
        count += 1
    return count
