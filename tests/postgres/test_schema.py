"""`sql/schema.sql` is the sum of the migrations, on every supported version of PostgreSQL, and can be loaded."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.core.embedded.server import EmbeddedServer, temporary_server
from pgcoord_cli.db.sqlfiles import sql_root
from pgcoord_cli.errors import ServerUnavailable
from pgcoord_cli.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]

dump_schema = SimpleNamespace(**runpy.run_path(str(REPOSITORY / ".ci" / "dump_schema.py")))


@pytest.fixture(scope="module", params=[15, 16, 18])
def any_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server of each supported version, independent of `--server-version`."""
    try:
        installation = find_installation(request.param)
    except ServerUnavailable as error:
        pytest.skip(str(error))
    with temporary_server(installation) as running:
        yield running


@pytest.fixture(scope="module")
def migrated(any_server: EmbeddedServer) -> str:
    """The DSN of a migrated database on that server."""
    upgrade(Settings(dsn=any_server.dsn))
    return any_server.dsn


def test_the_golden_dump_is_the_sum_of_the_migrations(migrated: str, capsys: pytest.CaptureFixture[str]) -> None:
    different = dump_schema.compare(dump_schema.dump(migrated))
    assert not different, f"run python .ci/dump_schema.py\n{capsys.readouterr().out}"


def test_the_golden_dump_loads_into_an_empty_database(any_server: EmbeddedServer) -> None:
    golden = dump_schema.GOLDEN.read_text()
    with psycopg.connect(any_server.dsn, autocommit=True) as conn:
        conn.execute("CREATE DATABASE loaded")
    loaded = make_conninfo(any_server.dsn, dbname="loaded")
    with psycopg.connect(loaded) as conn:
        conn.execute(golden)
    assert dump_schema.dump(loaded) == golden


def test_another_schema_has_the_same_shape(migrated: str) -> None:
    upgrade(Settings(dsn=migrated, schema="second_cluster"))
    renamed = dump_schema.dump(migrated, "second_cluster").replace("second_cluster", "pgcoord")
    assert renamed == dump_schema.GOLDEN.read_text()


def test_a_dump_keeps_function_bodies_as_they_are() -> None:
    body = "AS $_$\nBEGIN\n-- why\nSET LOCAL a = 1;\n\n\n\nEND\n$_$;\n"
    noise = (
        "--\n-- Dumped by\n--\n\n\\restrict x\n\nSET a = 1;\nSELECT pg_catalog.set_config('search_path', '', false);\n"
    )
    assert dump_schema.normalised(f"{noise}CREATE FUNCTION f() {body}\n\n{noise}") == f"CREATE FUNCTION f() {body}"


def test_migrations_are_ascii_since_a_database_may_have_any_encoding() -> None:
    for path in (sql_root() / "migrations").iterdir():
        assert path.read_text(encoding="utf-8").isascii(), path.name
