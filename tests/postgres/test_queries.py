"""The SQL files: the server accepts every statement, with the types that Python relies on, and every one is used.

`EXPECTED` holds the parameter types and the columns of every statement. A new statement has to be added there; an
accidental change of types shows as a difference.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.pq import ExecStatus

import pgcoord_cli
from pgcoord_cli.db.sqlfiles import NamedStatement, fill, sql_root, statements
from pgcoord_cli.db.sqlfiles import sql as statement_text

PACKAGE = Path(pgcoord_cli.__file__).parent
FILES = sorted((sql_root() / "queries").iterdir())

UTILITY = {"migrations.create_schema", "migrations.choose_schema", "migrations.create_ledger"}
"""Statements that PREPARE does not accept, since they are DDL."""


class Shape(NamedTuple):
    """Types of the parameters, and names and types of the columns."""

    parameters: str
    columns: str


REQUEST = (
    "id bigint, request_id uuid, status text, commit_version bigint, read_version bigint, epoch bigint, reason text, "
    "created_at timestamptz, resolved_at timestamptz"
)

EXPECTED = {
    "locks.name_key": Shape("bigint, text", ""),
    "locks.name_of_key": Shape("bigint", "lock_name text"),
    "locks.try_lock": Shape("bigint", "is_taken boolean"),
    "locks.wait_for_lock": Shape("bigint", "is_taken boolean"),
    "locks.set_lock_timeout": Shape("text", "lock_timeout text"),
    "locks.check_client": Shape("", "client_connection_check_interval text"),
    "locks.heartbeat": Shape("", "alive boolean"),
    "locks.list": Shape(
        "",
        "name text, is_waiting boolean, pid integer, application text, client text, since timestamptz",
    ),
    "locks.end_session": Shape("integer", "is_ended boolean"),
    "subscriptions.list": Shape(
        "text",
        "subscription_name text, outbox text, last_position bigint, fence bigint, updated_at timestamptz, lag bigint",
    ),
    "subscriptions.set_position": Shape("text, bigint, bigint, uuid", ""),
    "subscriptions.remove": Shape("text, bigint, uuid", ""),
    "executions.claim": Shape(
        "text, double precision, integer, text, text",
        "execution_id uuid, lease_id uuid, lease_epoch bigint, flow_id uuid, name text, command text[], "
        "attempt integer, expires_at timestamptz",
    ),
    "executions.renew": Shape("uuid, bigint, double precision", "expires_at timestamptz"),
    "executions.complete": Shape("uuid, bigint", "ended bigint"),
    "executions.fail": Shape("uuid, bigint, text", "state text"),
    "executions.revoke": Shape("uuid, bigint", "revoked integer"),
    "executions.show": Shape(
        "uuid",
        "execution_id uuid, flow_id uuid, name text, state text, partition_key smallint, namespace text, "
        "instance_tag text, command text[], max_attempts integer, failures integer, lost_leases integer, "
        "reason text, created_at timestamptz, ended_at timestamptz, lease_epoch bigint, lease_id uuid, "
        "owner text, expires_at timestamptz",
    ),
    "executions.next_eligible": Shape("text, text", "seconds double precision"),
    "flows.insert_flow": Shape("text, text", "flow_id uuid"),
    "flows.insert_executions": Shape("uuid, jsonb", "execution_id uuid, name text"),
    "flows.insert_groups": Shape("uuid, jsonb", ""),
    "flows.insert_edges": Shape("uuid, uuid[], uuid[]", ""),
    "flows.announce": Shape("", "announced void"),
    "flows.lock_group": Shape("uuid", "downstream_id uuid"),
    "flows.hold_ends": Shape("uuid[]", "execution_id uuid, state text"),
    "flows.insert_edge": Shape("uuid, uuid, text", "edge_id uuid"),
    "flows.count_new_edge": Shape("uuid, text", ""),
    "flows.judge": Shape("uuid", "moved integer"),
    "flows.dispatch": Shape("bigint[]", "claimed_id bigint, counted integer"),
    "flows.show": Shape(
        "uuid",
        "flow_id uuid, namespace text, instance_tag text, created_at timestamptz, cancelled_at timestamptz",
    ),
    "flows.executions": Shape(
        "uuid",
        "execution_id uuid, name text, state text, command text[], max_attempts integer, "
        "failures integer, lost_leases integer, reason text, created_at timestamptz, "
        "ended_at timestamptz, owner text, policy jsonb",
    ),
    "flows.edges": Shape("uuid", "upstream text, downstream text, outcome text"),
    "flows.list": Shape(
        "text, integer",
        "flow_id uuid, namespace text, instance_tag text, created_at timestamptz, executions bigint, "
        "unfinished bigint, failed bigint",
    ),
    "flows.cancel": Shape("uuid", "is_found boolean, cancelled bigint"),
    "reconcile.undispatched": Shape("bigint, integer, text, text", "event_id bigint"),
    "reconcile.count_filtered": Shape("bigint, integer, text, text", "filtered bigint"),
    "reconcile.note_failure": Shape("bigint, text, integer", "attempts integer, is_quarantined boolean"),
    "reconcile.quarantined": Shape(
        "",
        "event_id bigint, execution_id uuid, flow_id uuid, outcome text, attempts integer, "
        "last_error text, quarantined_at timestamptz",
    ),
    "reconcile.retry": Shape("bigint", ""),
    "reconcile.expire_leases": Shape("integer, text, text, integer", "scanned integer, expired integer"),
    "reconcile.cancel_siblings": Shape("integer, text, text", "scanned integer, cancelled bigint"),
    "outbox.append_lease_event": Shape("text, text, text, integer, text, text, bigint", "event_id bigint"),
    "outbox.append_completion_event": Shape("uuid, uuid, text, smallint, text, text, bigint", "event_id bigint"),
    "tail.lease_events": Shape(
        "bigint, integer",
        "event_id bigint, execution_id text, lease_id text, event_type text, occurred_at_ms bigint, "
        "partition_key integer, namespace text, instance_tag text, committed_at_ms bigint",
    ),
    "tail.completion_events": Shape(
        "bigint, integer",
        "event_id bigint, execution_id text, flow_id text, outcome text, occurred_at_ms bigint, "
        "partition_key smallint, namespace text, instance_tag text, committed_at_ms bigint",
    ),
    "tail.open_transactions": Shape("text", "open_transactions text[]"),
    "tail.request_wakeups": Shape("text, integer", "wake_until bigint"),
    "tail.cancel_wakeups": Shape("text, bigint", "wake_until bigint"),
    "tail.bounds": Shape("", "head bigint, collected_through bigint"),
    "tail.blocking_transactions": Shape("text", "pid integer, application text, since timestamptz"),
    "tail.place": Shape(
        "bigint",
        "head bigint, collected_through bigint, drawn_through bigint, execution_id text, committed_at_ms bigint",
    ),
    "tail.last_passed": Shape("bigint", "event_id bigint, execution_id text, committed_at_ms bigint"),
    "tail.resume_after_loss": Shape("bigint", "event_id bigint"),
    "tail.gaps": Shape("bigint, bigint", "first_id bigint, last_id bigint"),
    "tail.first_at": Shape("bigint", "event_id bigint"),
    "tail.count": Shape("bigint", "events bigint"),
    "subscriptions.acquire": Shape(
        "text, text, text",
        "fence bigint, fence_id uuid, last_position bigint, outbox text, passed text, filters text",
    ),
    "subscriptions.save": Shape("text, bigint, bigint, uuid, text", "is_saved boolean"),
    "subscriptions.checkpoint": Shape("text", "outbox text, last_position bigint, passed text"),
    "gc.event_bound": Shape("text, double precision", "committed_before_ms bigint, passed_by_all bigint"),
    "gc.delete_lease_events": Shape(
        "bigint, bigint, integer, bigint", "deleted bigint, last_id bigint, is_last boolean"
    ),
    "gc.delete_completion_events": Shape(
        "bigint, bigint, integer, bigint", "deleted bigint, last_id bigint, is_last boolean"
    ),
    "gc.oldest_event": Shape("", "oldest_kept timestamptz, furthest_behind text"),
    "gc.blocking_writers": Shape(
        "double precision", "pid integer, application text, role text, since timestamptz, own_role text"
    ),
    "gc.count_lease_events": Shape("double precision", "deletable bigint"),
    "gc.count_completion_events": Shape("double precision", "deletable bigint"),
    "commits.enqueue": Shape(
        "uuid[], bigint[], uuid[], bigint[], bytea[], text, text", "announced boolean, enqueued_at timestamptz"
    ),
    "commits.enqueue_again": Shape(
        "uuid[], bigint[], uuid[], bigint[], bytea[], text, text", "announced boolean, enqueued_at timestamptz"
    ),
    "commits.claim": Shape(
        "bigint, integer, bigint, integer, uuid",
        "id bigint, read_limit bigint, read_version bigint, payload bytea, claimed_at timestamptz",
    ),
    "commits.queue_writers": Shape("", "last_id bigint, writers text[]"),
    "commits.write_data": Shape("bytea[], bytea[], bytea[], bytea[], bytea[], bigint", "write_data void"),
    "commits.keep_undo": Shape("bigint, uuid", "missing text"),
    "commits.commit_directly": Shape(
        "uuid, bigint, uuid, bigint, bytea[], bytea[], bytea[], bytea[], bytea[], bytea[], bytea[], bytea[], text",
        "version bigint, answered_at timestamptz",
    ),
    "commits.block_direct_commits": Shape("text", "is_locked_out boolean, lock_timeout text"),
    "commits.admit_direct_commits": Shape("", "is_unlocked boolean"),
    "commits.settle": Shape(
        "bigint, uuid, bigint, bigint, bigint, bigint, bigint, bigint[], text[], bigint[], text[]",
        "settle_commits void",
    ),
    "commits.stored_values": Shape("bytea[]", "key bytea, value bytea"),
    "commits.payload": Shape("uuid", "payload bytea"),
    "commits.requests_before": Shape(
        "bigint, integer, bigint", "request_id uuid, commit_version bigint, id bigint, payload bytea"
    ),
    "commits.requests_after": Shape(
        "bigint, integer, bigint, bigint",
        "request_id uuid, commit_version bigint, id bigint, is_later boolean, payload bytea",
    ),
    "commits.newest_requests": Shape(
        "bigint, integer, double precision",
        "id bigint, status text, read_version bigint, commit_version bigint, created_at timestamptz, "
        "is_wanted boolean, payload bytea",
    ),
    "commits.window_commits": Shape(
        "bigint, bigint", "id bigint, commit_version bigint, payload bytea, resolved_at timestamptz"
    ),
    "commits.ask": Shape(
        "uuid[], boolean",
        "epoch bigint, request_id uuid, status text, commit_version bigint, reason text, needs_barrier boolean",
    ),
    "commits.needs_barrier": Shape("", "needs_barrier boolean"),
    "commits.barrier": Shape("", "level text, message text"),
    "commits.queue_state": Shape("", "pending bigint, oldest_pending_seconds double precision"),
    "commits.list": Shape("text, integer", REQUEST),
    "commits.show": Shape("uuid", REQUEST),
    "gc.orphan_requests": Shape("bigint, double precision, integer", "orphaned bigint, last_id bigint"),
    "gc.delete_requests": Shape("bigint, double precision, integer", "deleted bigint, last_id bigint"),
    "gc.count_requests": Shape("double precision", "deletable bigint"),
    "gc.oldest_request": Shape("", "created_at timestamptz"),
    "grants.role_exists": Shape("text", "found boolean"),
    "grants.reader_grants": Shape("text", "statement text"),
    "grants.client_grants": Shape("text", "statement text"),
    "grants.operator_grants": Shape("text", "statement text"),
    "kv.read_keys": Shape("bytea[]", "epoch bigint, last_term_id uuid, durable_version bigint, key bytea, value bytea"),
    "kv.read_snapshot": Shape(
        "bytea[], bytea[], bytea[], bigint[], boolean[]",
        "epoch bigint, last_term_id uuid, durable_version bigint, part bigint, key bytea, value bytea",
    ),
    "kv.read_at": Shape(
        "bytea[], bigint[], bytea[], bytea[], bigint[], boolean[], bigint[], uuid",
        "epoch bigint, last_term_id uuid, durable_version bigint, readable_to bigint, readable_from bigint, "
        "part bigint, key bytea, value bytea",
    ),
    "kv.read_keys_at": Shape(
        "bytea[], bigint[], uuid",
        "epoch bigint, last_term_id uuid, durable_version bigint, readable_to bigint, readable_from bigint, "
        "part bigint, key bytea, value bytea",
    ),
    "kv.version_at": Shape(
        "bigint",
        "epoch bigint, last_term_id uuid, durable_version bigint, readable_from bigint, version bigint",
    ),
    "kv.read_version": Shape("", "epoch bigint, durable_version bigint"),
    "kv.watched_range": Shape("bytea, bytea, bigint", "durable_version bigint, key bytea, value bytea"),
    "kv.read_range": Shape("bytea, bytea, bigint", "key bytea, value bytea"),
    "kv.read_range_reverse": Shape("bytea, bytea, bigint", "key bytea, value bytea"),
    "lease.read_lease": Shape(
        "",
        "epoch bigint, term_id uuid, leader_addr text, durable_version bigint, conflict_floor bigint, "
        "window_start_id bigint, queue_floor_id bigint, acquired_at timestamptz, renewed_at timestamptz, "
        "expires_at timestamptz, held boolean, expires_in_seconds double precision",
    ),
    "lease.is_held": Shape("", "held boolean"),
    "lease.wait_for_leader_lock": Shape("bigint", "pg_advisory_lock void"),
    "lease.try_leader_lock": Shape("bigint", "locked boolean"),
    "lease.make_commits_durable": Shape("", "set_config text"),
    "lease.terminate_idle_leader_sessions": Shape("bigint", "pid integer, terminated boolean"),
    "lease.share_session_lock": Shape("bigint", "is_marked boolean"),
    "lease.is_elected_here": Shape("uuid", "is_here boolean"),
    "lease.terminate_idle_direct_commits": Shape("", "pid integer, terminated boolean"),
    "lease.lease_holders": Shape(
        "", "pid integer, application text, role text, waits_for_standby boolean, seconds double precision"
    ),
    "lease.waits_for_standby": Shape("", "seconds double precision, standbys text, hidden_sessions bigint"),
    "lease.lock_lease": Shape("", "synchronous_commit text"),
    "lease.take_over": Shape(
        "text, double precision, boolean, text",
        "epoch bigint, term_id uuid, durable_version bigint, conflict_floor bigint, window_start_id bigint, "
        "queue_floor_id bigint, announced boolean",
    ),
    "lease.renew": Shape(
        "bigint, uuid, double precision, boolean", "asked_to_step_down boolean, synchronous_commit text"
    ),
    "lease.ask_to_step_down": Shape("text", "epoch bigint, leader_addr text, announced boolean"),
    "lease.raise_floors": Shape("bigint, uuid, bigint, bigint, bigint", "durable_version bigint"),
    "lease.history": Shape(
        "double precision, integer",
        "epoch bigint, leader_addr text, acquired_at timestamptz, ended_at timestamptz, end_reason text, "
        "first_version bigint, last_version bigint",
    ),
    "lease.release": Shape(
        "bigint, uuid, text, text", "durable_version bigint, announced boolean, synchronous_commit text"
    ),
    "lease.successor": Shape("", "epoch bigint, leader_addr text"),
    "locks.lock_holder": Shape("bigint", "pid integer, application text, client text, since timestamptz"),
    "migrations.create_schema": Shape("", ""),
    "migrations.choose_schema": Shape("", ""),
    "migrations.create_ledger": Shape("", ""),
    "migrations.find_ledger": Shape("text", "ledger text"),
    "migrations.schema_to_create": Shape("text", "statement text"),
    "migrations.read_ledger": Shape(
        "",
        "version integer, name text, checksum text, applied_at timestamptz, applied_by text, execution_ms integer, "
        "breaking boolean",
    ),
    "migrations.record_migration": Shape("integer, text, text, boolean", ""),
    "migrations.record_duration": Shape("integer", ""),
    "migrations.try_lock": Shape("bigint", "locked boolean"),
    "migrations.wait_for_lock": Shape("bigint", "pg_advisory_lock void"),
    "migrations.unlock": Shape("bigint", "unlocked boolean"),
    "session.prepare_session": Shape(
        "text, text, text, integer",
        "backend_pid integer, is_prepared boolean, version_number integer, in_recovery boolean, has_ledger boolean, "
        "renamed_from text",
    ),
    "locks.unlock": Shape("bigint", "is_released boolean"),
    "migrations.lacking_right": Shape("text", "format text, pg_get_userbyid name, format text"),
    "migrations.not_owner": Shape("text", "format text, format text"),
    "session.backend": Shape("", "backend_pid integer"),
    "kv.commit_asynchronously": Shape("", "durable text, synchronous_commit text"),
    "session.plan_once": Shape(
        "",
        "plan_cache_mode text, jit text, enable_seqscan text, enable_hashjoin text, enable_mergejoin text",
    ),
    "session.other_schemas": Shape("text", "schema text"),
}

SQL_IN_PYTHON = re.compile(
    r"\s*(SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|TABLE|CREATE|ALTER|DROP|TRUNCATE|GRANT|REVOKE|COMMENT|LOCK|COPY|"
    r"BEGIN|COMMIT|ROLLBACK|SAVEPOINT|PREPARE|EXECUTE|DECLARE|FETCH|CALL|DO|NOTIFY|ANALYZE|VACUUM)\b"
)
"""How a statement that should be in a file begins. The session's SET and LISTEN are not among them."""

