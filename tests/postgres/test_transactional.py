"""Functions decorated with `transactional`, and the item syntax of transactions, of both interfaces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import unwrap
from typing import Any

import pytest

import pgcoord_cli
from pgcoord_cli import KeySelector, sync
from pgcoord_cli.core.kv.client import Database
from pgcoord_cli.core.kv.hot_keys import HotKeys, Ticket, kind_of
from pgcoord_cli.core.kv.transaction import Transaction
from pgcoord_cli.errors import Conflict, Rejected, UsageError
from pgcoord_cli.settings import Settings
from tests.postgres.commit_scenarios import Sql, data, needs_leader, put, scenario_test

Rows = list[tuple[bytes, bytes]]

NAMES = (b"", b"a", b"ab", b"b", b"b\xff", b"b\xff\0", b"c", b"\xff\xff", b"\xff\xff\1")

ROWS: Rows = [(name, b"value of " + name) for name in NAMES]
"""Stored before the tests of the item syntax, in key order."""


@pytest.fixture
def blocking(settings: Settings) -> Iterator[sync.Database]:
    with sync.connect(settings.dsn, schema=settings.schema) as opened:
        yield opened


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The kinds of the attempts that are made from now on."""
    found: list[object] = []
    ticket_of = HotKeys.ticket

    def ticket(hot_keys: HotKeys, work: Callable[..., Any]) -> Ticket | None:
        ticket = ticket_of(hot_keys, work)
        found.append(ticket and ticket.kind)
        return ticket

    monkeypatch.setattr(HotKeys, "ticket", ticket)
    return found


def code_of(decorated: Any) -> object:
    return unwrap(decorated).__code__


# -- the decorator, asyncio


@needs_leader
@scenario_test
async def test_a_function_given_a_database_is_committed_and_runs_again_after_a_conflict(db: Database, sql: Sql) -> None:
    attempts: list[bytes | None] = []

    @pgcoord_cli.transactional
    async def work(tr: Transaction, suffix: bytes, *, marks: int = 0) -> str:
        """Appends to a key."""
        attempts.append(await tr.get(b"k"))
        if len(attempts) <= 2:
            await put(db, k=b"%d" % len(attempts))
        tr.set(b"k", (attempts[-1] or b"") + suffix + b"!" * marks)
        return f"attempt {len(attempts)}"

    assert await work(db, b"x", marks=2) == "attempt 3"
    assert (attempts, data(sql)) == ([None, b"1", b"2"], {b"k": b"2x!!"})
    assert (work.__name__, work.__doc__) == ("work", "Appends to a key.")


@needs_leader
@scenario_test
async def test_a_function_given_a_transaction_joins_it_without_a_commit(db: Database, sql: Sql) -> None:
    @pgcoord_cli.transactional(retry_limit=3)
    async def inner(tr: Transaction, name: bytes) -> Transaction:
        tr.set(name, b"inner")
        return tr

    @pgcoord_cli.transactional
    async def outer(tr: Transaction) -> bool:
        tr.set(b"o", b"outer")
        return await inner(tr, b"a") is tr and await inner(tr=tr, name=b"b") is tr

    given = db.transaction()
    assert await outer(given)
    assert given.options.retry_limit == db.options.retry_limit
    assert data(sql) == {}
    await given.commit()
    assert data(sql) == {b"o": b"outer", b"a": b"inner", b"b": b"inner"}
    assert await db.run(outer), "a decorated function is work for `run` as well"
    assert await outer(db)


@needs_leader
@scenario_test
async def test_a_conflict_within_a_joined_function_runs_the_outermost_again(db: Database) -> None:
    calls: list[str] = []

    @pgcoord_cli.transactional
    async def inner(tr: Transaction) -> None:
        calls.append("inner")
        await tr.get(b"k")
        if len(calls) == 2:
            await put(db, k=b"other")
        tr.set(b"k", b"mine")

    @pgcoord_cli.transactional
    async def outer(tr: Transaction) -> None:
        calls.append("outer")
        await inner(tr)

    await outer(db)
    assert calls == 2 * ["outer", "inner"]


@needs_leader
@scenario_test
async def test_the_options_of_the_decorator_are_those_of_the_transaction(db: Database) -> None:
    attempts: list[float] = []

    @pgcoord_cli.transactional(retry_limit=2, time_limit_seconds=4.5)
    async def work(transaction: Transaction) -> None:
        attempts.append(transaction.options.time_limit_seconds)
        await transaction.get(b"k")
        await put(db, k=b"%d" % len(attempts))
        transaction.set(b"k", b"mine")

    with pytest.raises(Conflict):
        await work(db)
    assert attempts == 3 * [4.5]


