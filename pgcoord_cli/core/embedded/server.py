"""A PostgreSQL server of one's own, for trying things on: found, created, started, stopped, removed.

**Programs and account** are the matter of `core.embedded.installation`: as root, the server runs as an unprivileged account, and the
data belongs to that account.

**A cluster** is one directory:

    <root>/             entered by its owner alone; as root, the account may pass through it
    ├── lock            held with flock by whoever starts, stops or removes
    ├── server.log      what initdb, pg_ctl and the server said
    ├── data/           the data directory, 0700, of the account
    └── data.half-*     not yet a data directory, or no longer one: what a crash left; the next start removes it

`data` is made under another name and renamed once initdb is through, so that it is either whole or not there.
Durability is on: what is promised to survive a crash does so here too.

**The process**, its socket and what is left of a killed one are the matter of `core.embedded.postmaster`: a cluster asks there
whether its server lives before anything is done, and has the dead one's files cleared away before it starts the next.
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
    check_reach,
    environment,
    find_programs,
    has_programs,
    identity,
    locked,
    make_directories,
    open_private,
    plain_os_errors,
    server_account,
)
from pgcoord_cli.core.embedded.postmaster import PORT, Postmaster, text_of
from pgcoord_cli.errors import PgcoordError

ROOT_BASE = Path("/var/lib/pgcoord")

SETTINGS = {"fsync": "on", "max_connections": "200", "max_prepared_transactions": "20"}
PATIENCE = 60
"""Seconds that pg_ctl waits for a start (crash recovery included) or a stop."""

_HALF = "data.half-"

StopMode = Literal["fast", "immediate"]


class Description(NamedTuple):
    """What there is to say of a server. `dsn`, `pid` and `source`, the directory of its programs, if it runs."""

    running: bool
    version: int | None
    dsn: str | None
    data_directory: str
    log: str
    pid: int | None
    source: str | None


@dataclass(frozen=True)
class EmbeddedServer:
    """The cluster in `root`, an absolute path that need not exist yet.

    `given` are the programs to use; else those that fit the data, and for new data the best there are. `settings`
    come on top of SETTINGS at every start. Methods raise ServerUnavailable without programs, and otherwise
    PgcoordError with the last lines of the log.
    """

    root: Path
    given: Installation | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def programs(self) -> Installation:
        """The installation of PostgreSQL that runs this cluster."""
        return self.given or find_programs(self.version())

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory."""
        return self.root / "data"

    @property
    def log(self) -> Path:
        """Everything that initdb, pg_ctl and the server say, of all starts."""
        return self.root / "server.log"

    @property
    def postmaster(self) -> Postmaster:
        """The server's process, whether there is one or not."""
        return Postmaster(self.data)

    @property
    def socket_directory(self) -> Path:
        """Where the server listens, on a Unix socket only."""
        return self.postmaster.socket_directory

    @property
    def dsn(self) -> str:
        """The connection string, whether the server runs or not: a URI, because a URI has no spaces to quote."""
        return f"postgresql://postgres@/postgres?host={quote(os.fsencode(self.socket_directory))}&port={PORT}"

    def version(self) -> int | None:
        """Major version that the data belongs to, or None if there is no data yet."""
        return int(text_of(self.data / "PG_VERSION") or 0) or None

    def is_running(self) -> bool:
        """Whether the server lives and takes connections."""
        return self.postmaster.is_ready()

    def postmaster_pid(self) -> int | None:
        """Process number of the running server, or None."""
        return self.postmaster.pid()

    def describe(self) -> Description:
        """What there is to say about the server. Starts and changes nothing."""
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
        """Makes the server run and take connections, on a new cluster if there is none; False if it did already."""
        if self.is_running():
            return False
        programs = self.programs  # found before anything is made
        with plain_os_errors(), self._exclusive():
            if self.is_running():  # another start was faster
                return False
            self._stop("fast")  # one whose start or stop was cut short
            if self.version() is None:
                self._create(programs)
            self._launch(programs)
            return True

    def stop(self, mode: StopMode = "fast") -> bool:
        """Stops the server; False if it did not run. After `immediate` the next start does crash recovery."""
        with plain_os_errors():
            if not self.root.is_dir():
                return False
            with self._exclusive():
                return self._stop(mode)

    def destroy(self) -> bool:
        """Stops the server and removes its data, log and directory; False if there was no data."""
        with plain_os_errors():
            if not self.root.is_dir():
                return False
            with self._exclusive():
                if self.postmaster.was_killed():
                    self.postmaster.bury()
                    # Only PostgreSQL itself can free what a killed server left in the system's shared memory.
                    with suppress(PgcoordError):
                        self._launch(self.programs)
                self._stop("immediate")
                self.postmaster.remove_socket_directory(self._account())
                existed = self._remove_data()
                self.log.unlink(missing_ok=True)
                self._lock.unlink()
            with suppress(OSError):  # the user keeps something else in it
                self.root.rmdir()
            return existed

    @property
    def _lock(self) -> Path:
        return self.root / "lock"

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Within the block nobody else starts, stops or removes this cluster; waits for its turn."""
        while True:
            self._make_root()
            with locked(self._lock) as held:
                if held:
                    yield
                    return

    def _make_root(self) -> None:
        account = self._account()
        check_reach(self.root, account)
        make_directories(self.root, 0o711 if account else 0o700)
        owner = self.root.stat().st_uid
        if owner != os.geteuid():
            raise PgcoordError(
                f"{self.root} belongs to another account: {account_name(owner)}",
                hint="call pgcoord as that account, or let PGCOORD_DEV_DIR name a directory of your own",
            )

    def _account(self) -> Account | None:
        """Whom the data belongs to, or will."""
        account = server_account()
        if account is None or not self.data.is_dir():
            return account
        owner = self.data.stat()
        return Account(account_name(owner.st_uid), owner.st_uid, owner.st_gid) if owner.st_uid else account

    def _launch(self, programs: Installation) -> None:
        self.postmaster.bury()
        self.postmaster.make_socket_directory(self._account())
        self._pg_ctl(programs.bin_dir, "start", "-o", shlex.join(self._server_options()))

    def _create(self, programs: Installation) -> None:
        self._remove_halves()
        if self.data.exists():
            raise PgcoordError(f"{self.data} is in the way: it is not the data of a PostgreSQL server")
        fresh = Path(tempfile.mkdtemp(prefix=_HALF, dir=self.root))
        try:
            if account := self._account():
                os.chown(fresh, account.uid, account.gid)
            self._initdb(programs.bin_dir / "initdb", fresh)
            fresh.rename(self.data)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _initdb(self, initdb: Path, directory: Path) -> None:
        words = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-instructions", "--no-sync"]
        try:
            self._run(initdb, [*words, "--locale=C.UTF-8"], directory)
        except PgcoordError as error:
            if "invalid locale" not in error.message:
                raise
            self._run(initdb, [*words, "--locale=C"], directory)

    def _server_options(self) -> Iterator[str]:
        directory = str(self.socket_directory).replace('"', '""')
        # Quoted, because the setting is a list, which a comma in the path would split.
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
        self._run(bin_dir / "pg_ctl", [action, "--wait", f"--timeout={PATIENCE}", *words], self.data)

    def _run(self, program: Path, words: Sequence[str], data: Path) -> None:
        """Runs a program to its end as the account; PgcoordError with what it wrote to the log if it fails.

        A Ctrl-C comes through when it has ended: whoever cleans up then finds the server up or down, not on its way.
        The data directory goes by PGDATA: pg_ctl hands its option to a shell, which would read a `$` in the path.
        """
        with open_private(self.log) as log, _undisturbed():
            before = log.seek(0, os.SEEK_END)
            done = subprocess.run(
                [program, *words], cwd="/", env=environment() | {"PGDATA": str(data)}, check=False,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, umask=0o077,
                start_new_session=True, **identity(self._account()),
            )  # fmt: skip
        if done.returncode != 0:
            raise PgcoordError(f"{program.name} failed; {self.log} ends with:\n{_tail(self.log, before)}")

    def _stopping_programs(self) -> Path:
        """Those that it was started from, because the caller's own may be of another version."""
        started_from = self.postmaster.started_from()
        return started_from if has_programs(started_from) else self.programs.bin_dir

    def _remove_data(self) -> bool:
        existed = self.data.exists()
        if existed:
            # Renamed first: a crash half-way must not leave half a cluster under the name of a whole one.
            self.data.rename(self.root / f"{_HALF}{os.getpid()}")
        self._remove_halves()
        return existed

    def _remove_halves(self) -> None:
        for half in self.root.glob(f"{_HALF}*"):
            shutil.rmtree(half, ignore_errors=True)


