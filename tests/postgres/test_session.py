"""Opening a session: the source of the address, the settings of the session, and the errors."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgcoord_cli.core.database import session
from pgcoord_cli.core.database.advisory_keys import lock_key
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import Installation, server_account
from pgcoord_cli.core.embedded.server import EmbeddedServer, temporary_server
from pgcoord_cli.db import connection
from pgcoord_cli.errors import Busy, ConnectionFailed, PgcoordError, SchemaMissing, TimedOut, UnsuitableServer
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value

if TYPE_CHECKING:
    from tests.conftest import Call

SECRET = "hunter2"

REQUEST_ID = "7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f"


@pytest.fixture
def call(offline: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `pgcoord …` in this process, with no PG* environment variables but the given ones."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    return offline


@pytest.fixture
def primary(installation: Installation) -> Iterator[EmbeddedServer]:
    """A migrated server for one test, with one key."""
    with temporary_server(installation) as running:
        upgrade(Settings(dsn=running.dsn))
        with psycopg.connect(running.dsn, autocommit=True) as conn:
            conn.execute("INSERT INTO pgcoord.kv VALUES ('key', 'value')")
        yield running


@contextmanager
def standby_of(primary: EmbeddedServer, installation: Installation) -> Iterator[EmbeddedServer]:
    """A streaming standby of the server."""
    with tempfile.TemporaryDirectory(prefix="pgcoord-standby-", dir="/tmp") as name:
        root = Path(name)
        root.chmod(0o711)
        standby = EmbeddedServer(root, installation)
        standby.data.mkdir(mode=0o700)
        identity: dict[str, Any] = {}
        if account := server_account():
            os.chown(standby.data, account.uid, account.gid)
            identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
        subprocess.run(
            [installation.bin_dir / "pg_basebackup", "--pgdata", standby.data, "--dbname", primary.dsn,
             "--write-recovery-conf", "--checkpoint=fast", "--no-sync"],
            cwd="/", check=True, **identity,
        )  # fmt: skip
        standby.start()
        try:
            yield standby
        finally:
            standby.stop("immediate")


def everything(dsn: str) -> list[Any]:
    """Every row of the schema."""
    with psycopg.connect(dsn, options="-c search_path=pgcoord") as conn:
        tables = ("leader_lease", "leader_history", "commit_requests", "kv", "schema_migrations")
        return [conn.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables]


# Unsuitable servers


def test_i14_on_a_standby_commands_read_and_change_nothing(
    call: Call, primary: EmbeddedServer, installation: Installation
) -> None:
    reading = {
        "leader status": 3, "leader history": 0, "leader assert --epoch 1": 6,
        "leader wait": 9, "leader status --watch": 9,  # a standby sends no notifications
        "kv get key": 0, "kv get key --at 0": 9, "kv range": 0, "kv export": 0,
        "commit list": 0, f"commit show {REQUEST_ID}": 3, f"commit explain {REQUEST_ID}": 3,
        "commit explain --hot": 0,
        "migrate status --check": 0, "migrate verify": 0, "migrate up --dry-run": 0,
        "migrate grant --reader postgres --dry-run": 0, "gc commit-requests --dry-run": 0,
    }  # fmt: skip
    writing = (
        "leader run", "leader step-down", "kv set key other", "kv clear key", "kv clear-range a z", "kv add key 1",
        "kv load /dev/null", "migrate up", "migrate grant --reader postgres", "gc commit-requests", "bench",
        "kv txn docs/transaction.jsonl", "leader step-down --wait", "kv watch key", "tail completion",
        "lock run name true --wait 1m", "worker run", "reconcile --loop",
    )  # fmt: skip
    before = everything(primary.dsn)
    with standby_of(primary, installation) as standby:
        codes = {words: call(*words.split(), "--dsn", standby.dsn).code for words in [*reading, *writing]}
        assert codes == reading | dict.fromkeys(writing, 9)
        answer = call("kv", "set", "key", "other", "-o", "json", "--dsn", standby.dsn)
        error = json.loads(answer.out)["error"]
        assert error["code"] == "unsuitable_server"
        assert "standby" in error["message"]
        assert "target_session_attrs=read-write" in error["hint"]
        asyncio.run(open_and_close(Settings(dsn=standby.dsn), writes=False))
        with pytest.raises(UnsuitableServer, match="standby"):
            asyncio.run(open_and_close(Settings(dsn=standby.dsn), writes=True))
        assert everything(standby.dsn) == before

        # The cure that the hint names works in any order of the servers.
        assert call("gc", "commit-requests", "--dsn", any_of(standby, primary)).code == 0
    assert everything(primary.dsn) == before


def test_i15_on_a_standby_a_default_of_serializable_transactions_has_no_effect(
    call: Call, primary: EmbeddedServer, installation: Installation
) -> None:
    with standby_of(primary, installation) as standby:
        dsn = make_conninfo(standby.dsn, options="-c default_transaction_isolation=serializable")
        assert call("kv", "get", "key", "-o", "plain", "--dsn", dsn).out == "value\n"
        asyncio.run(open_and_close(Settings(dsn=dsn), writes=False))


async def open_and_close(settings: Settings, *, writes: bool) -> None:
    await (await session.open_session_async(settings, "test", writes=writes)).close()


def any_of(*servers: EmbeddedServer) -> str:
    hosts = [str(server.socket_directory) for server in servers]
    return f"host={','.join(hosts)} user=postgres dbname=postgres target_session_attrs=read-write"


def test_i14_a_server_that_is_too_old_is_refused() -> None:
    with pytest.raises(UnsuitableServer, match="PostgreSQL 14 is not supported") as refused:
        session._server((1, True, 140_000, False, True))
    assert refused.value.hint == "pgcoord needs PostgreSQL 15 or newer"
    assert session._server((1, True, 150_000, False, True)).has_ledger


def test_i14_asyncio_sessions_make_the_same_checks(settings: Settings, empty_settings: Settings) -> None:
    def refused_alike(wanted: Settings, code: str) -> None:
        with pytest.raises(PgcoordError) as refused:
            session.open_session(wanted, "test", writes=True)
        with pytest.raises(PgcoordError) as refused_too:
            asyncio.run(open_and_close(wanted, writes=True))
        assert refused.value.code == code
        assert (refused_too.value.code, str(refused_too.value)) == (code, str(refused.value))

    asyncio.run(open_and_close(settings, writes=True))
    refused_alike(empty_settings, "schema_missing")
    refused_alike(replace(settings, schema="other", schema_given=True), "schema_missing")
    with psycopg.connect(settings.dsn, autocommit=True) as conn:
        conn.execute("INSERT INTO pgcoord.schema_migrations VALUES (9001, 'new', 'x', now(), 'x', 1, true)")
        refused_alike(settings, "schema_unknown")
        conn.execute("DELETE FROM pgcoord.schema_migrations WHERE version > 1")
        refused_alike(settings, "schema_missing")


# Malformed addresses

MALFORMED = [
    "mydatabase",
    f"host=localhost password={SECRET} and more",
    f"host=localhost password='{SECRET}",
    f"host=localhost password={SECRET} no_such_option=1",
    f"postgresql://me:{SECRET}@[::1/db",
    f"postgresql://me:{SECRET}%zz@localhost/db",
    f"postgresql://me:{SECRET}@localhost/db?no_such_option=1",
    f"postgresql://me:a@{SECRET}@localhost/db",
    f"postgresql://me:{SECRET}/a@localhost/db",
    f"postgres://me:a/{SECRET}@localhost/db",
    f"postgresql://me:{SECRET}",
    f"postgresql://me:{SECRET}@localhost:port/db",
    f"host=localhost port=70000 password={SECRET}",
    f"host=one,two,three port=1,2 password={SECRET}",
    f"host=localhost sslmode=perhaps password={SECRET}",
    f"host=localhost connect_timeout=soon password={SECRET}",
    f"host=localhost keepalives_idle=soon password={SECRET}",
    f"host=localhost target_session_attrs=any-at-all password={SECRET}",
    f"service=no_such_service password={SECRET}",
]


@pytest.mark.parametrize("dsn", MALFORMED)
def test_a_malformed_address_is_a_usage_error_without_the_password(dsn: str, call: Call) -> None:
    for words in (("migrate", "status"), ("leader", "status", "-v"), ("kv", "set", "k", "v", "-o", "json")):
        for source, answer in {
            "--dsn": call(*words, "--dsn", dsn), "PGCOORD_DSN": call(*words, PGCOORD_DSN=dsn),
        }.items():  # fmt: skip
            assert answer.code == 2, answer
            assert f"{source}: " in answer.out + answer.err
            assert SECRET not in answer.out + answer.err
            assert len((answer.out + answer.err).splitlines()) <= 7


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me@localhost/db", "postgresql:///db?host=/tmp/a@b", "postgresql://me:p%40ss%2F@h1:1,h2:2/db",
        "postgresql://", "postgresql://?user=me@there", "host=/tmp port=5432,5433", "host=a@b user=c@d", "",
        "postgresql://me:what?is#this@localhost/db",
    ],
)  # fmt: skip
def test_an_unusual_address_is_accepted(dsn: str) -> None:
    given = conninfo_to_dict(connection.conninfo(Settings(dsn=dsn), "test"))
    assert given.items() >= conninfo_to_dict(dsn).items()


@pytest.mark.parametrize(
    ("variables", "named"),
    [({"PGPORT": "many"}, '"port"'), ({"PGSSLMODE": "perhaps"}, "sslmode"), ({"PGSERVICE": "none"}, "service")],
)
def test_a_malformed_variable_of_libpq_is_a_usage_error(variables: dict[str, str], named: str, call: Call) -> None:
    answer = call("migrate", "status", **variables)
    assert answer.code == 2
    assert answer.err.startswith("error: libpq's environment: ")
    assert named in answer.err


def test_a_secret_in_the_text_of_an_error_is_struck_out() -> None:
    texts = [f"x postgresql://me:{SECRET}@host/db y", f"password={SECRET} z", f"PASSWORD = '{SECRET} {SECRET}' z"]
    assert [connection.redact(text) for text in texts] == [
        "x postgresql://me:***@host/db y", "password=*** z", "PASSWORD = *** z",
    ]  # fmt: skip
    assert SECRET not in repr(Settings(dsn=f"password={SECRET}"))


# Servers that do not answer, or refuse the session


@pytest.mark.parametrize(
    ("dsn", "reason"),
    [
        ("host=127.0.0.1 port=1", 'connection to server at "127.0.0.1", port 1 failed: Connection refused'),
        ("host=/nowhere", 'connection to server on socket "/nowhere/.s.PGSQL.5432" failed: No such file or directory'),
        ("host=/nowhere,127.0.0.1 port=1", 'connection to server at "127.0.0.1", port 1 failed: Connection refused'),
        ("host=no-such-host.invalid", "failed to resolve host 'no-such-host.invalid'"),
    ],
)
def test_an_unreachable_server_is_reported_in_one_line_and_a_hint(dsn: str, reason: str, call: Call) -> None:
    answer = call("leader", "status", PGCOORD_DSN=f"{dsn} password={SECRET}")
    assert (answer.code, answer.out) == (4, "")
    error, hint = answer.err.splitlines()
    assert error.startswith(f"error: cannot connect: {reason}")
    assert hint.startswith("hint: the address comes from PGCOORD_DSN; is the server up?")
    assert SECRET not in answer.err

    answer = call("kv", "set", "k", "v", "-o", "json", "--dsn", f"{dsn} password={SECRET}")
    assert (answer.code, answer.err) == (4, "")
    assert json.loads(answer.out)["error"]["code"] == "cannot_connect"
    assert SECRET not in answer.out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dbname": "no_such_database"}, 'database "no_such_database" does not exist'),
        ({"user": "no_such_role"}, 'role "no_such_role" does not exist'),
    ],
)
def test_a_missing_database_or_role_is_named(
    changes: dict[str, str], reason: str, call: Call, server: EmbeddedServer
) -> None:
    answer = call("leader", "status", "--dsn", make_conninfo(server.dsn, password=SECRET, **changes))
    assert answer.code == 4
    assert reason in answer.err.splitlines()[0]
    assert len(answer.err.splitlines()) == 2
    assert SECRET not in answer.err


def test_a_wrong_password_is_refused_and_not_shown(call: Call, own_server: EmbeddedServer) -> None:
    with psycopg.connect(own_server.dsn, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{SECRET}'")
    rules = own_server.data / "pg_hba.conf"
    rules.write_text(f"local all guarded scram-sha-256\n{rules.read_text()}")
    own_server.stop()
    own_server.start()
    guarded = make_conninfo(own_server.dsn, user="guarded")
    right = make_conninfo(guarded, password=SECRET)
    assert call("migrate", "status", "--dsn", right).code == 0
    assert call("migrate", "status", "--dsn", guarded, PGPASSWORD=SECRET).code == 0
    wrong = call("migrate", "status", "-v", "--dsn", make_conninfo(right, password=f"wrong{SECRET}"))
    assert wrong.code == 4
    assert 'password authentication failed for user "guarded"' in wrong.err
    none = call("migrate", "status", "--dsn", guarded)
    assert none.code == 4
    assert "no password supplied" in none.err
    assert all(len(answer.err.splitlines()) == 2 and SECRET not in answer.err for answer in (wrong, none))


def test_a_connection_lost_while_waiting_is_reported_in_one_line_and_a_hint(empty_settings: Settings) -> None:
    with psycopg.connect(empty_settings.dsn, autocommit=True) as admin:
        admin.execute("SELECT pg_advisory_lock(%s)", [lock_key("pgcoord", "migrate")])
        process = subprocess.Popen(
            [sys.executable, "-m", "pgcoord_cli", "migrate", "up", "-q", "--dsn", empty_settings.dsn],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        waiting = (
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/migrate' AND wait_event = 'advisory'"
        )
        deadline = time.monotonic() + TIMEOUT
        while not (found := admin.execute(waiting).fetchone()):
            assert time.monotonic() < deadline
        admin.execute("SELECT pg_terminate_backend(%s)", found)
        out, err = process.communicate(timeout=TIMEOUT)
        assert admin.execute("SELECT to_regnamespace('pgcoord')").fetchone() == (None,)
    assert (process.returncode, out) == (4, "")
    assert err.splitlines() == [
        "error: connection lost: terminating connection due to administrator command",
        "hint: is the server still up?",
    ]


# The source of the address


def test_the_flag_has_precedence_over_the_variable_and_that_over_libpq(call: Call, settings: Settings) -> None:
    nowhere = "host=/nowhere"
    assert call("migrate", "verify", "--dsn", settings.dsn, PGCOORD_DSN=nowhere, PGHOST="/nowhere").code == 0
    assert call("migrate", "verify", PGCOORD_DSN=settings.dsn, PGHOST="/nowhere").code == 0
    assert call("migrate", "verify", PGCOORD_DSN=nowhere, PGHOST=libpq(settings)["PGHOST"]).code == 4


def libpq(settings: Settings) -> dict[str, str]:
    """Returns the address as libpq's environment variables."""
    given = conninfo_to_dict(settings.dsn)
    return {"PGHOST": str(given["host"]), "PGUSER": str(given["user"]), "PGDATABASE": str(given["dbname"])}


