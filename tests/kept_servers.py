"""`pytest --keep-server`: the servers and databases of a run stay, and the run ends with where they are.

Each process of a run (`-n`) starts servers of its own; the workers hand what they kept to the process that reports.
`python -m tests.kept_servers DIRECTORY` stops such a server and removes it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pgcoord_cli.core.embedded.installation import Installation
from pgcoord_cli.core.embedded.server import EmbeddedServer

PLUGIN = "kept-servers"

PREFIX = "pgcoord-kept-"

LOGGING = {
    "log_statement": "all",
    "log_lock_waits": "on",  # a wait of more than a second
    "log_line_prefix": "%m [%p] %a %d ",
}
"""Settings of a kept server: its log has every statement with time, pid, application and database."""


class KeptServers:
    """The plugin: starts servers that stay, and prints the address, log and pid of each at the end of the run."""

    def __init__(self) -> None:
        self.described: list[str] = []
        """A description of each server, which is text because workers send it to another process."""

    @contextmanager
    def running(self, installation: Installation) -> Iterator[EmbeddedServer]:
        """A new server that is left as the block leaves it."""
        root = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        root.chmod(0o711)  # the server's account has to pass through
        server = EmbeddedServer(root, installation, LOGGING)
        server.start()
        try:
            yield server
        finally:
            self.described.append(describe(server))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[PLUGIN] = self.described

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.described += getattr(node, "workeroutput", {}).get(PLUGIN, [])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("kept servers")
        for described in self.described:
            terminalreporter.write_line(described)


def describe(server: EmbeddedServer) -> str:
    """Where a server is and how to end it, a line each."""
    pid = server.postmaster_pid() or "not running"
    return f"dsn  {server.dsn}\nlog  {server.log}\npid  {pid}\nend  python -m tests.kept_servers {server.root}\n"


@contextmanager
def new_server(
    config: pytest.Config, installation: Installation, settings: Mapping[str, str] | None = None
) -> Iterator[EmbeddedServer]:
    """A server that is removed after the block, unless the run keeps its servers."""
    kept: KeptServers | None = config.pluginmanager.get_plugin(PLUGIN)
    with kept.running(installation) if kept else copied_server(installation, settings or {}) as running:
        yield running


MEMORY, WANTED_BYTES = Path("/dev/shm"), 4 * 2**30
"""The file system in memory, used if it has room: a database is copied there in a twentieth of the CPU time."""


@cache
def fast_directory() -> str | None:
    """Returns the parent of the servers' directories; None: the default of `tempfile`."""
    has_room = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > WANTED_BYTES
    return str(MEMORY) if has_room else None


@contextmanager
def copied_server(installation: Installation, settings: Mapping[str, str]) -> Iterator[EmbeddedServer]:
    """A server on a copy of a cluster that each process makes once: a copy takes a tenth of the time of initdb."""
    root = Path(tempfile.mkdtemp(prefix="pgcoord-test-", dir=fast_directory()))
    server = EmbeddedServer(root, installation, settings)
    try:
        root.chmod(0o711)  # the server's account has to pass through
        subprocess.run(["cp", "-a", new_cluster(installation), server.data], check=True)
        server.start()
        yield server
    finally:
        server.destroy()
        shutil.rmtree(root, ignore_errors=True)


@cache
def new_cluster(installation: Installation) -> Path:
    """Returns the data directory of a stopped cluster, which is removed when this process ends."""
    root = Path(tempfile.mkdtemp(prefix="pgcoord-test-", dir=fast_directory()))
    root.chmod(0o711)
    server = EmbeddedServer(root, installation)
    atexit.register(server.destroy)
    server.start()
    server.stop()
    return server.data


def main(directory: str) -> int:
    """Ends the server in a directory that a run kept."""
    root = Path(directory).absolute()
    if not root.name.startswith(PREFIX):
        print(f"{root} was not kept by a run of the tests: its name does not begin with {PREFIX}", file=sys.stderr)
        return 2
    EmbeddedServer(root).destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
