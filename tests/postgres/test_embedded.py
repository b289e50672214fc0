"""The embedded server: where its programs come from, and that it neither loses data nor leaves anything behind."""

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

from pgcoord_cli.core.embedded import installation as finding
from pgcoord_cli.core.embedded import postmaster
from pgcoord_cli.core.embedded import server as embedded_server
from pgcoord_cli.core.embedded.installation import find_programs, server_account
from pgcoord_cli.core.embedded.server import EmbeddedServer, throw_away_server
from pgcoord_cli.errors import PgcoordError, ServerUnavailable

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root needs an account for the server")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


@pytest.fixture
def cluster(place: Path) -> Iterator[EmbeddedServer]:
    """One that does not exist yet; destroyed in the end."""
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
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without PostgreSQL."""
    monkeypatch.setattr(finding, "PACKAGE", "no_such_package_of_postgresql")
    monkeypatch.setattr(finding, "LOCAL_DIRECTORIES", ())
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
    """Whether the process runs; one that only waits to be reaped does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def kill(server: EmbeddedServer) -> None:
    """kill -9 of the postmaster; returns once it is dead."""
    descriptor = os.pidfd_open(pid := pid_of(server))
    os.kill(pid, signal.SIGKILL)
    select.select([descriptor], [], [])
    os.close(descriptor)


def servers_below(directory: Path) -> list[str]:
    """Processes that have the directory in their command line."""
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
def bystander() -> Iterator[int]:
    """The number of a living process of the server's account that is no server."""
    account = server_account()
    identity: dict[str, Any] = {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}
    process = subprocess.Popen(["sleep", "600"], cwd="/", **identity)
    try:
        yield process.pid
        assert process.poll() is None, "somebody stopped a process that is not the server"
    finally:
        process.kill()
        process.wait()


def rewrite_pid_file(server: EmbeddedServer, line: int, text: str) -> None:
    file = server.data / "postmaster.pid"
    lines = file.read_text().splitlines()
    lines[line] = text
    file.write_text("\n".join(lines) + "\n")


def installation(directory: Path, banner: str) -> Path:
    """A bin directory whose programs do nothing but print `banner`."""
    bin_dir = directory / "bin"
    bin_dir.mkdir(parents=True)
    for program in ("initdb", "pg_ctl", "postgres"):
        (bin_dir / program).write_text(f"#!/bin/sh\necho {shlex.quote(banner)}\n")
        (bin_dir / program).chmod(0o755)
    directory.chmod(0o755)
    bin_dir.chmod(0o755)
    return bin_dir


def slowed(directory: Path) -> Path:
    """A bin directory whose programs take a moment to begin."""
    bin_dir = installation(directory / "slow", "")
    for program in ("initdb", "pg_ctl"):
        (bin_dir / program).write_text(f'#!/bin/sh\nsleep 0.3\nexec {find_programs().bin_dir / program} "$@"\n')
    return bin_dir


