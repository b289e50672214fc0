"""The event loop of commands and of the blocking client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import ModuleType

import pytest

from pgcoord_cli.core.concurrency import event_loop
from pgcoord_cli.core.concurrency.loop_thread import LoopThread


class OtherLoop(asyncio.SelectorEventLoop):
    """The loop of a stand-in for uvloop."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `import uvloop` find a stand-in."""
    module = ModuleType("uvloop")
    module.new_event_loop = OtherLoop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uvloop", module)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `import uvloop` fail."""
    monkeypatch.setitem(sys.modules, "uvloop", None)


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


class Resource:
    """The resource of a LoopThread."""

    async def __aenter__(self) -> Resource:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


async def opened() -> Resource:
    return Resource()


@pytest.mark.usefixtures("installed")
def test_uvloop_is_used_where_it_is_installed() -> None:
    assert isinstance(event_loop.run(running_loop()), OtherLoop)


@pytest.mark.usefixtures("installed")
def test_the_thread_of_the_blocking_client_uses_it() -> None:
    thread = LoopThread(opened, "test")
    try:
        assert isinstance(thread.call(lambda _: running_loop()), OtherLoop)
    finally:
        thread.close()


@pytest.mark.usefixtures("not_installed")
def test_without_uvloop_asyncio_is_used() -> None:
    assert type(event_loop.run(running_loop())) is type(asyncio.run(running_loop()))


@pytest.mark.usefixtures("installed")
def test_loops_of_the_program_are_left_as_they_are() -> None:
    event_loop.run(running_loop())
    assert not isinstance(asyncio.run(running_loop()), OtherLoop)


def test_uvloop_is_not_imported_before_a_loop_is_needed() -> None:
    program = "import sys, pgcoord_cli.sync, pgcoord_cli.cli; pgcoord_cli.connect; print('uvloop' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"
