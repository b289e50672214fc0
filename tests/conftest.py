"""Fixtures for all tests: a PostgreSQL database of their own, and the program as its users run it.

One temporary server serves a session (`--server-version 15|16|17|18` selects it); every test gets a database of
its own, copied from a migrated template. Tests that stop or break a server start their own (`own_server`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple

import hypothesis
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor

from pgcoord_cli import cli as program
from pgcoord_cli.core.database import migrations
from pgcoord_cli.core.database.session import migration_session
from pgcoord_cli.core.embedded.installation import Installation, find_installation
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT
from tests.kept_servers import PLUGIN, KeptServers, new_server

# No test asserts how long something takes, and on a busy machine an example may take any time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server-version", type=int, default=18, choices=(15, 16, 17, 18), help="PostgreSQL to test on")
    parser.addoption("--rounds", type=int, default=20, help="rounds of each slow failover test")
    parser.addoption("--stall", type=float, default=30.0, help="seconds for which slow failover tests stall a standby")
    parser.addoption(
        "--keep-server",
        action="store_true",
        help="leave the run's servers and databases as they are, log every statement, and print where they are",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background commands with SIGINT ignored, and programs that a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--keep-server"):
        config.pluginmanager.register(KeptServers(), PLUGIN)


@pytest.fixture(scope="session")
def installation(pytestconfig: pytest.Config) -> Installation:
    """The PostgreSQL installation of the chosen version."""
    return find_installation(pytestconfig.getoption("--server-version"))


SHARED_SERVER = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "128MB"}
"""The shared server never crashes, and most of a test's time went into flushing the database that it makes and drops.

