"""Waiting in tests: poll a condition on the server until it holds, with one timeout for every test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import psycopg

TIMEOUT = 30.0
"""Seconds after which a test that waits for something fails. No test asserts anything about shorter times."""


def until(condition: Callable[[], object]) -> None:
    """Polls `condition` until it is true; fails after TIMEOUT seconds.

    There is no pause between two polls: a condition makes a round trip to the server, which is pause enough.
    """
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {TIMEOUT:g} s"


async def until_async(condition: Callable[[], object]) -> None:
    """Polls `condition` like `until`, and lets other tasks of the event loop run between two polls."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {TIMEOUT:g} s"
        await asyncio.sleep(0)


def value(sql: psycopg.Connection[Any], text: str, *parameters: object) -> Any:
    """Returns the first column of the first row of a query; fails when there is no row."""
    row = sql.execute(text, parameters).fetchone()
    assert row
    return row[0]
