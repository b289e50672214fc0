"""Embedded servers: PostgreSQL servers for development, tests and the demo, created, started, stopped and removed.

**Installation and account** are found by `core.embedded.installation`. If root calls, the server runs as an
unprivileged account, and the data belongs to that account.

**A cluster** is one directory:

    <root>/             only its owner can read it; if root calls, the account can pass through it
    ├── lock            held with flock during a start, a stop and a removal
    ├── server.log      the output of initdb, pg_ctl and the server
    ├── data/           the data directory, mode 0700, owned by the account
    └── data.partial-*  incomplete data directories that a crash left; the next start removes them

`data` is created under another name and renamed once initdb has succeeded, so that it is complete or does not exist.
Durability is on: what survives a crash elsewhere does so here too.

**The process**, its socket and the files of a killed one are the task of `core.embedded.postmaster`. A cluster checks
there whether its server runs before it does anything, and removes a killed server's files before it starts the next.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from pgcoord_cli.core.embedded.installation import (
    Account,
    Installation,
    account_name,
    check_access,
    environment,
    find_installation,
    has_programs,
    identity,
    locked,
    make_directories,
    mapped_os_errors,
    open_private,
    server_account,
)
from pgcoord_cli.core.embedded.postmaster import PORT, Postmaster, text_of
from pgcoord_cli.errors import PgcoordError, UsageError

ROOT_BASE = Path("/var/lib/pgcoord")

SETTINGS = {"fsync": "on", "max_connections": "200", "max_prepared_transactions": "20"}
TIMEOUT_SECONDS = 60
"""How long pg_ctl waits for a start, including crash recovery, or a stop."""

_PARTIAL = "data.partial-"

StopMode = Literal["fast", "immediate"]


class Description(NamedTuple):
    """The state of a server. While it is down, `dsn`, `pid` and `source`, the directory of its programs, are None."""

    running: bool
    version: int | None
    dsn: str | None
    data_directory: str
    log: str
    pid: int | None
    source: str | None


@dataclass(frozen=True)
class EmbeddedServer:
    """The server of the cluster in `root`, an absolute path that need not exist yet.

    `given` is the installation to use; by default one of the data's version, and for new data the preferred one.
    `settings` override SETTINGS at every start. Methods raise ServerUnavailable if there is no installation, and
    otherwise PgcoordError with the last lines of the log.
    """

    root: Path
    given: Installation | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def installation(self) -> Installation:
        """The installation of PostgreSQL for this cluster."""
        return self.given or find_installation(self.version())

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory."""
        return self.root / "data"

    @property
    def log(self) -> Path:
        """The output of initdb, pg_ctl and the server, of all starts."""
        return self.root / "server.log"

    @property
    def postmaster(self) -> Postmaster:
        """The server's process, which need not be running."""
        return Postmaster(self.data)

    @property
    def socket_directory(self) -> Path:
        """The directory of the Unix socket on which the server listens."""
        return self.postmaster.socket_directory

    @property
    def dsn(self) -> str:
        """The connection string, also while the server is down."""
        # A URI, because it has no spaces that a shell command would have to quote.
        return f"postgresql://postgres@/postgres?host={quote(os.fsencode(self.socket_directory))}&port={PORT}"

    def version(self) -> int | None:
        """Returns the major version of the data, or None if there is no data."""
        return int(text_of(self.data / "PG_VERSION") or 0) or None

    def is_running(self) -> bool:
        """Returns whether the server runs and accepts connections."""
        return self.postmaster.is_ready()

    def postmaster_pid(self) -> int | None:
        """Returns the process id of the running server, or None."""
        return self.postmaster.pid()

    def describe(self) -> Description:
        """Returns the state of the server. Starts and changes nothing."""
        running = self.is_running()
        return Description(
            running=running,
            version=self.version(),
            dsn=self.dsn if running else None,
            data_directory=str(self.data),
            log=str(self.log),
            pid=self.postmaster_pid() if running else None,
            source=str(self.postmaster.started_from()) if running else None,
        )

    def start(self) -> bool:
        """Starts the server, on a new cluster if there is none; returns False if it runs already.

        On return the server accepts connections.
        """
        if self.is_running():
            return False
        installation = self.installation  # before anything is created, because it may raise
        with mapped_os_errors(), self._exclusive():
            if self.is_running():  # another process has started it meanwhile
                return False
            self._stop("fast")  # a server whose start or stop was interrupted runs, but accepts no connections
            if self.version() is None:
                self._create(installation)
            self._launch(installation)
            return True

    def stop(self, mode: StopMode = "fast") -> bool:
        """Stops the server; returns False if it is not running. `immediate` is like a crash of the server."""
        with mapped_os_errors():
            if not self.root.is_dir():
                return False
            with self._exclusive():
                return self._stop(mode)

    def destroy(self) -> bool:
        """Stops the server and removes its data, log and directory. Returns False if there was no data."""
        with mapped_os_errors():
            if not self.root.is_dir():
                return False
            with self._exclusive():
                if self.postmaster.was_killed():
                    self.postmaster.remove_stale_files()
                    # Only PostgreSQL itself can free the system's shared memory of a killed server, at its next start.
                    with suppress(PgcoordError):
                        self._launch(self.installation)
                self._stop("immediate")
                self.postmaster.remove_socket_directory(self._account())
                existed = self._remove_data()
                self.log.unlink(missing_ok=True)
                self._lock.unlink()
            with suppress(OSError):  # the directory has other files
                self.root.rmdir()
            return existed

    @property
    def _lock(self) -> Path:
        return self.root / "lock"

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Excludes other starts, stops and removals of this cluster within the block, waiting for them."""
        # Repeated, because a removal that held the lock has removed the locked file.
        while True:
            self._make_root()
            with locked(self._lock) as held:
                if held:
                    yield
                    return

    def _make_root(self) -> None:
        """Creates the cluster's directory. Raises PgcoordError if it belongs to another account or is inaccessible."""
        account = self._account()
        check_access(self.root, account)
        make_directories(self.root, 0o711 if account else 0o700)
        owner = self.root.stat().st_uid
        if owner != os.geteuid():
            raise PgcoordError(
                f"{self.root} belongs to another account: {account_name(owner)}",
                hint="run pgcoord as that account, or set PGCOORD_DEV_DIR to a directory of your own",
            )

    def _account(self) -> Account | None:
        """Returns the account that owns the data, or will own it; None if this process runs the server directly."""
        account = server_account()
        if account is None or not self.data.is_dir():
            return account
        owner = self.data.stat()
        return Account(account_name(owner.st_uid), owner.st_uid, owner.st_gid) if owner.st_uid else account

    def _launch(self, installation: Installation) -> None:
        self.postmaster.remove_stale_files()
        self.postmaster.make_socket_directory(self._account())
        self._pg_ctl(installation.bin_dir, "start", "-o", shlex.join(self._server_options()))

    def _create(self, installation: Installation) -> None:
        self._remove_partial()
        if self.data.exists():
            raise PgcoordError(
                f"cannot create {self.data}: it exists and is not the data directory of a PostgreSQL server",
                hint="remove or rename it, or use another name or directory",
            )
        fresh = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.root))
        try:
            if account := self._account():
                os.chown(fresh, account.uid, account.gid)
            self._initdb(installation.bin_dir / "initdb", fresh)
            fresh.rename(self.data)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _initdb(self, initdb: Path, directory: Path) -> None:
        words = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-instructions", "--no-sync"]
        try:
            self._run(initdb, [*words, "--locale=C.UTF-8"], directory)
        except PgcoordError as error:
            # Not every system has C.UTF-8.
            if "invalid locale" not in error.message:
                raise
            self._run(initdb, [*words, "--locale=C"], directory)

    def _server_options(self) -> Iterator[str]:
        directory = str(self.socket_directory).replace('"', '""')
        # Quoted, because the setting is a list that a comma in the path would split.
        address = {"listen_addresses": "", "unix_socket_directories": f'"{directory}"', "port": str(PORT)}
        for name, value in (SETTINGS | dict(self.settings) | address).items():
            yield from ("-c", f"{name}={value}")

    def _stop(self, mode: StopMode) -> bool:
        listener = self.postmaster.listener()
        if listener is None:
            return False
        self.postmaster.check_pid_file(listener)
        self._pg_ctl(self._stopping_programs(), "stop", "-m", mode)
        self.postmaster.remove_socket_directory(self._account())
        return True

    def _pg_ctl(self, bin_dir: Path, action: str, *words: str) -> None:
        self._run(bin_dir / "pg_ctl", [action, "--wait", f"--timeout={TIMEOUT_SECONDS}", *words], self.data)

    def _run(self, program: Path, words: Sequence[str], data: Path) -> None:
        """Runs a program to its end as the account. Raises PgcoordError with what it wrote to the log if it fails."""
        # Signals are deferred until it has ended, so that clean-up finds the server either up or down. The data
        # directory is passed in PGDATA: pg_ctl passes its option to a shell, which would expand a `$` in the path.
        with open_private(self.log) as log, _deferred_signals():
            before = log.seek(0, os.SEEK_END)
            done = subprocess.run(
                [program, *words], cwd="/", env=environment() | {"PGDATA": str(data)}, check=False,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, umask=0o077,
                start_new_session=True, **identity(self._account()),
            )  # fmt: skip
        if done.returncode != 0:
            raise PgcoordError(f"{program.name} failed; {self.log} ends with:\n{_tail(self.log, before)}")

    def _stopping_programs(self) -> Path:
        """Returns the directory of the programs that the server was started from."""
        # The caller's own installation may be of another version.
        started_from = self.postmaster.started_from()
        return started_from if has_programs(started_from) else self.installation.bin_dir

    def _remove_data(self) -> bool:
        existed = self.data.exists()
        if existed:
            # Renamed first, so that a crash during the removal leaves no partial cluster under the final name.
            self.data.rename(self.root / f"{_PARTIAL}{os.getpid()}")
        self._remove_partial()
        return existed

    def _remove_partial(self) -> None:
        for partial in self.root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def temporary_server(
    installation: Installation | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[EmbeddedServer]:
    """Starts a server on a new cluster in a temporary directory; removes both at the end, also if the block raises.

    A process that may get SIGTERM has to turn it into an exception, or the server stays.
    """
    root = Path(tempfile.mkdtemp(prefix="pgcoord-"))
    try:
        if server_account():
            root.chmod(0o711)  # the account has to pass through
        server = EmbeddedServer(root, installation, settings or {})
        try:
            server.start()
            yield server
        finally:
            with _deferred_signals():
                server.destroy()
    finally:
        with _deferred_signals():
            shutil.rmtree(root, ignore_errors=True)


def dev_root(name: str = "default") -> Path:
    """Returns the directory of the `pgcoord dev` cluster of that name. PGCOORD_DEV_DIR is the parent of all of them."""
    if chosen := os.environ.get("PGCOORD_DEV_DIR"):
        return _expanded(Path(chosen)) / name
    if os.geteuid() == 0:
        return ROOT_BASE / "dev" / name  # not below /root, which the server's account cannot enter
    from platformdirs import user_data_path

    return _expanded(user_data_path("pgcoord")) / "dev" / name


def _expanded(path: Path) -> Path:
    """Returns an absolute path for one that may begin with ~. Raises UsageError if there is no home directory."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # HOME is not set, and the user is not in the password database
        raise UsageError(
            f"PGCOORD_DEV_DIR: no home directory is known for {str(path)!r}",
            hint="set PGCOORD_DEV_DIR to an absolute path, or HOME",
        ) from None


def _tail(log: Path, offset: int, lines: int = 10) -> str:
    """Returns the last lines that were written to the log after `offset` bytes."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:] if line.strip()) or "  (no output)"


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defers SIGINT and SIGTERM until the end of the block. Outside the main thread, which gets them, does nothing."""
    # By handlers and not by a mask: a mask of this thread only makes the system deliver the signal to another thread,
    # and Python then interrupts the main thread all the same.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    try:
        with ExitStack() as restored:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    handler = signal.signal(number, lambda number, _: received.append(number))
                    restored.callback(signal.signal, number, handler)
            yield
    finally:
        if received:
            signal.raise_signal(received[0])
