"""Transactions: the reads of one transaction, its buffered writes, and its commit.

**Reading.** The first read fixes the read version: the durable version of the snapshot that it read in. Every other
read is of that version too: later ones, those that run at the same time, snapshot reads, ranges, key selectors
(rule I4; `core.kv.read_view`). So a transaction always sees one consistent state, and holds no connection between its
reads. Its reads see its own writes (`core.kv.own_writes`).

**Snapshot reads** (`snapshot=True`) see the same state but add no read conflict: what they returned may be written by
others, without a conflict at the commit.

**Conflicts** are checked at the commit, from the read version on, for the keys that were read, and of a range that was
read for the part that the returned rows determine; not for what own writes alone decide. Callers can add keys and
ranges, to the reads and to the writes. A transaction that writes nothing never conflicts.

**Commit.** A transaction commits once (`core.kv.lifetime`). After OutcomeUnknown a further `commit` submits the same
request, which applies at most once. `reset` makes a transaction new; `on_error` does so after an error that is worth
another attempt.

**Limits.** The options of the transaction (`core.kv.options`) limit its time, from the first read to the commit, and
its size; the sizes of keys and values are those of `core.commits.codec`. Each limit has its own error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import overload

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Op, Range, Request
from pgcoord_cli.core.commits.mutations import versionstamp
from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.kv.checks import (
    as_bound,
    as_bytes,
    as_key,
    as_mutation,
    as_range,
    as_selector,
    as_slice,
    limits_checked,
    rejection,
)
from pgcoord_cli.core.kv.hot_keys import Ticket
from pgcoord_cli.core.kv.key_selector import KeySelector
from pgcoord_cli.core.kv.leader_check import LeaderCheck
from pgcoord_cli.core.kv.lifetime import CANCELLED, Life
from pgcoord_cli.core.kv.options import TransactionOptions
from pgcoord_cli.core.kv.own_writes import OwnWrites
from pgcoord_cli.core.kv.range_scan import RangeScan
from pgcoord_cli.core.kv.read_view import ReadView
from pgcoord_cli.core.kv.reading import prefix_range
from pgcoord_cli.core.kv.snapshots import ReadSet, ReadVersion, Snapshot, SnapshotReader
from pgcoord_cli.core.kv.submissions import Outcome, Submission, Submitter, new_request_id
from pgcoord_cli.core.kv.watches import TransactionWatches, Watch, Watcher
from pgcoord_cli.core.kv.writing import WriteMethods
from pgcoord_cli.errors import (
    CommitRefused,
    Conflict,
    ConnectionFailed,
    Rejected,
    TooOld,
    TransactionCancelled,
    TransactionTooLarge,
)

FIRST_PAUSE, LAST_PAUSE = 0.001, 0.25
"""Seconds between attempts at a transaction."""

ITEM_BYTES = 8
"""Bytes that a key, a range or a mutation takes in a request beside its contents, roughly."""

PAGE_ROWS = 500
"""Rows that `Transaction.range` reads at a time."""


class Transaction(WriteMethods):
    """Reads and writes that commit together or not at all.

    Several tasks may read in it at once. A read that goes to the server raises TimeLimit after the time limit (by
    default five seconds), TooOld if its version can no longer be read, as after a crash of the server, and
    ConnectionFailed. Reads and writes raise Rejected for keys and values beyond the limits: KeyTooLarge, ValueTooLarge.

    From the commit on they raise UsedDuringCommit, also a read that the commit has overtaken; after a commit that was
    refused, its error; and after `cancel` TransactionCancelled.
    """

    def __init__(
        self,
        reader: SnapshotReader,
        submitter: Submitter,
        watcher: Watcher,
        leader: LeaderCheck,
        options: TransactionOptions,
        ticket: Ticket | None = None,
    ) -> None:
        self._reader = reader
        self._submitter = submitter
        self._watcher = watcher
        self._leader = leader
        self.options = options
        self._backoff = Backoff(FIRST_PAUSE, LAST_PAUSE)
        self._retries = 0
        self._begin(ticket)

    def _begin(self, ticket: Ticket | None) -> None:
        """Begins a life: nothing read, nothing written."""
        self._life = Life()
        self._ticket = ticket
        self._view = ReadView(self._reader, self.options.time_limit_seconds)
        self._values: dict[bytes, bytes | None] = {}
        # Dictionaries in place of sets: they keep the order of the reads, so that no payload depends on hashes.
        self._read_keys: dict[bytes, None] = {}
        self._read_ranges: dict[Range, None] = {}
        self._write_ranges: list[Range] = []
        self._own = OwnWrites()
        self._written_bytes = 0
        # The positions of the mutations that are no writes when other transactions are checked for conflicts.
        self._no_conflict: list[int] = []
        self._next_without_conflict = False
        self._watches = TransactionWatches(self._watcher)

    @property
    def read_version(self) -> int | None:
        """The version that all reads are of; None before the first read."""
        return self._view.version.version if self._view.version else None

    async def set_read_version(self, version: int) -> None:
        """Makes all reads be of a version that was committed: of a commit of one's own, or of another transaction.

        Versions that were committed in one batch became visible together: the last of them is taken. Raises TooOld if
        the version is further back than the time limit of transactions, Rejected if it was not committed yet, and if
        the transaction has read already.
        """
        life = self._life
        life.check_usable()
        await self._view.fix(version)
        life.check_usable()

    @property
    def versionstamp(self) -> bytes:
        """The ten bytes of this transaction's versionstamp. Raises Rejected before the commit, and without writes."""
        if self._life.version is None or not self._life.wrote:
            raise Rejected("no versionstamp: the transaction has not committed, or it wrote nothing")
        return versionstamp(self._life.version)

    # -- reading

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """Returns the value of a key as this transaction would leave it, or None if the key is absent.

        Raises Rejected for a key whose value contains the versionstamp of this transaction.
        """
        self._life.check_usable()
        key = as_key(key)
        decided, value = self._own.lookup(key)
        if decided:  # by own writes, without a read: so there is nothing that could conflict
            return value
        if key not in self._values:
            # Before the read, so that it sees what the holder of the key before this one wrote.
            ticket = None if snapshot else self._ticket
            found = await self._read(ReadSet((key,)), ticket)
            self._values[key] = found.values[key]
        # Also for a value that is known already: a snapshot read may have read it, without a conflict.
        if not snapshot:
            self._read_keys[key] = None
        return self._own.value(key, self._values[key])

    async def get_range(
        self,
        begin: bytes | KeySelector,
        end: bytes | KeySelector | None,
        *,
        limit: int | None = None,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        """Returns the keys and values from `begin` up to but without `end` (None: to the last key), in key order.

        At most `limit` of them (None or 0: all); from the end backwards if `reverse`. Own writes are seen. Raises like
        `get`.
        """
        pages = self.pages(begin, end, page_rows=None, limit=limit, reverse=reverse, snapshot=snapshot)
        rows: list[tuple[bytes, bytes]] = []
        async for page in pages:
            rows += page
        return rows

    async def get_range_startswith(
        self, prefix: bytes, *, limit: int | None = None, reverse: bool = False, snapshot: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Returns the keys that begin with a prefix, and their values, as `get_range` does."""
        begin, end = prefix_range(as_bytes(prefix, "a prefix"))
        return await self.get_range(begin, end, limit=limit, reverse=reverse, snapshot=snapshot)

    @overload
    def __getitem__(self, item: bytes) -> Awaitable[bytes | None]: ...

    @overload
    def __getitem__(self, item: slice) -> AsyncIterator[tuple[bytes, bytes]]: ...

    def __getitem__(self, item: bytes | slice) -> Awaitable[bytes | None] | AsyncIterator[tuple[bytes, bytes]]:
        """`await transaction[key]` is `get`, `async for key, value in transaction[begin:end]` is `range`.

        A begin that is left out is the first key, an end that is left out the last one; either may be a KeySelector. A
        step of -1 gives descending order; raises ValueError for a step other than 1 and -1.
        """
        if isinstance(item, slice):
            begin, end, reverse = as_slice(item)
            return self.range(begin, end, reverse=reverse)
        return self.get(item)

    async def range(
        self,
        begin: bytes | KeySelector,
        end: bytes | KeySelector | None,
        *,
        limit: int | None = None,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        """Iterates over what `get_range` returns, reading PAGE_ROWS rows at a time.

        Rows that are never reached are not read, and do not conflict.
        """
        async for page in self.pages(begin, end, limit=limit, reverse=reverse, snapshot=snapshot):
            for row in page:
                yield row

    async def pages(
        self,
        begin: bytes | KeySelector,
        end: bytes | KeySelector | None,
        *,
        page_rows: int | None = PAGE_ROWS,
        limit: int | None = None,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> AsyncIterator[Sequence[tuple[bytes, bytes]]]:
        """Yields the rows that `range` does, those of one read at a time; never an empty page."""
        self._life.check_usable()
        if limit is not None and not 0 <= limit < 1 << 63:
            raise ValueError(f"limit: {limit} is not between 0 and {(1 << 63) - 1}")
        begin = as_bound(begin, "the begin of a range")
        end = None if end is None else as_bound(end, "the end of a range")
        first = await self._bound(begin, snapshot=snapshot)
        last = await self._bound(end, snapshot=snapshot)
        if first is None or (last is not None and first >= last):
            return
        with limits_checked():
            codec.check_range(first, last)
        scan = RangeScan(self._read, self._own, limit or None, page_rows, reverse=reverse)
        async for page in scan.pages(first, last):
            if not snapshot:
                self._read_ranges.update(dict.fromkeys(page.conflicts))
            if page.rows:
                yield page.rows

    async def get_key(self, selector: KeySelector, *, snapshot: bool = False) -> bytes | None:
        """Returns the key that a selector points at; b"" before the first key, None past the last."""
        selector = as_selector(selector)
        # Everything below the edge is below the selector's key, or not above it with `or_equal`.
        edge = selector.key + b"\0" if selector.or_equal else selector.key
        if selector.offset > 0:
            rows = await self.get_range(edge, None, limit=selector.offset, snapshot=snapshot)
            return rows[-1][0] if len(rows) == selector.offset else None
        count = 1 - selector.offset
        rows = await self.get_range(b"", edge, limit=count, reverse=True, snapshot=snapshot)
        return rows[-1][0] if len(rows) == count else b""

    async def _bound(self, bound: bytes | KeySelector | None, *, snapshot: bool) -> bytes | None:
        return await self.get_key(bound, snapshot=snapshot) if isinstance(bound, KeySelector) else bound

    async def _read(self, read_set: ReadSet, ticket: Ticket | None = None) -> Snapshot:
        """Reads at the read version, and raises what a read raises that is overtaken by a commit, a cancel or a reset.

        What it returned would be checked by no commit.
        """
        life = self._life
        snapshot = await self._view.read(read_set, ticket)
        life.check_usable()
        return snapshot

    # -- conflicts that the caller adds

    def add_read_conflict_key(self, key: bytes) -> None:
        """Makes this transaction conflict with later writes of a key, as if it had been read."""
        self._life.check_usable()
        self._read_keys[as_key(key)] = None

    def add_read_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes this transaction conflict with later writes from `begin` up to but without `end`."""
        self._life.check_usable()
        self._read_ranges[as_range(begin, end)] = None

    def add_write_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes transactions that read from `begin` up to but without `end` conflict with this one."""
        self._life.check_usable()
        self._write_ranges.append(as_range(begin, end))

    # -- writing

    def mutate(self, op: Op, key: bytes, operand: bytes | None) -> None:
        self._life.check_usable()
        mutation = as_mutation(op, key, operand)
        if self._next_without_conflict:
            self._next_without_conflict = False
            self._no_conflict.append(len(self._own.mutations))
        self._own.add(mutation)
        self._written_bytes += ITEM_BYTES + len(mutation.key) + len(mutation.operand or b"")

    def next_write_no_write_conflict_range(self) -> None:
        self._life.check_usable()
        self._next_without_conflict = True

    @property
    def approximate_size(self) -> int:
        """Bytes of the request that a commit would submit now, roughly; the size limit applies to the exact number."""
        ranges = (*self._read_ranges, *self._write_ranges)
        read = sum(len(key) for key in self._read_keys) + sum(len(begin) + len(end or b"") for begin, end in ranges)
        return self._written_bytes + read + ITEM_BYTES * (len(self._read_keys) + len(ranges))

    @property
    def wrote_ticket_key(self) -> bool:
        """Whether the transaction wrote the key that it read first. A cleared range with that key does not count."""
        key = self._ticket.key if self._ticket else None
        return key is not None and any(mutation.key == key for mutation in self._own.mutations)

    # -- ending

    async def watch(self, key: bytes) -> Watch:
        """Returns a watch to await after the commit: it completes once the key has another value than this leaves.

        It reads the key, without a read conflict.
        """
        key = as_key(key)
        watches = self._watches
        return watches.add(key, await self.get(key, snapshot=True))

    async def commit(self) -> int:
        """Commits the writes, and returns their commit version; without writes, the read version.

        Raises Conflict, TooOld or Rejected, after which nothing was written; ConnectionFailed or NoLeader if the
        request was not sent; OutcomeUnknown if it is not known whether it committed. A transaction that wrote nothing
        never conflicts.

        After a success, returns the same version again; after OutcomeUnknown, submits the same request again, which
        applies at most once. Raises UsedDuringCommit while another commit of this transaction is in progress.
        """
        life, watches = self._life, self._watches
        if life.version is not None:
            return life.version
        life.begin_commit()
        try:
            version = await self._commit(life)
        except BaseException as error:
            life.failed(error)
            if isinstance(error, Exception):
                watches.fail(error)
            raise
        # Only now: a watch expects the value that this transaction leaves, which was not there before.
        watches.start()
        return version

    async def _commit(self, life: Life) -> int:
        if life.request:  # submitted before, with an unknown outcome
            life.request = self._submitter.begin_again(life.request, self.options.commit_seconds)
        else:
            read_version = self._view.version or await self._read_version_only()
            life.check_committing()
            # Without writes nothing is submitted: all reads were of one version, where the transaction takes effect.
            if not self._own and not self._write_ranges:
                life.committed(read_version.version, wrote=False)
                return read_version.version
            self._view.check_time()
            submission = self._submission(read_version)
            if self.options.require_leader:
                await self._leader.require()
                life.check_committing()
            life.request = self._submitter.begin(submission, self.options.commit_seconds)
        try:
            version = committed_version(await self._submitter.outcome(life.request))
        except ConnectionFailed:
            life.check_committing()  # not sent because it was cancelled
            raise
        life.committed(version, wrote=True)
        return version

    async def _read_version_only(self) -> ReadVersion:
        """Fixes the version of a transaction that read nothing. Raises ConnectionFailed after `commit_seconds`."""
        try:
            async with asyncio.timeout(self.options.commit_seconds):
                return (await self._view.read(ReadSet())).version
        except TimeoutError:
            raise ConnectionFailed("the server does not answer", hint="nothing was written") from None

    def _submission(self, read: ReadVersion) -> Submission:
        request = Request(
            tuple(self._read_keys),
            tuple(self._read_ranges),
            tuple(self._write_ranges),
            tuple(self._own.mutations),
            tuple(self._no_conflict),
        )
        try:
            payload = codec.encode(request)
        except codec.Undecodable as error:
            raise rejection(error) from None
        if len(payload) > self.options.size_limit_bytes:
            raise TransactionTooLarge(f"the transaction has {len(payload)} of {self.options.size_limit_bytes} bytes")
        return Submission(new_request_id(), read.epoch, read.term_id, read.version, payload, request)

    # -- ending without a commit

    async def on_error(self, error: BaseException) -> None:
        """Prepares another attempt after a read or commit that raised `error`: backs off, then makes this one new.

        Raises `error` itself if another attempt is not worth it: it is neither Conflict nor TooOld (with the option
        `retry_unknown`, OutcomeUnknown), or there were `retry_limit` attempts already.
        """
        if self._retries >= self.options.retry_limit or not self.options.is_retryable(error):
            raise error
        self._retries += 1
        await self._backoff.pause()
        self._restart()

    def reset(self) -> None:
        """Makes the transaction new, with the same options, and no retries so far.

        What is in progress ends as with `cancel`, and watches of a transaction that has not committed fail.
        """
        self._retries = 0
        self._backoff.reset()
        self._restart()

    def _restart(self) -> None:
        self.cancel()
        self._begin(None)  # a ticket is for one attempt

    def cancel(self) -> None:
        """Ends the transaction: its watches fail, and all its uses raise TransactionCancelled until `reset`.

        A commit in progress raises OutcomeUnknown if it was sent, since it cannot be withdrawn. A transaction that has
        committed stays committed.
        """
        self._life.cancel()
        self._watches.fail(TransactionCancelled(CANCELLED))


def committed_version(outcome: Outcome) -> int:
    """Returns the version of a committed outcome. Raises Conflict, Rejected or TooOld for any other."""
    if outcome.version is not None:
        return outcome.version
    kinds: dict[str | None, type[CommitRefused]] = {"conflict": Conflict, "rejected": Rejected}
    # An orphaned request outlived its leader without being decided: for the caller that is as too_old.
    kind = kinds.get(outcome.status, TooOld)
    raise kind(outcome.reason or "a key that was read has been written since", hint="nothing was written")