def test_without_an_address_libpqs_environment_and_service_file_are_used(
    call: Call, settings: Settings, tmp_path: Path
) -> None:
    assert call("migrate", "verify", **libpq(settings)).code == 0
    given = conninfo_to_dict(settings.dsn)
    file = tmp_path / "pg_service.conf"
    file.write_text("[coordination]\n" + "".join(f"{name}={value}\n" for name, value in given.items()))
    assert call("migrate", "verify", PGSERVICEFILE=str(file), PGSERVICE="coordination").code == 0
    assert call("migrate", "verify", "--dsn", "service=coordination", PGSERVICEFILE=str(file)).code == 0
    answer = call("migrate", "verify", PGHOST="/nowhere")
    assert answer.code == 4
    assert "the address comes from libpq's environment" in answer.err


def test_of_several_hosts_an_unreachable_one_is_skipped(call: Call, settings: Settings) -> None:
    given = conninfo_to_dict(settings.dsn)
    several = make_conninfo(settings.dsn, host=f"/nowhere,{given['host']}", target_session_attrs="read-write")
    assert call("gc", "commit-requests", "--dsn", several).code == 0
    uri = f"postgresql://postgres@127.0.0.1:1/{given['dbname']}?target_session_attrs=read-write"
    assert call("gc", "commit-requests", "--dsn", uri).code == 4