SESSION_COMMAND = re.compile(r"SELECT set_config\(.*|SELECT 1")

ALLOWED = {
    ("core/database/migrations.py", "BEGIN;"),
    ("core/database/migrations.py", "COMMIT;"),
    ("commands/kv.py", "BEGIN"),  # the name of an argument
    ("commands/kv_options.py", "BEGIN"),
    ("core/database/pooler_check.py", "BEGIN; "),
    ("core/database/pooler_check.py", "COMMIT;"),
    ("core/database/grants.py", "CREATE ROLE"),  # of a hint
}


def every_statement() -> Iterator[tuple[str, NamedStatement]]:
    for path in FILES:
        for name, statement in statements(path.stem).items():
            yield f"{path.stem}.{name}", statement


def test_every_statement_has_the_expected_types(sql: psycopg.Connection[Any]) -> None:
    found = {name: shape(sql, name, filled(statement.text)) for name, statement in every_statement()}
    assert found == EXPECTED


def filled(text: str) -> str:
    """The statement with the placeholders that it has: the schema of the tests, and one of the outboxes."""
    schema = "pgcoord" if "{schema}" in text else None
    outbox = "completion_events" if "{outbox}" in text else None
    return fill(text, schema, outbox) if schema or outbox else text


def shape(conn: psycopg.Connection[Any], name: str, text: str) -> Shape:
    """The shape that the server derives: prepared by PREPARE where possible, otherwise through the protocol."""
    if name in UTILITY:
        assert conn.pgconn.prepare(name.encode(), text.encode()).status == ExecStatus.COMMAND_OK
    else:
        conn.execute(f'PREPARE "{name}" AS {text}')
    row = conn.execute("SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = %s", [name]).fetchone()
    assert row is not None
    described = conn.pgconn.describe_prepared(name.encode())
    columns = [
        f"{(described.fname(i) or b'').decode()} {type_name(conn, described.ftype(i))}"
        for i in range(described.nfields)
    ]
    return Shape(short(", ".join(row[0])), short(", ".join(columns)))


