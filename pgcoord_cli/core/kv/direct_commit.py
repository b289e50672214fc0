"""Committing without the leader, for a client that is alone.

**Why.** Going through the queue pays when many commit: one statement, one wait for the disk, one wake-up serve all of
them. A commit that nobody competes with has nothing to share, and would only wait for others to be woken. Most of
what coordinates is like that, a write now and then.

**How.** `commit_alone`, in the database, does in one transaction what the leader would do: stores the request as
committed, writes the data, advances the durable version under the fence, wakes whoever watches. It checks no
conflicts, because there can be none: the durable version is still the one that the transaction read at, so nobody
has committed since. What it stores is what the leader would have stored, so that nobody needs to know who did it: the
leader takes such commits into its window before it decides anything, and a new one finds them in the table.

**Never beside the leader.** While the leader works at a batch it holds a session lock that `commit_alone` tries for and
does not wait for; while one of these commits is under way, the leader waits for the end of it, and then reads what
they have left behind. Only the fence is what safety stands on: settling a batch, like a lone commit, names the version
that it follows upon, and one of two that name the same is undone. The lock keeps that from happening; a leader that
cannot get it, since somebody holds it who should not, goes on without.

**Never without a leader.** A lease alone does not count: it may be a copy, on a standby that was promoted with fewer
commits than clients have seen. So `commit_alone` wants to see a session of the leader, by the lock that all of those
share. Where somebody makes such a commit by hand, in a transaction that he does not end, the lease cannot be renewed;
then the leader, or whoever stands for election, ends his session (`core.leader.lease_keeper`).

**Not alone.** Where anything is in the way, the same statement puts the request into the queue, and all goes on as
usual. The client then takes it that others are committing, and tries again a moment later. Only what is plain is
tried: keys and ranges read, written and cleared, and not much of it; what depends on stored values or on the version
needs the leader, as does whoever competes within the client.
"""

from __future__ import annotations

from pgcoord_cli.core.commits.codec import Op, Request
from pgcoord_cli.core.commits.mutations import fold
from pgcoord_cli.db.binary import bytea_array, bytea_columns

MAX_BYTES = 16_000
"""A larger request goes into the queue: what commits alone keeps everybody else waiting."""

PAUSE_SECONDS = 0.25
"""After it was not alone, a client goes through the queue for so long."""

PERMANENT = ("42501", "42883")
"""Insufficient privilege; no such function, for somebody with no right to use the schema."""


def is_plain(request: Request) -> bool:
    """Whether a request writes only what it says itself. Pure."""
    return not request.write_ranges and all(mutation.op <= Op.CLEAR_RANGE for mutation in request.mutations)


def columns(request: Request) -> list[bytes]:
    """What a plain request read and its net effect, as `commit_alone` takes them. Pure."""
    writes = fold(request.mutations)
    return [
        bytea_array(request.read_keys),
        *bytea_columns(request.read_ranges),
        *bytea_columns(writes.ranges),
        bytea_array(writes.removed),
        *bytea_columns(writes.written.items()),
    ]


class DirectCommitBackoff:
    """Whether it is worth trying to commit alone; only a guess, which the database confirms or not."""

    def __init__(self) -> None:
        self._not_before = 0.0

    def admits(self, now: float) -> bool:
        """Whether it may be so at `now`, in seconds of any clock that goes on."""
        return now >= self._not_before

    def fell_back(self, now: float) -> None:
        """Somebody else was committing."""
        self._not_before = now + PAUSE_SECONDS

    def refused(self, sqlstate: str | None, now: float) -> None:
        """PostgreSQL refused. A role that got its rights before there was this one does not ask again."""
        self._not_before = float("inf") if sqlstate in PERMANENT else now + PAUSE_SECONDS
