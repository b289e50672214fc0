"""Cursor files on paths that others may have prepared, and in the face of crashes."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.cursor_file import MAX_BYTES, CursorFile
from pgcoord_cli.core.events.history import PassedEvent
from pgcoord_cli.errors import Busy, PgcoordError, UsageError

STRANGER = 65_534


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A cursor file at position 7."""
    path = tmp_path / "cursor"
    path.write_text(f"{to_cursor(7)}\n")
    return path


def names(directory: Path) -> list[str]:
    """Returns the names of the files in a directory."""
    return sorted(path.name for path in directory.iterdir())


def test_a_link_is_followed_and_stays(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "app" / "cursor"
    link.parent.mkdir()
    link.symlink_to("../cursor")
    cursor_file = CursorFile(link)
    cursor_file.lock()
    assert cursor_file.load() == 7
    cursor_file.save(8)
    assert names(tmp_path) == [".cursor.lock", "app", "cursor"], "the lock file is beside the target"
    cursor_file.close()
    assert link.is_symlink()
    assert file.read_text() == f"{to_cursor(8)}\n"
    assert names(tmp_path) == ["app", "cursor"]


def test_a_link_to_a_file_that_does_not_exist_yet_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("target")
    assert CursorFile(link).load() is None
    CursorFile(link).save(3)
    assert link.is_symlink()
    assert CursorFile(tmp_path / "target").load() == 3


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for use in (CursorFile(tmp_path / "a").load, CursorFile(tmp_path / "a").lock):
        with pytest.raises(UsageError, match="it is a symbolic link"):
            use()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create a link of another user")
@pytest.mark.parametrize("owned", ["link", "directory of the link"])
def test_a_link_of_another_user_is_refused(tmp_path: Path, file: Path, owned: str) -> None:
    """In a directory like /tmp, world-writable and sticky, where each user may place a link."""
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    link = place / "cursor"
    link.symlink_to(file)
    if owned == "link":
        os.lchown(link, STRANGER, STRANGER)
    else:
        os.chown(place, STRANGER, STRANGER)
    cursor_file = CursorFile(link)
    for use in (cursor_file.lock, cursor_file.load, lambda: cursor_file.save(9)):
        with pytest.raises(UsageError, match=f"is a symbolic link, and the {owned} belongs to uid {STRANGER}"):
            use()
    assert file.read_text() == f"{to_cursor(7)}\n"
    assert names(place) == ["cursor"]


@pytest.mark.parametrize("kind", ["a directory", "a FIFO", "a socket"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "a directory":
            path.mkdir()
        elif kind == "a FIFO":
            os.mkfifo(path)
        else:
            server.bind(str(path))
        before = path.lstat()
        cursor_file = CursorFile(path)
        for use in (cursor_file.lock, cursor_file.load, lambda: cursor_file.save(9)):
            with pytest.raises(UsageError, match=f"it is {kind}, not a regular file"):
                use()
        assert os.path.samestat(before, path.lstat())
        assert names(tmp_path) == ["it"]


def test_a_large_file_is_not_read_in_full(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as large:
        large.truncate(2**40)  # without blocks on disk
    with pytest.raises(UsageError, match=f"it has more than {MAX_BYTES} bytes"):
        CursorFile(path).load()


def test_the_longest_identity_fits(tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    passed = PassedEvent(2**63 - 1, "\x01\U0001f600" * 100, 2**63 - 1)
    CursorFile(path).save(passed.event_id, passed)
    again = CursorFile(path)
    assert again.load() == passed.event_id
    assert again.passed == passed


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o604])
def test_the_mode_is_kept(file: Path, mode: int) -> None:
    file.chmod(mode)
    CursorFile(file).save(8)
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_owner_and_group_are_kept(file: Path) -> None:
    os.chown(file, STRANGER, STRANGER)
    CursorFile(file).save(8)
    assert (file.stat().st_uid, file.stat().st_gid) == (STRANGER, STRANGER)


def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    CursorFile(tmp_path / "cursor").save(1)
    assert (tmp_path / "cursor").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_temporary_name_that_is_taken_is_not_followed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link at the very name of the temporary file: the file behind it is not written to."""
    precious = file.with_name("precious")
    precious.write_text("precious")
    monkeypatch.setattr(os, "urandom", bytes)
    file.with_name(f".cursor.{bytes(8).hex()}.tmp").symlink_to(precious)
    with pytest.raises(PgcoordError, match=r"cannot write .*: File exists"):
        CursorFile(file).save(8)
    assert (precious.read_text(), CursorFile(file).load()) == ("precious", 7)


KILLED_AT_THE_RENAME = """
import os, signal, sys
from pathlib import Path
from pgcoord_cli.core.events.cursor_file import CursorFile
def crash(*names, **descriptors):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = crash
file = CursorFile(Path(sys.argv[1]))
file.lock()
file.save(8)
"""


def test_i10_a_crash_at_the_rename_leaves_the_old_cursor(file: Path) -> None:
    code = subprocess.run([sys.executable, "-c", KILLED_AT_THE_RENAME, str(file)], check=False).returncode
    assert code == -signal.SIGKILL
    assert ".cursor.lock" in names(file.parent), "the lock file is left behind"
    again = CursorFile(file)
    again.lock()
    assert again.load() == 7
    again.save(9)
    assert CursorFile(file).load() == 9


def test_i10_a_failed_rename_leaves_the_old_cursor_and_no_other_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_names: str, **_descriptors: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PgcoordError, match="Input/output error"):
        CursorFile(file).save(8)
    assert CursorFile(file).load() == 7
    assert names(file.parent) == ["cursor"]


def test_a_second_user_of_the_file_is_refused(file: Path) -> None:
    first, second = CursorFile(file), CursorFile(file)
    first.lock()
    with pytest.raises(Busy, match=f"--cursor-file {file} is in use by pid {os.getpid()}"):
        second.lock()
    assert second.load() == 7, "to read it needs no lock"
    first.close()
    second.lock()
    assert names(file.parent) == [".cursor.lock", "cursor"]
    second.close()
    assert names(file.parent) == ["cursor"]


@pytest.mark.parametrize("kind", ["FIFO", "symbolic link", "hard link"])
def test_a_lock_file_of_another_kind_is_refused(file: Path, kind: str) -> None:
    place, precious = file.with_name(".cursor.lock"), file.with_name("precious")
    precious.write_text("precious")
    if kind == "FIFO":
        os.mkfifo(place)
    elif kind == "symbolic link":
        place.symlink_to(precious)
    else:
        place.hardlink_to(precious)
    with pytest.raises(PgcoordError, match=r"its lock file .* is not a regular file with one name|Too many levels of"):
        CursorFile(file).lock()
    assert precious.read_text() == "precious"
