"""Which role may run which statement of sql/queries (rule I18). `LOWEST` documents it; the server is asked.

Rights are granted by `migrate grant`; docs/security.md says what each role can do with them.
"""

from __future__ import annotations

import uuid
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege
from psycopg.sql import SQL, Identifier

from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.settings import Settings
from tests.asking import value
from tests.postgres.test_queries import UTILITY, every_statement, filled

LOWEST = {
    # Reads data and payloads, submits requests, inserts events, owns names and subscriptions.
    "client": {
        "commits": "enqueue enqueue_again commit_directly claim stored_values window_commits payload "
        "requests_before requests_after newest_requests",
        "kv": "read_keys read_snapshot read_at read_keys_at version_at read_range read_range_reverse watched_range",
        "locks": "name_key",
        "outbox": "append_lease_event append_completion_event",
        "subscriptions": "acquire save set_position remove",
    },
    # Leads, settles requests, runs and moves executions, reconciles, deletes what is old.
    "operator": {
        "commits": "write_data settle keep_undo",
        "executions": "claim renew complete fail revoke",
        "flows": "insert_flow insert_executions insert_groups insert_edges lock_group hold_ends insert_edge "
        "count_new_edge judge dispatch cancel",
        "gc": "orphan_requests delete_requests delete_lease_events delete_completion_events",
        "lease": "lock_lease take_over renew ask_to_step_down raise_floors release",
        "reconcile": "note_failure retry expire_leases cancel_siblings",
    },
    # Changes the schema and its ledger.
    "owner": {"migrations": "record_migration record_duration"},
}
"""The lowest role that may run each statement; a reader may run those that are not listed."""


def test_i18_each_role_may_run_exactly_the_statements_of_its_work(
    settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    # As on a hardened database. Where PUBLIC may execute functions, their own statements are refused instead.
    sql.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA pgcoord FROM PUBLIC")
    names = [name for name, _ in every_statement() if name not in UTILITY]
    allowed = {kind: allowed_statements(settings, sql, kind) for kind in grants.KINDS}
    assert allowed["reader"] <= allowed["client"] <= allowed["operator"]
    found = {name: next((kind for kind in grants.KINDS if name in allowed[kind]), "owner") for name in names}
    listed = {
        f"{noun}.{each}": kind
        for kind, nouns in LOWEST.items()
        for noun, together in nouns.items()
        for each in together.split()
    }
    assert found == dict.fromkeys(names, "reader") | listed


def allowed_statements(settings: Settings, sql: psycopg.Connection[Any], kind: str) -> set[str]:
    """Returns the statements for which a role of that kind has the rights."""
    name = f"{kind}_{uuid.uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {kind: [name]}, dry_run=False)
    # A generic plan keeps the branches that the NULLs below would have removed.
    options = "-c search_path=pgcoord -c plan_cache_mode=force_generic_plan"
    with psycopg.connect(make_conninfo(settings.dsn, user=name, options=options), autocommit=True) as conn:
        return {
            name
            for name, statement in every_statement()
            if name not in UTILITY and may_run(conn, name, filled(statement.text))
        }


def may_run(conn: psycopg.Connection[Any], name: str, text: str) -> bool:
    """Whether the role has the rights that the plan of the statement needs. The statement is not executed."""
    try:
        conn.execute(f'PREPARE "{name}" AS {text}'.encode())
        query = "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = %s"
        parameters = ", ".join(["NULL"] * value(conn, query, name))
        conn.execute(f'EXPLAIN EXECUTE "{name}" {f"({parameters})" if parameters else ""}'.encode())
    except InsufficientPrivilege:
        return False
    return True
