"""Functions of the schema resolve names only in pg_catalog and their own schema, whatever the caller's search path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import make_conninfo

from pgcoord_cli.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import Call


def test_i18_every_function_pins_its_search_path_or_is_resolved_when_it_is_created(
    sql: psycopg.Connection[Any],
) -> None:
    found = sql.execute(
        "SELECT proname, coalesce(proconfig, '{}'), prosqlbody IS NOT NULL FROM pg_proc"
        " WHERE pronamespace = 'pgcoord'::regnamespace ORDER BY proname"
    ).fetchall()
    assert len(found) >= 10
    pinned = "search_path=pgcoord, pg_temp"
    assert [name for name, config, is_resolved in found if not is_resolved and pinned not in config] == []
    assert [
        name for name, config, _ in found if any("search_path" in item for item in config) and pinned not in config
    ] == []


TRAPS = """
    CREATE FUNCTION public.took_over() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        IF pg_catalog.current_setting('is_superuser') OPERATOR(pg_catalog.=) 'on' THEN
            EXECUTE 'ALTER ROLE attacker SUPERUSER';
        END IF;
    END $$;
    CREATE FUNCTION public.trap(bigint, double precision) RETURNS double precision LANGUAGE plpgsql AS
        'BEGIN PERFORM public.took_over(); RETURN 0; END';
    CREATE OPERATOR public./ (LEFTARG = bigint, RIGHTARG = double precision, FUNCTION = public.trap);
    CREATE FUNCTION public.trap(name, text) RETURNS text LANGUAGE plpgsql AS
        'BEGIN PERFORM public.took_over(); RETURN pg_catalog.textcat($1::text, $2); END';
    CREATE OPERATOR public.|| (LEFTARG = name, RIGHTARG = text, FUNCTION = public.trap);
    CREATE FUNCTION public.trap(bytea, bytea) RETURNS bytea LANGUAGE plpgsql AS
        'BEGIN PERFORM public.took_over(); RETURN pg_catalog.byteacat($1, $2); END';
    CREATE OPERATOR public.|| (LEFTARG = bytea, RIGHTARG = bytea, FUNCTION = public.trap);
    CREATE FUNCTION public.octet_length(bytea) RETURNS integer LANGUAGE plpgsql AS
        'BEGIN PERFORM public.took_over(); RETURN 1; END';
    CREATE FUNCTION public.cardinality(bytea[]) RETURNS integer LANGUAGE plpgsql AS
        'BEGIN PERFORM public.took_over(); RETURN 0; END';
"""
"""What a role that may create in a schema of others' search paths can put in the way of its betters."""


def test_i18_a_role_that_creates_operators_does_not_get_the_rights_of_roles_that_insert(
    call: Call, settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    sql.execute("CREATE ROLE attacker LOGIN")
    try:
        assert call("migrate", "grant", "--client", "attacker").code == 0
        sql.execute("GRANT CREATE ON SCHEMA public TO attacker")  # as databases of PostgreSQL 14 and older have it
        with psycopg.connect(make_conninfo(settings.dsn, user="attacker"), autocommit=True) as attacker:
            attacker.execute(TRAPS)
        for path in ('"$user", public', "public, pg_catalog", "pgcoord, public, pg_catalog"):
            insert_and_commit(settings, path)
        assert sql.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'attacker'").fetchone() == (False,)
    finally:
        sql.execute("DROP OWNED BY attacker CASCADE")
        sql.execute("DROP ROLE attacker")


def insert_and_commit(settings: Settings, path: str) -> None:
    """Writes events and calls the functions of direct commits under a search path, as a superuser."""
    with psycopg.connect(settings.dsn, autocommit=True) as conn:
        conn.execute("SELECT set_config('search_path', %s, false)", [path])
        conn.execute("SELECT setval('pgcoord.completion_events_wake_until', 9e15::bigint)")
        conn.execute(
            "INSERT INTO pgcoord.completion_events (execution_id, outcome) VALUES (gen_random_uuid(), 'success')"
        )
        conn.execute("INSERT INTO pgcoord.lease_events (execution_id, event_type) VALUES ('x', 'acquired')")
        conn.execute(
            "SELECT pgcoord.packed_binary('k'), pgcoord.packed_head(1), pgcoord.is_list('{k}'),"
            " pgcoord.packed_request('{k}', '{a}', '{b}', '{}', '{}', '{}', '{k}', '{v}')"
        )
        conn.execute(
            "SELECT pgcoord.commit_directly(gen_random_uuid(), 0, NULL, 0,"
            " '{}', '{}', '{}', '{}', '{}', '{}', '{k}', '{v}', NULL)"
        )
