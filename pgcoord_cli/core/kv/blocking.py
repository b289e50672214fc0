"""The transaction client for programs without an event loop: `core.kv.client`, with calls that block.

    with connect() as database:
        def withdraw(transaction):
            balance = int(transaction.get(b"alice") or 0)
            transaction.set(b"alice", b"%d" % (balance - 1))
        database.run(withdraw)

**One loop.** A Database runs the asyncio client in one background thread (`core.concurrency.loop_thread`). All
threads of the program may use one Database at once: their reads and commits share its connections and statements, as
those of tasks do. A transaction belongs to one thread at a time.

**Run.** `Database.run` is the `run` of the asyncio client, with its retries, back-off and hot keys. For each attempt
the loop hands the transaction to the thread that called `run`, which calls the function and hands the result back. So
the function runs in its caller's thread and may block there, and other transactions go on meanwhile. An exception other
than Conflict and TooOld ends the run: it is raised in the caller's thread as it is, and nothing is written.

**Interruption.** Ctrl-C raises KeyboardInterrupt in the thread that waits. Its transaction is cancelled, and whether a
commit that was being waited for has happened is not known. The Database stays usable.

**Fork.** A Database is of the process that opened it: a child gets UsageError and opens one of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import iscoroutinefunction, unwrap
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar, Unpack, overload

from pgcoord_cli.core.commits.codec import Op
from pgcoord_cli.core.concurrency.loop_thread import LoopThread, wait_for
from pgcoord_cli.core.kv import client
from pgcoord_cli.core.kv.checks import as_bytes, as_slice
from pgcoord_cli.core.kv.client import POOL_SIZE
from pgcoord_cli.core.kv.hot_keys import inside_attempt
from pgcoord_cli.core.kv.key_selector import KeySelector
from pgcoord_cli.core.kv.options import OptionChanges, TransactionOptions
from pgcoord_cli.core.kv.reading import prefix_range
from pgcoord_cli.core.kv.transactional import TransactionArgument, Work
from pgcoord_cli.core.kv.writing import WriteMethods
from pgcoord_cli.errors import Conflict, ConnectionFailed, OutcomeUnknown, TooOld
from pgcoord_cli.settings import resolve_arguments

T = TypeVar("T")

ClientThread = LoopThread[client.Database]


def connect(
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
    arguments are those of TransactionOptions, for all transactions. Use the result with `with`, or close it.

    Raises UsageError for a malformed argument, ConnectionFailed, SchemaMissing, SchemaUnknown, UnsuitableServer.
    """
    settings, chosen = resolve_arguments(dsn, schema), TransactionOptions(**options)

    async def opener() -> client.Database:
        return await client.open_database(settings, application, pool_size=pool_size, options=chosen)

    return Database(LoopThread(opener, f"pgcoord/{application}"))


