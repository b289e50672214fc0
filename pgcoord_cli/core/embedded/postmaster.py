"""The server process of a data directory: where it listens, whether it lives, and what a killed one left behind.

**The address** is a Unix socket in the data directory, or in a private directory below /tmp where that path would be
longer than a socket address can be. It follows from the path of the data directory alone, so that every call finds the
same one and nothing has to be written down. /tmp is open to all: a directory there that is not private and the server
account's own is neither used nor removed.

**Alive or not** is asked at the socket: only a living server of this cluster answers there, and the system says which
process it is. A `postmaster.pid` proves nothing, as it outlives a killed server and its process number may be somebody
else's by now. What it does say of a server that answers is whether that takes connections yet.

**No other process is ever stopped.** It is `pg_ctl` that sends the signals, and it believes postmaster.pid. So a server
is told to stop only if the process named there is the one that listens; otherwise (it may run in another container,
where numbers mean something else) nothing is stopped, and the error names both. Nothing in this file sends a signal.

**What a kill leaves** are the server's children, which go on for a moment and hold its shared memory, and its files.
A process is one of them if it is named `postgres` and works in this very data directory, which /proc is asked for and
which is compared by device and inode. They are waited for, not killed: they end by themselves once their postmaster is
gone. Only when none is left are postmaster.pid and the socket's lock file removed. Where it cannot be told (not on
Linux, or when the caller may not look) the files stay, and PostgreSQL decides.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import stat
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pgcoord_cli.core.embedded.installation import Account, plain_os_errors
from pgcoord_cli.errors import PgcoordError

PORT = 5432
"""Names the socket file; nothing listens on a network."""

SOCKET_BASE = Path("/tmp")
"""Not TMPDIR: it has to be short, and the same at the next call."""

MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes in the address of a Unix socket, the final zero not counted."""

_SOCKET = f".s.PGSQL.{PORT}"
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""The shortest message that PostgreSQL answers, with one byte, and says nothing about in its log."""

_PID_LINE, _STATUS_LINE = 0, 7  # of postmaster.pid; the status is starting, ready or stopping


@dataclass(frozen=True)
class Postmaster:
    """The server process of the data directory `data`, whether there is one or not."""

    data: Path

    @property
    def socket_directory(self) -> Path:
        """Where the socket is: the data directory, or a short path below /tmp that only depends on it."""
        path = os.fsencode(self.data / _SOCKET)
        if len(path) <= MAX_SOCKET_PATH and b"," not in path:  # libpq would take a comma for a list of hosts
            return self.data
        return SOCKET_BASE / f"pgcoord-{blake2b(path, digest_size=6).hexdigest()}"

    def make_socket_directory(self, account: Account | None) -> None:
        """Makes the private directory, if one is needed, for the account that the server runs under."""
        directory = self.socket_directory
        if directory == self.data:
            return
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            if account:
                os.chown(directory, account.uid, account.gid)
        if not _is_private(directory, account):
            raise PgcoordError(f"{directory} is in the way: it is not a private directory of the server's account")

    def remove_socket_directory(self, account: Account | None) -> None:
        """Removes the private directory, if there is one and it is the account's."""
        if self.socket_directory != self.data and _is_private(self.socket_directory, account):
            shutil.rmtree(self.socket_directory, ignore_errors=True)

    def is_ready(self) -> bool:
        """Whether it lives and takes connections."""
        return self.listener() is not None and self._file_says(_STATUS_LINE) == "ready"

    def pid(self) -> int | None:
        """Its process number if it is ready, or None."""
        return int(self._file_says(_PID_LINE) or 0) or None if self.is_ready() else None

    def listener(self) -> int | None:
        """Process that answers at the cluster's socket, 0 where the system does not say which; None if nobody does."""
        with plain_os_errors(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            try:
                probe.connect(str(self.socket_directory / _SOCKET))
                probe.sendall(_SSL_REQUEST)
                # A server killed a moment ago may still seem to listen: until its last child has closed the socket.
                answered = probe.recv(1)
            except (FileNotFoundError, NotADirectoryError, ConnectionError):
                return None
            except BlockingIOError:  # the queue is full
                return 0
            except TimeoutError:  # stopped or overloaded, but there
                return _peer_pid(probe)
            return _peer_pid(probe) if answered else None

    def check_pid_file(self, listener: int) -> None:
        """PgcoordError unless postmaster.pid, which pg_ctl goes by, names the process that listens."""
        named = self._file_says(_PID_LINE)
        if sys.platform == "linux" and str(listener) != named:
            raise PgcoordError(
                f"the server of {self.data} is process {listener or 'unknown'}, but postmaster.pid says {named}",
                hint="stop it where it was started, perhaps in another container; here nothing has been stopped",
            )

    def started_from(self) -> Path:
        """The directory of the programs that started it last."""
        return Path(text_of(self.data / "postmaster.opts").split(' "')[0]).parent

    def was_killed(self) -> bool:
        """Whether one ended without removing its postmaster.pid."""
        return self._file.exists() and self.listener() is None

    def bury(self) -> None:
        """Waits for the processes that a killed server left, then removes the files with its process number.

        PostgreSQL does so itself, unless that number is still taken: by another process, or by the dead one in a
        container where nobody reaps. Then it refuses to start.
        """
        processes = _processes_in(self.data)
        if processes is not None and _wait_for_end(processes):
            for stale in (self._file, self.socket_directory / f"{_SOCKET}.lock"):
                stale.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.data / "postmaster.pid"

    def _file_says(self, line: int) -> str | None:
        """One line of postmaster.pid, or None."""
        lines = text_of(self._file).splitlines()
        return lines[line].strip() if len(lines) > line else None


def _is_private(directory: Path, account: Account | None) -> bool:
    """Whether it is there, private and the account's. /tmp is open to all: anybody could have made it."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return False
    owner = account.uid if account else os.geteuid()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and stat.S_IMODE(found.st_mode) & 0o077 == 0


def _peer_pid(connection: socket.socket) -> int:
    """The process that called listen() on the other side; 0 if it is in another container."""
    if sys.platform != "linux":
        return 0
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _processes_in(data: Path) -> list[int] | None:
    """PostgreSQL processes at work in the data directory; None where that cannot be told (it can on Linux)."""
    if not Path("/proc/self/cwd").exists() or not data.is_dir():
        return None
    here, found = data.stat(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text().strip() != "postgres":
                continue
            if os.path.samestat((process / "cwd").stat(), here):
                found.append(int(process.name))
        except PermissionError:
            if process.stat().st_uid == here.st_uid:
                return None  # it may be one of them: root in a container need not be allowed to look
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return found


def _wait_for_end(processes: Sequence[int], patience: float = 10.0) -> bool:
    """Whether all the processes ended within `patience` seconds. Returns the moment the last one is gone."""
    deadline = time.monotonic() + patience
    for pid in processes:
        if not hasattr(os, "pidfd_open"):
            return False
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    return False
            finally:
                os.close(descriptor)
    return True


def text_of(path: Path) -> str:
    """What the file holds, nothing if it is not there; PgcoordError if it may not be read."""
    with plain_os_errors():
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