# The settings of a session


def setting(conn: psycopg.Connection[Any], name: str) -> Any:
    row = conn.execute(f"SHOW {name}").fetchone()
    assert row is not None
    return row[0]


def test_a_session_has_its_application_name_and_timeouts(settings: Settings) -> None:
    given = replace(settings, statement_timeout=2.5, lock_timeout=0.25)
    with session.command_session(given, "kv get", writes=False) as conn, psycopg.connect(settings.dsn) as onlooker:
        seen = onlooker.execute(
            "SELECT application_name FROM pg_stat_activity WHERE pid = %s", [conn.info.backend_pid]
        ).fetchone()
        assert seen == ("pgcoord/kv get",)
        shown = [setting(conn, name) for name in ("statement_timeout", "lock_timeout", "search_path")]
        assert shown == ["2500ms", "250ms", "pgcoord, pg_temp"]
    with session.migration_session(given, read_only=False) as (conn, _):
        assert setting(conn, "application_name") == "pgcoord/migrate"
        # A migration has no statement timeout.
        assert (setting(conn, "statement_timeout"), setting(conn, "lock_timeout")) == ("0", "250ms")


def test_dead_peers_are_detected_unless_the_address_says_otherwise(settings: Settings) -> None:
    with closing(session.open_session(settings, "test", writes=False)) as conn:
        parameters = conn.info.get_parameters()
        expected = {name: str(value) for name, value in connection.LIVENESS_DEFAULTS.items()}
        assert parameters.items() >= expected.items()
    own = make_conninfo(settings.dsn, tcp_user_timeout=1, keepalives_idle=2, connect_timeout=3, application_name="mine")
    chosen = conninfo_to_dict(connection.conninfo(replace(settings, dsn=own), "test"))
    assert (chosen["tcp_user_timeout"], chosen["keepalives_idle"], chosen["connect_timeout"]) == ("1", "2", "3")
    assert chosen["application_name"] == "pgcoord/test"


