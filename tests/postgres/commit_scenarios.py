"""A leader in a thread, and scenarios that run with a commit client, for the tests of this folder."""

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

from pgcoord_cli.core.kv.client import Database, open_database
from pgcoord_cli.core.leader.candidate import Candidate, CandidateEvent
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

T = TypeVar("T")
Sql = psycopg.Connection[Any]
Data = dict[bytes, bytes]


@contextmanager
def leader_thread(settings: Settings) -> Iterator[None]:
    """Runs a candidate in a thread, and a leader within the block; fails if it is not elected within TIMEOUT."""
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
def leader_running(settings: Settings) -> Iterator[None]:
    """Runs a leader for as long as the test lasts."""
    with leader_thread(settings):
        yield


needs_leader = pytest.mark.usefixtures("leader_running")


def run_scenario(settings: Settings, scenario: Callable[[Database], Awaitable[T]], *, pool_size: int = 3) -> T:
    """Runs a scenario in an event loop of its own, with a client of its own, and returns its result."""

    async def main() -> T:
        async with await open_database(settings, pool_size=pool_size) as db:
            return await scenario(db)

    return asyncio.run(main())


def scenario_test(scenario: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Makes a test of a scenario: it runs with a client of its own, and its other parameters are fixtures."""
    _, *fixtures = signature(scenario).parameters

    @wraps(scenario)
    def test(settings: Settings, **given: Any) -> None:
        run_scenario(settings, partial(scenario, **given))

    asked_for = [Parameter(name, Parameter.KEYWORD_ONLY) for name in ("settings", *fixtures)]
    test.__signature__ = Signature(asked_for)  # type: ignore[attr-defined]
    return test


async def put(db: Database, **values: bytes) -> int:
    """Commits a value for each key that an argument names, and returns the commit version."""
    tr = db.transaction()
    for name, written in values.items():
        tr.set(name.encode(), written)
    return await tr.commit()


def data(sql: Sql) -> Data:
    """Returns all keys with their values."""
    return dict(sql.execute("SELECT key, value FROM kv").fetchall())


def requests(sql: Sql) -> list[tuple[str, int | None]]:
    """Returns the status and the commit version of every request, in queue order."""
    return sql.execute("SELECT status, commit_version FROM commit_requests ORDER BY id").fetchall()
