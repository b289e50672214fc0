"""`migrate grant`: each kind of role can do its work through the program, and nothing else by SQL."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege
from psycopg.sql import SQL, Identifier

from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.errors import PermissionDenied, UsageError
from pgcoord_cli.settings import Settings

if TYPE_CHECKING:
    from pgcoord_cli.core.embedded.server import EmbeddedServer
    from tests.conftest import Cli, StartLeader

NewRole = Callable[..., str]


@pytest.fixture
def new_role(sql: psycopg.Connection[Any]) -> NewRole:
    """Creates a role that may only log in; its name has the given beginning."""

    def make(beginning: str = "role") -> str:
        name = f"{beginning}_{uuid.uuid4().hex[:8]}"
        sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
        return name

    return make


def as_role(settings: Settings, role: str) -> Settings:
    return replace(settings, dsn=make_conninfo(settings.dsn, user=role))


def give(settings: Settings, **wanted: list[str]) -> None:
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, wanted, dry_run=False)


@pytest.fixture
def reader(settings: Settings, new_role: NewRole) -> Settings:
    """The settings of a reader of the test's database."""
    role = new_role("reader")
    give(settings, reader=[role])
    return as_role(settings, role)


@pytest.fixture
def client(settings: Settings, new_role: NewRole) -> Settings:
    """The settings of a client of the test's database."""
    role = new_role("client")
    give(settings, client=[role])
    return as_role(settings, role)


@pytest.fixture
def operator(settings: Settings, new_role: NewRole) -> Settings:
    """The settings of an operator of the test's database."""
    role = new_role("operator")
    give(settings, operator=[role])
    return as_role(settings, role)


