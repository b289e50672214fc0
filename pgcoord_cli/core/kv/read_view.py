"""The view of a transaction: the one version that all its reads are of (rule I4), and the time limit that it starts.

The first read fixes the version. Reads that are asked for before it has been sent join it; those that come while it is
in flight wait for it and then read at its version, as every later one does. A first read that fails fixes nothing, and
the next read tries again.
"""

from __future__ import annotations

from time import monotonic

import psycopg

from pgcoord_cli.core.kv.hot_keys import Ticket
from pgcoord_cli.core.kv.snapshots import PendingRead, ReadSet, ReadVersion, Snapshot, SnapshotReader
from pgcoord_cli.db.connection import translate
from pgcoord_cli.errors import PgcoordError, Rejected, TimeLimit


class ReadView:
    """Reads of one version, which is None until the first read has fixed it; for at most `time_limit_seconds`."""

    def __init__(self, reader: SnapshotReader, time_limit_seconds: float) -> None:
        self.version: ReadVersion | None = None
        self._reader = reader
        self._time_limit_seconds = time_limit_seconds
        self._first: PendingRead | None = None
        self._began = 0.0

    async def read(self, read_set: ReadSet, ticket: Ticket | None = None) -> Snapshot:
        """Returns a snapshot with the set. The first read acquires `ticket`, for its first key, before it is sent.

        Raises TimeLimit, TooOld and ConnectionFailed.
        """
        if self.version is None:
            if self._first is None or not self._first.is_sent:
                return await self._read_first(read_set, ticket)
            await self._answer_of(self._first)
        self.check_time()
        return await self._reader.read(read_set, self.version)

    async def fix(self, version: int) -> None:
        """Fixes a version that was committed in place of the first read's. Raises TooOld and Rejected."""
        self._check_open()
        self._began = monotonic()
        found = await self._reader.version_at(version)
        self._check_open()  # a read may have begun meanwhile
        self.version = found

    def _check_open(self) -> None:
        if self.version or self._first:
            raise Rejected("the transaction has a read version already")

    def check_time(self) -> None:
        """Raises TimeLimit if the first read began too long ago."""
        limit = self._time_limit_seconds
        if monotonic() - self._began > limit:
            raise TimeLimit(
                f"the transaction began more than {limit:g}s ago",
                hint="run it again, with less work between its first read and its commit",
            )

    async def _read_first(self, read_set: ReadSet, ticket: Ticket | None) -> Snapshot:
        if self._first:
            self._first.join(read_set)
            return await self._answer_of(self._first)
        self._began = monotonic()
        first = self._first = PendingRead(read_set, None)
        try:
            if ticket and read_set.keys:
                await ticket.acquire(read_set.keys[0])
        finally:  # also if this task is cancelled: others may have joined the read
            self._reader.start(first)
        return await self._answer_of(first)

    async def _answer_of(self, first: PendingRead) -> Snapshot:
        try:
            found = await first.snapshot()
        except (PgcoordError, psycopg.Error) as error:
            if self._first is first:
                self._first = None
            raise translate(error) if isinstance(error, psycopg.Error) else error from None
        self.version = found.version
        return found
