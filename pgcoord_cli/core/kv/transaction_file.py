"""Transactions written as JSON lines: comparisons, and mutations that are made if all of them are true.

One object a line, in any order. Every comparison is of the state before the transaction.

    {"compare": {"key": "a", "value": "1"}}               the value equals; "op" compares otherwise: != < <= > >=
    {"compare": {"key": "b", "absent": true}}             or "exists": true
    {"set": {"key": "a", "value": "2"}}                   as do all mutations of a key with an operand
    {"add": {"key": "n", "amount": 5}}                    as do max and min: a number in place of "value"
    {"clear": {"key": "c"}}
    {"clear_range": {"begin": "d", "end": "e"}}           an end of null is past the last key; or {"prefix": "d/"}

Keys and values are text, or hexadecimal in an object with "encoding": "hex". Values are compared byte by byte; a
comparison with a value is false for an absent key, whatever its "op".

**Atomic.** The whole file is checked before anything is sent. Comparisons read at one version and add read conflicts:
if a compared key was written meanwhile, the commit is refused, and the transaction runs again. Nothing is written when
a comparison is false.
"""

from __future__ import annotations

import asyncio
import json
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import MAX_TRANSACTION_BYTES, Mutation, Op, Undecodable
from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.kv import reading
from pgcoord_cli.core.kv.client import Database, Transaction
from pgcoord_cli.core.kv.reading import Entry
from pgcoord_cli.errors import Conflict, TooOld, UsageError

MAX_LINE_BYTES = 1_000_000
"""Longest line. The longest key and value, every byte of them escaped, are shorter."""

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
"""Seconds between attempts to commit."""

