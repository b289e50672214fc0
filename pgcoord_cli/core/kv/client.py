"""The transaction client for asyncio: optimistic transactions over the table `kv`.

    async with await connect() as database:
        async def withdraw(transaction):
            balance = int(await transaction.get(b"alice") or 0)
            transaction.set(b"alice", b"%d" % (balance - 1))
        await database.run(withdraw)

**Connections.** A Database is a few connections that any number of transactions share. Reads and submissions that are
asked for while a statement is in flight go out together in the next one, and no transaction holds a connection while
it waits. Connections that are not used for some seconds are given back, the last one too.

**Commit.** `core.kv.transaction` says what a transaction sees, `core.kv.submissions` how the leader commits it, and
`core.kv.direct_commit` how a client without competitors commits by itself. A transaction that wrote nothing needs no
leader: it commits as of the version that it read.

**Retries.** `Database.run` runs the transaction again while it conflicts. The transactions of one Database that run
the same read-modify-write of a contended key do so one after the other (`core.kv.hot_keys`). Where most attempts
at other work conflict, fewer are in flight at once (`core.kv.admission`).

`core.kv.blocking` is the same client for programs without an event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from psycopg import AsyncConnection

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.database.async_listener import HEARTBEAT_SECONDS, AsyncListener
from pgcoord_cli.core.database.pool import IDLE_SECONDS, Pool
from pgcoord_cli.core.database.session import answer_timeout, open_session_async
from pgcoord_cli.core.kv.admission import Admission
from pgcoord_cli.core.kv.hot_keys import HotKeys, Ticket
from pgcoord_cli.core.kv.key_selector import KeySelector
from pgcoord_cli.core.kv.leader_check import LeaderCheck
from pgcoord_cli.core.kv.options import OptionChanges, TransactionOptions
from pgcoord_cli.core.kv.snapshots import ReadSet, SnapshotReader
from pgcoord_cli.core.kv.submissions import Submitter
from pgcoord_cli.core.kv.transaction import FIRST_PAUSE, LAST_PAUSE, Transaction
from pgcoord_cli.core.kv.watches import Watch, Watcher
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Conflict, OutcomeUnknown, TooOld
from pgcoord_cli.settings import Settings, resolve_arguments

__all__ = ["Database", "KeySelector", "Transaction", "Watch", "connect", "open_database"]

_log = logging.getLogger("pgcoord.kv")

POOL_SIZE = 3
"""Connections of a Database that run statements, by default."""

ANSWER_SECONDS = 5.0
"""Seconds after the statement timeout at which a server that has not answered counts as lost."""

DEFAULT_OPTIONS = TransactionOptions()

T = TypeVar("T")


async def connect(
    dsn: str | None = None,
    *,
    schema: str | None = None,
    application: str = "client",
    pool_size: int = POOL_SIZE,
    **options: Unpack[OptionChanges],
) -> Database:
    """Opens a client of the cluster in `schema` of the database at `dsn`, a connection string of libpq.

    What is left out comes from PGCOORD_DSN, PGCOORD_SCHEMA and libpq's environment. Sessions are named
    `pgcoord/<application>` in pg_stat_activity; at most `pool_size` run statements, one more listens. The other
    arguments are those of TransactionOptions, for all transactions. Use the result with `async with`, or close it.

    Raises UsageError for a malformed argument, ConnectionFailed, SchemaMissing, SchemaUnknown, UnsuitableServer.
    """
    chosen = TransactionOptions(**options)
    return await open_database(resolve_arguments(dsn, schema), application, pool_size=pool_size, options=chosen)


async def open_database(
    settings: Settings,
    application: str = "client",
    *,
    pool_size: int = POOL_SIZE,
    options: TransactionOptions = DEFAULT_OPTIONS,
) -> Database:
    """Opens a client of the cluster that `settings` name. Raises what `connect` raises."""
    database = Database(settings, application, pool_size, options)
    await database.open()
    return database


class Database:
    """Transactions over a few shared connections. `connect` opens one; close it, or use it with `async with`.

    Belongs to the event loop in which it was opened.
    """

    def __init__(
        self, settings: Settings, application: str, pool_size: int, options: TransactionOptions = DEFAULT_OPTIONS
    ) -> None:
        self.options = options
        """The options of the transactions that are begun from now on."""
        self._settings = settings
        self._application = application
        # The server itself ends a statement at its timeout; 0 is no limit.
        limit = settings.statement_timeout
        self._pool = Pool(self._open_connection, pool_size, limit + ANSWER_SECONDS if limit else None, IDLE_SECONDS)
        self._reader = SnapshotReader(self._pool)
        self._listener = AsyncListener(self._open_connection, HEARTBEAT_SECONDS)
        self._submitter = Submitter(settings.schema, self._pool, self._listener)
        self._hot_keys = HotKeys()
        self._admission = Admission()
        self._watcher = Watcher(settings.schema, self._reader, self._listener)
        self._leader = LeaderCheck(settings.schema, self._pool, self._listener)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Opens the first connection. Raises what `connect` raises."""
        with mapped_errors():
            await self._pool.open()

    async def close(self) -> None:
        """Closes every connection and cancels every watch.

        Transactions that are under way raise ConnectionFailed, or OutcomeUnknown while they commit.
        """
        await self._watcher.close()
        await self._submitter.close()
        await self._listener.close()
        await self._pool.close()

    async def _open_connection(self) -> AsyncConnection[Any]:
        conn = await open_session_async(self._settings, self._application, writes=True)
        try:
            with mapped_errors():
                async with answer_timeout():
                    await conn.execute(sql("kv", "commit_asynchronously"))
                    await conn.execute(sql("session", "plan_once"))
        except BaseException:  # cancellation of the waiting task included
            await conn.close()
            raise
        return conn

    def transaction(self, **options: Unpack[OptionChanges]) -> Transaction:
        """Returns a new transaction, for a caller that commits and retries by itself.

        It begins with its first read. The arguments are those of TransactionOptions, where it differs from the others.
        """
        return self._transaction(self.options.changed(**options))

    def _transaction(self, options: TransactionOptions, ticket: Ticket | None = None) -> Transaction:
        return Transaction(self._reader, self._submitter, self._watcher, self._leader, options, ticket)

    async def wait_for_leader(self, seconds: float) -> None:
        """Returns once a leader is there. Raises NoLeader after `seconds`, and ConnectionFailed."""
        await self._leader.wait(seconds)

    async def read_version(self) -> int:
        """Returns the durable version: that of the last commit that is visible now."""
        return (await self._reader.read(ReadSet())).version.version

    async def write(self, work: Callable[[Transaction], Awaitable[Any]], **options: Unpack[OptionChanges]) -> int:
        """Runs `work` once in a transaction and commits it; returns its version. Raises what the commit raises."""
        transaction = self.transaction(**options)
        await work(transaction)
        return await transaction.commit()

    async def run(self, work: Callable[[Transaction], Awaitable[T]], **options: Unpack[OptionChanges]) -> T:
        """Runs `work` in a transaction, commits it, and returns the result of `work`.

        Runs it again from the start, after a back-off, up to `retry_limit` times, while it ends with Conflict or
        TooOld; `work` must have no effects outside the transaction that may not happen twice. The last Conflict or
        TooOld is raised, and at once anything that `work` raises, Rejected, ConnectionFailed and NoLeader (nothing was
        written), and OutcomeUnknown (no outcome within `commit_seconds`, or the connection was lost: it may have been
        committed), which is retried only with `retry_unknown`.

        The arguments are those of TransactionOptions, where this work differs from the others.
        """
        chosen = self.options.changed(**options)
        backoff = Backoff(FIRST_PAUSE, LAST_PAUSE)
        retries = 0
        while True:
            try:
                return await self._attempt(work, chosen, run_again=retries > 0)
            except (Conflict, TooOld, OutcomeUnknown) as error:
                if retries == chosen.retry_limit or not chosen.is_retryable(error):
                    raise
                _log.debug("a transaction is run again: %s", error.message, extra={"retries": retries + 1})
            retries += 1
            await backoff.pause()

    async def _attempt(
        self, work: Callable[[Transaction], Awaitable[T]], options: TransactionOptions, *, run_again: bool
    ) -> T:
        ticket = self._hot_keys.ticket(work)
        transaction = self._transaction(options, ticket)
        if ticket is None:
            return await _work_and_commit(work, transaction)
        async with self._admission.slot(ticket.kind, run_again=run_again):
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
    try:
        result = await work(transaction)
    except BaseException:
        transaction.cancel()  # its watches would wait for ever
        raise
    await transaction.commit()
    return result
