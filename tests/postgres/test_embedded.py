"""The embedded server: finding an installation, keeping the data, and leaving no process or file behind."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.embedded import installation as installation_module
from pgcoord_cli.core.embedded import postmaster
from pgcoord_cli.core.embedded import server as embedded_server
from pgcoord_cli.core.embedded.installation import find_installation, server_account
from pgcoord_cli.core.embedded.server import EmbeddedServer, temporary_server
from pgcoord_cli.errors import PgcoordError, ServerUnavailable

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root needs an account for the server")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def cluster(place: Path) -> Iterator[EmbeddedServer]:
    """A cluster that does not exist yet; destroyed at the end."""
    cluster = EmbeddedServer(place / "cluster")
    yield cluster
    cluster.destroy()


@pytest.fixture
def temporary(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`place` as the directory for temporary files of this process and its children."""
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    return place


@pytest.fixture
def no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without PostgreSQL."""
    monkeypatch.setattr(installation_module, "PACKAGE", "no_such_package_of_postgresql")
    monkeypatch.setattr(installation_module, "LOCAL_DIRECTORIES", ())
    monkeypatch.setenv("PATH", "/nonexistent")


def query(server: EmbeddedServer, statement: str) -> Any:
    with psycopg.connect(server.dsn) as conn:
        row = conn.execute(statement.encode()).fetchone()
        return row[0] if row else None


def execute(server: EmbeddedServer, statement: str) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        conn.execute(statement.encode())


def pid_of(server: EmbeddedServer) -> int:
    pid = server.postmaster_pid()
    assert pid is not None
    return pid


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def kill(server: EmbeddedServer) -> None:
    """Sends SIGKILL to the postmaster and waits for its end."""
    descriptor = os.pidfd_open(pid := pid_of(server))
    os.kill(pid, signal.SIGKILL)
    select.select([descriptor], [], [])
    os.close(descriptor)


def servers_below(directory: Path) -> list[str]:
    """Returns the command lines of processes that contain the directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if os.fsencode(directory) in line and int(process.name) != os.getpid():
            found.append(line.decode(errors="replace"))
    return found


@contextmanager
def another_process() -> Iterator[int]:
    """Runs a process of the server's account that is no server; yields its id."""
    account = server_account()
    identity: dict[str, Any] = {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}
    process = subprocess.Popen(["sleep", "600"], cwd="/", **identity)
    try:
        yield process.pid
        assert process.poll() is None, "a process that is not the server was stopped"
    finally:
        process.kill()
        process.wait()


def rewrite_pid_file(server: EmbeddedServer, line: int, text: str) -> None:
    file = server.data / "postmaster.pid"
    lines = file.read_text().splitlines()
    lines[line] = text
    file.write_text("\n".join(lines) + "\n")


def fake_installation(directory: Path, banner: str) -> Path:
    """Creates a bin directory whose programs only print `banner`."""
    bin_dir = directory / "bin"
    bin_dir.mkdir(parents=True)
    for program in ("initdb", "pg_ctl", "postgres"):
        (bin_dir / program).write_text(f"#!/bin/sh\necho {shlex.quote(banner)}\n")
        (bin_dir / program).chmod(0o755)
    directory.chmod(0o755)
    bin_dir.chmod(0o755)
    return bin_dir


def slowed(directory: Path) -> Path:
    """Creates a bin directory whose programs begin after 0.3 s."""
    bin_dir = fake_installation(directory / "slow", "")
    for program in ("initdb", "pg_ctl"):
        (bin_dir / program).write_text(f'#!/bin/sh\nsleep 0.3\nexec {find_installation().bin_dir / program} "$@"\n')
    return bin_dir