def type_name(conn: psycopg.Connection[Any], oid: int) -> str:
    row = conn.execute("SELECT format_type(%s, NULL)", [oid]).fetchone()
    assert row is not None
    return str(row[0])


def short(types: str) -> str:
    return types.replace("timestamp with time zone", "timestamptz")


def test_a_schema_enters_a_statement_as_a_quoted_name() -> None:
    text = statement_text("outbox", "append_lease_event", schema='a"b')
    assert 'INSERT INTO "a""b".lease_events' in text


def test_a_statement_that_names_its_schema_is_never_used_without_one() -> None:
    with pytest.raises(ValueError, match=r"outbox\.append_lease_event"):
        statement_text("outbox", "append_lease_event")
    with pytest.raises(ValueError, match=r"tail\.open_transactions"):
        statement_text("tail", "open_transactions", schema="pgcoord")
    with pytest.raises(ValueError, match=r"tail\.bounds"):
        statement_text("tail", "bounds")


def test_i12_no_statement_takes_a_time_from_a_client() -> None:
    timed = [name for name, expected in EXPECTED.items() if re.search("time|date|interval", expected.parameters)]
    assert timed == []


def test_every_file_is_statements_headed_by_a_name_and_a_line_of_purpose() -> None:
    for path in FILES:
        assert path.suffix == ".sql"
        stored = statements(path.stem).values()
        assert path.read_text() == "\n".join(f"-- name: {s.name}\n-- {s.purpose}\n{s.text};\n" for s in stored), path