@needs_leader
@scenario_test
async def test_decorated_functions_are_of_different_kinds(db: Database, kinds: list[object]) -> None:
    def other_decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def wrapper(*args: Any, **named: Any) -> Any:
            return await function(*args, **named)

        return wrapper

    @pgcoord_cli.transactional
    async def first(tr: Transaction) -> None: ...

    @pgcoord_cli.transactional
    async def second(tr: Transaction) -> None: ...

    @pgcoord_cli.transactional
    @other_decorator
    async def third(tr: Transaction) -> None: ...

    for work in (first, second, third, first):
        await work(db)
    await db.run(first)
    expected = [code_of(work) for work in (first, second, third, first, first)]
    assert kinds == expected
    assert len(set(expected)) == 3


# -- the decorator, blocking


@needs_leader
def test_a_blocking_function_given_a_database_is_committed_and_runs_again(blocking: sync.Database, sql: Sql) -> None:
    attempts: list[bytes | None] = []

    @sync.transactional(retry_limit=2)
    def work(tr: sync.Transaction, suffix: bytes, always: bool = False) -> str:
        attempts.append(tr.get(b"k"))
        if always or len(attempts) <= 2:
            blocking.run(lambda other: other.set(b"k", b"%d" % len(attempts)))
        tr.set(b"k", (attempts[-1] or b"") + suffix)
        return f"attempt {len(attempts)}"

    assert work(blocking, suffix=b"x") == "attempt 3"
    assert (attempts, data(sql)) == ([None, b"1", b"2"], {b"k": b"2x"})
    assert work.__name__ == "work"
    attempts.clear()
    with pytest.raises(Conflict):
        work(blocking, b"x", always=True)
    assert len(attempts) == 3, "the option limits the attempts"


@needs_leader
def test_a_blocking_function_given_a_transaction_joins_it(blocking: sync.Database, sql: Sql) -> None:
    @sync.transactional
    def inner(name: bytes, transaction: sync.Transaction) -> sync.Transaction:
        transaction.set(name, b"inner")
        return transaction

    @sync.transactional
    def outer(tr: sync.Transaction) -> bool:
        return inner(b"a", tr) is tr and inner(b"b", transaction=tr) is tr

    given = blocking.transaction()
    assert outer(given)
    assert data(sql) == {}
    given.commit()
    assert data(sql) == {b"a": b"inner", b"b": b"inner"}
    assert outer(blocking)


@needs_leader
def test_blocking_decorated_functions_are_of_different_kinds(blocking: sync.Database, kinds: list[object]) -> None:
    @sync.transactional
    def first(tr: sync.Transaction) -> None: ...

    @sync.transactional
    def second(tr: sync.Transaction) -> None: ...

    for work in (first, second, first):
        work(blocking)
    assert kinds == [code_of(first), code_of(second), code_of(first)]
    assert kind_of(first) != kind_of(second)


# -- which argument it is


def test_the_argument_is_found_by_its_name_or_is_the_first(blocking: sync.Database) -> None:
    """Each returns its other arguments, if the transaction is where it belongs."""

    @sync.transactional
    def by_name(a: int, /, b: int, *rest: int, tr: Any, **named: int) -> list[object]:
        return [isinstance(tr, sync.Transaction), a, b, rest, named]

    @sync.transactional
    def first(begun: Any, b: int = 2) -> list[object]:
        return [isinstance(begun, sync.Transaction), b]

    class Accounts:
        @sync.transactional
        def method(self, begun: Any, b: int) -> list[object]:
            return [isinstance(begun, sync.Transaction), isinstance(self, Accounts), b]

        @sync.transactional
        def named(self, b: int, transaction: Any) -> list[object]:
            return [isinstance(transaction, sync.Transaction), isinstance(self, Accounts), b]

        @classmethod
        @sync.transactional
        def of_class(cls, begun: Any, b: int) -> list[object]:
            return [isinstance(begun, sync.Transaction), cls is Accounts, b]

        @staticmethod
        @sync.transactional
        def static(begun: Any, b: int) -> list[object]:
            return [isinstance(begun, sync.Transaction), b]

    for given in (blocking, blocking.transaction()):
        assert by_name(1, 2, 3, 4, tr=given, x=5) == [True, 1, 2, (3, 4), {"x": 5}]
        assert first(given) == [True, 2]
        assert first(b=3, begun=given) == [True, 3]
        assert Accounts().method(given, 2) == Accounts().method(b=2, begun=given) == [True, True, 2]
        assert Accounts().named(2, given) == Accounts().named(transaction=given, b=2) == [True, True, 2]
        assert Accounts.of_class(given, 2) == [True, True, 2]
        assert Accounts.static(given, 2) == [True, 2]


