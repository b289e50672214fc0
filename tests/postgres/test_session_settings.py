"""Settings of a role, a database or the environment: they change nothing that pgcoord does, nor how long it lives."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier, Literal

from pgcoord_cli.core.database.session import open_session, open_session_async
from pgcoord_cli.core.events.outbox import append_completion_event, append_lease_event
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value

if TYPE_CHECKING:
    from tests.conftest import Call, StartLeader, StartProgram

FLOW = """
executions:
  - {name: build, command: ["true"]}
  - {name: test, command: ["true"]}
edges:
  - {from: build, to: test}
"""

HOSTILE = {
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "TimeZone": "Australia/Eucla",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "escape_string_warning": "on",
    "backslash_quote": "off",
    "quote_all_identifiers": "on",
    "transform_null_equals": "on",
    "search_path": "elsewhere",
    "lc_numeric": "C",
    "xmloption": "document",
    "xmlbinary": "hex",
    "client_min_messages": "error",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "lock_timeout": "1",
    "statement_timeout": "10000",
    "idle_session_timeout": "1000",
    "idle_in_transaction_session_timeout": "1000",
    "session_replication_role": "replica",
    "row_security": "off",
    "synchronous_commit": "off",
    "plan_cache_mode": "force_custom_plan",
    "parallel_setup_cost": "0",
    "parallel_tuple_cost": "0",
    "min_parallel_table_scan_size": "0",
    "min_parallel_index_scan_size": "0",
    "max_parallel_workers_per_gather": "4",
    "enable_indexscan": "off",
    "enable_indexonlyscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_nestloop": "off",
    "enable_sort": "off",
    "enable_hashagg": "off",
    "geqo_threshold": "2",
    "from_collapse_limit": "1",
    "join_collapse_limit": "1",
    "work_mem": "64",
    "jit_above_cost": "0",
    "password_encryption": "md5",
    "application_name": "elsewhere",
    "client_encoding": "LATIN1",
    "plpgsql.extra_errors": "all",
    "pgcoord.notify": "off",
}
"""Settings that each could change the meaning of a statement, the form of a value, or the life of a session."""

SINGLE = ["DateStyle", "standard_conforming_strings", "default_transaction_read_only"]
"""Settings of which each by itself broke commands before sessions pinned them."""


def by_database(settings: Settings, sql: psycopg.Connection[Any], chosen: dict[str, str]) -> Settings:
    """Sets the settings for the database of the test."""
    for name, setting in chosen.items():
        sql.execute(SQL("ALTER DATABASE {} SET {} = {}").format(
            Identifier(sql.info.dbname), SQL(name), Literal(setting)))  # fmt: skip
    return settings


def by_role(settings: Settings, sql: psycopg.Connection[Any], chosen: dict[str, str]) -> Settings:
    """Creates a superuser with the settings."""
    role = Identifier(f"configured_{uuid.uuid4().hex[:8]}")
    sql.execute(SQL("CREATE ROLE {} SUPERUSER LOGIN").format(role))
    for name, setting in chosen.items():
        sql.execute(SQL("ALTER ROLE {} SET {} = {}").format(role, SQL(name), Literal(setting)))
    return replace(settings, dsn=make_conninfo(settings.dsn, user=role.as_string().strip('"')))


def by_options(settings: Settings, _: psycopg.Connection[Any], chosen: dict[str, str]) -> Settings:
    """Passes the settings as PGOPTIONS does."""
    escaped = " ".join(f"-c {name}={setting}".replace(", ", r",\ ") for name, setting in chosen.items())
    return replace(settings, dsn=make_conninfo(settings.dsn, options=escaped))


Given = Callable[[Settings, psycopg.Connection[Any], dict[str, str]], Settings]

WAYS = [by_database, by_role, by_options]


@contextmanager
def given(way: Given, settings: Settings, sql: psycopg.Connection[Any], chosen: dict[str, str]) -> Iterator[Settings]:
    """Creates a schema of lookalikes that the search path may lead to, and gives the settings to new sessions."""
    sql.execute("CREATE SCHEMA elsewhere")
    sql.execute("CREATE TABLE elsewhere.kv (key bytea, value bytea)")
    configured = way(settings, sql, chosen)
    try:
        yield configured
    finally:
        sql.execute(SQL("ALTER DATABASE {} RESET ALL").format(Identifier(sql.info.dbname)))


@pytest.mark.parametrize("way", WAYS)
def test_i15_each_noun_works_under_forty_settings(
    way: Given, call: Call, settings: Settings, sql: psycopg.Connection[Any], start_leader: StartLeader, place: Any
) -> None:
    assert len(HOSTILE) > 40
    with given(way, settings, sql, HOSTILE) as configured:
        one_of_each_noun(call, configured, sql, start_leader, place)


@pytest.mark.parametrize("name", SINGLE)
def test_i15_each_noun_works_under_a_single_setting(
    name: str, call: Call, settings: Settings, sql: psycopg.Connection[Any], start_leader: StartLeader, place: Any
) -> None:
    with given(by_options, settings, sql, {name: HOSTILE[name]}) as configured:
        one_of_each_noun(call, configured, sql, start_leader, place)


def one_of_each_noun(
    call: Call, configured: Settings, sql: psycopg.Connection[Any], start_leader: StartLeader, place: Any
) -> None:
    """Runs commands of each noun, with the outcomes that they have under the server's defaults."""

    def ask(*words: str) -> Any:
        answer = call(*words, "-o", "json", PGCOORD_DSN=configured.dsn)
        assert answer.code == 0, (words, answer)
        return answer.document

    ask("migrate", "status", "--check")
    leader = start_leader("one", settings=configured)
    leader.wait_for("elected epoch")
    assert ask("leader", "status")["leader"]["held"] is True
    assert ask("leader", "history")[0]["acquired_at"].endswith("Z")
    request = ask("kv", "set", "k\\x", "v\\y")
    assert request
    assert ask("kv", "get", "k\\x")["value"] == "v\\y"
    assert [row["key"] for row in ask("kv", "range")] == ["k\\x"]
    listed = ask("commit", "list")
    assert [row["status"] for row in listed] == ["committed"]
    assert ask("commit", "show", listed[0]["request_id"])["status"] == "committed"
    file = place / "flow.yaml"
    file.write_text(FLOW)
    flow_id = ask("flow", "create", str(file))["flow_id"]
    assert call("worker", "run", "--once", "-q", PGCOORD_DSN=configured.dsn).code == 0
    assert ask("reconcile", "all")["dependency"]["errors"] == 0
    assert {row["name"]: row["state"] for row in ask("flow", "show", flow_id)["executions"]}["build"] == "success"
    assert [row["flow_id"] for row in ask("flow", "list")] == [flow_id]
    assert value(sql, "SELECT count(*) FROM executions WHERE name = 'build' AND ended_at > now() - interval '1h'") == 1
    tail = call("tail", "completion", "--from-start", "--no-follow", "-o", "jsonl", PGCOORD_DSN=configured.dsn)
    assert (tail.code, tail.out.count("success")) == (0, 2)
    assert call("lock", "run", "n\\me", "--", "true", PGCOORD_DSN=configured.dsn).code == 0
    assert ask("lock", "list") == []
    ask("gc", "all")
    assert sql.execute("SELECT count(*) FROM elsewhere.kv").fetchone() == (0,)
    assert leader.end() == 0