def test_every_statement_is_ascii_so_that_it_can_be_sent_to_a_database_of_any_encoding() -> None:
    assert [name for name, statement in every_statement() if not statement.text.isascii()] == []


def test_no_statement_is_more_than_one() -> None:
    assert [name for name, statement in every_statement() if ";" in statement.text] == []


def test_every_purpose_is_a_sentence() -> None:
    sentence = re.compile(r"[A-Z].*\.")
    assert [name for name, statement in every_statement() if not sentence.fullmatch(statement.purpose)] == []


def test_every_statement_is_used_and_exists() -> None:
    assert used_names() == {name for name, _ in every_statement()}


def used_names() -> set[str]:
    """`noun.name` of every call `sql("noun", "name")`; for an f-string, every statement that it can name."""
    used: set[str] = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name("sql"), args=[ast.Constant(str(noun)), name]):
                    used |= {f"{noun}.{each}" for each in possible_names(noun, name)}
    return used


def possible_names(noun: str, name: ast.expr) -> set[str]:
    match name:
        case ast.Constant(str(only)):
            return {only}
        case ast.IfExp(body=one, orelse=other):
            return possible_names(noun, one) | possible_names(noun, other)
        case ast.JoinedStr(values=parts):
            pattern = "".join(
                re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"\w+" for part in parts
            )
            return {each for each in statements(noun) if re.fullmatch(pattern, each)}
    raise AssertionError(f"line {name.lineno}: cannot tell which statement of {noun}.sql this names")


def test_no_sql_lives_in_python() -> None:
    found = set(sql_like_strings())
    excused = {each for each in ALLOWED if any(is_excused(text, each) for text in found)}
    assert {text for text in found if not any(is_excused(text, each) for each in ALLOWED)} == set()
    assert excused == ALLOWED


def sql_like_strings() -> Iterator[tuple[str, str]]:
    """Path within the package and text of every string that begins like SQL, session commands aside."""
    for path, tree in trees():
        for node in ast.walk(tree):
            match node:
                case ast.Constant(str(text)) if SQL_IN_PYTHON.match(text) and not SESSION_COMMAND.fullmatch(text):
                    yield path, text.lstrip()


def is_excused(found: tuple[str, str], excuse: tuple[str, str]) -> bool:
    return found[0] == excuse[0] and found[1].startswith(excuse[1])


@cache
def trees() -> list[tuple[str, ast.Module]]:
    """Path within the package and syntax tree of every Python file of it."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths]