@scenario_test
async def test_a_coroutine_method_is_given_the_transaction_after_self(db: Database) -> None:
    class Accounts:
        @pgcoord_cli.transactional
        async def method(self, begun: Any, b: int) -> list[object]:
            return [isinstance(begun, Transaction), isinstance(self, Accounts), b]

    for given in (db, db.transaction()):
        assert await Accounts().method(given, 2) == await Accounts().method(b=2, begun=given) == [True, True, 2]


@scenario_test
async def test_anything_else_is_refused(db: Database, blocking: sync.Database) -> None:
    @pgcoord_cli.transactional
    async def coroutine(tr: Any = None) -> None: ...

    @sync.transactional
    def plain(tr: Any = None) -> None: ...

    for given in (blocking, blocking.transaction(), None, b"key"):
        with pytest.raises(TypeError, match="'tr' must be a Database or a Transaction"):
            await coroutine(given)
    for wrong in (db, db.transaction(), None, b"key"):
        with pytest.raises(TypeError, match=f"not {type(wrong).__module__}.{type(wrong).__name__}"):
            plain(wrong)
    with pytest.raises(TypeError, match="'tr' must be a Database or a Transaction"):
        plain()
    with pytest.raises(TypeError, match="too many"):
        plain(blocking, 2)


@pytest.mark.parametrize("decorator", [pgcoord_cli.transactional, sync.transactional])
def test_a_function_that_cannot_work_is_refused_where_it_is_decorated(decorator: Any) -> None:
    def without() -> None: ...

    def without_names(*args: int, **named: int) -> None: ...

    class Plain:
        def method(self) -> None: ...

    def generator(tr: Any) -> Iterator[int]:
        yield 1

    async def asynchronous_generator(tr: Any) -> Any:
        yield 1

    for function in (without, without_names, Plain.method):
        with pytest.raises(TypeError, match="has no argument for a transaction"):
            decorator(function)
    for each in (generator, asynchronous_generator):
        with pytest.raises(TypeError, match="is a generator"):
            decorator(each)
    with pytest.raises(UsageError, match="retry_limit"):
        decorator(retry_limit=-1)
    with pytest.raises(TypeError, match="retries"):
        decorator(retries=1)


def test_a_coroutine_function_is_refused_by_the_blocking_decorator() -> None:
    async def coroutine(tr: Any) -> None: ...

    with pytest.raises(TypeError, match=r"needs pgcoord_cli\.transactional"):
        sync.transactional(coroutine)


# -- item syntax

BOUNDS: list[Any] = [None, b"", b"a", b"b", b"b\xff", b"bz", b"c", b"\xff\xff", b"\xff\xff\xff"]

SELECTOR = KeySelector.first_greater_than(b"a")


@needs_leader
@scenario_test
async def test_items_are_read_and_written_as_by_the_methods(db: Database, sql: Sql) -> None:
    async def rows(item: Any) -> Rows:
        return [row async for row in tr[item]]

    tr = db.transaction()
    for key, written in ROWS:
        tr[key] = written
    await tr.commit()
    assert sorted(data(sql).items()) == ROWS
    tr = db.transaction()
    assert (await tr[b"ab"], await tr[b"absent"]) == (b"value of ab", None)
    assert await rows(slice(None)) == ROWS
    assert await rows(slice(None, None, -1)) == ROWS[::-1]
    for begin in [*BOUNDS, SELECTOR]:
        for end in [*BOUNDS, SELECTOR]:
            expected = await tr.get_range(begin or b"", end)
            assert await rows(slice(begin, end)) == await rows(slice(begin, end, 1)) == expected
            assert await rows(slice(begin, end, -1)) == expected[::-1]


@needs_leader
def test_items_are_read_and_written_as_by_the_blocking_methods(blocking: sync.Database, sql: Sql) -> None:
    def rows(item: Any) -> Rows:
        return list(tr[item])

    tr = blocking.transaction()
    for key, written in ROWS:
        tr[key] = written
    tr.commit()
    assert sorted(data(sql).items()) == ROWS
    tr = blocking.transaction()
    assert (tr[b"ab"], tr[b"absent"]) == (b"value of ab", None)
    assert rows(slice(None)) == ROWS
    assert rows(slice(None, None, -1)) == ROWS[::-1]
    for begin in [*BOUNDS, SELECTOR]:
        for end in [*BOUNDS, SELECTOR]:
            expected = tr.get_range(begin or b"", end)
            assert rows(slice(begin, end)) == rows(slice(begin, end, 1)) == expected
            assert rows(slice(begin, end, -1)) == expected[::-1]


