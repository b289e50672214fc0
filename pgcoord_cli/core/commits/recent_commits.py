"""The commits of the last seconds, as the resolver knows them: what each one wrote, and when. Pure.

The conflict window (`core.commits.conflict_window`) holds the writes with their versions. Beside it are commit periods,
which map time to versions and request ids: the window is cut to its length by time, and the next leader finds the same
commits in the table by their ids.

Commits come from two sources. Writes that the resolver decides enter the window as soon as they are decided, and are
recorded here once they are durable. Direct commits of clients (`core.kv.direct_commit`), and all commits when a leader
begins, are added as the table has them. Commit versions are dense, so a missing commit shows as a gap. A stored commit
that cannot be decoded counts as missing: no transaction that read below it can be checked, but the leader leads.
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
"""For how long after a commit its writes stay in the window; transactions that read before that are too_old.

One second more than the time limit of a transaction (`core.kv.transaction`), so that a request submitted at the limit
can still wait in the queue. Not much more, since a new leader reads all commits of this time before it begins.
"""


class StoredCommit(NamedTuple):
    """A committed request as the table has it; `resolved_at` is by the server's clock."""

    id: int
    version: int
    payload: bytes
    resolved_at: datetime


def stored_writes(payload: bytes, version: int) -> tuple[list[bytes], list[Range]]:
    """Returns the keys and the ranges that a stored commit wrote. Raises Undecodable, or what msgpack raises."""
    keys: list[bytes] = []
    stored, ranges = codec.decode_stored(payload)
    for op, key, operand in stored:
        if op == Op.CLEAR_RANGE:
            ranges.append((key, operand))
        elif op == Op.SET_VERSIONSTAMPED_KEY:
            # The key contains the commit version, so that only now it is known which key was written.
            keys.append(mutations.stamped(Mutation(Op(op), key, operand), version).key)
        else:
            keys.append(key)
    # `decode_stored` checks nothing; a key of another type would make every later comparison fail.
    if not all(isinstance(key, bytes) for key in (*keys, *(begin for begin, _ in ranges))):
        raise Undecodable("a key is not binary")
    return keys, ranges


class RecentCommits:
    """The commits above `floor` up to `durable_version`, as a leader that never stopped would know them (rule I8).

    `commits` are those that the table still has, in version order, all with ids above `start_id`. If one is missing
    between them, the floor rises to the last missing version, since what that one wrote is not known.
    """

    def __init__(self, floor: int, durable_version: int, start_id: int, commits: Sequence[StoredCommit]) -> None:
        # The commits are read after the durable version, so a direct commit may have added one above it in between.
        last = max(durable_version, commits[-1].version if commits else 0)
        whole_from = last - _dense_suffix([commit.version for commit in commits], last)
        self.window = ConflictWindow(max(floor, whole_from))
        self.periods = CommitPeriods()
        self.durable_version = self.window.floor  # raised with each commit that is recorded
        self.last_id = max([start_id, *(commit.id for commit in commits)])
        """Each direct commit to come has a greater id: it reads the last of these commits before it draws its id."""
        self._record([commit for commit in commits if commit.version > self.window.floor])

    def _record(self, commits: Sequence[StoredCommit]) -> None:
        for request_id, version, payload, resolved_at in commits:
            try:
                self.window.record(version, *stored_writes(payload, version))
            except Exception:  # noqa: BLE001 - a row that was changed by hand can raise anything
                # What it wrote is not known, so a transaction that read below it cannot be checked.
                self.window.raise_floor(version)
            self.periods.add(resolved_at, version, request_id)
            self.durable_version = version
            self.last_id = max(self.last_id, request_id)

    def add_stored(self, commits: Sequence[StoredCommit]) -> bool:
        """Adds the stored commits that follow the durable version. Returns False and adds nothing if one is missing.

        The caller then builds the window anew, and its floor rises above the gap.
        """
        if [commit.version - self.durable_version for commit in commits] != list(range(1, len(commits) + 1)):
            return False
        self._record(commits)
        # Without a batch of its own, a leader beside direct commits would never shorten the window.
        if commits:
            self.expire(commits[-1].resolved_at)
        return True

    def add_durable(self, committed_at: datetime, version: int, ids: Sequence[int]) -> None:
        """Records that the requests with `ids`, whose writes are in the window already, are durable up to `version`.

        `committed_at` is not later than their commit, by the server's clock.
        """
        self.durable_version = version
        self.last_id = max(self.last_id, *ids)
        self.periods.add(committed_at, version, min(ids))

    def expire(self, now: datetime) -> None:
        """Raises the floor above the commits that are older than CONFLICT_WINDOW at `now`, by the server's clock."""
        self.window.raise_floor(self.periods.forget(now - CONFLICT_WINDOW))


class CommitPeriod(NamedTuple):
    """Consecutive commits: the last one was made at `committed_at` with `version`; no id is below `first_id`."""

    committed_at: datetime
    version: int
    first_id: int


class CommitPeriods:
    """The times of the commits in the window, in periods of LENGTH, which bound their number. Iterates oldest first."""

    LENGTH = timedelta(seconds=0.5)

    def __init__(self) -> None:
        self._periods: deque[CommitPeriod] = deque()
        self._period_began: datetime | None = None
        self._forgotten = 0

    def __iter__(self) -> Iterator[CommitPeriod]:
        return iter(self._periods)

    def add(self, committed_at: datetime, version: int, first_id: int) -> None:
        """Adds commits up to `version`, none with an id below `first_id`, to the current period or as a new one."""
        if self._periods and self._period_began and committed_at - self._period_began < self.LENGTH:
            # The period takes the time of its last commit: it is dropped only when all of its commits are old.
            last = self._periods.pop()
            first_id = min(first_id, last.first_id)
        else:
            self._period_began = committed_at
        self._periods.append(CommitPeriod(committed_at, version, first_id))

    def forget(self, before: datetime) -> int:
        """Drops the periods that ended before a time. Returns the last version that was ever dropped, or 0."""
        while self._periods and self._periods[0].committed_at < before:
            self._forgotten = self._periods.popleft().version
        return self._forgotten


def _dense_suffix(versions: Sequence[int], last: int) -> int:
    """Returns how many of the ascending versions lead up to `last` without a gap."""
    count = 0
    for version in reversed(versions):
        if version != last - count:
            break
        count += 1
    return count
