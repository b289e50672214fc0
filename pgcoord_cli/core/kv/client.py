"""The commit client: optimistic transactions for asyncio.

    async with await connect(settings) as db:
        async def transfer(tr):
            balance = int(await tr.get(b"alice") or 0)
            tr.set(b"alice", str(balance - 1).encode())
        await db.run(transfer)

A Database is a few connections that many transactions share: reads and submissions that come up while a statement is
in flight go out together in the next one, and nothing holds a connection while it waits. `core.kv.transaction` says what
a transaction sees, `core.kv.submissions` how it is committed, and `core.kv.direct_commit` how that is done where nobody competes. One
that wrote nothing needs no leader: what it saw was consistent, and it commits as of then. Those of one Database that
`run` the same read-modify-write of a contended key take turns (`core.kv.hot_keys`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from psycopg import AsyncConnection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.database.async_listener import AsyncListener
from pgcoord_cli.core.database.pool import Pool
from pgcoord_cli.core.database.session import answer_expected, open_session_async
from pgcoord_cli.core.kv.hot_keys import HotKeys
from pgcoord_cli.core.kv.snapshots import SnapshotReader
from pgcoord_cli.core.kv.submissions import Submitter
from pgcoord_cli.core.kv.transaction import KeySelector, Transaction
from pgcoord_cli.core.kv.watches import Watch, Watcher
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Conflict, TooOld
from pgcoord_cli.settings import Settings

__all__ = ["Database", "KeySelector", "Transaction", "Watch", "connect"]

POOL_SIZE = 3
RETRY_LIMIT = 100
ANSWER_SECONDS = 5.0
"""A server whose statement timeout is over by this has fallen silent."""

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
        limit = settings.statement_timeout  # what the server itself keeps to; 0 is no limit
        self._pool = Pool(self._open_connection, pool_size, limit + ANSWER_SECONDS if limit else None)
        self._reader = SnapshotReader(self._pool)
        self._listener = AsyncListener(self._open_connection)
        self._submitter = Submitter(settings.schema, self._pool, self._listener)
        self._hot_keys = HotKeys()
        self._watcher = Watcher(settings.schema, self._reader, self._listener)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Opens the first connection, so that what is wrong with the server shows here."""
        with mapped_errors():
            await self._pool.open()

    async def close(self) -> None:
        """Closes every connection."""
        await self._watcher.close()
        await self._submitter.close()
        await self._listener.close()
        await self._pool.close()

    async def _open_connection(self) -> AsyncConnection[Any]:
        conn = await open_session_async(self._settings, self._command, writes=True)
        try:
            with mapped_errors():
                async with answer_expected():
                    await conn.execute(sql("session", "commit_lazily"))
                    await conn.execute(sql("session", "plan_once"))
        except BaseException:  # whoever waits for it may be cancelled
            await conn.close()
            raise
        return conn

    def transaction(self, *, commit_seconds: float = COMMIT_SECONDS) -> Transaction:
        """A new transaction. It begins with its first read; its commit is waited for that long."""
        return Transaction(self._reader, self._submitter, self._watcher, commit_seconds)

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
            try:
                return await self._attempt(work, commit_seconds)
            except (Conflict, TooOld):
                if retries == retry_limit:
                    raise
            retries += 1
            await backoff.pause()

    async def _attempt(self, work: Callable[[Transaction], Awaitable[T]], commit_seconds: float) -> T:
        ticket = self._hot_keys.ticket(work)
        transaction = Transaction(self._reader, self._submitter, self._watcher, commit_seconds, ticket)
        if ticket is None:
            return await _work_and_commit(work, transaction)
        with ticket:
            try:
                result = await _work_and_commit(work, transaction)
            except Conflict:
                if transaction.wrote_ticket_key:
                    ticket.conflicted()
                raise
            if not transaction.wrote_ticket_key:
                ticket.only_read()
            return result


async def _work_and_commit(work: Callable[[Transaction], Awaitable[T]], transaction: Transaction) -> T:
    result = await work(transaction)
    await transaction.commit()
    return result
