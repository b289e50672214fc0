"""One transaction: what it has read, what it wants to write.

**Reading.** The first read fixes a read version: the durable version of the very snapshot that it read in (rule I4).
What is asked for later is read in a later snapshot if data was committed since; then everything that the
transaction read before is read again with it, and if any of that has changed, the transaction ends as a Conflict at
once. So what it sees is always one consistent state, and no connection is held between its reads. Its own writes are
seen by its reads.

**Snapshot reads** (`snapshot=True`) see the same state but make no conflict: neither the resolver nor a later read
minds that what they saw has changed.

**Conflicts** are on what was read: keys, and of a range the part that the returned rows speak of. More can be added by
hand, for reads and for writes.

**Limits.** Five seconds from the first read; keys, values and the whole of it as `core.commits.codec` says. Each has its own
error.
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


class KeySelector(NamedTuple):
    """A key by its place: from the last key below `key` (or up to it, if `or_equal`) go `offset` keys forward."""

    key: bytes
    or_equal: bool
    offset: int

    @classmethod
    def last_less_than(cls, key: bytes) -> KeySelector:
        """The last key below `key`."""
        return cls(key, False, 0)

    @classmethod
    def last_less_or_equal(cls, key: bytes) -> KeySelector:
        """`key`, or else the last key below it."""
        return cls(key, True, 0)

    @classmethod
    def first_greater_than(cls, key: bytes) -> KeySelector:
        """The first key above `key`."""
        return cls(key, True, 1)

    @classmethod
    def first_greater_or_equal(cls, key: bytes) -> KeySelector:
        """`key`, or else the first key above it."""
        return cls(key, False, 1)

    def __add__(self, keys: object) -> KeySelector:
        """The selector of the key so many keys further on."""
        if not isinstance(keys, int):
            return NotImplemented
        return self._replace(offset=self.offset + keys)

    def __sub__(self, keys: int) -> KeySelector:
        """The selector of the key so many keys before."""
        return self._replace(offset=self.offset - keys)


class Transaction:
    """Reads and writes that commit together or not at all. Not for use by several tasks at once."""

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
        self._read_keys: dict[bytes, None] = {}
        self._read_ranges: dict[Range, None] = {}
        self._compared_ranges: set[RangeRead] = set()
        self._write_ranges: list[Range] = []
        self._mutations: list[Mutation] = []
        self._write_set: WriteSet | None = None
        self._unreadable: set[bytes] = set()
        self._watches: list[Watch] = []
        self._committed: int | None = None

    @property
    def read_version(self) -> int | None:
        """The durable version of the snapshot that everything so far was read in; None before the first read."""
        return self._snapshot.version if self._snapshot else None

    @property
    def versionstamp(self) -> bytes:
        """The ten bytes that name this transaction's commit; Rejected before it, and when nothing was written."""
        if self._committed is None:
            raise Rejected("there is no versionstamp before the commit, nor for one that wrote nothing")
        return versionstamp(self._committed)

    # -- reading

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """The value of a key, as this transaction would leave it; None when there is none."""
        if self._unreadable:
            self._check_readable(key, key + b"\0")
        own = self._own_writes()
        if own:
            decided, value = own.lookup(key)
            if decided:
                return value
        if key not in self._values:
            try:
                codec.check_key(key)
            except Undecodable as error:
                raise refusal(error) from None
            if self._ticket and self._snapshot is None and not snapshot:
                await self._ticket.acquire(key)
            await self._extend((key,), ())
        if not snapshot:
            self._read_keys[key] = None
        stored = self._values[key]
        return own.value(key, stored) if own else stored

    def _check_readable(self, begin: bytes, end: bytes | None) -> None:
        if any(covers((begin, end), key) for key in self._unreadable):
            raise Rejected("the key holds this commit's versionstamp: it can be read after the commit")

    def _own_writes(self) -> WriteSet | None:
        """The net effect of what was written so far; folded only when somebody reads after writing."""
        if self._mutations and self._write_set is None:
            # What versionstamped mutations write is known only to the commit.
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
        """Keys and values from `begin` up to but without `end` (None: to the last key), as this transaction sees them.

        At most `limit`, from the end backwards if `reverse`.
        """
        if limit is not None and not 0 <= limit < 1 << 63:
            raise ValueError(f"a limit of {limit}")
        first = await self._bound(begin, snapshot=snapshot)
        last = await self._bound(end, snapshot=snapshot)
        if first is None or (last is not None and first >= last):
            return []
        with checked():
            codec.check_range(first, last)
        self._check_readable(first, last)
        # Own writes may hide stored rows, so with any in hand the whole range is read.
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
        """The key that a selector points at; b"" before the first key, None past the last."""
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
        """Reads more; what was read before is read again with it, and must not have changed."""
        if self._snapshot is None:
            self._began = monotonic()
        else:
            self._check_time()
            keys, ranges = (*self._values, *keys), (*self._rows, *ranges)
        now = await self._reader.read(ReadSet(keys, ranges))
        if self._snapshot and now.version != self._snapshot.version and not self._still_holds(now):
            raise Conflict("what this transaction read before has been written since", hint="run it again")
        self._snapshot = now
        self._values.update((key, now.values[key]) for key in keys)
        self._rows.update((interval, now.rows[interval]) for interval in ranges)

    def _still_holds(self, now: Snapshot) -> bool:
        return all(now.values[key] == self._values[key] for key in self._read_keys if key in self._values) and all(
            now.rows[interval] == self._rows[interval] for interval in self._compared_ranges
        )

    def _check_time(self) -> None:
        if monotonic() - self._began > TIME_LIMIT_SECONDS:
            raise TimeLimit(f"the transaction is older than {TIME_LIMIT_SECONDS:g}s", hint="run it again, and faster")

    # -- conflicts by hand

    def add_read_conflict_key(self, key: bytes) -> None:
        """Makes this transaction conflict with writes of a key, as if it had been read."""
        with checked():
            codec.check_key(key)
        self._read_keys[key] = None

    def add_read_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes this transaction conflict with writes from `begin` up to but without `end`."""
        with checked():
            codec.check_range(begin, end)
        self._read_ranges[begin, end] = None

    def add_write_conflict_key(self, key: bytes) -> None:
        """Makes others that read a key conflict with this transaction, as if it had been written."""
        self.add_write_conflict_range(key, key + b"\0")

    def add_write_conflict_range(self, begin: bytes, end: bytes | None) -> None:
        """Makes others that read from `begin` up to but without `end` conflict with this transaction."""
        with checked():
            codec.check_range(begin, end)
        self._write_ranges.append((begin, end))

    # -- writing

    def set(self, key: bytes, value: bytes) -> None:
        """Writes a key."""
        self._mutate(Op.SET, key, value)

    def clear(self, key: bytes) -> None:
        """Removes a key."""
        self._mutate(Op.CLEAR, key, None)

    def clear_range(self, begin: bytes, end: bytes | None) -> None:
        """Removes every key from `begin` up to but without `end` (None: to the last key)."""
        self._mutate(Op.CLEAR_RANGE, begin, end)

    def add(self, key: bytes, operand: bytes) -> None:
        """Adds unsigned little-endian numbers; the result has the operand's length."""
        self._mutate(Op.ADD, key, operand)

    def bit_and(self, key: bytes, operand: bytes) -> None:
        """Bitwise and; an absent key becomes the operand."""
        self._mutate(Op.BIT_AND, key, operand)

    def bit_or(self, key: bytes, operand: bytes) -> None:
        """Bitwise or."""
        self._mutate(Op.BIT_OR, key, operand)

    def bit_xor(self, key: bytes, operand: bytes) -> None:
        """Bitwise exclusive or."""
        self._mutate(Op.BIT_XOR, key, operand)

    def append_if_fits(self, key: bytes, operand: bytes) -> None:
        """Appends, unless the value would become longer than values may be."""
        self._mutate(Op.APPEND_IF_FITS, key, operand)

    def max(self, key: bytes, operand: bytes) -> None:
        """The greater of two unsigned little-endian numbers, of the operand's length."""
        self._mutate(Op.MAX, key, operand)

    def min(self, key: bytes, operand: bytes) -> None:
        """The smaller of two unsigned little-endian numbers; an absent key becomes the operand."""
        self._mutate(Op.MIN, key, operand)

    def byte_max(self, key: bytes, operand: bytes) -> None:
        """The lexically greater of two byte strings."""
        self._mutate(Op.BYTE_MAX, key, operand)

    def byte_min(self, key: bytes, operand: bytes) -> None:
        """The lexically smaller of two byte strings; an absent key becomes the operand."""
        self._mutate(Op.BYTE_MIN, key, operand)

    def compare_and_clear(self, key: bytes, operand: bytes) -> None:
        """Removes the key if it holds just the operand."""
        self._mutate(Op.COMPARE_AND_CLEAR, key, operand)

    def set_versionstamped_key(self, template: bytes, value: bytes) -> None:
        """Writes a key that holds the commit's versionstamp; the template's last four bytes say at which offset."""
        self._mutate(Op.SET_VERSIONSTAMPED_KEY, template, value)

    def set_versionstamped_value(self, key: bytes, template: bytes) -> None:
        """Writes a value that holds the commit's versionstamp; the template's last four bytes say at which offset."""
        self._mutate(Op.SET_VERSIONSTAMPED_VALUE, key, template)

    def _mutate(self, op: Op, key: bytes, operand: bytes | None) -> None:
        mutation = Mutation(op, key, operand)
        try:
            codec.check_mutation(mutation)
        except Undecodable as error:
            raise refusal(error) from None
        self._mutations.append(mutation)
        if op == Op.SET_VERSIONSTAMPED_VALUE:
            self._unreadable.add(key)
        elif op in (Op.SET, Op.CLEAR):
            self._unreadable.discard(key)
        elif op == Op.CLEAR_RANGE:
            self._unreadable = {other for other in self._unreadable if not covers((key, operand), other)}
        if op < Op.SET_VERSIONSTAMPED_KEY and self._write_set is not None:
            self._write_set.add(mutation)

    @property
    def wrote_ticket_key(self) -> bool:
        """Whether it wrote the very key that it read first; a range that holds it does not count."""
        key = self._ticket.key if self._ticket else None
        return key is not None and any(mutation.key == key for mutation in self._mutations)

    # -- ending

    async def watch(self, key: bytes) -> Watch:
        """Something to await after the commit: it is over once the key no longer holds what this transaction leaves."""
        watch = Watch(key, await self.get(key, snapshot=True))
        self._watches.append(watch)
        return watch

    async def commit(self) -> int:
        """The version at which the writes took effect; without writes, the version that was read.

        Raises Conflict, TooOld, Rejected (nothing was written) and OutcomeUnknown.
        """
        snapshot = self._snapshot or await self._read_at_last()
        version = snapshot.version
        if self._mutations or self._write_ranges:
            self._check_time()
            version = self._committed = await self._submit(snapshot)
        for watch in self._watches:
            self._watcher.add(watch)
        return version

    async def _read_at_last(self) -> Snapshot:
        """The snapshot of a transaction that read nothing; it has as long for that as for its commit."""
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
            raise refusal(error) from None
        submission = Submission(new_request_id(), snapshot.epoch, snapshot.term_id, snapshot.version, payload, request)
        return committed_version(await self._submitter.submit(submission, self._commit_seconds))


_LIMITS: dict[type[Undecodable], type[Rejected]] = {
    codec.KeyTooLong: KeyTooLarge,
    codec.ValueTooLong: ValueTooLarge,
    codec.TooManyBytes: TransactionTooLarge,
}


@contextmanager
def checked() -> Iterator[None]:
    """Within the block, what the codec refuses leaves as the Rejected that says which limit it was."""
    try:
        yield
    except Undecodable as error:
        raise refusal(error) from None


def refusal(error: Undecodable) -> Rejected:
    """The Rejected that says which limit it was."""
    return _LIMITS.get(type(error), Rejected)(str(error))


def committed_version(outcome: Outcome) -> int:
    """The version of a committed outcome; raises the CommitRefused of any other."""
    if outcome.version is not None:
        return outcome.version
    kinds: dict[str | None, type[CommitRefused]] = {"conflict": Conflict, "rejected": Rejected}
    kind = kinds.get(outcome.status, TooOld)
    raise kind(outcome.reason or "a key that was read has been written since", hint="nothing was written")