@contextmanager
def throw_away_server(
    programs: Installation | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[EmbeddedServer]:
    """A server on a new cluster in a temporary directory; stopped and removed, also when the block raises.

    A process that is to end well on SIGTERM has to turn it into an exception.
    """
    root = Path(tempfile.mkdtemp(prefix="pgcoord-"))
    try:
        if server_account():
            root.chmod(0o711)  # the account has to pass through
        server = EmbeddedServer(root, programs, settings or {})
        try:
            server.start()
            yield server
        finally:
            with _undisturbed():
                server.destroy()
    finally:
        with _undisturbed():
            shutil.rmtree(root, ignore_errors=True)


def dev_root(name: str = "default") -> Path:
    """Where `pgcoord dev` keeps the cluster of that name; PGCOORD_DEV_DIR moves all of them."""
    if chosen := os.environ.get("PGCOORD_DEV_DIR"):
        return Path(chosen).expanduser().absolute() / name
    if os.geteuid() == 0:
        return ROOT_BASE / "dev" / name  # not below /root, where the server's account cannot go
    from platformdirs import user_data_path

    return user_data_path("pgcoord") / "dev" / name


def _tail(log: Path, offset: int, lines: int = 10) -> str:
    """The last lines of what was written to the log after `offset` bytes."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:] if line.strip()) or "  (it said nothing)"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps Ctrl-C and SIGTERM waiting until the block is through.

    By handlers and not by a mask: with other threads about, a mask of this one only moves the signal to them, and
    Python then interrupts the main thread all the same. Other threads are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    try:
        with ExitStack() as restored:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    handler = signal.signal(number, lambda number, _: heard.append(number))
                    restored.callback(signal.signal, number, handler)
            yield
    finally:
        if heard:
            signal.raise_signal(heard[0])
