"""The event loop of commands and of the blocking client: uvloop's where that is installed, otherwise asyncio's.

A program that uses the asyncio client brings its own loop, which is left as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in an event loop of its own, as `asyncio.run` does."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns what makes a loop; None: asyncio's own."""
    try:
        # Here, so that programs which never need a loop of ours do not load it.
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
