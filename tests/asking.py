"""How tests ask until something has come true, and what they give up after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import psycopg

PATIENCE = 30.0
"""Seconds after which a test that waits for something gives up. Nothing is asserted about shorter times."""


def until(condition: Callable[[], object]) -> None:
    """Asks until the answer is yes. Conditions ask the server, so this does not spin."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"


async def until_async(condition: Callable[[], object]) -> None:
    """The same, and lets the others run in between."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0)


def value(sql: psycopg.Connection[Any], text: str, *parameters: object) -> Any:
    """The one value that a query gives."""
    row = sql.execute(text, parameters).fetchone()
    assert row
    return row[0]
