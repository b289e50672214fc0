"""The postmaster, the server process of a data directory: its address, whether it runs, and files of a killed one.

**The address** is a Unix socket in the data directory or, if that path is longer than a socket address can be, in a
private directory below /tmp. It follows from the path of the data directory only, so that every call finds the same one
and nothing has to be stored. All accounts can write to /tmp: a directory there that is not private, or does not belong
to the server's account, is neither used nor removed.

**Whether it runs** is tested at the socket: only a running server of this cluster answers there, and the operating
system gives its process id. A `postmaster.pid` proves nothing, because it outlives a killed server, and its process id
may belong to another process by then. For a server that answers, it shows whether connections are accepted yet.

**No other process is ever stopped.** `pg_ctl` sends the signals, to the process id in postmaster.pid. So a server is
stopped only if that is the process that listens. Otherwise (it may run in another container, where process ids mean
something else) nothing is stopped, and the error names both. This file sends no signal.

**After a kill** the server's child processes go on for a moment and hold its shared memory, and its files remain. A
process is one of them if it is named `postgres` and its working directory, by device and inode in /proc, is this data
directory. They are waited for, not killed: they end by themselves once their postmaster is gone. Only when none is left
are postmaster.pid and the socket's lock file removed. Where the processes cannot be listed (not on Linux, or without
the right to) the files stay, and PostgreSQL decides.
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

from pgcoord_cli.core.embedded.installation import Account, mapped_os_errors
from pgcoord_cli.errors import PgcoordError

PORT = 5432
"""Part of the name of the socket file. The server listens on no network."""

SOCKET_BASE = Path("/tmp")
"""Not TMPDIR, because the path has to be short and the same at the next call."""

MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Length of the longest address of a Unix socket, in bytes without the final zero."""

_SOCKET = f".s.PGSQL.{PORT}"
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""The shortest message that PostgreSQL answers, with one byte, without an entry in its log."""

_PID_LINE, _STATUS_LINE = 0, 7  # of postmaster.pid; the status is starting, ready or stopping


@dataclass(frozen=True)
class Postmaster:
    """The server process of the data directory `data`, which need not be running."""

    data: Path

    @property
    def socket_directory(self) -> Path:
        """The directory of the socket: the data directory, or a short path below /tmp that only depends on it."""
        path = os.fsencode(self.data / _SOCKET)
        if len(path) <= MAX_SOCKET_PATH and b"," not in path:  # libpq would take a comma for a list of hosts
            return self.data
        return SOCKET_BASE / f"pgcoord-{blake2b(path, digest_size=6).hexdigest()}"

    def make_socket_directory(self, account: Account | None) -> None:
        """Creates the account's private directory, if one is needed. Raises PgcoordError if it is not private."""
        directory = self.socket_directory
        if directory == self.data:
            return
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            if account:
                os.chown(directory, account.uid, account.gid)
        if not _is_private(directory, account):
            raise PgcoordError(
                f"cannot use {directory} for the socket: it is not a private directory of the server's account",
                hint="remove it, or use a shorter path for the server's directory",
            )

    def remove_socket_directory(self, account: Account | None) -> None:
        """Removes the private directory, if there is one and it belongs to the account."""
        if self.socket_directory != self.data and _is_private(self.socket_directory, account):
            shutil.rmtree(self.socket_directory, ignore_errors=True)

    def is_ready(self) -> bool:
        """Returns whether the server runs and accepts connections."""
        return self.listener() is not None and self._pid_file_line(_STATUS_LINE) == "ready"

    def pid(self) -> int | None:
        """Returns the process id if the server runs and accepts connections, or None."""
        return int(self._pid_file_line(_PID_LINE) or 0) or None if self.is_ready() else None

    def listener(self) -> int | None:
        """Returns the id of the process that answers at the socket, 0 if unknown, or None without an answer."""
        with mapped_os_errors(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            try:
                probe.connect(str(self.socket_directory / _SOCKET))
                probe.sendall(_SSL_REQUEST)
                # After a kill, connecting succeeds until the last child process has closed the socket.
                answered = probe.recv(1)
            except (FileNotFoundError, NotADirectoryError, ConnectionError):
                return None
            except BlockingIOError:  # the server's queue of connections is full
                return 0
            except TimeoutError:  # the server is frozen or overloaded, but running
                return _peer_pid(probe)
            return _peer_pid(probe) if answered else None

    def check_pid_file(self, listener: int) -> None:
        """Raises PgcoordError unless postmaster.pid, which pg_ctl uses, has the process id of the listener."""
        named = self._pid_file_line(_PID_LINE)
        if sys.platform == "linux" and str(listener) != named:
            raise PgcoordError(
                f"the server of {self.data} is process {listener or 'unknown'}, but postmaster.pid says {named}",
                hint="nothing has been stopped; stop the server where it was started, perhaps in another container",
            )

    def started_from(self) -> Path:
        """Returns the directory of the programs that the server was started from last."""
        return Path(text_of(self.data / "postmaster.opts").split(' "')[0]).parent

    def was_killed(self) -> bool:
        """Returns whether the last server ended without removing its postmaster.pid."""
        return self._file.exists() and self.listener() is None

    def remove_stale_files(self) -> None:
        """Waits for the child processes of a killed server, then removes the files with its process id.

        PostgreSQL does so itself, but refuses to start if the process id is in use: by another process, or by the dead
        one in a container that reaps no processes.
        """
        processes = _processes_in(self.data)
        if processes is not None and _wait_for_end(processes):
            for stale in (self._file, self.socket_directory / f"{_SOCKET}.lock"):
                stale.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.data / "postmaster.pid"

    def _pid_file_line(self, line: int) -> str | None:
        """Returns one line of postmaster.pid, counted from 0, or None."""
        lines = text_of(self._file).splitlines()
        return lines[line].strip() if len(lines) > line else None


def _is_private(directory: Path, account: Account | None) -> bool:
    """Returns whether the directory exists, is private and belongs to the account."""
    # Not followed if it is a link: any account can create one in /tmp.
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return False
    owner = account.uid if account else os.geteuid()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and stat.S_IMODE(found.st_mode) & 0o077 == 0


def _peer_pid(connection: socket.socket) -> int:
    """Returns the id of the process that called listen() on the other side; 0 if it is in another container."""
    if sys.platform != "linux":
        return 0
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _processes_in(data: Path) -> list[int] | None:
    """Returns the PostgreSQL processes whose working directory is `data`, or None if they cannot be listed."""
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
                return None  # it may be one of them; in a container even root may lack the right to read this
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended meanwhile
    return found


def _wait_for_end(processes: Sequence[int], timeout: float = 10.0) -> bool:
    """Waits until all the processes have ended. Returns False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
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
    """Returns the text of a file, empty if it does not exist. Raises PgcoordError if it cannot be read."""
    with mapped_os_errors():
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
