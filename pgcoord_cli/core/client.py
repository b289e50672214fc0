"""The commit client: optimistic transactions for asyncio.

    async with await connect(settings) as db:
        async def transfer(tr):
            balance = int(await tr.get(b"alice") or 0)
            tr.set(b"alice", str(balance - 1).encode())
        await db.run(transfer)

**Reading.** A transaction reads in a snapshot of PostgreSQL and notes the durable version of that very snapshot. Keys
and ranges that it asks for later are read in a later snapshot if data was committed since; then everything that it
read before is read again with them, and if any of it has changed, the transaction ends as a Conflict at once. So
what a transaction sees is always one consistent state, and no connection is held between its reads.

**Committing** sends what was read and what is to be written, with the read version, to the leader (`core.submissions`
says how). A transaction that wrote nothing needs no leader: what it saw was consistent, and it commits as of then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

from psycopg import AsyncConnection

from pgcoord_cli.core import codec
from pgcoord_cli.core.backoff import Backoff
from pgcoord_cli.core.codec import Mutation, Op, Request, Undecodable
from pgcoord_cli.core.mutations import WriteSet
from pgcoord_cli.core.pool import Pool
from pgcoord_cli.core.session import open_session_async
from pgcoord_cli.core.snapshots import RangeRead, Snapshot, SnapshotReader, Wanted
from pgcoord_cli.core.submissions import Outcome, Submission, Submitter
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.errors import CommitRefused, Conflict, Rejected, TooOld
from pgcoord_cli.settings import Settings

POOL_SIZE = 3
RETRY_LIMIT = 100
COMMIT_SECONDS = 20.0
"""How long a commit is waited for by default."""

T = TypeVar("T")


async def connect(settings: Settings, command: str = "client", *, pool_size: int = POOL_SIZE) -> Database:
    """A client of the cluster that `settings` name. Raises ConnectionFailed, SchemaMissing, UnsuitableServer."""
    database = Database(settings, command, pool_size)
    await database.open()
    return database


class Database:
    """Transactions over a few shared connections. Use `connect`, and `async with` to close it."""

    def __init__(self, settings: Settings, command: str, pool_size: int) -> None:
        self._settings = settings
        self._command = command
        self._pool = Pool(self._open_connection, pool_size)
        self._reader = SnapshotReader(self._pool)
        self._submitter = Submitter(settings.schema, self._pool, self._open_connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Opens the first connection, so that what is wrong with the server shows here."""
        with mapped_errors():
            async with self._pool.connection():
                pass

    async def close(self) -> None:
        """Closes every connection."""
        await self._submitter.close()
        await self._pool.close()

    async def _open_connection(self) -> AsyncConnection[Any]:
        conn = await open_session_async(self._settings, self._command, writes=True)
        await conn.execute("SET synchronous_commit = off")
        return conn

    def transaction(self, *, commit_seconds: float = COMMIT_SECONDS) -> Transaction:
        """A new transaction. It begins with its first read; its commit is waited for that long."""
        return Transaction(self._reader, self._submitter, commit_seconds)

    async def write(self, work: Callable[[Transaction], Awaitable[Any]], *, commit_seconds: float) -> int:
        """Runs `work` once in a transaction and commits it; returns its version. Raises as `Transaction.commit`."""
        transaction = self.transaction(commit_seconds=commit_seconds)
        await work(transaction)
        return await transaction.commit()

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        retry_limit: int = RETRY_LIMIT,
        commit_seconds: float = COMMIT_SECONDS,
    ) -> T:
        """Runs `work` in a transaction and commits it, again from the start while it conflicts or read too long ago.

        Raises what `work` raises, Rejected, OutcomeUnknown, and, `retry_limit` retries later, Conflict or TooOld.
        """
        backoff = Backoff(0.001, 0.25)
        retries = 0
        while True:
            transaction = self.transaction(commit_seconds=commit_seconds)
            try:
                result = await work(transaction)
                await transaction.commit()
                return result
            except (Conflict, TooOld):
                if retries == retry_limit:
                    raise
            retries += 1
            await backoff.pause()


