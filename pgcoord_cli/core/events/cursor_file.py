"""A cursor kept in a file, from which the next reader of the outbox resumes.

The file holds the cursor in its first line, and the identity of the last event passed, as JSON, in its second; files of
one line are read too. `save` replaces it atomically: it writes a temporary file in the same
directory, flushes that to disk and renames it over the old one. A crash at any moment leaves the old cursor or the new
one. A reader that saves after it has processed an event therefore processes each event at least once.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pgcoord_cli.core.events.cursor import from_cursor, to_cursor
from pgcoord_cli.core.events.history import PassedEvent
from pgcoord_cli.errors import PgcoordError


class CursorFile:
    """The cursor in one file. The file need not exist before the first `save`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.passed: PassedEvent | None = None

    def load(self) -> int | None:
        """Returns the position in the file, or None if there is no file or it is empty.

        Raises UsageError if the text is not a cursor, PgcoordError if the file cannot be read.
        """
        try:
            # Undecodable bytes become U+FFFD, which `from_cursor` then reports as not a cursor.
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PgcoordError(f"--cursor-file: cannot read {str(self._path)!r}: {error.strerror}") from None
        if not text.strip():
            return None
        first, _, second = text.strip().partition("\n")
        self.passed = PassedEvent.from_json(second)
        # A second line that is no identity makes it some other file, which must not be replaced.
        cursor = text if second and self.passed is None else first
        return from_cursor(cursor, f"--cursor-file {self._path}")

    def save(self, position: int, passed: PassedEvent | None = None) -> None:
        """Replaces the cursor. Raises PgcoordError, with the operating system's reason, if that fails."""
        # In the same directory, since a rename is atomic within one file system only; one name for each process.
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._replace(temporary, position, passed)
        except OSError as error:
            raise PgcoordError(f"--cursor-file: cannot write {str(self._path)!r}: {error.strerror}") from None

    def _replace(self, temporary: Path, position: int, passed: PassedEvent | None) -> None:
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(f"{to_cursor(position)}\n")
                if passed:
                    file.write(f"{passed.to_json()}\n")
                file.flush()
                # Before the rename: otherwise a crash of the machine could leave the new name with no contents.
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def stop(self) -> None:
        """Does nothing: `save` never waits. Present because a Subscription, whose `save` may wait, has it."""

    def close(self) -> None:
        """Does nothing: no file stays open between two saves."""
