"""Every daemon through every trouble that passes: it lives, logs each reason once, and works again (rule I17).

The daemons run together, as a role with the rights of an operator, on a server that the tests of this file break. A
test applies one trouble to all of them, waits until each has logged it, ends it, and gives each some work.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.concurrency.outage import MAX_REASONS
from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.embedded.installation import Installation
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.flows import executions, flows
from pgcoord_cli.core.locks.ownership import Ownership, acquire_leadership
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.conftest import SHARED_SERVER, migrate_schema
from tests.faults.program_process import ProgramProcess, environment
from tests.kept_servers import new_server
from tests.postgres.flow_world import Flow, Make, plan

Sql = psycopg.Connection[Any]

OPERATOR = "west_operator"
WORKED, RECLAIMED = "worked", "reclaimed"
"""Namespaces of the executions that the worker runs, and of those whose leases only the reconciler ends."""

LOCK = "nightly"
TIMEOUTS = {"PGCOORD_LOCK_TIMEOUT": "300ms"}
LONGEST_LOG = 2 * MAX_REASONS + 4
"""Lines of a daemon for one trouble: its reasons, how a term or a tail has ended, and that it works again."""

DAEMONS = {
    "leader run": ("leader", "run", "--ttl", "2s", "--with", "dispatch"),
    "worker run": ("worker", "run", "--namespace", WORKED, "--", "true"),
    "reconcile": ("reconcile", "--loop", "--interval", "100ms", "--namespace", RECLAIMED),
    "tail": ("tail", "lease", "--from-start", "-o", "json"),
    "watch": ("leader", "status", "--watch", "--interval", "200ms", "-o", "json"),
    "lock run": ("lock", "run", LOCK, "--wait", "10m", "--", "true"),
}


class Daemon:
    """One daemon, with the lines that it has logged."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.running = ProgramProcess(DAEMONS[name], environment(settings.dsn) | TIMEOUTS)
        self.log: list[str] = []

    @property
    def has_ended(self) -> bool:
        return self.running.process.poll() is not None

    def next_line(self) -> str:
        line = self.running.stderr.next()
        assert line is not None, f"{self.name} has ended with {self.running.process.wait(TIMEOUT)}: {self.log}"
        self.log.append(line)
        return line

    def await_trouble(self, text: str = "") -> None:
        """Waits for the next warning with `text`."""
        while " WARNING " not in (line := self.next_line()) or text not in line:
            pass

    def document(self, is_wanted: Callable[[Any], object]) -> None:
        """Waits for the next document on stdout that is wanted."""
        while not is_wanted(json.loads(self.running.line())):
            pass

    def read_log(self) -> None:
        while self.running.stderr.is_waiting():
            self.next_line()

    def forget(self) -> None:
        """Reads what has been logged up to now, for the next trouble."""
        self.read_log()
        self.log = []


@dataclass
class World:
    """The server, the settings of its owner and of the daemons, the daemons, and who holds the lock they wait for."""

    server: EmbeddedServer
    owner: Settings
    operator: Settings
    daemons: dict[str, Daemon]
    holder: Ownership | None = None

    def start(self, name: str) -> None:
        """Starts a daemon, in the place of one that has ended."""
        if name in self.daemons:
            self.daemons[name].running.remove()
        self.daemons[name] = Daemon(name, self.operator)

    @contextmanager
    def sql(self) -> Iterator[Sql]:
        """A session of the owner, which the troubles leave alone."""
        with psycopg.connect(self.owner.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
            yield conn

    def execute(self, text: str) -> None:
        with self.sql() as sql:
            sql.execute(text.encode())

    def await_trouble(self, text: str = "", *, but: str = "") -> None:
        """Waits until each daemon has logged the trouble."""
        for name, daemon in self.daemons.items():
            if name != but:
                daemon.await_trouble(text)


@pytest.fixture(scope="module")
def world(installation: Installation, pytestconfig: pytest.Config) -> Iterator[World]:
    with new_server(pytestconfig, installation, SHARED_SERVER) as server:
        owner = Settings(dsn=server.dsn)
        migrate_schema(owner)
        made = World(server, owner, replace(owner, dsn=make_conninfo(server.dsn, user=OPERATOR)), {})
        made.execute(f"CREATE ROLE {OPERATOR} LOGIN")
        give_rights(made)
        try:
            yield made
        finally:
            for daemon in made.daemons.values():
                daemon.running.remove()
            if made.holder:
                made.holder.release()


@pytest.fixture
def daemons(world: World) -> World:
    """Starts the daemons that do not run yet, and gives each some work, so that all are known to be at work."""
    started = [name for name in DAEMONS if name not in world.daemons or world.daemons[name].has_ended]
    for name in started:
        world.start(name)
    for name in started:
        if name != "lock run":
            WORK[name](world)
    wait_for_the_lock(world)
    for daemon in world.daemons.values():
        daemon.forget()
    return world


def wait_for_the_lock(world: World) -> None:
    """Has the test hold the lock, and a new `lock run` wait for it."""
    world.daemons["lock run"].running.process.wait(TIMEOUT)
    if world.holder:
        world.holder.release()
    world.holder = acquire_leadership(world.owner.dsn, LOCK)
    world.start("lock run")
    with world.sql() as sql:
        until(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))


