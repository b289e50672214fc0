"""A PostgreSQL server of one's own, for trying things on: found, created, started, stopped, removed.

**Programs and account** are the matter of `core.programs`: as root, the server runs as an unprivileged account, and the
data belongs to that account.

**A cluster** is one directory:

    <root>/             entered by its owner alone; as root, the account may pass through it
    ├── lock            held with flock by whoever starts, stops or removes
    ├── server.log      what initdb, pg_ctl and the server said
    ├── data/           the data directory, 0700, of the account
    └── data.half-*     not yet a data directory, or no longer one: what a crash left; the next start removes it

The server listens on a Unix socket only, in `data`, or in a private directory below /tmp where that path would be
longer than a socket address can be. `data` is made under another name and renamed once initdb is through, so that it is
either whole or not there. Durability is on: what is promised to survive a crash does so here too.

**Alive or not** is asked at the socket: only a living server of this cluster answers there. A `postmaster.pid` proves
nothing, as it outlives a killed server and its process number may be somebody else's by now. It is removed only when no
process of the cluster is left; and a server is told to stop only if the process named there is the one that listens.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from pgcoord_cli.core.programs import (
    Account,
    Programs,
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
from pgcoord_cli.errors import PgcoordError

ROOT_BASE = Path("/var/lib/pgcoord")
SOCKET_BASE = Path("/tmp")
"""Not TMPDIR: it has to be short, and the same at the next call."""

PORT = 5432
"""Names the socket file; nothing listens on a network."""

MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes in the address of a Unix socket, the final zero not counted."""

SETTINGS = {"fsync": "on", "max_connections": "200", "max_prepared_transactions": "20"}
PATIENCE = 60
"""Seconds that pg_ctl waits for a start (crash recovery included) or a stop."""

