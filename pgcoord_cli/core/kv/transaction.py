"""Transactions: the reads of one transaction, its buffered writes, and its commit.

**Reading.** The first read fixes the read version: the durable version of the snapshot that it read in (rule I4). A
later read uses a later snapshot. If commits lie between the two, everything that the transaction has read before is
read again in the same statement, and if any of it has changed, the transaction ends with Conflict at once; otherwise
the later version becomes the read version. So a transaction always sees one consistent state, and holds no connection
between its reads. Its reads see its own writes.

**Snapshot reads** (`snapshot=True`) see the same state but add no read conflict: what they returned may be written by
others, without a conflict at a later read or at the commit.

**Conflicts** are checked for the keys that were read, and of a range that was read for the part that the returned rows
determine. Callers can add keys and ranges, to the reads and to the writes.

**Limits.** TIME_LIMIT_SECONDS from the first read to the commit; the sizes of keys, values and the whole transaction
are those of `core.commits.codec`. Each limit has its own error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Mutation, Op, Range, Request, Undecodable
from pgcoord_cli.core.commits.mutations import WriteSet, covers, fold, versionstamp
from pgcoord_cli.core.kv.hot_keys import Ticket
from pgcoord_cli.core.kv.snapshots import RangeRead, ReadSet, Rows, Snapshot, SnapshotReader
from pgcoord_cli.core.kv.submissions import Outcome, Submission, Submitter, new_request_id
from pgcoord_cli.core.kv.watches import Watch, Watcher
from pgcoord_cli.core.kv.writing import WriteMethods
from pgcoord_cli.errors import (
    CommitRefused,
    Conflict,
    ConnectionFailed,
    KeyTooLarge,
    Rejected,
    TimeLimit,
    TooOld,
    TransactionTooLarge,
    ValueTooLarge,
)

TIME_LIMIT_SECONDS = 5.0
"""Seconds from the first read after which a transaction is refused; the conflict window is a second longer."""


class KeySelector(NamedTuple):
    """A key by its position: `offset` keys after the last key below `key` (not above `key`, if `or_equal`)."""

    key: bytes
    or_equal: bool
    offset: int

    @classmethod
    def last_less_than(cls, key: bytes) -> KeySelector:
        """Selects the last key below `key`."""
        return cls(key, False, 0)

    @classmethod
    def last_less_or_equal(cls, key: bytes) -> KeySelector:
        """Selects `key` if it exists, or else the last key below it."""
        return cls(key, True, 0)

    @classmethod
    def first_greater_than(cls, key: bytes) -> KeySelector:
        """Selects the first key above `key`."""
        return cls(key, True, 1)

    @classmethod
    def first_greater_or_equal(cls, key: bytes) -> KeySelector:
        """Selects `key` if it exists, or else the first key above it."""
        return cls(key, False, 1)

    def __add__(self, keys: object) -> KeySelector:
        """Selects the key that is `keys` keys further on."""
        if not isinstance(keys, int):
            return NotImplemented
        return self._replace(offset=self.offset + keys)

    def __sub__(self, keys: int) -> KeySelector:
        """Selects the key that is `keys` keys further back."""
        return self._replace(offset=self.offset - keys)


class Transaction(WriteMethods):
    """Reads and writes that commit together or not at all. One task at a time may use it.

    A read that goes to the server raises Conflict if a key that was read before has been written since, TimeLimit after
    TIME_LIMIT_SECONDS, and ConnectionFailed. Reads and writes raise Rejected for keys and values beyond the limits:
    KeyTooLarge, ValueTooLarge.
    """

    def __init__(
        self,
        reader: SnapshotReader,
        submitter: Submitter,
        watcher: Watcher,
        commit_seconds: float,
        ticket: Ticket | None = None,
    ) -> None:
        self._reader = reader
        self._submitter = submitter
        self._watcher = watcher
        self._commit_seconds = commit_seconds
        self._ticket = ticket
        self._snapshot: Snapshot | None = None
        self._began = 0.0
        self._values: dict[bytes, bytes | None] = {}
        self._rows: dict[RangeRead, Rows] = {}
        # Dictionaries in place of sets: they keep the order of the reads, so that no payload depends on hashes.
        self._read_keys: dict[bytes, None] = {}
        self._read_ranges: dict[Range, None] = {}
        # The ranges among `_rows` that must not change; those of snapshot reads may.
        self._compared_ranges: set[RangeRead] = set()
        self._write_ranges: list[Range] = []
        self._mutations: list[Mutation] = []
        self._write_set: WriteSet | None = None
        # Keys whose value contains the versionstamp of this commit, which is not known yet.
        self._unreadable: set[bytes] = set()
        self._watches: list[Watch] = []
        self._committed: int | None = None

    @property
    def read_version(self) -> int | None:
        """The version that all reads so far are consistent with; None before the first read."""
        return self._snapshot.version if self._snapshot else None

    @property
    def versionstamp(self) -> bytes:
        """The ten bytes of this transaction's versionstamp. Raises Rejected before the commit, and without writes."""
        if self._committed is None:
            raise Rejected("no versionstamp: the transaction has not committed, or it wrote nothing")
        return versionstamp(self._committed)

    # -- reading

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """Returns the value of a key as this transaction would leave it, or None if the key is absent.

        Raises Rejected for a key whose value contains the versionstamp of this transaction.
        """
        if self._unreadable:
            self._check_readable(key, key + b"\0")
        own = self._own_writes()
        if own:
            decided, value = own.lookup(key)
            if decided:  # by own writes, without a read: so there is nothing that could conflict
                return value
        if key not in self._values:
            try:
                codec.check_key(key)
            except Undecodable as error:
                raise rejection(error) from None
            # Before the read, so that it sees what the holder of the key before this one wrote.
            if self._ticket and self._snapshot is None and not snapshot:
                await self._ticket.acquire(key)
            await self._extend((key,), ())
        # Also for a value that is known already: a snapshot read may have read it, without a conflict.
        if not snapshot:
            self._read_keys[key] = None
        stored = self._values[key]
        return own.value(key, stored) if own else stored

    def _check_readable(self, begin: bytes, end: bytes | None) -> None:
        if any(covers((begin, end), key) for key in self._unreadable):
            raise Rejected("the value contains the versionstamp of this commit: it can be read only after the commit")

    def _own_writes(self) -> WriteSet | None:
        """Returns the net effect of the writes so far, or None without any. Folded at the first read after a write."""
        if self._mutations and self._write_set is None:
            # Versionstamped mutations are left out: what they write is known only at the commit.
            self._write_set = fold(m for m in self._mutations if m.op < Op.SET_VERSIONSTAMPED_KEY)
        return self._write_set

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

        At most `limit` of them; from the end backwards if `reverse`. Own writes are seen. Raises like `get`.
        """
        if limit is not None and not 0 <= limit < 1 << 63:
            raise ValueError(f"limit: {limit} is not between 0 and {(1 << 63) - 1}")
        first = await self._bound(begin, snapshot=snapshot)
        last = await self._bound(end, snapshot=snapshot)
        if first is None or (last is not None and first >= last):
            return []
        with checked():
            codec.check_range(first, last)
        self._check_readable(first, last)
        # Own writes may hide stored rows, so that a limited read could return too few: the whole range is read.
        interval = RangeRead(first, last, None if self._mutations else limit, reverse)
        if interval not in self._rows:
            await self._extend((), (interval,))
        rows = self._rows[interval]
        if not snapshot:
            self._read_ranges[interval.seen(rows)] = None
            self._compared_ranges.add(interval)
        own = self._own_writes()
        if own is None:
            return list(rows)
        return sorted(own.over(dict(rows), first, last).items(), reverse=reverse)[:limit]

    async def get_key(self, selector: KeySelector, *, snapshot: bool = False) -> bytes | None:
        """Returns the key that a selector points at; b"" before the first key, None past the last."""
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

    async def _extend(self, keys: tuple[bytes, ...], ranges: tuple[RangeRead, ...]) -> None:
        """Reads keys and ranges, and all that was read before again, in one snapshot. Raises Conflict and TimeLimit."""
        if self._snapshot is None:
            self._began = monotonic()
        else:
            self._check_time()
            # One snapshot for all, so that no connection has to keep the earlier one open in between.
            keys, ranges = (*self._values, *keys), (*self._rows, *ranges)
        now = await self._reader.read(ReadSet(keys, ranges))
        # With the same durable version no commit lies between the two snapshots, so that nothing can have changed.
        if self._snapshot and now.version != self._snapshot.version and not self._is_unchanged(now):
            raise Conflict("a key that was read has been written since", hint="run the transaction again")
        self._snapshot = now
        self._values.update((key, now.values[key]) for key in keys)
        self._rows.update((interval, now.rows[interval]) for interval in ranges)

    def _is_unchanged(self, now: Snapshot) -> bool:
        # Keys that the caller added without a read have no value here; the resolver checks them, from this version on.
        return all(now.values[key] == self._values[key] for key in self._read_keys if key in self._values) and all(
            now.rows[interval] == self._rows[interval] for interval in self._compared_ranges
        )

    def _check_time(self) -> None:
        if monotonic() - self._began > TIME_LIMIT_SECONDS:
            raise TimeLimit(
                f"the transaction began more than {TIME_LIMIT_SECONDS:g}s ago",
                hint="run it again, with less work between its first read and its commit",
            )

    # -- conflicts that the caller adds

    def add_read_conflict_key(self, key: bytes) -> None:
        """Makes this transaction conflict with later writes of a key, as if it had been read."""
        with checked():
            codec.check_key(key)
        self._read_keys[key] = None

    def add_read_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes this transaction conflict with later writes from `begin` up to but without `end`."""
        with checked():
            codec.check_range(begin, end)
        self._read_ranges[begin, end] = None

    def add_write_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes transactions that read from `begin` up to but without `end` conflict with this one."""
        with checked():
            codec.check_range(begin, end)
        self._write_ranges.append((begin, end))

    # -- writing

    def mutate(self, op: Op, key: bytes, operand: bytes | None) -> None:
        mutation = Mutation(op, key, operand)
        try:
            codec.check_mutation(mutation)
        except Undecodable as error:
            raise rejection(error) from None
        self._mutations.append(mutation)
        if op == Op.SET_VERSIONSTAMPED_VALUE:
            self._unreadable.add(key)
        elif op in (Op.SET, Op.CLEAR):
            self._unreadable.discard(key)
        elif op == Op.CLEAR_RANGE:
            self._unreadable = {other for other in self._unreadable if not covers((key, operand), other)}
        # Once folded, the write set is kept up to date, so that reads between many writes do not fold them all again.
        if op < Op.SET_VERSIONSTAMPED_KEY and self._write_set is not None:
            self._write_set.add(mutation)

    @property
    def wrote_ticket_key(self) -> bool:
        """Whether the transaction wrote the key that it read first. A cleared range with that key does not count."""
        key = self._ticket.key if self._ticket else None
        return key is not None and any(mutation.key == key for mutation in self._mutations)

    # -- ending

    async def watch(self, key: bytes) -> Watch:
        """Returns a watch to await after the commit: it completes once the key has another value than this leaves.

        It reads the key, without a read conflict.
        """
        watch = Watch(key, await self.get(key, snapshot=True))
        self._watches.append(watch)
        return watch

    async def commit(self) -> int:
        """Commits the writes, and returns their commit version; without writes, the read version.

        Raises Conflict, TooOld or Rejected, after which nothing was written; ConnectionFailed if the request was not
        sent; OutcomeUnknown if it is not known whether it committed. A transaction that wrote nothing never conflicts.
        """
        snapshot = self._snapshot or await self._read_version_only()
        version = snapshot.version
        # Without writes nothing is submitted: all reads were of one version, and the transaction takes effect there.
        if self._mutations or self._write_ranges:
            self._check_time()
            version = self._committed = await self._submit(snapshot)
        # Only now: a watch expects the value that this transaction leaves, which was not there before.
        for watch in self._watches:
            self._watcher.add(watch)
        return version

    async def _read_version_only(self) -> Snapshot:
        """Takes the snapshot of a transaction that read nothing. Raises ConnectionFailed after `commit_seconds`."""
        try:
            async with asyncio.timeout(self._commit_seconds):
                await self._extend((), ())
        except TimeoutError:
            raise ConnectionFailed("the server does not answer", hint="nothing was written") from None
        assert self._snapshot is not None
        return self._snapshot

    async def _submit(self, snapshot: Snapshot) -> int:
        request = Request(
            tuple(self._read_keys), tuple(self._read_ranges), tuple(self._write_ranges), tuple(self._mutations)
        )
        try:
            payload = codec.encode(request)
        except Undecodable as error:
            raise rejection(error) from None
        submission = Submission(new_request_id(), snapshot.epoch, snapshot.term_id, snapshot.version, payload, request)
        return committed_version(await self._submitter.submit(submission, self._commit_seconds))


_LIMITS: dict[type[Undecodable], type[Rejected]] = {
    codec.KeyTooLong: KeyTooLarge,
    codec.ValueTooLong: ValueTooLarge,
    codec.TooManyBytes: TransactionTooLarge,
}


@contextmanager
def checked() -> Iterator[None]:
    """Translates an Undecodable that the block raises into the Rejected of the limit that was exceeded."""
    try:
        yield
    except Undecodable as error:
        raise rejection(error) from None


def rejection(error: Undecodable) -> Rejected:
    """Returns the Rejected of the limit that was exceeded, or a plain Rejected for a range that runs backwards."""
    return _LIMITS.get(type(error), Rejected)(str(error))


def committed_version(outcome: Outcome) -> int:
    """Returns the version of a committed outcome. Raises Conflict, Rejected or TooOld for any other."""
    if outcome.version is not None:
        return outcome.version
    kinds: dict[str | None, type[CommitRefused]] = {"conflict": Conflict, "rejected": Rejected}
    # An orphaned request outlived its leader without being decided: for the caller that is as too_old.
    kind = kinds.get(outcome.status, TooOld)
    raise kind(outcome.reason or "a key that was read has been written since", hint="nothing was written")