class TestInstallation:
    def test_the_newest_version_of_the_package_is_preferred(self) -> None:
        assert find_installation().version == 18
        assert installation_module.PACKAGE in find_installation().source

    @pytest.mark.parametrize("version", [16, 18])
    def test_a_version_can_be_chosen(self, version: int) -> None:
        installation = find_installation(version)
        banner = subprocess.check_output([installation.bin_dir / "postgres", "--version"], text=True)
        assert installation.version == version
        assert f"(PostgreSQL) {version}" in banner

    def test_the_package_is_not_imported(self) -> None:
        probe = (
            "import sys; from pgcoord_cli.core.embedded.installation import find_installation;"
            " find_installation(); print(*sys.modules)"
        )
        loaded = subprocess.check_output([sys.executable, "-c", probe], text=True).split()
        assert installation_module.PACKAGE not in loaded
        assert "psycopg" not in loaded

    @pytest.mark.usefixtures("no_installation")
    @pytest.mark.parametrize("version", [None, 18])
    def test_without_an_installation_the_error_says_what_to_install(self, place: Path, version: int | None) -> None:
        with pytest.raises(ServerUnavailable) as caught:
            find_installation(version)
        assert "there are no" in caught.value.message
        assert str(version or 15) in caught.value.message
        assert "pip install 'pgcoord[embedded]'" in (caught.value.hint or "")
        assert "distribution" in (caught.value.hint or "")
        with pytest.raises(ServerUnavailable):
            EmbeddedServer(place / "cluster").start()
        assert list(place.iterdir()) == []

    @pytest.mark.usefixtures("no_installation")
    def test_of_local_installations_the_one_on_the_path_and_then_the_newest_is_preferred(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for version in (9, 16, 17):
            fake_installation(place / str(version), f"postgres (PostgreSQL) {version}.2 (Debian)")
        on_path = fake_installation(place / "path", "postgres (PostgreSQL) 15.13")
        monkeypatch.setattr(installation_module, "LOCAL_DIRECTORIES", (f"{place}/[0-9]*/bin",))
        assert find_installation().version == 17
        assert find_installation(16).bin_dir == place / "16" / "bin"
        (place / "linked").mkdir()
        (place / "linked" / "pg_ctl").symlink_to(on_path / "pg_ctl")
        monkeypatch.setenv("PATH", str(place / "linked"))
        assert (find_installation().version, find_installation().bin_dir) == (15, on_path)

    @pytest.mark.usefixtures("no_installation")
    def test_too_old_or_broken_installations_are_skipped_and_named(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = fake_installation(place / "14", "postgres (PostgreSQL) 14.9")
        broken = fake_installation(place / "17", "Segmentation fault")
        monkeypatch.setattr(installation_module, "LOCAL_DIRECTORIES", (f"{place}/*/bin",))
        with pytest.raises(ServerUnavailable) as caught:
            find_installation()
        assert f"{old} (version 14)" in caught.value.message
        assert f"{broken} (" in caught.value.message

    @as_root
    def test_an_unreadable_package_is_copied_once(
        self, place: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = self.make_package_private(place, monkeypatch)
        partial = cache / "postgresql-18-0.0.partial-left-by-a-crash"
        partial.mkdir(parents=True)
        installation = find_installation()
        version = importlib.metadata.version(installation_module.PACKAGE)
        assert installation.bin_dir.is_relative_to(cache / f"postgresql-18-{version}")
        assert not partial.exists()
        with temporary_server(installation) as server:
            assert query(server, "SELECT current_setting('server_version_num')::int / 10000") == 18
        made = installation.bin_dir.stat().st_ino
        assert find_installation().bin_dir.stat().st_ino == made

    @as_root
    def test_a_crash_while_copying_leaves_no_partial_copy(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = self.make_package_private(place, monkeypatch)

        def crash(tree: Path) -> None:
            assert any(tree.rglob("initdb"))
            raise KeyboardInterrupt

        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(installation_module, "_make_readable", crash)
            find_installation()
        assert [path.name for path in cache.iterdir()] == ["lock"]
        assert find_installation().bin_dir.is_dir()

    @staticmethod
    def make_package_private(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Puts the package into a directory that only root can enter; returns the cache for the copies."""
        spec = importlib.util.find_spec(installation_module.PACKAGE)
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        closed = place / "closed"
        closed.mkdir(mode=0o700)
        for name in (package.name, f"{package.name}.libs"):
            (closed / name).symlink_to(package.parent / name)
        monkeypatch.syspath_prepend(closed)
        monkeypatch.setattr(installation_module, "CACHE", place / "cache")
        return place / "cache"


class TestCluster:
    def test_a_cluster_is_private_durable_and_on_a_socket_only(self, cluster: EmbeddedServer) -> None:
        assert cluster.start() is True
        assert cluster.start() is False
        settings = ("fsync", "full_page_writes", "synchronous_commit", "listen_addresses", "max_connections")
        shown = {name: query(cluster, f"SHOW {name}") for name in (*settings, "max_prepared_transactions")}
        assert shown == {
            "fsync": "on", "full_page_writes": "on", "synchronous_commit": "on",
            "listen_addresses": "", "max_connections": "200", "max_prepared_transactions": "20",
        }  # fmt: skip
        assert query(cluster, "SELECT current_user || ' ' || current_database()") == "postgres postgres"
        assert query(cluster, "SHOW server_encoding") == "UTF8"
        assert query(cluster, "SELECT datcollate FROM pg_database WHERE datname = 'postgres'") in ("C.UTF-8", "C")
        assert cluster.data.stat().st_mode & 0o777 == 0o700
        assert cluster.root.stat().st_mode & 0o066 == 0
        assert cluster.log.stat().st_mode & 0o777 == 0o600

    @as_root
    def test_the_data_belongs_to_the_account_and_all_else_to_the_caller(
        self, cluster: EmbeddedServer, place: Path
    ) -> None:
        account = server_account()
        assert account is not None
        cluster.start()
        assert Path(f"/proc/{pid_of(cluster)}").stat().st_uid == account.uid
        assert cluster.data.stat().st_uid == account.uid
        assert {cluster.root.stat().st_uid, cluster.log.stat().st_uid} == {0}
        assert place.stat().st_mode & 0o777 == 0o711, "existing directories keep their modes"

    def test_after_an_immediate_stop_the_data_is_recovered(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        execute(cluster, "CREATE TABLE kept AS SELECT 42 AS answer")
        assert cluster.stop("immediate") is True
        assert cluster.is_running() is False
        cluster.start()
        assert "was not properly shut down" in cluster.log.read_text()
        assert query(cluster, "SELECT answer FROM kept") == 42
        assert cluster.stop() is True
        assert cluster.stop() is False

    @on_linux
    def test_a_server_starts_after_a_kill_once_the_old_sessions_have_ended(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        with closing(psycopg.connect(cluster.dsn)) as conn:
            session = conn.info.backend_pid
            os.kill(session, signal.SIGSTOP)
            kill(cluster)
            # The session holds the shared memory of the killed server, beside which PostgreSQL does not start.
            wake = Timer(0.5, os.kill, (session, signal.SIGCONT))
            wake.start()
            assert cluster.start() is True
            wake.join()
        assert query(cluster, "SELECT 1") == 1

    def test_a_server_that_listens_but_does_not_answer_is_not_running(self, cluster: EmbeddedServer) -> None:
        """Just after a kill, a child process that is still starting holds the listening socket."""
        cluster.data.mkdir(parents=True)
        (cluster.data / "postmaster.pid").write_text("1\n" + "\n" * 6 + "ready\n")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(cluster.data / ".s.PGSQL.5432"))
            listener.listen()

            def close_without_answer() -> None:
                connection, _ = listener.accept()
                connection.recv(8)
                connection.close()

            child = Thread(target=close_without_answer)
            child.start()
            assert cluster.is_running() is False
            child.join()
        shutil.rmtree(cluster.data)

    @on_linux
    def test_a_stale_process_id_that_another_process_has_is_ignored(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        kill(cluster)
        with another_process() as pid:
            rewrite_pid_file(cluster, 0, str(pid))
            assert cluster.is_running() is False
            assert cluster.stop() is False
            assert cluster.start() is True
            assert pid_of(cluster) != pid

    @on_linux
    def test_stop_never_signals_another_process(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        ours = pid_of(cluster)
        with another_process() as pid:
            rewrite_pid_file(cluster, 0, str(pid))
            with pytest.raises(PgcoordError, match=f"is process {ours}, but postmaster.pid says {pid}"):
                cluster.stop()
            assert is_alive(ours)
            rewrite_pid_file(cluster, 0, str(ours))
        assert cluster.stop() is True
        assert not is_alive(ours)

    def test_an_interrupted_start_is_repeated(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        before = pid_of(cluster)
        rewrite_pid_file(cluster, 7, "starting")
        assert cluster.is_running() is False
        assert cluster.start() is True
        assert pid_of(cluster) != before
        assert not is_alive(before)

    def test_a_crash_in_initdb_leaves_no_partial_cluster(
        self, cluster: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def crash(_server: EmbeddedServer, _initdb: Path, directory: Path) -> None:
            (directory / "PG_VERSION").write_text("18\n")
            raise KeyboardInterrupt

        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(EmbeddedServer, "_initdb", crash)
            cluster.start()
        assert cluster.version() is None
        left = cluster.root / "data.partial-of-a-killed-process"
        left.mkdir()
        (left / "PG_VERSION").write_text("18\n")
        assert cluster.start() is True
        assert sorted(path.name for path in cluster.root.iterdir()) == ["data", "lock", "server.log"]

    def test_a_failed_start_shows_the_end_of_the_log(self, place: Path) -> None:
        cluster = EmbeddedServer(place / "cluster", settings={"max_connections": "lots"})
        with pytest.raises(PgcoordError, match='invalid value for parameter "max_connections": "lots"') as caught:
            cluster.start()
        assert str(cluster.log) in caught.value.message
        assert cluster.is_running() is False
        cluster.destroy()
        assert list(place.iterdir()) == []

    def test_a_data_directory_that_is_no_cluster_is_not_changed(self, place: Path) -> None:
        cluster = EmbeddedServer(place / "cluster")
        cluster.data.mkdir(parents=True)
        (cluster.data / "precious").touch()
        with pytest.raises(PgcoordError, match="is not the data directory"):
            cluster.start()
        assert (cluster.data / "precious").exists()

    def test_a_caller_without_an_installation_can_stop_a_server(
        self, cluster: EmbeddedServer, request: pytest.FixtureRequest
    ) -> None:
        cluster.start()
        request.getfixturevalue("no_installation")
        assert cluster.stop() is True

    def test_destroy_keeps_other_files(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        (cluster.root / "notes").touch()
        assert cluster.destroy() is True
        assert [path.name for path in cluster.root.iterdir()] == ["notes"]
        assert cluster.destroy() is False

    @on_linux
    def test_after_a_kill_destroy_removes_everything(self, cluster: EmbeddedServer, place: Path) -> None:
        cluster.start()
        shared_memory = (cluster.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert shared_memory in Path("/proc/sysvipc/shm").read_text().split()
        with closing(psycopg.connect(cluster.dsn)):
            kill(cluster)
            assert cluster.destroy() is True
        assert list(place.iterdir()) == []
        assert shared_memory not in Path("/proc/sysvipc/shm").read_text().split()

    @on_linux
    def test_settings_are_applied_and_the_callers_environment_is_not(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"PGPORT": "1", "PGDATA": "/nonexistent", "PGPASSWORD": "secret"}.items():
            monkeypatch.setenv(name, value)
        cluster = EmbeddedServer(place / "cluster", settings={"work_mem": "7MB", "cluster_name": 'it\'s "two" $words'})
        cluster.start()
        try:
            assert query(cluster, "SHOW work_mem") == "7MB"
            assert query(cluster, "SHOW cluster_name") == 'it\'s "two" $words'
            assert b"secret" not in Path(f"/proc/{pid_of(cluster)}/environ").read_bytes()
        finally:
            cluster.destroy()


class TestSocket:
    @pytest.fixture
    def distant(self, place: Path) -> Iterator[EmbeddedServer]:
        """A cluster whose path is too long for a socket address."""
        server = EmbeddedServer(place / ("x" * 90) / "cluster")
        yield server
        server.destroy()

    def test_the_longest_path_that_fits_is_used(self, place: Path) -> None:
        most = postmaster.MAX_SOCKET_PATH - len(os.fsencode(place / "" / "data" / ".s.PGSQL.5432")) - 1
        longest, longer = EmbeddedServer(place / ("x" * most)), EmbeddedServer(place / ("x" * (most + 1)))
        assert longest.socket_directory == longest.data
        assert longer.socket_directory != longer.data
        longest.start()
        try:
            assert query(longest, "SELECT 1") == 1
        finally:
            longest.destroy()

    @pytest.mark.parametrize("name", ['it\'s a $HOME, "50%20"', 'it\'s $HOME; "50%20" ünï'])
    def test_paths_with_special_characters(self, place: Path, name: str) -> None:
        server = EmbeddedServer(place / name)
        server.start()
        try:
            assert query(server, "SHOW data_directory") == str(server.data)
        finally:
            server.destroy()
        assert list(place.iterdir()) == []

    def test_a_long_path_gets_a_private_directory_that_is_removed_again(self, distant: EmbeddedServer) -> None:
        distant.start()
        directory = distant.socket_directory
        assert directory.parent == Path("/tmp")
        assert directory.stat().st_mode & 0o777 == 0o700
        assert query(distant, "SELECT 1") == 1
        distant.stop()
        assert not directory.exists()
        distant.start()
        kill(distant)
        distant.start()
        assert query(distant, "SELECT 1") == 1
        kill(distant)
        distant.destroy()
        assert not directory.exists()

    def test_destroy_removes_the_private_directory_even_without_an_installation(
        self, distant: EmbeddedServer, request: pytest.FixtureRequest
    ) -> None:
        distant.start()
        distant.stop()
        (distant.data / "postmaster.pid").write_text("999999999\n")  # as after a kill
        distant.postmaster.make_socket_directory(server_account())
        request.getfixturevalue("no_installation")
        assert distant.destroy() is True
        assert not distant.socket_directory.exists()
        assert not distant.root.exists()

    @pytest.mark.parametrize(
        ("mode", "of_the_account"),
        [pytest.param(0o755, True, id="open to all"), pytest.param(0o700, False, id="of root", marks=as_root)],
    )
    def test_a_socket_directory_that_is_not_private_to_the_account_is_not_used(
        self, distant: EmbeddedServer, mode: int, of_the_account: bool
    ) -> None:
        directory, account = distant.socket_directory, server_account()
        directory.mkdir(mode=mode)
        try:
            if account and of_the_account:
                os.chown(directory, account.uid, account.gid)
            with pytest.raises(PgcoordError, match="is not a private directory"):
                distant.start()
        finally:
            directory.rmdir()


class TestTemporaryServer:
    @pytest.mark.parametrize("raised", [None, RuntimeError, KeyboardInterrupt])
    def test_leaves_nothing_behind(self, temporary: Path, raised: type[BaseException] | None) -> None:
        seen: list[int] = []

        def use() -> None:
            with temporary_server() as server:
                seen.append(pid_of(server))
                execute(server, "CREATE TABLE t AS SELECT generate_series(1, 10)")
                if raised:
                    raise raised

        if raised:
            with pytest.raises(raised):
                use()
        else:
            use()
        assert not is_alive(seen[0])
        assert list(temporary.iterdir()) == []

    def test_leaves_nothing_behind_after_a_kill(self, temporary: Path) -> None:
        with temporary_server() as server:
            kill(server)
        assert list(temporary.iterdir()) == []

    def test_takes_an_installation_and_settings(self, temporary: Path) -> None:
        with temporary_server(find_installation(16), {"work_mem": "7MB"}) as server:
            assert query(server, "SELECT current_setting('server_version_num')::int / 10000") == 16
            assert query(server, "SHOW work_mem") == "7MB"
            assert query(server, "SHOW fsync") == "on"
        assert list(temporary.iterdir()) == []

    @on_linux
    @pytest.mark.parametrize("moment", ["*/data.partial-*", "*/data/postmaster.pid", "ready"])
    def test_ctrl_c_leaves_nothing_behind(self, temporary: Path, moment: str) -> None:
        """A Ctrl-C during initdb, the start or the block, and then several more."""
        slow = slowed(temporary)
        program = (
            "import pathlib, signal\n"
            "from pgcoord_cli.core.embedded.server import temporary_server\n"
            "from pgcoord_cli.core.embedded.installation import Installation\n"
            f"with temporary_server(Installation(pathlib.Path({str(slow)!r}), 18, 'slow')) as server:\n"
            f"    pathlib.Path({str(temporary)!r}, 'ready').touch()\n"
            "    signal.pause()\n"
        )
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, process_group=0)
        try:
            deadline = time.monotonic() + 30
            while not list(temporary.glob(moment)):
                assert time.monotonic() < deadline
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
            for _ in range(3):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.06)
                    break
                os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        assert "KeyboardInterrupt" in err
        assert servers_below(temporary) == []
        assert list(temporary.glob("pgcoord-*")) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_are_deferred_until_the_clean_up_is_done(self, number: signal.Signals) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before, reached = signal.signal(number, interrupt), False
        other = Thread(target=Event().wait, args=(0.2,))  # the system may deliver the signal to it
        try:
            with pytest.raises(KeyboardInterrupt), embedded_server._deferred_signals():
                other.start()
                os.kill(os.getpid(), number)
                other.join()
                reached = True
            assert signal.getsignal(number) is interrupt
        finally:
            signal.signal(number, before)
        assert reached

    @as_root
    def test_an_inaccessible_directory_is_named(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        closed = place / "closed"
        closed.mkdir(mode=0o700)
        monkeypatch.setattr(tempfile, "tempdir", str(closed))
        with pytest.raises(PgcoordError, match=f"cannot enter {closed}") as caught, temporary_server():
            pass
        assert "TMPDIR" in (caught.value.hint or "")
        assert list(closed.iterdir()) == []


class TestDevRoot:
    def test_default_directories(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PGCOORD_DEV_DIR", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", "/home/ada/data")
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert embedded_server.dev_root() == Path("/var/lib/pgcoord/dev/default")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert embedded_server.dev_root().parts[-3:] == ("pgcoord", "dev", "default")
        assert "/var/lib" not in str(embedded_server.dev_root())

    def test_the_environment_overrides_the_directory(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PGCOORD_DEV_DIR", "here")
        assert embedded_server.dev_root("two") == tmp_path / "here" / "two"


def test_i7_nothing_sleeps() -> None:
    """Waits are for events, not for time (rule I7)."""
    assert "sleep(" not in Path(embedded_server.__file__).read_text() + Path(postmaster.__file__).read_text()
    assert shutil.which("sleep"), "the other process of these tests is a sleep"