def test_libpqs_environment_overrides_defaults_and_is_overridden_by_settings(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def chosen(given: Settings) -> tuple[object, object]:
        options = conninfo_to_dict(connection.conninfo(given, "test"))
        return options["connect_timeout"], options["keepalives_idle"]

    assert chosen(settings) == ("10", "10")
    (tmp_path / "services").write_text("[slow]\nconnect_timeout=77\nkeepalives_idle=66\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGSERVICE", "slow")
    assert chosen(settings) == ("77", "66")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "55")
    assert chosen(settings) == ("77", "66"), "libpq reads a service before its variables"
    monkeypatch.delenv("PGSERVICE")
    assert chosen(settings) == ("55", "10")
    assert chosen(replace(settings, connect_timeout=4.2)) == ("4", "10")
    assert chosen(replace(settings, dsn=make_conninfo(settings.dsn, connect_timeout=3))) == ("3", "10")


def test_timeouts_come_from_the_environment(call: Call, settings: Settings) -> None:
    with psycopg.connect(settings.dsn) as other:
        other.execute("LOCK TABLE pgcoord.kv")
        dsn = {"PGCOORD_DSN": settings.dsn}
        statement = call("kv", "get", "key", PGCOORD_STATEMENT_TIMEOUT="50ms", **dsn)
        lock = call("kv", "get", "key", PGCOORD_LOCK_TIMEOUT="50ms", **dsn)
    assert (statement.code, statement.err.splitlines()[1]) == (
        124,
        "hint: raise the limit with PGCOORD_STATEMENT_TIMEOUT",
    )
    assert lock.code == 5
    wrong = call("kv", "get", "key", PGCOORD_LOCK_TIMEOUT="soon", **dsn)
    assert (wrong.code, "PGCOORD_LOCK_TIMEOUT" in wrong.err) == (2, True)