_SOCKET = f".s.PGSQL.{PORT}"
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""The shortest message that PostgreSQL answers, with one byte, and says nothing about in its log."""

_HALF = "data.half-"
_PID_LINE, _STATUS_LINE = 0, 7  # of postmaster.pid; the status is starting, ready or stopping


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
    given: Programs | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def programs(self) -> Programs:
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
    def socket_directory(self) -> Path:
        """Where the socket is: the data directory, or a short path below /tmp that only depends on it."""
        path = os.fsencode(self.data / _SOCKET)
        if len(path) <= MAX_SOCKET_PATH and b"," not in path:  # libpq would take a comma for a list of hosts
            return self.data
        return SOCKET_BASE / f"pgcoord-{blake2b(path, digest_size=6).hexdigest()}"

    @property
    def dsn(self) -> str:
        """The connection string, whether the server runs or not: a URI, because a URI has no spaces to quote."""
        return f"postgresql://postgres@/postgres?host={quote(os.fsencode(self.socket_directory))}&port={PORT}"

    def version(self) -> int | None:
        """Major version that the data belongs to, or None if there is no data yet."""
        return int(_text(self.data / "PG_VERSION") or 0) or None

    def is_running(self) -> bool:
        """Whether the server lives and takes connections."""
        return self._listener() is not None and self._pid_file(_STATUS_LINE) == "ready"

    def postmaster_pid(self) -> int | None:
        """Process number of the running server, or None."""
        return int(self._pid_file(_PID_LINE) or 0) or None if self.is_running() else None

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
            source=str(self._started_from()) if running else None,
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
                if self._was_killed():
                    self._bury()
                    # Only PostgreSQL itself can free what a killed server left in the system's shared memory.
                    with suppress(PgcoordError):
                        self._launch(self.programs)
                self._stop("immediate")
                self._remove_socket_directory()
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

    def _launch(self, programs: Programs) -> None:
        self._bury()
        self._make_socket_directory()
        self._pg_ctl(programs.bin_dir, "start", "-o", shlex.join(self._server_options()))

    def _create(self, programs: Programs) -> None:
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
        listener = self._listener()
        if listener is None:
            return False
        pid = self._pid_file(_PID_LINE)
        if sys.platform == "linux" and str(listener) != pid:
            raise PgcoordError(
                f"the server of {self.data} is process {listener or 'unknown'}, but postmaster.pid says {pid}",
                hint="stop it where it was started, perhaps in another container; here nothing has been stopped",
            )
        self._pg_ctl(self._stopping_programs(), "stop", "-m", mode)
        self._remove_socket_directory()
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

    def _listener(self) -> int | None:
        """Process that answers at the cluster's socket, 0 where the system does not say which; None if nobody does."""
        with plain_os_errors(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            try:
                probe.connect(str(self.socket_directory / _SOCKET))
                probe.sendall(_SSL_REQUEST)
                # A server killed a moment ago may still seem to listen: until its last child has closed the socket.
                answered = probe.recv(1)
            except (FileNotFoundError, NotADirectoryError, ConnectionError):
                return None
            except BlockingIOError:  # the queue is full
                return 0
            except TimeoutError:  # stopped or overloaded, but there
                return _peer_pid(probe)
            return _peer_pid(probe) if answered else None

    def _pid_file(self, line: int) -> str | None:
        """One line of postmaster.pid, or None."""
        lines = _text(self.data / "postmaster.pid").splitlines()
        return lines[line].strip() if len(lines) > line else None

    def _started_from(self) -> Path:
        """The directory of the programs that started the server last."""
        return Path(_text(self.data / "postmaster.opts").split(' "')[0]).parent

    def _stopping_programs(self) -> Path:
        """Those that it was started from, because the caller's own may be of another version."""
        started_from = self._started_from()
        return started_from if has_programs(started_from) else self.programs.bin_dir

    def _was_killed(self) -> bool:
        return (self.data / "postmaster.pid").exists() and self._listener() is None

    def _bury(self) -> None:
        """Waits for the processes that a killed server left, then removes the files with its process number.

        PostgreSQL does so itself, unless that number is still taken: by another process, or by the dead one in a
        container where nobody reaps. Then it refuses to start.
        """
        processes = _processes_in(self.data)
        if processes is not None and _wait_for_end(processes):
            for stale in (self.data / "postmaster.pid", self.socket_directory / f"{_SOCKET}.lock"):
                stale.unlink(missing_ok=True)

    def _make_socket_directory(self) -> None:
        directory, account = self.socket_directory, self._account()
        if directory == self.data:
            return
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            if account:
                os.chown(directory, account.uid, account.gid)
        if not self._owns_socket_directory():
            raise PgcoordError(f"{directory} is in the way: it is not a private directory of the server's account")

    def _remove_socket_directory(self) -> None:
        if self.socket_directory != self.data and self._owns_socket_directory():
            shutil.rmtree(self.socket_directory, ignore_errors=True)

    def _owns_socket_directory(self) -> bool:
        """Whether it is there, private and the account's. /tmp is open to all: anybody could have made it."""
        account = self._account()
        try:
            found = self.socket_directory.lstat()
        except FileNotFoundError:
            return False
        owner = account.uid if account else os.geteuid()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and stat.S_IMODE(found.st_mode) & 0o077 == 0

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
    programs: Programs | None = None, settings: Mapping[str, str] | None = None
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


def _peer_pid(connection: socket.socket) -> int:
    """The process that called listen() on the other side; 0 if it is in another container."""
    if sys.platform != "linux":
        return 0
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _processes_in(data: Path) -> list[int] | None:
    """PostgreSQL processes at work in the data directory; None where that cannot be told (it can on Linux)."""
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
                return None  # it may be one of them: root in a container need not be allowed to look
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return found


def _wait_for_end(processes: Sequence[int], patience: float = 10.0) -> bool:
    """Whether all the processes ended within `patience` seconds. Returns the moment the last one is gone."""
    deadline = time.monotonic() + patience
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


def _text(path: Path) -> str:
    """What the file holds, nothing if it is not there; PgcoordError if it may not be read."""
    with plain_os_errors():
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""


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