PINNED = {
    "DateStyle": "ISO, MDY", "TimeZone": "UTC", "idle_session_timeout": "0", "standard_conforming_strings": "on",
    "session_replication_role": "origin", "max_parallel_workers_per_gather": "0", "client_encoding": "UTF8",
    "default_transaction_read_only": "off", "default_transaction_isolation": "read committed",
}  # fmt: skip

ASK = "SELECT current_setting(name) FROM unnest($1::text[]) WITH ORDINALITY AS asked (name, n) ORDER BY n"


def test_i15_the_sessions_of_the_library_pin_their_settings(settings: Settings, sql: psycopg.Connection[Any]) -> None:
    async def found_by_asyncio() -> list[tuple[str]]:
        async with await open_session_async(settings, "test", writes=True) as conn:
            return await (await conn.execute(ASK, [list(PINNED)])).fetchall()

    with given(by_database, settings, sql, HOSTILE):
        adopted = psycopg.connect(settings.dsn)
        owner = acquire_leadership(adopted, "adopted")
        found = [asyncio.run(found_by_asyncio()), adopted.execute(ASK, [list(PINNED)]).fetchall()]
        owner.release()
        with closing(open_session(settings, "test", writes=True)) as conn:
            found.append(conn.execute(ASK, [list(PINNED)]).fetchall())
    assert [[row[0] for row in rows] for rows in found] == [list(PINNED.values())] * 3


