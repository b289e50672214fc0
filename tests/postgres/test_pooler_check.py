"""Behind PgBouncer: in transaction mode every command refuses before it changes anything; session mode works."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgcoord_cli.core.database.session import open_session, open_session_async
from pgcoord_cli.core.embedded.installation import identity, server_account
from pgcoord_cli.errors import UnsuitableServer
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.program_process import Lines
from tests.faults.tail_process import add

if TYPE_CHECKING:
    from tests.conftest import Call, StartLeader

PGBOUNCER = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")

Sql = psycopg.Connection[Any]

CONFIGURATION = """
[databases]
* = host='{host}' port={port} user={user}
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {directory}
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
server_round_robin = {round_robin}
max_client_conn = 100
ignore_startup_parameters = extra_float_digits
"""

Pool = Callable[..., Settings]


@pytest.fixture
def pool(settings: Settings, place: Path) -> Iterator[Pool]:
    """Starts a PgBouncer before the test's database; returns the settings for connecting through it."""
    started: list[tuple[subprocess.Popen[bytes], Lines]] = []

    def start(mode: str, size: int, round_robin: int = 0) -> Settings:
        if account := server_account():
            os.chown(place, account.uid, account.gid)
        file = place / "pgbouncer.ini"
        file.write_text(configuration(settings, place, mode=mode, size=size, round_robin=round_robin))
        file.chmod(0o644)
        assert PGBOUNCER
        process = subprocess.Popen([PGBOUNCER, file], stderr=subprocess.PIPE, cwd="/", **identity(account))
        assert process.stderr
        said = Lines(process.stderr)
        started.append((process, said))
        assert any("process up" in line for line in iter(said.next, None)), "PgBouncer did not start"
        dbname = conninfo_to_dict(settings.dsn)["dbname"]
        return replace(settings, dsn=make_conninfo("", host=str(place), port=6432, user="any", dbname=dbname))

    yield start
    for process, said in started:
        process.terminate()
        process.wait(TIMEOUT)
        said.close()


def configuration(settings: Settings, directory: Path, **chosen: object) -> str:
    server = {"port": 5432} | conninfo_to_dict(settings.dsn)
    return CONFIGURATION.format(host=server["host"], port=server["port"], user=server["user"], directory=directory,
                                **chosen)  # fmt: skip


def backends(pooled: Settings, size: int) -> list[tuple[Any, ...]]:
    """Returns the settings of each backend of a pool, through as many transactions at once."""
    query = """SELECT pg_backend_pid(), current_setting('search_path'), current_setting('statement_timeout'),
                      current_setting('lock_timeout'), current_setting('plan_cache_mode'),
                      ARRAY(SELECT pg_listening_channels())"""
    with ExitStack() as stack:
        rows = []
        for _ in range(size):
            conn = stack.enter_context(closing(psycopg.connect(pooled.dsn)))
            rows.append(conn.execute(query.encode()).fetchone())
            stack.callback(conn.rollback)  # PgBouncer closes a backend whose client leaves a transaction open
    assert len({row[0] for row in rows if row}) == size
    return [row[1:] for row in rows if row]