class TestPrograms:
    def test_the_package_comes_first_newest_first(self) -> None:
        assert find_programs().version == 18
        assert finding.PACKAGE in find_programs().source

    @pytest.mark.parametrize("version", [16, 18])
    def test_a_version_may_be_chosen(self, version: int) -> None:
        programs = find_programs(version)
        banner = subprocess.check_output([programs.bin_dir / "postgres", "--version"], text=True)
        assert programs.version == version
        assert f"(PostgreSQL) {version}" in banner

    def test_the_package_is_not_imported(self) -> None:
        probe = "import sys; from pgcoord_cli.core import programs; programs.find_programs(); print(*sys.modules)"
        loaded = subprocess.check_output([sys.executable, "-c", probe], text=True).split()
        assert finding.PACKAGE not in loaded
        assert "psycopg" not in loaded

    @pytest.mark.usefixtures("no_programs")
    @pytest.mark.parametrize("version", [None, 18])
    def test_without_any_the_error_says_what_to_install(self, place: Path, version: int | None) -> None:
        with pytest.raises(ServerUnavailable) as caught:
            find_programs(version)
        assert "there are no" in caught.value.message
        assert str(version or 15) in caught.value.message
        assert "pip install 'pgcoord[embedded]'" in (caught.value.hint or "")
        assert "distribution" in (caught.value.hint or "")
        with pytest.raises(ServerUnavailable):
            EmbeddedServer(place / "cluster").start()
        assert list(place.iterdir()) == []

    @pytest.mark.usefixtures("no_programs")
    def test_local_ones_path_first_then_newest(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for version in (9, 16, 17):
            installation(place / str(version), f"postgres (PostgreSQL) {version}.2 (Debian)")
        on_path = installation(place / "path", "postgres (PostgreSQL) 15.13")
        monkeypatch.setattr(finding, "LOCAL_DIRECTORIES", (f"{place}/[0-9]*/bin",))
        assert find_programs().version == 17
        assert find_programs(16).bin_dir == place / "16" / "bin"
        (place / "linked").mkdir()
        (place / "linked" / "pg_ctl").symlink_to(on_path / "pg_ctl")
        monkeypatch.setenv("PATH", str(place / "linked"))
        assert (find_programs().version, find_programs().bin_dir) == (15, on_path)

    @pytest.mark.usefixtures("no_programs")
    def test_too_old_or_broken_ones_are_passed_over_and_named(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = installation(place / "14", "postgres (PostgreSQL) 14.9")
        broken = installation(place / "17", "Segmentation fault")
        monkeypatch.setattr(finding, "LOCAL_DIRECTORIES", (f"{place}/*/bin",))
        with pytest.raises(ServerUnavailable) as caught:
            find_programs()
        assert f"{old} (version 14)" in caught.value.message
        assert f"{broken} (" in caught.value.message

    @as_root
    def test_out_of_reach_they_are_copied_once(
        self, place: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = self.hide_the_package(place, monkeypatch)
        half = cache / "postgresql-18-0.0.half-left-by-a-crash"
        half.mkdir(parents=True)
        programs = find_programs()
        version = importlib.metadata.version(finding.PACKAGE)
        assert programs.bin_dir.is_relative_to(cache / f"postgresql-18-{version}")
        assert not half.exists()
        with throw_away_server(programs) as server:
            assert query(server, "SELECT current_setting('server_version_num')::int / 10000") == 18
        made = programs.bin_dir.stat().st_ino
        assert find_programs().bin_dir.stat().st_ino == made

    @as_root
    def test_a_crash_while_copying_leaves_no_half_copy(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = self.hide_the_package(place, monkeypatch)

        def crash(tree: Path) -> None:
            assert any(tree.rglob("initdb"))
            raise KeyboardInterrupt

        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(finding, "_make_readable", crash)
            find_programs()
        assert [path.name for path in cache.iterdir()] == ["lock"]
        assert find_programs().bin_dir.is_dir()

    @staticmethod
    def hide_the_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Lets the package be found in a directory that only root can enter; returns the cache for the copies."""
        spec = importlib.util.find_spec(finding.PACKAGE)
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        closed = place / "closed"
        closed.mkdir(mode=0o700)
        for name in (package.name, f"{package.name}.libs"):
            (closed / name).symlink_to(package.parent / name)
        monkeypatch.syspath_prepend(closed)
        monkeypatch.setattr(finding, "CACHE", place / "cache")
        return place / "cache"


class TestCluster:
    def test_is_private_durable_and_on_a_socket_only(self, cluster: EmbeddedServer) -> None:
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
    def test_the_data_is_the_accounts_the_rest_is_ours(self, cluster: EmbeddedServer, place: Path) -> None:
        account = server_account()
        assert account is not None
        cluster.start()
        assert Path(f"/proc/{pid_of(cluster)}").stat().st_uid == account.uid
        assert cluster.data.stat().st_uid == account.uid
        assert {cluster.root.stat().st_uid, cluster.log.stat().st_uid} == {0}
        assert place.stat().st_mode & 0o777 == 0o711, "what was there before keeps its mode"

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
    def test_a_killed_postmaster_whose_sessions_live_on(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        with closing(psycopg.connect(cluster.dsn)) as conn:
            session = conn.info.backend_pid
            os.kill(session, signal.SIGSTOP)
            kill(cluster)
            # It holds the shared memory of the killed server, and PostgreSQL will not start beside it.
            wake = Timer(0.5, os.kill, (session, signal.SIGCONT))
            wake.start()
            assert cluster.start() is True
            wake.join()
        assert query(cluster, "SELECT 1") == 1

    def test_a_socket_where_nobody_answers(self, cluster: EmbeddedServer) -> None:
        """The moment after a kill: a child that is still starting holds the listening socket."""
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
    def test_a_process_number_that_is_somebody_elses_by_now(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        kill(cluster)
        with bystander() as pid:
            rewrite_pid_file(cluster, 0, str(pid))
            assert cluster.is_running() is False
            assert cluster.stop() is False
            assert cluster.start() is True
            assert pid_of(cluster) != pid

    @on_linux
    def test_stop_never_signals_another_process(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        ours = pid_of(cluster)
        with bystander() as pid:
            rewrite_pid_file(cluster, 0, str(pid))
            with pytest.raises(PgcoordError, match=f"is process {ours}, but postmaster.pid says {pid}"):
                cluster.stop()
            assert is_alive(ours)
            rewrite_pid_file(cluster, 0, str(ours))
        assert cluster.stop() is True
        assert not is_alive(ours)

    def test_a_start_that_was_cut_short_is_begun_again(self, cluster: EmbeddedServer) -> None:
        cluster.start()
        before = pid_of(cluster)
        rewrite_pid_file(cluster, 7, "starting")
        assert cluster.is_running() is False
        assert cluster.start() is True
        assert pid_of(cluster) != before
        assert not is_alive(before)

    def test_a_crash_in_initdb_leaves_no_half_cluster(
        self, cluster: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def crash(_server: EmbeddedServer, _initdb: Path, directory: Path) -> None:
            (directory / "PG_VERSION").write_text("18\n")
            raise KeyboardInterrupt

        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(EmbeddedServer, "_initdb", crash)
            cluster.start()
        assert cluster.version() is None
        left = cluster.root / "data.half-of-a-killed-process"
        left.mkdir()
        (left / "PG_VERSION").write_text("18\n")
        assert cluster.start() is True
        assert sorted(path.name for path in cluster.root.iterdir()) == ["data", "lock", "server.log"]

    def test_a_start_that_fails_shows_the_end_of_the_log(self, place: Path) -> None:
        cluster = EmbeddedServer(place / "cluster", settings={"max_connections": "lots"})
        with pytest.raises(PgcoordError, match='invalid value for parameter "max_connections": "lots"') as caught:
            cluster.start()
        assert str(cluster.log) in caught.value.message
        assert cluster.is_running() is False
        cluster.destroy()
        assert list(place.iterdir()) == []

    def test_data_that_is_no_cluster_is_left_alone(self, place: Path) -> None:
        cluster = EmbeddedServer(place / "cluster")
        cluster.data.mkdir(parents=True)
        (cluster.data / "precious").touch()
        with pytest.raises(PgcoordError, match="is in the way"):
            cluster.start()
        assert (cluster.data / "precious").exists()

    def test_a_caller_without_programs_can_stop_it(
        self, cluster: EmbeddedServer, request: pytest.FixtureRequest
    ) -> None:
        cluster.start()
        request.getfixturevalue("no_programs")
        assert cluster.stop() is True

    def test_destroy_keeps_what_is_not_ours(self, cluster: EmbeddedServer) -> None:
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
    def test_settings_and_environment_of_the_caller(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_a_path_that_just_fits_is_used(self, place: Path) -> None:
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
    def test_odd_paths(self, place: Path, name: str) -> None:
        server = EmbeddedServer(place / name)
        server.start()
        try:
            assert query(server, "SHOW data_directory") == str(server.data)
        finally:
            server.destroy()
        assert list(place.iterdir()) == []

    def test_a_long_path_gets_a_private_directory_that_goes_again(self, distant: EmbeddedServer) -> None:
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

    def test_destroy_removes_it_even_where_programs_are_missing(
        self, distant: EmbeddedServer, request: pytest.FixtureRequest
    ) -> None:
        distant.start()
        distant.stop()
        (distant.data / "postmaster.pid").write_text("999999999\n")  # as after a kill
        distant.postmaster.make_socket_directory(server_account())
        request.getfixturevalue("no_programs")
        assert distant.destroy() is True
        assert not distant.socket_directory.exists()
        assert not distant.root.exists()

    @pytest.mark.parametrize(
        ("mode", "of_the_account"),
        [pytest.param(0o755, True, id="open to all"), pytest.param(0o700, False, id="of root", marks=as_root)],
    )
    def test_a_directory_that_is_not_the_accounts_alone_is_not_used(
        self, distant: EmbeddedServer, mode: int, of_the_account: bool
    ) -> None:
        directory, account = distant.socket_directory, server_account()
        directory.mkdir(mode=mode)
        try:
            if account and of_the_account:
                os.chown(directory, account.uid, account.gid)
            with pytest.raises(PgcoordError, match="is in the way"):
                distant.start()
        finally:
            directory.rmdir()


class TestThrowAway:
    @pytest.mark.parametrize("raised", [None, RuntimeError, KeyboardInterrupt])
    def test_leaves_nothing_behind(self, temporary: Path, raised: type[BaseException] | None) -> None:
        seen: list[int] = []

        def use() -> None:
            with throw_away_server() as server:
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

    def test_leaves_nothing_behind_when_it_was_killed(self, temporary: Path) -> None:
        with throw_away_server() as server:
            kill(server)
        assert list(temporary.iterdir()) == []

    def test_takes_programs_and_settings(self, temporary: Path) -> None:
        with throw_away_server(find_programs(16), {"work_mem": "7MB"}) as server:
            assert query(server, "SELECT current_setting('server_version_num')::int / 10000") == 16
            assert query(server, "SHOW work_mem") == "7MB"
            assert query(server, "SHOW fsync") == "on"
        assert list(temporary.iterdir()) == []

    @on_linux
    @pytest.mark.parametrize("moment", ["*/data.half-*", "*/data/postmaster.pid", "ready"])
    def test_ctrl_c_leaves_nothing_behind(self, temporary: Path, moment: str) -> None:
        """A Ctrl-C in initdb, in the start and in the block; then more of them, from somebody impatient."""
        slow = slowed(temporary)
        program = (
            "import pathlib, signal\n"
            "from pgcoord_cli.core.embedded.server import throw_away_server\n"
            "from pgcoord_cli.core.embedded.installation import Programs\n"
            f"with throw_away_server(Programs(pathlib.Path({str(slow)!r}), 18, 'slow')) as server:\n"
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
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        assert "KeyboardInterrupt" in said
        assert servers_below(temporary) == []
        assert list(temporary.glob("pgcoord-*")) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_wait_until_cleaning_up_is_done(self, number: signal.Signals) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before, reached = signal.signal(number, interrupt), False
        other = Thread(target=Event().wait, args=(0.2,))  # the system may hand the signal to it
        try:
            with pytest.raises(KeyboardInterrupt), embedded_server._undisturbed():
                other.start()
                os.kill(os.getpid(), number)
                other.join()
                reached = True
            assert signal.getsignal(number) is interrupt
        finally:
            signal.signal(number, before)
        assert reached

    @as_root
    def test_a_directory_out_of_reach_is_named(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        closed = place / "closed"
        closed.mkdir(mode=0o700)
        monkeypatch.setattr(tempfile, "tempdir", str(closed))
        with pytest.raises(PgcoordError, match=f"cannot enter {closed}") as caught, throw_away_server():
            pass
        assert "TMPDIR" in (caught.value.hint or "")
        assert list(closed.iterdir()) == []


class TestDevRoot:
    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PGCOORD_DEV_DIR", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", "/home/ada/data")
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert embedded_server.dev_root() == Path("/var/lib/pgcoord/dev/default")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert embedded_server.dev_root().parts[-3:] == ("pgcoord", "dev", "default")
        assert "/var/lib" not in str(embedded_server.dev_root())

    def test_the_environment_moves_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PGCOORD_DEV_DIR", "here")
        assert embedded_server.dev_root("two") == tmp_path / "here" / "two"


def test_nothing_sleeps() -> None:
    """Waiting is for events (rule I7)."""
    assert "sleep(" not in Path(embedded_server.__file__).read_text() + Path(postmaster.__file__).read_text()
    assert shutil.which("sleep"), "the bystander of these tests needs it"
