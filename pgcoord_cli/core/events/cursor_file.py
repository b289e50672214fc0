"""A cursor kept in a file, from which the next reader of the outbox resumes.

The file holds the cursor in its first line, and the identity of the last event passed, as JSON, in its second; files of
one line are read too. `save` replaces it atomically: it writes a temporary file in the same
directory, flushes that to disk and renames it over the old one. A crash at any moment leaves the old cursor or the new
one. A reader that saves after it has processed an event therefore processes each event at least once.

The path is trusted only as far as it has to be, since a tail may run as root in a directory that others can write to:

- A symbolic link is followed if the link and its directory belong to the caller or to root. The file that it points to
  is replaced, and the link stays.
- Only a regular file is read or replaced, at most MAX_BYTES are read, and a file that holds something else than a
  cursor is left as it is.
- The temporary file has a random name and is created exclusively, without following a link. It gets the mode of the
  file that it replaces, and its owner and group where the caller may set them.
- One tail uses the file at a time: `lock` raises Busy for a second one.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from pgcoord_cli.core.events.cursor import MALFORMED_HINT, from_cursor, to_cursor
from pgcoord_cli.core.events.file_lock import FileLock
from pgcoord_cli.core.events.history import PassedEvent
from pgcoord_cli.errors import PgcoordError, UsageError

MAX_BYTES = 4096
"""Bytes of the longest file that can be a cursor: a cursor, and the identity of an event in JSON."""

_MOST_LINKS = 40
"""Symbolic links that are followed one after the other, as many as Linux follows."""

_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFLNK: "a symbolic link",
}  # fmt: skip


class CursorFile:
    """The cursor in one file. The file need not exist before the first `save`; its directory must."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: FileLock | None = None
        self._target: Path | None = None
        self.passed: PassedEvent | None = None

    def lock(self) -> None:
        """Keeps other tails from using the file until `close`.

        Raises Busy if one uses it, UsageError if the file cannot be a cursor file, PgcoordError with the operating
        system's reason if the lock file beside it cannot be written.
        """
        try:
            target = self._locate()
            self._status(target)
            lock = FileLock(target)
            lock.acquire(f"--cursor-file {self._path}")
        except OSError as error:
            raise self._failure("write", error) from None
        self._lock = lock

    def load(self) -> int | None:
        """Returns the position in the file, or None if there is no file or it is empty.

        Raises UsageError if the text is not a cursor, PgcoordError if the file cannot be read.
        """
        try:
            target = self._locate()
            if self._status(target) is None:
                return None
            text = self._read(target)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure("read", error) from None
        if not text.strip():
            return None
        first, _, second = text.strip().partition("\n")
        self.passed = PassedEvent.from_json(second)
        # A second line that is no identity makes it some other file, which must not be replaced.
        cursor = text if second and self.passed is None else first
        return from_cursor(cursor, f"--cursor-file {self._path}")

    def save(self, position: int, passed: PassedEvent | None = None) -> None:
        """Replaces the cursor. Raises PgcoordError, with the operating system's reason, if that fails."""
        text = f"{to_cursor(position)}\n" + (f"{passed.to_json()}\n" if passed else "")
        try:
            target = self._locate()
            directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._replace(directory, target.name, text, self._status(target))
            finally:
                os.close(directory)
        except OSError as error:
            raise self._failure("write", error) from None

    def stop(self) -> None:
        """Does nothing: `save` never waits. Present because a Subscription, whose `save` may wait, has it."""

    def close(self) -> None:
        """Releases the lock, if it is held."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def _locate(self) -> Path:
        """Returns the path behind all symbolic links. Resolved once, so that load, save and lock agree on the file."""
        if self._target is None:
            target = self._path
            for _ in range(_MOST_LINKS):
                if not target.is_symlink():
                    break
                self._check_link(target)
                target = target.parent / target.readlink()
            self._target = target
        return self._target

    def _check_link(self, link: Path) -> None:
        """Raises UsageError if another user than root may have placed the link there."""
        trusted = {os.geteuid(), 0}
        for thing, owner in (("link", link.lstat().st_uid), ("directory of the link", link.parent.stat().st_uid)):
            if owner not in trusted:
                raise UsageError(
                    f"--cursor-file {self._path}: {str(link)!r} is a symbolic link, and the {thing} belongs to uid"
                    f" {owner}",
                    hint="a link is followed if it and its directory belong to the caller or to root;"
                    " give the path of the file itself",
                )

    def _status(self, target: Path) -> os.stat_result | None:
        """Returns the status of the file, None if there is none. Raises UsageError if it is not a regular file."""
        try:
            status = target.lstat()
        except FileNotFoundError:
            return None
        self._check_regular(status)
        return status

    def _check_regular(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
            raise UsageError(
                f"--cursor-file {self._path}: it is {kind}, not a regular file",
                hint="give the path of a file that holds a cursor, or of one that does not exist yet",
            )

    def _read(self, target: Path) -> str:
        # O_NONBLOCK and a second check: the file may have been exchanged for a FIFO since the first one.
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            self._check_regular(os.fstat(descriptor))
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(
                f"--cursor-file {self._path}: it has more than {MAX_BYTES} bytes, so that it is not a cursor",
                hint=MALFORMED_HINT,
            )
        # Undecodable bytes become U+FFFD, which `from_cursor` then reports as not a cursor.
        return data.decode(errors="replace")

    def _replace(self, directory: int, name: str, text: str, old: os.stat_result | None) -> None:
        # In the same directory, since a rename is atomic within one file system only. The name is random and the file
        # new, so that a link which another user has put there is neither followed nor overwritten.
        temporary = f".{name}.{os.urandom(8).hex()}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666 if old is None else 0o600, dir_fd=directory)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if old:
                    _copy_rights(old, descriptor)
                # Before the rename: otherwise a crash of the machine could leave the new name with no contents.
                os.fsync(descriptor)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        _sync_directory(directory)

    def _failure(self, verb: str, error: OSError) -> PgcoordError:
        hint = None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and verb == "write":
            hint = "the directory must be writable, since the file is replaced and a lock file is kept beside it"
        return PgcoordError(f"--cursor-file: cannot {verb} {str(self._path)!r}: {error.strerror}", hint=hint)


def _copy_rights(old: os.stat_result, descriptor: int) -> None:
    """Gives a file the mode of the old one, and its owner and group where the caller may set them."""
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
        with suppress(PermissionError):
            os.fchown(descriptor, owner, group)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o777)


def _sync_directory(directory: int) -> None:
    """Flushes the rename to disk."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot flush a directory
            raise
