"""Clients that commit, and somebody who leads, for the tests of this folder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

import psycopg
import pytest

from pgcoord_cli.core.kv.client import Database, connect
from pgcoord_cli.core.leader.candidate import Candidate, CandidateEvent
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

T = TypeVar("T")
Sql = psycopg.Connection[Any]
Data = dict[bytes, bytes]


@contextmanager
def leading(settings: Settings) -> Iterator[None]:
    """Within the block this process leads."""
    elected = threading.Event()

    def report(event: CandidateEvent) -> None:
        if event.event == "elected":
            elected.set()

    leader = Candidate(settings, "this process", 10.0, report)
    thread = threading.Thread(target=leader.run)
    thread.start()
    try:
        assert elected.wait(TIMEOUT)
        yield
    finally:
        leader.stop()
        thread.join()


@pytest.fixture
def some_leader(settings: Settings) -> Iterator[None]:
    """Somebody leads as long as the test lasts."""
    with leading(settings):
        yield


needs_leader = pytest.mark.usefixtures("some_leader")


def play(settings: Settings, scenario: Callable[[Database], Awaitable[T]], *, pool_size: int = 3) -> T:
    """Runs a scenario with a client of its own."""

    async def main() -> T:
        async with await connect(settings, pool_size=pool_size) as db:
            return await scenario(db)

    return asyncio.run(main())


def played(scenario: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The scenario as a test: it is played with a client of its own. What it takes beside that are fixtures."""
    _, *fixtures = signature(scenario).parameters

    @wraps(scenario)
    def test(settings: Settings, **given: Any) -> None:
        play(settings, partial(scenario, **given))

    asked_for = [Parameter(name, Parameter.KEYWORD_ONLY) for name in ("settings", *fixtures)]
    test.__signature__ = Signature(asked_for)  # type: ignore[attr-defined]
    return test


async def put(db: Database, **values: bytes) -> int:
    """Commits some keys, each named like its argument."""
    tr = db.transaction()
    for name, written in values.items():
        tr.set(name.encode(), written)
    return await tr.commit()


def data(sql: Sql) -> Data:
    return dict(sql.execute("SELECT key, value FROM kv").fetchall())


def requests(sql: Sql) -> list[tuple[str, int | None]]:
    return sql.execute("SELECT status, commit_version FROM commit_requests ORDER BY id").fetchall()