# -- the work of each daemon


def settle_a_request(world: World) -> None:
    """Has the leader reject a request whose payload cannot be read, which is a batch like any other."""
    with world.sql() as sql:
        until(lambda: value(sql, "SELECT expires_at > clock_timestamp() FROM leader_lease"))
        request = uuid4()
        sql.execute(
            "INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload)"
            " SELECT %s, epoch, term_id, durable_version, '' FROM leader_lease",
            [request],
        )
        until(lambda: status_of(sql, request) != "pending")
        assert status_of(sql, request) == "rejected"


def status_of(sql: Sql, request: object) -> Any:
    return value(sql, "SELECT status FROM commit_requests WHERE request_id = %s", request)


def run_a_flow(world: World) -> None:
    """Has the worker run two commands; the second becomes eligible when the completion of the first is dispatched."""
    with world.sql() as sql, command_session(world.owner, "test", writes=True) as conn:
        flow = Flow(conn, sql, plan("a b", "a>b", namespace=WORKED))
        until(lambda: flow.states() == {"a": "success", "b": "success"})


def end_a_lease(world: World) -> None:
    """Has the reconciler end a lease that has expired."""
    with world.sql() as sql, command_session(world.owner, "test", writes=True) as conn:
        flow = Flow(conn, sql, plan("a", namespace=RECLAIMED))
        assert executions.claim(conn, "a worker that is gone", 0.001, namespace=RECLAIMED, instance_tag=None)
        until(lambda: flow.state("a") == "eligible")
        flows.cancel(conn, flow.flow_id)  # so that the next claim takes that of the next flow


def print_an_event(world: World) -> None:
    with world.sql() as sql:
        event = value(
            sql,
            "INSERT INTO lease_events (execution_id, lease_id, event_type)"
            " VALUES (gen_random_uuid(), gen_random_uuid(), 'renewed') RETURNING event_id",
        )
    world.daemons["tail"].document(lambda document: document.get("event_id") == event)


def show_a_renewal(world: World) -> None:
    with world.sql() as sql:
        now = value(sql, "SELECT clock_timestamp()")

    def is_later(document: Any) -> bool:
        renewed = document["leader"]["renewed_at"]
        return bool(renewed) and datetime.fromisoformat(renewed) > now

    world.daemons["watch"].document(is_later)


def run_under_the_lock(world: World) -> None:
    assert world.holder
    world.holder.release()
    assert world.daemons["lock run"].running.process.wait(TIMEOUT) == 0


WORK: dict[str, Callable[[World], None]] = {
    "leader run": settle_a_request,
    "worker run": run_a_flow,
    "reconcile": end_a_lease,
    "tail": print_an_event,
    "watch": show_a_renewal,
    "lock run": run_under_the_lock,
}


def work(world: World, *, but: str = "") -> None:
    for name, prove in WORK.items():
        if name != but:
            prove(world)


def assert_survived(world: World) -> None:
    """Asserts that each daemon works again, and has logged each reason once and little else."""
    work(world)
    for name, daemon in world.daemons.items():
        if name != "lock run":  # it has ended well
            assert not daemon.has_ended
            daemon.read_log()
        else:
            daemon.log += daemon.running.stderr.rest()
        warnings = [re.sub(r"^\S+ ", "", line) for line in daemon.log if " WARNING " in line]
        assert len(warnings) == len(set(warnings)), (name, daemon.log)
        assert len(daemon.log) <= LONGEST_LOG, (name, daemon.log)
        assert not any("Traceback" in line for line in daemon.log)


# -- the troubles


SESSIONS = f"FROM pg_stat_activity WHERE usename = '{OPERATOR}' AND starts_with(application_name, 'pgcoord/')"
END_SESSIONS = f"SELECT pg_terminate_backend(pid) {SESSIONS}"
CANCEL_WAITS = f"""SELECT pg_cancel_backend(pid) {SESSIONS} AND wait_event_type = 'Lock'
                       AND split_part(application_name, '/', 2) = ANY (%s)"""