COMPARISONS: dict[str, Callable[[bytes, bytes], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip

COUNTERS = (Op.ADD, Op.MAX, Op.MIN)
"""Operations on little-endian numbers, which take an `amount` too."""

MUTATIONS = {op.name.lower(): op for op in Op}


class Comparison(NamedTuple):
    """A condition on one key, and the line of the file that it is from."""

    line: int
    key: bytes
    holds: Callable[[bytes | None], bool]


class TransactionFile(NamedTuple):
    """The comparisons and mutations of a file."""

    comparisons: list[Comparison]
    mutations: list[Mutation]


class FalseComparison(NamedTuple):
    """A comparison that was false, with the value of its key (None: absent)."""

    line: int
    key: bytes
    value: bytes | None


class Result(NamedTuple):
    """The commit version and no false comparison; or the version that was read, and those that were false at it."""

    version: int
    false: list[FalseComparison]

    def document(self) -> dict[str, Any]:
        """Returns the result as a record."""
        failed = [{"line": each.line} | shown(each, self.version) for each in self.false]
        return {"committed": not self.false, "version": self.version, "failed": failed}


def shown(comparison: FalseComparison, version: int) -> dict[str, Any]:
    """Returns the key and the value of a comparison as a record without the version."""
    record = reading.show(Entry(comparison.key, comparison.value, version), as_hex=False)
    return {name: record[name] for name in ("key", "value", "encoding")}


# Committing


async def commit(database: Database, file: TransactionFile, seconds: float) -> Result:
    """Runs the transaction, again while it conflicts, for at most `seconds`. Raises what its last commit raised."""
    deadline = time.monotonic() + seconds
    backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
    while True:
        attempt = _Attempt(file)
        try:
            version = await database.write(attempt.run, commit_seconds=max(0.001, deadline - time.monotonic()))
            return Result(version, attempt.false)
        except (Conflict, TooOld):
            if time.monotonic() >= deadline:
                raise
        await backoff.pause()


class _Attempt:
    """One run of the transaction, with the comparisons that were false in it."""

    def __init__(self, file: TransactionFile) -> None:
        self._file = file
        self.false: list[FalseComparison] = []

    async def run(self, transaction: Transaction) -> None:
        # At once, so that they go to the server in one statement.
        values = await asyncio.gather(*(transaction.get(each.key) for each in self._file.comparisons))
        compared = zip(self._file.comparisons, values, strict=True)
        self.false = [FalseComparison(each.line, each.key, value) for each, value in compared if not each.holds(value)]
        if not self.false:
            for mutation in self._file.mutations:
                transaction.mutate(*mutation)


# Parsing


class _Malformed(ValueError):
    """A line is not valid; the text says why."""


def parse(stream: IO[bytes], name: str) -> TransactionFile:
    """Parses a whole file. Raises UsageError for an invalid line, which it names, and for an empty file."""
    file = TransactionFile([], [])
    size = 0
    for number, line in _lines(stream):
        try:
            size += _parse_line(number, line, file)
            if size > MAX_TRANSACTION_BYTES:
                raise _Malformed(f"the transaction has more than {MAX_TRANSACTION_BYTES} bytes up to here")
        except (_Malformed, Undecodable) as error:
            raise UsageError(
                f"FILE: {name}, line {number}: {error}",
                hint="see the lines in: pgcoord kv txn --help",
            ) from None
    if not (file.comparisons or file.mutations):
        raise UsageError(f"FILE: {name} has neither a comparison nor a mutation")
    return file


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank, with their numbers. A line that is too long is cut, and not valid then."""
    lines: Iterable[bytes] = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


def _parse_line(number: int, line: bytes, file: TransactionFile) -> int:
    """Appends what the line says to the file; returns the bytes of its keys and operands."""
    name, fields = _only_item(_object(line))
    if name == "compare":
        comparison = _comparison(number, _Fields(name, fields))
        file.comparisons.append(comparison)
        return len(comparison.key)
    op = MUTATIONS.get(name)
    if op is None:
        raise _Malformed(f"{name!r} is neither compare nor a mutation ({', '.join(MUTATIONS)})")
    mutation = _mutation(op, _Fields(name, fields))
    codec.check_mutation(mutation)
    file.mutations.append(mutation)
    return len(mutation.key) + len(mutation.operand or b"")


def _object(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise _Malformed(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        return json.loads(line, object_pairs_hook=_without_repetition)
    except _Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"not JSON: {error}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # json would take the last one, and ignore a mutation
        raise _Malformed("a name occurs twice in an object")
    return fields


def _only_item(record: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(record, dict) or len(record) != 1:
        raise _Malformed("not a JSON object with one name, the comparison or mutation")
    ((name, fields),) = record.items()
    if not isinstance(fields, dict):
        raise _Malformed(f"{name!r} is not an object")
    return name, fields


class _Fields:
    """The fields of a comparison or mutation, each taken once; `end` refuses what is left."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self._name = name
        self._fields = dict(fields)
        encoding = self._fields.pop("encoding", "utf-8")
        if encoding not in ("utf-8", "hex"):
            raise _Malformed(f"the encoding {encoding!r} is neither utf-8 nor hex")
        self._is_hex = encoding == "hex"

    def __contains__(self, field: str) -> bool:
        return field in self._fields

    def take(self, field: str) -> Any:
        """Takes a field of any type."""
        try:
            return self._fields.pop(field)
        except KeyError:
            raise _Malformed(f"{self._name} has no {field!r}") from None

    def text(self, field: str) -> str:
        """Takes a field that is a string."""
        value = self.take(field)
        if not isinstance(value, str):
            raise _Malformed(f"{field!r} of {self._name} is not a string")
        return value

    def bytes(self, field: str) -> bytes:
        """Takes a field that is text or, by the encoding of the object, hexadecimal."""
        text = self.text(field)
        try:
            return bytes.fromhex(text) if self._is_hex else text.encode()
        except ValueError:
            raise _Malformed(f"{field!r} of {self._name} is not {'hexadecimal' if self._is_hex else 'UTF-8'}") from None

    def take_null(self, field: str) -> bool:
        """Takes a field if it is there and null; returns whether it was."""
        is_null = field in self._fields and self._fields[field] is None
        if is_null:
            del self._fields[field]
        return is_null

    def flag(self, field: str) -> None:
        """Takes a field that is true."""
        if self.take(field) is not True:
            raise _Malformed(f"{field!r} of {self._name} is not true")

    def end(self) -> None:
        """Refuses fields that were not taken."""
        if self._fields:
            raise _Malformed(f"{self._name} takes no {next(iter(self._fields))!r} here")


def _comparison(number: int, fields: _Fields) -> Comparison:
    key = fields.bytes("key")
    codec.check_key(key)
    holds = _condition(fields)
    fields.end()
    return Comparison(number, key, holds)


def _condition(fields: _Fields) -> Callable[[bytes | None], bool]:
    for name in ("absent", "exists"):
        if name in fields:
            fields.flag(name)
            return (lambda found: found is None) if name == "absent" else (lambda found: found is not None)
    op = fields.text("op") if "op" in fields else "="
    if op not in COMPARISONS:
        raise _Malformed(f"the op {op!r} is not one of {' '.join(COMPARISONS)}")
    if "value" not in fields:
        raise _Malformed("compare has no 'value', 'absent' or 'exists'")
    compare, value = COMPARISONS[op], fields.bytes("value")
    return lambda found: found is not None and compare(found, value)


def _mutation(op: Op, fields: _Fields) -> Mutation:
    if op == Op.CLEAR_RANGE:
        mutation = Mutation(op, *_range(fields))
    else:
        mutation = Mutation(op, fields.bytes("key"), None if op == Op.CLEAR else _operand(op, fields))
    fields.end()
    return mutation


def _range(fields: _Fields) -> tuple[bytes, bytes | None]:
    if "prefix" in fields:
        return reading.prefix_range(fields.bytes("prefix"))
    begin = fields.bytes("begin")
    # It has to be written as null, so that a forgotten end does not clear all that follows.
    return begin, None if fields.take_null("end") else fields.bytes("end")


def _operand(op: Op, fields: _Fields) -> bytes:
    if op not in COUNTERS or "amount" not in fields:
        return fields.bytes("value")
    amount = fields.take("amount")
    # bool is a subclass of int.
    if type(amount) is not int or not -(1 << 63) <= amount < 1 << 63:
        raise _Malformed("'amount' is not an integer of eight bytes")
    if amount < 0 and op != Op.ADD:
        raise _Malformed(f"'amount' of {op.name.lower()} is negative; it compares unsigned numbers")
    return reading.counter(amount, "amount")