class Database:
    """Transactions for any number of threads. `connect` opens one; close it, or use it with `with`.

    Every method raises ConnectionFailed once it is closed, and UsageError in a process that was forked from the one
    that opened it.
    """

    def __init__(self, thread: ClientThread) -> None:
        self._thread = thread

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every connection and ends the background thread; waits for both. Repeated calls do nothing.

        Transactions of other threads that are under way raise ConnectionFailed, or OutcomeUnknown while they commit.
        """
        self._thread.close()

    @property
    def options(self) -> TransactionOptions:
        """The options of the transactions that are begun from now on; they may be set."""
        return self._thread.resource.options

    @options.setter
    def options(self, options: TransactionOptions) -> None:
        self._thread.resource.options = options

    def transaction(self, **options: Unpack[OptionChanges]) -> Transaction:
        """Returns a new transaction, for a caller that commits and retries by itself.

        It begins with its first read. The arguments are those of TransactionOptions, where it differs from the others.
        """
        return Transaction(self._thread, self._thread.resource.transaction(**options))

    def wait_for_leader(self, seconds: float) -> None:
        """Returns once a leader is there. Raises NoLeader after `seconds`, and ConnectionFailed."""
        self._thread.call(lambda database: database.wait_for_leader(seconds))

    def read_version(self) -> int:
        """Returns the durable version: that of the last commit that is visible now."""
        return self._thread.call(lambda database: database.read_version())

    def run(self, work: Callable[[Transaction], T], **options: Unpack[OptionChanges]) -> T:
        """Runs `work` in a transaction, commits it, and returns the result of `work`.

        Runs it again from the start, after a back-off, up to `retry_limit` times, while it ends with Conflict or
        TooOld; `work` must have no effects outside the transaction that may not happen twice. The last Conflict or
        TooOld is raised, and at once anything that `work` raises, Rejected, ConnectionFailed and NoLeader (nothing was
        written), and OutcomeUnknown (no outcome within `commit_seconds`, or the connection was lost: it may have been
        committed), which is retried only with `retry_unknown`.

        The arguments are those of TransactionOptions, where this work differs from the others.
        """
        attempts = _Attempts(self._thread, work)
        running = self._thread.submit(lambda database: database.run(attempts, **options))
        running.add_done_callback(attempts.end)
        try:
            attempts.make_all()
            return wait_for(running)
        finally:
            running.cancel()  # does nothing if it is done; otherwise `work` raised, or this thread was interrupted


class _Attempt(NamedTuple):
    """A transaction for one attempt at the work, and the future of the loop for the attempt's result."""

    transaction: client.Transaction
    result: asyncio.Future[Any]

    def settle(self, value: Any, error: Exception | None) -> None:
        """Sets the result, in the loop; an attempt that was cancelled there has one already."""
        if self.result.done():
            return
        if error is None:
            self.result.set_result(value)
        else:
            self.result.set_exception(error)


class _Attempts(Generic[T]):
    """The attempts of one `run`: the loop calls this object for each, and the thread that called `run` makes them.

    `__wrapped__` tells the loop's client which attempts run the same work (`core.kv.hot_keys.kind_of`).
    """

    def __init__(self, thread: ClientThread, work: Callable[[Transaction], T]) -> None:
        self.__wrapped__ = work
        self._thread = thread
        self._asked: SimpleQueue[_Attempt | None] = SimpleQueue()

    async def __call__(self, transaction: client.Transaction) -> T:
        """Asks for an attempt and waits for its result; runs in the loop."""
        attempt = _Attempt(transaction, asyncio.get_running_loop().create_future())
        self._asked.put(attempt)
        result: T = await attempt.result
        return result

    def end(self, _running: object) -> None:
        """Has `make_all` return; runs in the loop."""
        self._asked.put(None)

    def make_all(self) -> None:
        """Makes the attempts that the loop asks for, until `end`. Raises what `run` does not retry."""
        while attempt := self._asked.get():
            value: T | None = None
            error: Conflict | TooOld | OutcomeUnknown | None = None
            try:
                with inside_attempt():
                    value = self.__wrapped__(Transaction(self._thread, attempt.transaction))
            except (Conflict, TooOld, OutcomeUnknown) as ended:
                error = ended
            self._thread.call_soon(attempt.settle, value, error)