def test_i15_a_connection_of_the_caller_works_under_any_setting_and_keeps_it(
    settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    writable = HOSTILE | {"default_transaction_read_only": "off"}
    with given(by_database, settings, sql, writable), acquire_leadership(settings.dsn, "name") as owner:
        with psycopg.connect(settings.dsn) as conn:
            before = all_settings(conn)
            append_completion_event(conn, uuid.uuid4(), "success", instance_tag="a\\'b")
            append_lease_event(conn, "a\\'b", "acquired")
            owner.checkpoint.save(7, conn)
            assert all_settings(conn) >= before  # plpgsql, loaded by the trigger, has added settings of its own
        assert owner.checkpoint.load() == 7
    assert sql.execute("SELECT instance_tag FROM completion_events").fetchall() == [("a\\'b",)]
    assert sql.execute("SELECT execution_id FROM lease_events").fetchall() == [("a\\'b",)]


def all_settings(conn: psycopg.Connection[Any]) -> set[tuple[str, str]]:
    return set(conn.execute("SELECT name, setting FROM pg_catalog.pg_settings"))


@pytest.mark.parametrize("name", ["idle_session_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"])
def test_i15_locks_leaders_and_waits_outlive_the_time_limits_of_their_role(
    name: str,
    settings: Settings,
    sql: psycopg.Connection[Any],
    start_leader: StartLeader,
    start_program: StartProgram,
) -> None:
    if sql.info.server_version < 170_000 and name == "transaction_timeout":
        pytest.skip("a setting of PostgreSQL 17")
    limited = by_role(settings, sql, {name: "100"})
    start_leader("one", "--ttl", "60s", settings=limited).wait_for("elected epoch")
    owner = acquire_leadership(limited.dsn, "held")
    waiting = start_program("lock", "run", "held", "--wait", "60s", "--", "true", settings=limited)
    until(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"))
    start_program("tail", "completion", settings=limited)
    until(lambda: sessions(sql, "tail"))
    before = sessions(sql)
    wait_for_the_limit(limited, name)
    assert before <= sessions(sql)
    owner.checkpoint.save(1)
    owner.release()
    assert waiting.wait(TIMEOUT) == 0


def sessions(sql: psycopg.Connection[Any], application: str = "") -> set[tuple[int]]:
    """Returns the backends of pgcoord's sessions whose application name begins like that."""
    return set(sql.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE %s",
        [f"pgcoord/{application}%"],
    ))  # fmt: skip


def wait_for_the_limit(limited: Settings, name: str) -> None:
    """Waits until the server has ended a session of the same role, which exceeds the limit."""
    with psycopg.connect(limited.dsn, autocommit=True) as conn:
        if name != "idle_session_timeout":
            conn.execute("BEGIN")
        with pytest.raises(psycopg.OperationalError):
            list(conn.notifies(timeout=TIMEOUT))


def test_i15_row_level_security_that_may_hide_rows_is_named(
    call: Call, settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    role = f"restricted_{uuid.uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    call("migrate", "grant", "--operator", role)
    sql.execute("INSERT INTO kv VALUES ('key', 'value')")
    sql.execute("ALTER TABLE kv ENABLE ROW LEVEL SECURITY")
    answer = call("kv", "get", "key", PGCOORD_DSN=make_conninfo(settings.dsn, user=role))
    assert answer.code == 1
    assert 'row-level security policy for table "kv"' in answer.err
    assert "BYPASSRLS" in answer.err
