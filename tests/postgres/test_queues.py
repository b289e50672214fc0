"""No queue of the client stays shut: what raises inside harms the call that it belongs to, and nothing after it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any

import pytest

from pgcoord_cli.core.kv import direct_commit, snapshots, submissions
from pgcoord_cli.core.kv.client import Database, Transaction
from pgcoord_cli.core.kv.direct_commit import DirectCommitBackoff
from pgcoord_cli.core.kv.watches import Watcher
from pgcoord_cli.db.binary import bytea_array
from pgcoord_cli.db.callback_connection import UnreadableAnswer
from tests.asking import TIMEOUT
from tests.postgres.commit_scenarios import Sql, data, needs_leader, put, requests, scenario_test

BAD = b"bad"
"""A key or a value that the broken encoder of a test cannot encode."""


def raise_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: int = 0) -> list[str]:
    """Replaces a function by one that raises once, `after` some calls; the list tells whether it has raised."""
    original, raised, calls = getattr(owner, name), list[str](), count()

    def broken(*arguments: Any) -> Any:
        if next(calls) >= after and not raised:
            raised.append(name)
            raise LookupError("injected")
        return original(*arguments)

    monkeypatch.setattr(owner, name, broken)
    return raised


def refuse_bad_items(monkeypatch: pytest.MonkeyPatch, owner: Any) -> None:
    """Makes a module's encoder raise for every array with an item that contains BAD."""

    def encode(values: Sequence[bytes | None]) -> bytes:
        if any(value is not None and BAD in value for value in values):
            raise LookupError("injected")
        return bytea_array(values)

    monkeypatch.setattr(owner, "bytea_array", encode)


def use_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectCommitBackoff, "admits", lambda *_: False)


async def at_once(*calls: Awaitable[Any]) -> list[Any]:
    """Runs calls in one step of the event loop, and returns their results and exceptions."""
    async with asyncio.timeout(TIMEOUT):
        return await asyncio.gather(*calls, return_exceptions=True)


# -- reads


@needs_leader
@scenario_test
async def test_i6_a_read_that_cannot_be_encoded_fails_by_itself(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await put(db, a=b"1", b=b"2")
    refuse_bad_items(monkeypatch, snapshots)
    first, bad, last = await at_once(*(db.transaction().get(key) for key in (b"a", BAD, b"b")))
    assert (first, last) == (b"1", b"2")
    assert isinstance(bad, LookupError)
    assert await at_once(db.transaction().get(b"a")) == [b"1"]


@needs_leader
@pytest.mark.parametrize("parser", ["_snapshot_now", "_results_at", "_version_at"])
@scenario_test
async def test_i6_an_answer_to_a_read_that_cannot_be_parsed_fails_its_callers(
    db: Database, monkeypatch: pytest.MonkeyPatch, parser: str
) -> None:
    version = await put(db, a=b"1")
    raised = raise_once(monkeypatch, snapshots, parser)

    async def read() -> bytes | None:
        tr = db.transaction()
        if parser == "_version_at":
            await tr.set_read_version(version)
        await tr.get(b"a")
        await put(db, z=b"a commit between the reads")
        await tr.get(b"b")
        return await tr.get(b"a")

    [failed] = await at_once(read())
    assert isinstance(failed, UnreadableAnswer)
    assert raised
    assert await at_once(read()) == [b"1"]


# -- commits


@needs_leader
@scenario_test
async def test_i6_a_commit_that_cannot_be_encoded_fails_by_itself(
    db: Database, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_the_queue(monkeypatch)
    await put(db, a=b"1")
    refuse_bad_items(monkeypatch, submissions)
    first, bad, last = await at_once(put(db, b=b"2"), put(db, k=BAD), put(db, c=b"3"))
    assert isinstance(bad, LookupError)
    assert sorted([first, last]) == [2, 3]
    assert await at_once(put(db, d=b"4")) == [4]
    assert data(sql) == {b"a": b"1", b"b": b"2", b"c": b"3", b"d": b"4"}


@needs_leader
@scenario_test
async def test_i6_a_direct_commit_that_cannot_be_encoded_fails_by_itself(
    db: Database, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert raise_once(monkeypatch, direct_commit, "columns") == []
    [bad] = await at_once(put(db, k=BAD))
    assert isinstance(bad, LookupError)
    assert await at_once(put(db, a=b"1")) == [1]
    assert data(sql) == {b"a": b"1"}


@needs_leader
@pytest.mark.parametrize(
    ("parser", "direct"),
    [("_enqueued_at", False), ("_statuses", False), ("_direct_answer", True)],
)
@scenario_test
async def test_i3_a_commit_whose_answer_cannot_be_parsed_still_applies_once_and_is_acknowledged(
    db: Database, sql: Sql, monkeypatch: pytest.MonkeyPatch, parser: str, direct: bool
) -> None:
    await put(db, a=b"1")
    if not direct:
        use_the_queue(monkeypatch)
    raised = raise_once(monkeypatch, submissions, parser)
    assert await at_once(put(db, b=b"2")) == [2]
    assert raised
    assert await at_once(put(db, c=b"3")) == [3]
    assert requests(sql) == [("committed", 1), ("committed", 2), ("committed", 3)]


@needs_leader
@scenario_test
async def test_a_question_for_outcomes_that_cannot_be_encoded_is_asked_again(
    db: Database, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_the_queue(monkeypatch)
    await put(db, a=b"1")
    raised = raise_once(monkeypatch, submissions, "uuid_array", after=2)  # two to enqueue
    assert await at_once(put(db, b=b"2")) == [2]
    assert raised
    assert await at_once(put(db, c=b"3")) == [3]


@needs_leader
@scenario_test
async def test_a_callback_of_the_listener_that_raises_ends_no_channel(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = raise_once(monkeypatch, submissions.Submitter, "_on_news")
    use_the_queue(monkeypatch)
    assert await at_once(put(db, a=b"1"), put(db, b=b"2")) in ([1, 2], [2, 1])
    assert raised
    assert await at_once(put(db, c=b"3")) == [3]
    assert db._listener._task and not db._listener._task.done()


# -- watches


@needs_leader
@scenario_test
async def test_a_check_of_the_watches_that_raises_fails_them_and_later_ones_work(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = raise_once(monkeypatch, Watcher, "_check_once")

    async def watch(change: Callable[[Transaction], None]) -> None:
        tr = db.transaction()
        watch = await tr.watch(b"k")
        await tr.commit()
        tr = db.transaction()
        change(tr)
        await tr.commit()
        await watch

    [failed] = await at_once(watch(lambda tr: tr.set(b"k", b"1")))
    assert isinstance(failed, LookupError)
    assert raised
    assert await at_once(watch(lambda tr: tr.set(b"k", b"2"))) == [None]
