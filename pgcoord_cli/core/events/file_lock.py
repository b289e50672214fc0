"""A lock on a file: an exclusive `flock` on a second file beside it, which names the holder.

The second file is needed because the locked one is replaced by a rename, which a lock on it would not survive. The
lock ends with the process, however that ends; a second file that was left behind is taken over.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from pgcoord_cli.errors import Busy

_LONGEST_PID = 20
"""Bytes that are read of a lock file."""


class FileLock:
    """The lock on the file at `path`. Its directory must exist and be writable."""

    def __init__(self, path: Path) -> None:
        self._lock_path = path.with_name(f".{path.name}.lock")
        self._descriptor: int | None = None

    def acquire(self, what: str) -> None:
        """Acquires the lock. Raises Busy, with `what` and the pid of the holder, or OSError."""
        while self._descriptor is None:
            descriptor = _open(self._lock_path)
            try:
                _lock(descriptor, what)
                # Without this, a holder that unlinks the file would leave two processes with a lock on one file each.
                if _is_still_at(descriptor, self._lock_path):
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def release(self) -> None:
        """Deletes the lock file and releases the lock; does nothing if it is not held."""
        if self._descriptor is None:
            return
        # Deleted before the lock ends: afterwards it could be the lock file of the next holder.
        with suppress(OSError):
            if _is_still_at(self._descriptor, self._lock_path):
                self._lock_path.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def _open(path: Path) -> int:
    # O_NONBLOCK: a FIFO that was put there must not block the call.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    status = os.fstat(descriptor)
    # A second name could be that of any file, which the pid would overwrite.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(0, f"its lock file {str(path)!r} is not a regular file with one name")
    return descriptor


def _lock(descriptor: int, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(descriptor, _LONGEST_PID).strip()
        holder = f"pid {int(text)}" if text.isdigit() else "another process"
        raise Busy(
            f"{what} is in use by {holder}", hint="stop that process, or give each tail a file of its own"
        ) from None


def _is_still_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False