def refused(settings: Settings, *statements: str) -> None:
    """Asserts that the role has the right to execute none of the statements."""
    with psycopg.connect(settings.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
        for statement in statements:
            with pytest.raises(InsufficientPrivilege):
                conn.execute(statement)


def rights(conn: psycopg.Connection[Any]) -> Any:
    """Returns the access rights of the schema, its relations and columns."""
    return conn.execute(
        "SELECT array_agg(ROW(relname, relacl::text) ORDER BY relname)::text,"
        "       (SELECT nspacl::text FROM pg_namespace WHERE nspname = 'pgcoord'),"
        "       (SELECT array_agg(ROW(attrelid::regclass, attname, attacl::text)) FROM pg_attribute"
        "         WHERE attacl IS NOT NULL)::text"
        "  FROM pg_class WHERE relnamespace = 'pgcoord'::regnamespace"
    ).fetchone()


# Through the program


def test_a_reader_can_read_the_status_but_no_data(cli: Cli, reader: Settings) -> None:
    assert cli("leader", "status", settings=reader).returncode == 3  # no leader
    assert cli("leader", "history", settings=reader).returncode == 0
    assert cli("commit", "list", settings=reader).returncode == 0
    assert cli("migrate", "status", "--check", settings=reader).returncode == 0
    assert "up to date" in cli("migrate", "up", settings=reader).stderr, (
        "without pending migrations no right to create is needed"
    )
    denied = cli("kv", "get", "key", "-o", "json", settings=reader)
    assert denied.returncode == 1
    error = json.loads(denied.stdout)["error"]
    assert (error["code"], error["message"]) == ("permission_denied", "permission denied for table kv")
    assert "pgcoord migrate grant" in error["hint"]


@pytest.mark.parametrize("words", [("--once",), ("--once", "--concurrency", "3"), ()], ids=str)
def test_a_worker_without_the_rights_reports_that_and_ends(words: tuple[str, ...], cli: Cli, reader: Settings) -> None:
    denied = cli("worker", "run", "-q", *words, "--", "true", settings=reader)
    assert denied.returncode == 1
    assert "permission denied for table" in denied.stderr
    assert "pgcoord migrate grant" in denied.stderr


def test_a_client_reads_and_writes_through_a_leader_that_is_an_operator(
    cli: Cli, start_leader: StartLeader, client: Settings, reader: Settings, operator: Settings
) -> None:
    start_leader("one", settings=operator).wait_for("elected epoch")
    written = cli("kv", "set", "key", "value", settings=client)
    assert written.returncode == 0, written.stderr
    assert cli("kv", "get", "key", "-o", "plain", settings=client).stdout == "value\n"
    assert cli("leader", "status", settings=reader).returncode == 0
    denied = cli("kv", "set", "key", "other", settings=reader)
    assert (denied.returncode, denied.stderr.splitlines()[0]) == (1, "error: permission denied for table kv"), denied
    collected = cli("gc", "commit-requests", "-o", "json", settings=operator)
    assert (collected.returncode, collected.stderr) == (0, "")
    denied = cli("gc", "commit-requests", settings=client)
    assert (denied.returncode, denied.stderr.splitlines()[0]) == (
        1,
        "error: permission denied for table commit_requests",
    )


def test_an_operator_is_elected_after_another_operator(
    start_leader: StartLeader, settings: Settings, new_role: NewRole, operator: Settings
) -> None:
    second = new_role("operator")
    give(settings, operator=[second])
    first = start_leader("first", settings=operator)
    first.wait_for("elected epoch")
    assert first.end() == 0
    assert "epoch 2" in start_leader("second", settings=as_role(settings, second)).wait_for("elected epoch")


def test_an_operator_cannot_migrate(cli: Cli, operator: Settings, sql: psycopg.Connection[Any]) -> None:
    sql.execute("DELETE FROM schema_migrations WHERE version > 1")
    denied = cli("migrate", "up", "-o", "json", settings=operator)
    assert denied.returncode == 1
    assert json.loads(denied.stdout)["error"]["code"] == "permission_denied"
    assert sql.execute("SELECT count(*) FROM schema_migrations").fetchone() == (1,)


# By SQL


def test_a_reader_can_change_nothing_and_read_neither_data_nor_payloads(reader: Settings) -> None:
    refused(
        reader,
        "SELECT * FROM kv",
        "SELECT payload FROM commit_requests",
        "SELECT reply_channel FROM commit_requests",
        "INSERT INTO commit_requests (request_id, epoch, read_version, payload) VALUES (gen_random_uuid(), 1, 0, '')",
        "UPDATE leader_lease SET expires_at = now()",
        "DELETE FROM leader_history",
        "UPDATE schema_migrations SET breaking = true",
        "CREATE TABLE mine ()",
    )


def test_i18_a_client_can_submit_requests_but_not_settle_them(client: Settings, sql: psycopg.Connection[Any]) -> None:
    columns, values = "request_id, epoch, read_version, payload", "gen_random_uuid(), 1, 0, ''"
    refused(
        client,
        "UPDATE commit_requests SET status = 'committed', commit_version = 1, resolved_at = now()",
        "UPDATE commit_requests SET payload = ''",
        "DELETE FROM commit_requests",
        f"INSERT INTO commit_requests ({columns}, status) VALUES ({values}, 'pending')",
        f"INSERT INTO commit_requests ({columns}, status, commit_version, resolved_at)"
        f" VALUES ({values}, 'committed', 1, now())",
        f"INSERT INTO commit_requests ({columns}, created_at) VALUES ({values}, now())",
        "INSERT INTO kv VALUES ('key', 'value')",
        "UPDATE kv SET value = ''",
        "DELETE FROM kv",
        "UPDATE leader_lease SET durable_version = 9",
        "SELECT settle_commits(1, NULL, 0, 0, 0, 0, 0, '{}', '{}', '{}', '{}')",
        "SELECT write_data('{}', '{}', '{}', '{key}', '{value}', 0, 0::smallint)",
        "CREATE TABLE mine ()",
    )
    with psycopg.connect(client.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
        conn.execute(f"INSERT INTO commit_requests ({columns}) VALUES ({values})")
    assert sql.execute("SELECT status, commit_version FROM commit_requests").fetchall() == [("pending", None)]


def test_a_client_can_make_direct_commits(
    cli: Cli, start_leader: StartLeader, client: Settings, operator: Settings, sql: psycopg.Connection[Any]
) -> None:
    start_leader("one", settings=operator).wait_for("elected epoch")
    for number in range(2):
        written = cli("kv", "set", f"key{number}", "value", settings=client)
        assert written.returncode == 0, written.stderr
    assert sql.execute("SELECT status, reply_channel FROM commit_requests").fetchall() == [("committed", None)] * 2


def test_an_operator_can_change_neither_the_schema_nor_its_ledger(operator: Settings) -> None:
    refused(
        operator,
        "INSERT INTO schema_migrations VALUES (9001, 'new', 'x', now(), 'x', 1, true)",
        "UPDATE schema_migrations SET breaking = true",
        "DELETE FROM schema_migrations",
        "TRUNCATE kv",
        "DROP TABLE kv",
        "ALTER TABLE kv ADD COLUMN more text",
        "CREATE TABLE mine ()",
        "DROP SCHEMA pgcoord CASCADE",
        "CREATE FUNCTION mine() RETURNS void LANGUAGE sql AS ''",
    )


# Granting


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding_works(
    cli: Cli, server: EmbeddedServer, sql: psycopg.Connection[Any], encoding: str
) -> None:
    name = f"in_{encoding.lower()}"
    sql.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        settings = Settings(dsn=make_conninfo(server.dsn, dbname=name))
        for words in (
            ("migrate", "up"),
            ("migrate", "grant", "--client", "postgres", "--dry-run"),
            ("migrate", "verify"),
        ):
            done = cli(*words, settings=settings)
            assert done.returncode == 0, done.stderr
        assert json.loads(cli("leader", "status", "-o", "json", settings=settings).stdout)["leader"]["held"] is False
    finally:
        sql.execute(f"DROP DATABASE {name}")


def test_an_unknown_role_is_refused_before_anything_is_granted(
    cli: Cli, sql: psycopg.Connection[Any], new_role: NewRole
) -> None:
    known, before = new_role(), rights(sql)
    for kind in grants.KINDS:
        answer = cli("migrate", "grant", "--reader", known, f"--{kind}", 'No "such" role', "-o", "json")
        assert answer.returncode == 2
        error = json.loads(answer.stdout)["error"]
        assert error["message"].startswith(f"--{kind}: there is no role ")
        assert error["hint"] == 'create it first: CREATE ROLE "No ""such"" role" LOGIN'
    assert rights(sql) == before


def test_a_grant_without_a_role_is_a_usage_error(cli: Cli) -> None:
    answer = cli("migrate", "grant")
    assert answer.returncode == 2
    assert all(f"--{kind}" in answer.stderr for kind in grants.KINDS)


def test_a_dry_run_prints_the_statements_and_changes_nothing(
    cli: Cli, sql: psycopg.Connection[Any], new_role: NewRole
) -> None:
    before = rights(sql)
    role = new_role()
    words = ("migrate", "grant", "--reader", role, "--operator", role, "-o", "json")
    planned = cli(*words, "--dry-run")
    assert planned.returncode == 0
    assert rights(sql) == before
    statements = json.loads(planned.stdout)
    assert {item["kind"] for item in statements} == {"reader", "operator"}
    assert all(item["role"] == role and f" {role}" in item["statement"] for item in statements)
    assert cli(*words).stdout == planned.stdout
    assert rights(sql) != before


@pytest.mark.parametrize("beginning", ["UpperCase", 'quo"ted', "it's", "semi; DROP TABLE kv; --", "per%sent %1$I", "ß"])
def test_names_of_roles_are_quoted(
    beginning: str, settings: Settings, new_role: NewRole, sql: psycopg.Connection[Any]
) -> None:
    role = new_role(beginning)
    give(settings, operator=[role])
    give(settings, operator=[role])  # a second time has no effect
    with psycopg.connect(as_role(settings, role).dsn, autocommit=True) as conn:
        assert conn.execute("SELECT count(*) FROM pgcoord.kv").fetchone() == (0,)
    granted = sql.execute("SELECT has_table_privilege(%s, 'kv', 'DELETE')", [role]).fetchone()
    assert granted == (True,)


def test_a_schema_whose_name_is_a_reserved_word_is_quoted(
    settings: Settings, new_role: NewRole, in_schema: Callable[[Settings, str], Settings]
) -> None:
    from pgcoord_cli.core.database.upgrade import upgrade

    reserved = in_schema(settings, "order")
    upgrade(reserved)
    role = new_role()
    give(reserved, client=[role])
    with psycopg.connect(as_role(settings, role).dsn, autocommit=True) as conn:
        assert conn.execute('SELECT count(*) FROM "order".kv').fetchone() == (0,)
        with pytest.raises(InsufficientPrivilege):
            conn.execute("SELECT count(*) FROM pgcoord.kv")


def test_only_an_owner_can_grant(operator: Settings, new_role: NewRole, sql: psycopg.Connection[Any]) -> None:
    before, role = rights(sql), new_role()
    with pytest.raises(PermissionDenied):
        give(operator, reader=[role])
    with pytest.raises(UsageError):
        give(operator, reader=["no_such_role"])
    assert rights(sql) == before