APPLICATIONS = {
    "leader run": ["leader keeper", "leader run"],
    "worker run": ["worker"],
    "reconcile": ["reconcile"],
    "tail": ["tail"],
    "watch": ["leader status"],
    "lock run": [f"lock {LOCK}"],
}
"""The sessions of each daemon."""


def without_server(world: World, seconds: float = 0.0) -> None:
    world.server.stop("immediate")
    world.await_trouble("No such file or directory")
    assert lives_for(world, seconds)
    world.server.start()


def lives_for(world: World, seconds: float) -> bool:
    """Whether the leader's process lives for that long."""
    try:
        world.daemons["leader run"].running.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def with_locked_tables(world: World, seconds: float = 0.0) -> None:
    with world.sql() as sql, sql.transaction():
        lock_tables(sql)
        world.await_trouble(but="lock run")  # its wait is for another lock
        assert lives_for(world, seconds)


def lock_tables(sql: Sql) -> None:
    names = [name for (name,) in sql.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'pgcoord'")]
    sql.execute(f"LOCK TABLE {', '.join(names)} IN ACCESS EXCLUSIVE MODE".encode())


def with_cancelled_statements(world: World) -> None:
    with world.sql() as sql, world.sql() as canceller, sql.transaction():
        lock_tables(sql)
        for name, daemon in world.daemons.items():

            def is_cancelled(name: str = name, daemon: Daemon = daemon) -> bool:
                canceller.execute(CANCEL_WAITS, [APPLICATIONS[name]])
                daemon.read_log()
                return any(" WARNING " in line for line in daemon.log)

            until(is_cancelled)


def with_ended_sessions(world: World) -> None:
    world.execute(END_SESSIONS)
    world.await_trouble(but="reconcile")  # it has a session during a tick only


def with_refused_connections(world: World) -> None:
    """A role's limit is refused with the SQLSTATE of max_connections, and leaves the test its own sessions."""
    with refused_connections(world):
        pass


@contextmanager
def refused_connections(world: World) -> Iterator[None]:
    world.execute(f"ALTER ROLE {OPERATOR} CONNECTION LIMIT 0")
    # In another transaction: until the limit is committed, a daemon could connect again.
    world.execute(END_SESSIONS)
    try:
        world.await_trouble("too many connections")
        yield
    finally:
        world.execute(f"ALTER ROLE {OPERATOR} CONNECTION LIMIT -1")


def without_rights(world: World) -> None:
    world.execute(
        f"REVOKE ALL ON ALL TABLES IN SCHEMA pgcoord FROM {OPERATOR};"
        f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA pgcoord FROM {OPERATOR}"
    )
    world.await_trouble("permission denied", but="lock run")
    give_rights(world)


def give_rights(world: World) -> None:
    with command_session(world.owner, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"operator": [OPERATOR]}, dry_run=False)


TROUBLES = [
    without_server,
    with_locked_tables,
    with_cancelled_statements,
    with_ended_sessions,
    pytest.param(with_refused_connections, marks=pytest.mark.slow),
    pytest.param(without_rights, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_i17_every_daemon_rides_out(trouble: Callable[[World], None], daemons: World) -> None:
    trouble(daemons)
    assert_survived(daemons)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [without_server, with_locked_tables])
def test_i17_every_daemon_rides_out_a_minute(trouble: Callable[[World, float], None], daemons: World) -> None:
    trouble(daemons, 60.0)
    assert_survived(daemons)


# -- exit codes


@pytest.mark.slow
def test_i17_daemons_that_are_stopped_during_an_outage_end_with_success(daemons: World) -> None:
    stopped = [daemons.daemons[name].running for name in ("leader run", "worker run", "reconcile")]
    with refused_connections(daemons):
        assert [daemon.end(signal.SIGTERM)[0] for daemon in stopped] == [0, 0, 0]


EVENTS = {
    "leader run": ("leader", "run", "--ttl", "1s", "-o", "json"),
    "worker run": ("worker", "run", "-o", "json", "--", "true"),
    "reconcile": ("reconcile", "--loop", "--interval", "10ms", "-o", "json"),
}


@pytest.mark.parametrize("name", EVENTS)
def test_i17_a_daemon_whose_readers_are_gone_works_on(name: str, settings: Settings, make: Make, sql: Sql) -> None:
    """Of stdout and stderr: neither its events nor its log can be written, and it ends with success when asked to."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", *EVENTS[name]],
        env=environment(settings.dsn), stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    try:
        if name == "leader run":
            until(lambda: value(sql, "SELECT renewed_at > acquired_at FROM leader_lease"))
        else:
            flow = make(plan("a b", "a>b"))
            if name == "reconcile":
                flow.end("a")
            until(lambda: flow.state("b") == ("eligible" if name == "reconcile" else "success"))
        process.terminate()
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait(TIMEOUT)
