"""Direct commits: the fast path that commits a request without the leader, when no other commit is in progress.

**Why.** The queue pays when many transactions commit at the same time: they share one statement, one flush of the WAL
and one wake-up. A single commit shares nothing, and through the queue it would only wait for other processes to be
woken. Much of what coordination writes is of this kind: a single write now and then.

**How.** The SQL function `commit_directly` does in one transaction what the leader would do: it stores the request as
committed, writes the data, advances the durable version under the fence, and notifies the watches. It checks no reads,
since no conflict is possible: it requires that the epoch, the term and the durable version are still those that the
transaction read under, so that no commit can have written what was read. The stored row has the form of one that the
leader settled, so that readers of the table need not tell the two apart: a running leader adds direct commits to its
conflict window before it decides a batch, and a new leader loads them from the table.

**Not beside the leader.** While the leader works at batches it holds a session-level advisory lock in shared mode.
`commit_directly` tries for the same lock in exclusive mode and does not wait for it; the leader does wait for a direct
commit in progress, and then reads what direct commits have written. Correctness rests on the fence alone: the
settlement of a batch and a direct commit each name the version that they follow, and of two that name the same version
one is rolled back. The lock makes that rare. A leader that cannot get the lock within its limit, because another
session holds it for too long, goes on without it.

**Not on a copy.** A valid lease is not enough: it may be a copy, on a standby that was promoted with fewer commits than
clients have seen, or on a restored backup. The lease therefore names the start of the postmaster that it was taken on,
and `commit_directly` compares it with its own. A direct commit that is called by hand in a transaction that stays open
blocks the renewal of the lease; the leader, or a candidate, then terminates that session, unless it may be committing
(`core.leader.lease_keeper`).

**Fallback.** When any of these conditions fails, the same statement inserts the request into the queue, and the commit
goes on as any other. The client then takes it that others are committing, and uses the queue for PAUSE_SECONDS. The
client tries a direct commit only for small requests that read, set and clear keys and ranges, and only while no other
commit of the same client is pending. Mutations that depend on the stored value or on the commit version, and conflict
ranges added by hand, need the leader.
"""

from __future__ import annotations

from pgcoord_cli.core.commits.codec import Op, Request
from pgcoord_cli.core.commits.mutations import fold
from pgcoord_cli.db.binary import bytea_array, bytea_columns

MAX_BYTES = 16_000
"""Payload bytes of the largest direct commit, which excludes all others while it runs.

`commit_directly` checks it too.
"""

PAUSE_SECONDS = 0.25
"""Seconds for which a client uses the queue after a direct commit that fell back to it."""

PERMANENT = ("42501", "42883")
"""SQLSTATEs after which no direct commit is tried again: insufficient privilege, undefined function.

The second is what a role without USAGE on the schema gets, which does not see the function.
"""


def is_plain(request: Request) -> bool:
    """Whether the writes of a request follow from the request alone, not from stored values or its version. Pure."""
    # What the function stores is built from keys, ranges and values; it has no place for anything else.
    if request.write_ranges or request.no_conflict:
        return False
    return all(mutation.op <= Op.CLEAR_RANGE for mutation in request.mutations)


def columns(request: Request) -> list[bytes]:
    """Returns reads and net writes of a plain request as `commit_directly` takes them: eight `bytea[]`. Pure."""
    # Folded: the function removes ranges, then keys, and then writes keys, in whatever order they were written.
    writes = fold(request.mutations)
    return [
        bytea_array(request.read_keys),
        *bytea_columns(request.read_ranges),
        *bytea_columns(writes.ranges),
        bytea_array(writes.removed),
        *bytea_columns(writes.written.items()),
    ]


class DirectCommitBackoff:
    """Decides when a client tries a direct commit. It only saves statements that would fall back: the database decides.

    Times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._not_before = 0.0

    def admits(self, now: float) -> bool:
        """Whether a direct commit may be tried at `now`."""
        return now >= self._not_before

    def fell_back(self, now: float) -> None:
        """Records that the database enqueued the request instead, as when another commit was in progress."""
        self._not_before = now + PAUSE_SECONDS

    def refused(self, sqlstate: str | None, now: float) -> None:
        """Records that the statement raised an error. After one of PERMANENT, no direct commit is tried again."""
        # Grants that were made before the function existed do not cover it, and will not until they are renewed.
        self._not_before = float("inf") if sqlstate in PERMANENT else now + PAUSE_SECONDS