def test_errors_within_a_session_are_translated(settings: Settings) -> None:
    blocked = replace(settings, statement_timeout=0.05, lock_timeout=0)
    with psycopg.connect(settings.dsn) as other:
        other.execute("LOCK TABLE pgcoord.kv")
        with pytest.raises(TimedOut), session.command_session(blocked, "test", writes=False) as conn:
            conn.execute("TABLE kv")
        with (
            pytest.raises(Busy),
            session.command_session(replace(settings, lock_timeout=0.05), "test", writes=False) as conn,
        ):
            conn.execute("TABLE kv")
    with pytest.raises(ConnectionFailed), session.command_session(settings, "test", writes=False) as conn:
        conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def test_a_refused_session_is_closed(settings: Settings, empty_settings: Settings) -> None:
    with pytest.raises(SchemaMissing):
        session.open_session(replace(settings, schema="other", schema_given=True), "test", writes=True)
    with psycopg.connect(settings.dsn, autocommit=True) as conn:
        deadline = time.monotonic() + TIMEOUT
        others = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        while conn.execute(others).fetchone():
            assert time.monotonic() < deadline


def test_i3_a_session_that_ends_with_any_code_leaves_the_outcome_unknown(
    settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    """The code is none of those for lost connections; the severity of the error shows the loss."""
    with psycopg.connect(settings.dsn) as conn:
        # Set within the transaction, so that it does not end the session between BEGIN and the first statement.
        conn.execute("SET LOCAL idle_in_transaction_session_timeout = '1ms'")
        ended = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)"
        until(lambda: value(sql, ended, conn.info.backend_pid))
        with pytest.raises(psycopg.Error) as caught:
            conn.execute("SELECT 1")
    assert caught.value.sqlstate == "25P03"
    assert connection.is_connection_lost(caught.value)
    assert isinstance(connection.translate(caught.value), ConnectionFailed)
