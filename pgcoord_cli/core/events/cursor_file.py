"""A cursor kept in a file, so that whoever reads an outbox resumes where the last one stopped, however that ended.

The file holds one cursor and a line end. It is replaced as a whole: written beside, flushed to the disk, renamed. So a
crash at any moment leaves the old cursor or the new one, and whoever saves after dealing with an event deals with it
at least once.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pgcoord_cli.core.events.cursor import from_cursor, to_cursor
from pgcoord_cli.errors import PgcoordError


class CursorFile:
    """A cursor in a file of one's own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> int | None:
        """The position in the file; None when there is no file or it is empty. UsageError: that is no cursor."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PgcoordError(f"--cursor-file: cannot read {str(self._path)!r}: {error.strerror}") from None
        return from_cursor(text, f"--cursor-file {self._path}") if text.strip() else None

    def save(self, position: int) -> None:
        """Replaces the cursor. PgcoordError: it cannot be kept there."""
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._replace(beside, position)
        except OSError as error:
            raise PgcoordError(f"--cursor-file: cannot write {str(self._path)!r}: {error.strerror}") from None

    def _replace(self, beside: Path, position: int) -> None:
        try:
            with beside.open("w", encoding="ascii") as file:
                file.write(f"{to_cursor(position)}\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise

    def stop(self) -> None:
        """A save waits for nobody."""

    def close(self) -> None:
        """Nothing is held between two saves."""