def advisory_locks(sql: Sql) -> int:
    query = """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    return int(value(sql, query))


# -- transaction mode

COMMANDS = [
    ["leader", "status"],
    ["kv", "set", "key", "value"],
    ["tail", "lease", "--no-follow"],
    ["migrate", "up"],
    ["worker", "run", "--once"],
    ["leader", "run"],  # last: without a refusal it would not end
]

TRANSACTION_POOLS = [(size, round_robin) for size in (1, 2, 5) for round_robin in (0, 1)]


@pytest.mark.parametrize(("size", "round_robin"), TRANSACTION_POOLS)
def test_i14_a_transaction_pooler_is_refused_and_its_backends_are_unchanged(
    call: Call, pool: Pool, sql: Sql, size: int, round_robin: int
) -> None:
    pooled = pool("transaction", size, round_robin)
    before = backends(pooled, size)  # which also fills the pool: probes find idle backends
    for words in COMMANDS:
        answer = call(*words, "-o", "json", PGCOORD_DSN=pooled.dsn)
        assert (answer.code, answer.error["code"]) == (9, "unsuitable_server"), words
        assert "session" in answer.error["hint"]
    assert backends(pooled, size) == before
    assert advisory_locks(sql) == 0


@pytest.mark.parametrize(("size", "round_robin"), TRANSACTION_POOLS)
def test_i14_a_transaction_pooler_without_backends_yet_is_refused(pool: Pool, size: int, round_robin: int) -> None:
    with pytest.raises(UnsuitableServer, match="transaction pooler"):
        open_session(pool("transaction", size, round_robin), "test", writes=False).close()


@pytest.mark.parametrize(("size", "round_robin"), TRANSACTION_POOLS)
def test_i14_asyncio_sessions_refuse_a_transaction_pooler(pool: Pool, size: int, round_robin: int) -> None:
    pooled = pool("transaction", size, round_robin)
    before = backends(pooled, size)
    with pytest.raises(UnsuitableServer, match="transaction pooler"):
        asyncio.run(opened(pooled))
    assert backends(pooled, size) == before


async def opened(pooled: Settings) -> None:
    await (await open_session_async(pooled, "test", writes=True)).close()


def test_i14_a_transaction_pooler_is_refused_while_other_clients_use_it(pool: Pool) -> None:
    """Two of three backends are busy, so that the session and the probes share one."""
    pooled = pool("transaction", 3)
    with ExitStack() as busy:
        for _ in range(2):
            busy.enter_context(closing(psycopg.connect(pooled.dsn))).execute("SELECT 1")
        with pytest.raises(UnsuitableServer):
            open_session(pooled, "test", writes=False).close()


def pids(pooled: Settings, size: int) -> set[int]:
    """Returns the pids of the backends of a pool."""
    with ExitStack() as stack:
        found = set()
        for _ in range(size):
            conn = stack.enter_context(closing(psycopg.connect(pooled.dsn)))
            found.add(value(conn, "SELECT pg_backend_pid()"))
            stack.callback(conn.rollback)
    return found


@pytest.mark.parametrize("size", [1, 2, 5])
def test_i14_probing_closes_no_backends_of_a_pool(pool: Pool, size: int) -> None:
    pooled = pool("transaction", size)
    before = pids(pooled, size)
    with pytest.raises(UnsuitableServer):
        open_session(pooled, "test", writes=False).close()
    assert pids(pooled, size) == before


# -- session mode


@pytest.mark.parametrize("size", [1, 2])
def test_in_session_mode_a_command_of_one_connection_works(
    call: Call, pool: Pool, sql: Sql, start_leader: StartLeader, size: int
) -> None:
    start_leader("A").wait_for("elected epoch 1")
    add(sql)
    pooled = pool("session", size)
    status = call("leader", "status", "-o", "json", PGCOORD_DSN=pooled.dsn)
    assert (status.code, status.document["leader"]["epoch"]) == (0, 1)
    tailed = call("tail", "lease", "--no-follow", "--from-start", "-o", "plain", PGCOORD_DSN=pooled.dsn)
    assert (tailed.code, len(tailed.out.splitlines())) == (0, 1)


def test_in_session_mode_a_leader_is_elected_and_a_client_writes(
    call: Call, pool: Pool, start_leader: StartLeader
) -> None:
    pooled = pool("session", 20)
    start_leader("A", settings=pooled).wait_for("elected epoch 1")
    assert call("kv", "set", "key", "value", PGCOORD_DSN=pooled.dsn).code == 0
    assert call("kv", "get", "key", "-o", "plain").out == "value\n"


def test_in_session_mode_sessions_have_their_settings_also_for_asyncio(pool: Pool) -> None:
    pooled = replace(pool("session", 4), statement_timeout=12.0)
    query = "SELECT current_setting('search_path'), current_setting('statement_timeout')"
    with closing(open_session(pooled, "test", writes=True)) as conn:
        assert conn.execute(query).fetchone() == ("pgcoord, pg_temp", "12s")

    async def ask() -> Any:
        conn = await open_session_async(pooled, "test", writes=True)
        row = await (await conn.execute(query)).fetchone()
        await conn.close()
        return row

    assert asyncio.run(ask()) == ("pgcoord, pg_temp", "12s")


# -- no pooler


def sessions_so_far(sql: Sql) -> int:
    """Returns the number of sessions so far, once all but this one have ended and been counted."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    until(lambda: value(sql, others) == 0)
    sql.execute("SELECT pg_stat_force_next_flush()")
    sql.execute("SELECT")
    return int(value(sql, "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"))


@pytest.mark.parametrize("words", [["leader", "status"], ["kv", "get", "key"], ["tail", "lease", "--no-follow"]])
def test_without_a_pooler_nothing_is_probed(call: Call, sql: Sql, words: Sequence[str]) -> None:
    before = sessions_so_far(sql)
    assert call(*words).code in (0, 3)
    assert sessions_so_far(sql) == before + 1