@pytest.mark.parametrize("begin", BOUNDS)
@scenario_test
async def test_deleted_items_are_those_that_the_methods_clear(
    db: Database, blocking: sync.Database, begin: bytes | None
) -> None:
    for end in [bound for bound in BOUNDS if bound is None or (begin or b"") <= bound]:
        for step in (None, 1, -1):
            left, by_method = db.transaction(), db.transaction()
            left_blocking = blocking.transaction()
            for tr in (left, by_method, left_blocking):
                for key, written in ROWS:
                    tr.set(key, written)
            del left[begin:end:step]
            del left_blocking[begin:end:step]
            by_method.clear_range(begin or b"", end)
            expected = await by_method.get_range(b"", None)
            assert await left.get_range(b"", None) == left_blocking.get_range(b"", None) == expected
    if begin is not None:
        by_item, by_method = db.transaction(), db.transaction()
        for each in (by_item, by_method):
            each.set(begin, b"1")
        del by_item[begin]
        by_method.clear(begin)
        assert await by_item.get_range(b"", None) == await by_method.get_range(b"", None) == []


@scenario_test
async def test_another_step_or_another_type_is_refused_at_once(db: Database, blocking: sync.Database) -> None:
    tr: Any
    for tr in (db.transaction(), blocking.transaction()):
        for step in (0, 2, -2, b"1", 1.5):
            with pytest.raises(ValueError, match="the step of a range of keys is 1, or -1"):
                tr[b"a":b"b":step]
            with pytest.raises(ValueError, match="the step of a range of keys is 1, or -1"):
                del tr[b"a":b"b":step]
        with pytest.raises(TypeError, match="must be bytes"):
            tr["key"] = b"value"
        with pytest.raises(TypeError, match="must be bytes"):
            tr[b"key"] = "value"
        with pytest.raises(TypeError, match="must be bytes"):
            del tr["key"]
        with pytest.raises(TypeError, match="must be bytes"):
            del tr["a":"b"]
        with pytest.raises(TypeError, match="a prefix must be bytes"):
            tr.clear_range_startswith("a")
        with pytest.raises(Rejected):
            del tr[b"b":b"a"]
    with pytest.raises(TypeError, match="must be bytes"):
        await db.transaction()["key"]  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="must be bytes"):
        blocking.transaction()["key"]  # type: ignore[call-overload]


@scenario_test
async def test_a_transaction_is_no_container_of_keys(db: Database, blocking: sync.Database) -> None:
    tr: Any
    for tr in (db.transaction(), blocking.transaction()):
        with pytest.raises(TypeError, match="iterable"):
            iter(tr)
        with pytest.raises(TypeError, match="iterable"):
            b"key" in tr  # noqa: B015


# -- prefixes


@pytest.mark.parametrize("prefix", [b"", b"a", b"b", b"b\xff", b"bb", b"\xff", b"\xff\xff", b"\xff\xff\xff"])
@scenario_test
async def test_the_keys_that_start_with_a_prefix_are_read_and_cleared(
    db: Database, blocking: sync.Database, prefix: bytes
) -> None:
    expected = [row for row in ROWS if row[0].startswith(prefix)]
    others = [row for row in ROWS if row not in expected]
    tr, by_calls = db.transaction(), blocking.transaction()
    for key, written in ROWS:
        tr.set(key, written)
        by_calls.set(key, written)
    assert await tr.get_range_startswith(prefix) == by_calls.get_range_startswith(prefix) == expected
    last = expected[::-1][:1]
    assert await tr.get_range_startswith(prefix, limit=1, reverse=True, snapshot=True) == last
    assert by_calls.get_range_startswith(prefix, limit=1, reverse=True, snapshot=True) == last
    tr.clear_range_startswith(prefix)
    by_calls.clear_range_startswith(prefix)
    assert await tr.get_range(b"", None) == by_calls.get_range(b"", None) == others


@needs_leader
@scenario_test
async def test_only_a_plain_read_of_a_prefix_conflicts(db: Database) -> None:
    for snapshot in (False, True):
        tr = db.transaction()
        await tr.get_range_startswith(b"k", snapshot=snapshot)
        tr.set(b"other", b"1")
        await put(db, k1=b"1")
        if snapshot:
            await tr.commit()
        else:
            with pytest.raises(Conflict):
                await tr.commit()


@needs_leader
@scenario_test
async def test_several_items_are_read_at_once(db: Database) -> None:
    await put(db, a=b"1", b=b"2")
    tr = db.transaction()
    first, second = await asyncio.gather(tr[b"a"], tr[b"b"])
    assert (first, second) == (b"1", b"2")
