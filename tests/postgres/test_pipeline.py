"""`db.pipeline`: several statements sent as one unit, which takes effect as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.db.binary import bytea_array, int8, int8_array, text_array
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.settings import Settings

Conn = psycopg.Connection[Any]
INSERT = "INSERT INTO numbers VALUES ($1::bigint)"


@pytest.fixture
def conn(settings: Settings) -> Iterator[Conn]:
    with closing(open_session(settings, "test", writes=True)) as conn:
        conn.execute("CREATE TEMPORARY TABLE numbers (number bigint PRIMARY KEY)")
        yield conn


@pytest.fixture
def pipeline(conn: Conn) -> Pipeline:
    return Pipeline(conn)


def numbers(conn: Conn) -> list[int]:
    return [row[0] for row in conn.execute("SELECT number FROM numbers ORDER BY number")]


def test_each_statement_of_a_unit_gives_its_own_rows(pipeline: Pipeline) -> None:
    series = "SELECT n FROM generate_series(1, $1::bigint) AS n"
    found = pipeline.run([(series, [int8(2)]), (series, [int8(0)]), ("SELECT 'x'::text, NULL::bytea", [])])
    assert found == [[(1,), (2,)], [], [("x", None)]]


def test_values_come_as_psycopg_loads_them(pipeline: Pipeline) -> None:
    [row] = pipeline.fetch("SELECT $1::bigint, $2::bytea[], $3::text[], clock_timestamp()", [
        int8(-7), bytea_array([b"\0", None]), text_array(["é", None]),
    ])  # fmt: skip
    assert row[:3] == (-7, [b"\0", None], ["é", None])
    assert isinstance(row[3], datetime)


def test_a_unit_takes_effect_as_a_whole_or_not_at_all(pipeline: Pipeline, conn: Conn) -> None:
    pipeline.run([(INSERT, [int8(1)]), (INSERT, [int8(2)])])
    with pytest.raises(psycopg.errors.UniqueViolation):
        pipeline.run([(INSERT, [int8(3)]), (INSERT, [int8(1)]), (INSERT, [int8(4)])])
    assert numbers(conn) == [1, 2]


def test_a_failed_unit_leaves_the_pipeline_usable(pipeline: Pipeline, conn: Conn) -> None:
    for _ in range(2):
        with pytest.raises(psycopg.errors.UndefinedTable):
            pipeline.run([(INSERT, [int8(1)]), ("SELECT * FROM nowhere", [])])
    pipeline.run([(INSERT, [int8(1)])])
    assert numbers(conn) == [1]


def test_several_pipelines_may_follow_each_other_on_one_connection(conn: Conn) -> None:
    for number in range(3):
        Pipeline(conn).fetch(INSERT, [int8(number)])
    assert numbers(conn) == [0, 1, 2]


def test_a_unit_larger_than_the_socket_buffers_passes_both_ways(pipeline: Pipeline) -> None:
    """Client and server would block each other without limit if the client did not read while it writes."""
    echo = "SELECT n FROM unnest($1::bigint[]) AS n"
    many = list(range(200_000))
    found = pipeline.run([(echo, [int8_array(many)])] * 4)
    assert [len(rows) for rows in found] == [200_000] * 4
    assert found[3][-1] == (199_999,)


def test_a_lost_connection_is_an_operational_error(pipeline: Pipeline, conn: Conn, sql: Conn) -> None:
    pipeline.fetch("SELECT 1", [])
    sql.execute("SELECT pg_terminate_backend(%s)", [conn.info.backend_pid])
    with pytest.raises(psycopg.OperationalError):
        pipeline.run([("SELECT 1", []), ("SELECT 1", [])])


def test_i7_a_notification_that_arrives_during_a_unit_is_kept_for_the_caller(pipeline: Pipeline, conn: Conn) -> None:
    conn.execute("LISTEN news")
    pipeline.run([("SELECT pg_notify('news', '')", []), ("SELECT 1", [])])
    notification = conn.pgconn.notifies()
    assert notification is not None
    assert notification.relname == b"news"