class Transaction:
    """Reads and writes that commit together or not at all. Not for use by several tasks at once."""

    def __init__(self, reader: SnapshotReader, submitter: Submitter, commit_seconds: float) -> None:
        self._reader = reader
        self._submitter = submitter
        self._commit_seconds = commit_seconds
        self._snapshot: Snapshot | None = None
        self._mutations: list[Mutation] = []
        self._write_set = WriteSet()

    @property
    def read_version(self) -> int | None:
        """The durable version of the snapshot that everything so far was read in; None before the first read."""
        return self._snapshot.version if self._snapshot else None

    async def get(self, key: bytes) -> bytes | None:
        """The value of a key, as this transaction would leave it; None when there is none."""
        _checked(lambda: codec.check_key(key))
        decided, value = self._write_set.lookup(key)
        if decided:
            return value
        return (await self._read(Wanted(keys=(key,)))).values[key]

    async def get_range(
        self, begin: bytes, end: bytes | None, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Keys and values from `begin` up to but without `end` (None: to the last key), with own writes seen."""
        _checked(lambda: codec.check_range(begin, end))
        if limit is not None and limit < 0:
            raise ValueError(f"a limit of {limit}")
        # Own writes may hide stored rows, so with any in hand the whole range is read.
        interval = RangeRead(begin, end, None if self._mutations else limit, reverse)
        rows = (await self._read(Wanted(ranges=(interval,)))).rows[interval]
        if not self._mutations:
            return list(rows)
        seen = self._write_set.over(dict(rows), begin, end)
        return sorted(seen.items(), reverse=reverse)[:limit]

    def set(self, key: bytes, value: bytes) -> None:
        """Writes a key."""
        self._mutate(Mutation(Op.SET, key, value))

    def clear(self, key: bytes) -> None:
        """Removes a key."""
        self._mutate(Mutation(Op.CLEAR, key, None))

    def clear_range(self, begin: bytes, end: bytes | None) -> None:
        """Removes every key from `begin` up to but without `end` (None: to the last key)."""
        self._mutate(Mutation(Op.CLEAR_RANGE, begin, end))

    def _mutate(self, mutation: Mutation) -> None:
        _checked(lambda: codec.check_mutation(mutation))
        self._mutations.append(mutation)
        self._write_set.add(mutation)

    async def commit(self) -> int:
        """The version at which the writes took effect; without writes, the version that was read.

        Raises Conflict, TooOld, Rejected (nothing was written) and OutcomeUnknown.
        """
        snapshot = self._snapshot or await self._read(Wanted())
        if not self._mutations:
            return snapshot.version
        payload = codec.encode(self._request(snapshot))
        if len(payload) > codec.MAX_TRANSACTION_BYTES:
            raise Rejected(f"the transaction has more than {codec.MAX_TRANSACTION_BYTES} bytes")
        submission = Submission(uuid4(), snapshot.epoch, snapshot.version, payload)
        return _committed_version(await self._submitter.submit(submission, self._commit_seconds))

    def _request(self, snapshot: Snapshot) -> Request:
        read_ranges = tuple(interval.seen(rows) for interval, rows in snapshot.rows.items())
        return Request(tuple(snapshot.values), read_ranges, (), tuple(self._mutations))

    async def _read(self, wanted: Wanted) -> Snapshot:
        """The snapshot, extended by more keys and ranges; what was read before must not have changed."""
        before = self._snapshot
        if before is None:
            self._snapshot = await self._reader.read(wanted)
            return self._snapshot
        keys = tuple(before.values | dict.fromkeys(wanted.keys))
        ranges = tuple(before.rows | dict.fromkeys(wanted.ranges, ()))
        if len(keys) == len(before.values) and len(ranges) == len(before.rows):
            return before
        now = await self._reader.read(Wanted(keys, ranges))
        if not now.agrees_with(before):
            raise Conflict("what this transaction read before has been written since", hint="run it again")
        self._snapshot = now
        return now


def _checked(check: Callable[[], None]) -> None:
    try:
        check()
    except Undecodable as error:
        raise Rejected(str(error)) from None


def _committed_version(outcome: Outcome) -> int:
    if outcome.version is not None:
        return outcome.version
    kinds: dict[str | None, type[CommitRefused]] = {"conflict": Conflict, "rejected": Rejected}
    kind = kinds.get(outcome.status, TooOld)
    raise kind(outcome.reason or "a key that was read has been written since", hint="nothing was written")