class Transaction(WriteMethods):
    """Reads and writes that take effect together or not at all, as `pgcoord_cli.Transaction`; for one thread at a time.

    Reads raise TimeLimit after the time limit, TooOld if its version can no longer be read, as after a crash of the
    server, and ConnectionFailed. What is used at the wrong moment raises as there: UsedDuringCommit,
    TransactionCancelled.
    """

    def __init__(self, thread: ClientThread, transaction: client.Transaction) -> None:
        self._thread = thread
        self._transaction = transaction

    @property
    def read_version(self) -> int | None:
        """The version that all reads are of; None before the first read."""
        return self._transaction.read_version

    def set_read_version(self, version: int) -> None:
        """Makes all reads be of a version that was committed, as that of `pgcoord_cli.Transaction`; raises as it."""
        self._thread.call(lambda _: self._transaction.set_read_version(version))

    @property
    def versionstamp(self) -> bytes:
        """The ten bytes that name this transaction's commit. Raises Rejected before it, and if nothing was written."""
        return self._transaction.versionstamp

    def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """Returns the value of a key as this transaction would leave it; None if there is none."""
        return self._thread.call(lambda _: self._transaction.get(key, snapshot=snapshot))

    def get_range(
        self,
        begin: bytes | KeySelector,
        end: bytes | KeySelector | None,
        *,
        limit: int | None = None,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        """Returns keys and values from `begin` up to but without `end` (None: to the last key), in order of the keys.

        At most `limit` (None or 0: all); `reverse`: the last ones, in descending order.
        """
        return self._thread.call(
            lambda _: self._transaction.get_range(begin, end, limit=limit, reverse=reverse, snapshot=snapshot)
        )

    def get_range_startswith(
        self, prefix: bytes, *, limit: int | None = None, reverse: bool = False, snapshot: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Returns the keys that begin with a prefix, and their values, as `get_range` does."""
        begin, end = prefix_range(as_bytes(prefix, "a prefix"))
        return self.get_range(begin, end, limit=limit, reverse=reverse, snapshot=snapshot)

    @overload
    def __getitem__(self, item: bytes) -> bytes | None: ...

    @overload
    def __getitem__(self, item: slice) -> Iterator[tuple[bytes, bytes]]: ...

    def __getitem__(self, item: bytes | slice) -> bytes | Iterator[tuple[bytes, bytes]] | None:
        """`transaction[key]` is `get`, `for key, value in transaction[begin:end]` is `range`.

        A begin that is left out is the first key, an end that is left out the last one; either may be a KeySelector. A
        step of -1 gives descending order; raises ValueError for a step other than 1 and -1.
        """
        if isinstance(item, slice):
            begin, end, reverse = as_slice(item)
            return self.range(begin, end, reverse=reverse)
        return self.get(item)

    def range(
        self,
        begin: bytes | KeySelector,
        end: bytes | KeySelector | None,
        *,
        limit: int | None = None,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Iterates over what `get_range` returns, reading some hundred rows at a time; the rest is not read."""
        pages = self._transaction.pages(begin, end, limit=limit, reverse=reverse, snapshot=snapshot)
        while page := self._thread.call(lambda _: anext(pages, None)):
            yield from page

    def get_key(self, selector: KeySelector, *, snapshot: bool = False) -> bytes | None:
        """Returns the key that a selector selects; b"" before the first key, None after the last."""
        return self._thread.call(lambda _: self._transaction.get_key(selector, snapshot=snapshot))

    def watch(self, key: bytes) -> Watch:
        """Returns a watch: it ends once the key no longer holds the value that this transaction leaves.

        It watches from the commit on.
        """
        return Watch(self._thread, self._thread.call(lambda _: self._transaction.watch(key)))

    def mutate(self, op: Op, key: bytes, operand: bytes | None) -> None:
        self._transaction.mutate(op, key, operand)

    def add_read_conflict_key(self, key: bytes) -> None:
        """Makes this transaction conflict with later writes of a key, as if it had been read."""
        self._transaction.add_read_conflict_key(key)

    def add_read_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes this transaction conflict with later writes from `begin` up to but without `end`."""
        self._transaction.add_read_conflict_range(begin, end)

    def add_write_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        self._transaction.add_write_conflict_range(begin, end)

    def next_write_no_write_conflict_range(self) -> None:
        self._transaction.next_write_no_write_conflict_range()

    @property
    def options(self) -> TransactionOptions:
        """The options of this transaction."""
        return self._transaction.options

    @property
    def approximate_size(self) -> int:
        """Bytes of the request that a commit would submit now, roughly; the size limit applies to the exact number."""
        return self._transaction.approximate_size

    def commit(self) -> int:
        """Commits, and returns the version of the commit; without writes, the read version.

        Raises Conflict, TooOld or Rejected, after which nothing was written; ConnectionFailed or NoLeader if the
        request was not sent; OutcomeUnknown if it is not known whether it committed.

        After a success, returns the same version again; after OutcomeUnknown, submits the same request again, which
        applies at most once.
        """
        return self._thread.call(lambda _: self._transaction.commit())

    def on_error(self, error: BaseException) -> None:
        """Backs off and makes the transaction new after an error that is worth another attempt.

        Raises `error` itself if it is not, as that of `pgcoord_cli.Transaction`.
        """
        self._thread.call(lambda _: self._transaction.on_error(error))

    def reset(self) -> None:
        """Makes the transaction new, with the same options, and no retries so far."""
        self._in_loop(self._transaction.reset)

    def cancel(self) -> None:
        """Ends the transaction: its watches fail, and all its uses raise TransactionCancelled until `reset`.

        May be called by any thread. A commit in progress raises OutcomeUnknown if it was sent.
        """
        self._in_loop(self._transaction.cancel)

    def _in_loop(self, function: Callable[[], None]) -> None:
        """Calls a function that completes futures in the loop, where they belong."""

        async def call() -> None:
            function()

        self._thread.call(lambda _: call())


class Watch:
    """A key that is watched from the commit of its transaction on; made by `Transaction.watch`."""

    def __init__(self, thread: ClientThread, watch: client.Watch) -> None:
        self._thread = thread
        self._watch = watch

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the key holds another value; returns False after `timeout` seconds, if given. May be repeated.

        Raises ConnectionFailed if the watch is cancelled or the Database closed meanwhile.
        """
        return self._thread.call(lambda _: self._wait(timeout))

    async def _wait(self, timeout: float | None) -> bool:
        # Unlike wait_for, this leaves the watch as it is at the timeout.
        done, _ = await asyncio.wait([self._watch.changed], timeout=timeout)
        if self._watch.changed.cancelled():
            raise ConnectionFailed("the watch was cancelled")
        return bool(done) and self._watch.changed.result() is None

    def cancel(self) -> None:
        """Ends the watch; a thread that waits for it gets ConnectionFailed."""
        self._thread.call_soon(self._watch.cancel)


@overload
def transactional(function: Callable[..., T], /, **options: Unpack[OptionChanges]) -> Callable[..., T]: ...


@overload
def transactional(**options: Unpack[OptionChanges]) -> Callable[[Callable[..., T]], Callable[..., T]]: ...


def transactional(function: Callable[..., T] | None = None, /, **options: Unpack[OptionChanges]) -> Any:
    """Decorates a function that is given a Database or a Transaction, as `pgcoord_cli.transactional`, by plain calls.

    The argument is the one named `tr` or `transaction`, else the first; of a method, the first after `self` or `cls`.
    Given a Database, the function runs by `Database.run`: it is given a transaction, which is then committed, and runs
    again after a conflict. Given a Transaction, it joins it: the caller of the outermost function commits and retries.

    The options are those of TransactionOptions, as in `@transactional(retry_limit=3)`; a function that joins a
    transaction does not change its options. Raises TypeError for a function without such an argument, for a generator
    and for a coroutine function, UsageError for an option out of range.
    """
    TransactionOptions(**options)

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        argument = TransactionArgument(function)
        if iscoroutinefunction(unwrap(function)):
            raise TypeError("a coroutine function would run after the commit; it needs pgcoord_cli.transactional")

        @wraps(function)
        def in_transaction(*args: Any, **named: Any) -> T:
            call, given = argument.bind(args, named)
            if isinstance(given, Transaction):
                return function(*args, **named)
            if isinstance(given, Database):
                return given.run(Work(function, call, argument.name), **options)
            raise argument.refusal(given)

        return in_transaction

    return decorate if function is None else decorate(function)