Tests of what survives a crash have a server of their own, with durability on.
"""


@pytest.fixture(scope="session")
def server(installation: Installation, pytestconfig: pytest.Config) -> Iterator[EmbeddedServer]:
    """The server that the tests of the session share; no test may stop it."""
    with new_server(pytestconfig, installation, SHARED_SERVER) as running:
        yield running


class Address(NamedTuple):
    """The address of the shared server, with the attributes that pytest-postgresql reads."""

    host: str
    port: int = 5432
    user: str = "postgres"
    password: str | None = None
    options: str = ""
    maintenance_dbname: str = "postgres"
    template_dbname: str | None = None


@pytest.fixture(scope="session")
def server_address(server: EmbeddedServer) -> Address:
    return Address(host=str(conninfo_to_dict(server.dsn)["host"]))


def migrate(**address: Any) -> None:
    """Migrates the template that the databases of the tests are copied from."""
    address = {name: value for name, value in address.items() if value}
    migrate_schema(Settings(dsn=make_conninfo("", **address)))


def migrate_schema(settings: Settings) -> None:
    """Applies every migration, like `pgcoord migrate up`."""
    with (
        migration_session(settings, read_only=False) as (conn, _),
        migrations.migration_lock(conn, settings.schema, TIMEOUT, lambda _: None),
    ):
        migrations.apply(conn, settings.schema, None, lambda _: None)


migrated_template = factories.postgresql_noproc(dbname="migrated", depends_on="server_address", load=[migrate])
empty_template = factories.postgresql_noproc(dbname="empty", depends_on="server_address")


@pytest.fixture(scope="session")
def maintenance(server: EmbeddedServer) -> Iterator[psycopg.Connection[Any]]:
    """The connection that creates and drops the databases of the tests."""
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        yield conn


@contextmanager
def _copy_of(template: NoopExecutor, request: pytest.FixtureRequest) -> Iterator[Settings]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    copied = Settings(dsn=make_conninfo("", host=template.host, user=template.user, dbname=name))
    maintenance: psycopg.Connection[Any] = request.getfixturevalue("maintenance")
    # Copied file by file, in a sixth of the time that logging every page takes; the server flushes nothing.
    maintenance.execute(f"CREATE DATABASE {name} TEMPLATE {template.template_dbname} STRATEGY file_copy")
    is_kept = request.config.getoption("--keep-server")
    if is_kept:
        request.node.add_report_section("setup", "database", copied.dsn)  # shown with the test if that fails
    try:
        yield copied
    finally:
        if not is_kept:
            maintenance.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings(migrated_template: NoopExecutor, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """Creates a migrated database for the test."""
    with _copy_of(migrated_template, request) as copied:
        yield copied


@pytest.fixture
def empty_settings(empty_template: NoopExecutor, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """Creates a database for the test, without a pgcoord schema."""
    with _copy_of(empty_template, request) as copied:
        yield copied


@pytest.fixture
def sql(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    """Opens an autocommit connection to the test's database, without the session settings of pgcoord."""
    with psycopg.connect(settings.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
        yield conn


@pytest.fixture
def own_server(installation: Installation, pytestconfig: pytest.Config) -> Iterator[EmbeddedServer]:
    """Starts a server for the test, which may stop, kill and start it again."""
    with new_server(pytestconfig, installation) as running:
        yield running


@pytest.fixture
def own_settings(own_server: EmbeddedServer) -> Settings:
    """Creates a migrated database on a server that the test may stop."""
    settings = Settings(dsn=own_server.dsn)
    migrate_schema(settings)
    return settings


@pytest.fixture
def place() -> Iterator[Path]:
    """Creates a directory that the account of a server can enter; those of pytest it cannot."""
    with tempfile.TemporaryDirectory(prefix="pgcoord-test-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o711)
        yield directory


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(settings: Settings) -> dict[str, str]:
    """Returns the environment for a process of the program: PGCOORD_DSN and PGCOORD_SCHEMA name the test's database."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PGCOORD"))}
    return clean | {"PGCOORD_DSN": settings.dsn, "PGCOORD_SCHEMA": settings.schema, "NO_COLOR": "1"}


@pytest.fixture
def cli(request: pytest.FixtureRequest) -> Cli:
    """Runs `pgcoord …` in a process of its own, against the test's database unless `settings=` names another."""

    def run(
        *words: str, settings: Settings | None = None, env: dict[str, str] | None = None, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        chosen = settings or request.getfixturevalue("settings")
        return subprocess.run(
            [sys.executable, "-m", "pgcoord_cli", *words],
            env=environment(chosen) | (env or {}), capture_output=True, text=True, timeout=TIMEOUT * 2, input=stdin,
            check=False,
        )  # fmt: skip

    return run


class Answer(NamedTuple):
    """The exit code and the output of a call in this process."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document on stdout; fails if there is anything else."""
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return self.document["error"]

    @property
    def refusal(self) -> str:
        """The message of a usage error; fails unless the call ended in one, with exit code 2."""
        assert (self.code, self.error["code"]) == (2, "usage")
        return str(self.error["message"])


Call = Callable[..., Answer]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Runs `pgcoord …` in this process, without a server unless the call names one; stdout is no terminal.

    Keyword arguments are environment variables of the call. A command that runs longer than TIMEOUT fails the test.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    monkeypatch.setenv("PGCOORD_DSN", "host=/nowhere")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(*words: str, **variables: str) -> Answer:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            signal.alarm(int(TIMEOUT))
            code = program.run(words)
            signal.alarm(0)
            return Answer(code, *capsys.readouterr())

    signal.signal(signal.SIGALRM, give_up)
    yield run
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def give_up(*_: Any) -> None:
    raise AssertionError(f"the command has not ended after {TIMEOUT} s")


@pytest.fixture
def call(offline: Call, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `pgcoord …` in this process, like `offline`, on the test's database."""
    monkeypatch.setenv("PGCOORD_DSN", settings.dsn)
    return offline


StartProgram = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_program(request: pytest.FixtureRequest) -> Iterator[StartProgram]:
    """Starts `pgcoord …` in a process of its own, with pipes; kills the processes that still run after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, settings: Settings | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgcoord_cli", *words],
            env=environment(settings or request.getfixturevalue("settings")),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@dataclass
class LeaderProcess:
    """A `pgcoord leader run` in a process of its own, with the lines that it has written to stderr so far."""

    process: subprocess.Popen[str]
    node_id: str
    _lines: Queue[str]
    written: list[str]

    def wait_for(self, text: str) -> str:
        """Returns the next line on stderr that contains `text`; fails after TIMEOUT without one."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise AssertionError(f"{self.node_id} did not write {text!r}; it wrote {self.written}") from None
            self.written.append(line)
            if text in line:
                return line

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Terminates the process, even if it is stopped, and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(TIMEOUT)


StartLeader = Callable[..., LeaderProcess]


@pytest.fixture
def start_leader(request: pytest.FixtureRequest) -> Iterator[StartLeader]:
    """Starts `pgcoord leader run`; terminates the processes that still run after the test."""
    started: list[LeaderProcess] = []

    def start(node_id: str, *words: str, settings: Settings | None = None) -> LeaderProcess:
        leader = _start_leader(node_id, words, settings or request.getfixturevalue("settings"))
        started.append(leader)
        return leader

    yield start
    for leader in started:
        leader.end()
        assert leader.process.stderr
        leader.process.stderr.close()


TwoLeaders = Callable[..., tuple[LeaderProcess, LeaderProcess]]


@pytest.fixture
def two_leaders(start_leader: StartLeader) -> TwoLeaders:
    """Starts two leader processes: `first` is elected, `second` is a candidate. By default no lease expires meanwhile.

    `settings` are those of the first and of the second; None: those of the test.
    """

    def start(
        first_ttl: str = "60s", second_ttl: str = "60s", settings: Sequence[Settings | None] = (None, None)
    ) -> tuple[LeaderProcess, LeaderProcess]:
        first = start_leader("first", "--ttl", first_ttl, settings=settings[0])
        first.wait_for("elected epoch 1")
        second = start_leader("second", "--ttl", second_ttl, settings=settings[1])
        second.wait_for("candidate:")
        return first, second

    return start


def _start_leader(node_id: str, words: Sequence[str], settings: Settings) -> LeaderProcess:
    process = subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", "leader", "run", "--node-id", node_id, *words],
        env=environment(settings), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: Queue[str] = Queue()

    def read() -> None:
        assert process.stderr
        for line in process.stderr:
            lines.put(line)

    Thread(target=read, daemon=True).start()
    return LeaderProcess(process, node_id, lines, [])


@pytest.fixture
def in_schema() -> Callable[[Settings, str], Settings]:
    """Returns a function that replaces the schema in settings."""
    return lambda settings, schema: replace(settings, schema=schema, schema_given=True)
