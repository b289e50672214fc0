"""The client's lean connections: answers, errors, notifications and the end, each told to whom it concerns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.database.session import open_session_async
from pgcoord_cli.db.binary import bytea_array, integer
from pgcoord_cli.db.callback_connection import Answer, CallbackConnection, PendingStatement
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

Sql = psycopg.Connection[Any]
PID = "SELECT pg_backend_pid()"


class Heard:
    """What a connection tells: channels, that it is lost, answers."""

    def __init__(self) -> None:
        self.channels: list[str] = []
        self.lost = asyncio.Event()
        self.answers: asyncio.Queue[tuple[Answer, bool]] = asyncio.Queue()

    async def connection(self, settings: Settings) -> CallbackConnection:
        conn = await open_session_async(settings, "test", writes=True)
        return CallbackConnection(conn, self.channels.append, self.lost.set)

    def note(self, connection: CallbackConnection, answer: Answer) -> None:
        """An answer, and whether the connection was still open when it came."""
        self.answers.put_nowait((answer, connection.is_open))


def on_a_connection(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs a test with a connection, what is heard of it, and a session beside it."""

    @wraps(test)
    def run(settings: Settings, sql: Sql) -> None:
        async def play() -> None:
            heard = Heard()
            connection = await heard.connection(settings)
            try:
                async with asyncio.timeout(TIMEOUT):
                    await test(connection, heard, sql)
            finally:
                connection.close()

        asyncio.run(play())

    del run.__wrapped__
    return run


@on_a_connection
async def test_rows_come_as_bytes_and_nulls(connection: CallbackConnection, heard: Heard, sql: Sql) -> None:
    rows = await connection.fetch("SELECT value FROM unnest($1::bytea[]) AS value", [bytea_array([b"\0", None, b""])])
    assert rows == [(b"\0",), (None,), (b"",)]
    assert await connection.fetch("SELECT 1 WHERE false", []) == []


@on_a_connection
async def test_a_statement_that_fails_leaves_the_connection_as_it_was(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    for _ in range(2):
        with pytest.raises(psycopg.errors.SyntaxError):
            await connection.fetch("SELEKT", [])
        with pytest.raises(psycopg.errors.DivisionByZero):
            await connection.fetch("SELECT 1 / $1::integer", [bytes(4)])
    assert await connection.fetch("SELECT 'x'", []) == [(b"x",)]
    assert not heard.lost.is_set()


@on_a_connection
async def test_more_than_fits_the_socket_is_sent_by_and_by(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    size = 20_000_000
    [(length,)] = await connection.fetch("SELECT octet_length($1::bytea)", [bytes(size)])
    assert integer(length) == size


@on_a_connection
async def test_a_notification_that_comes_together_with_an_answer_is_heard(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    await connection.fetch("LISTEN news", [])
    for number in range(1, 4):
        await connection.fetch("SELECT pg_notify('news', '')", [])
        assert heard.channels == ["news"] * number


@on_a_connection
async def test_a_session_that_is_ended_tells_its_statement_and_its_owner(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    [(pid,)] = await connection.fetch(PID, [])
    connection.run(PendingStatement("SELECT pg_sleep(600)", [], partial(heard.note, connection)))
    sql.execute("SELECT pg_terminate_backend(%s)", [integer(pid)])
    answer, was_open = await heard.answers.get()
    assert isinstance(answer, psycopg.OperationalError)
    assert not was_open, "nobody sends anything over it any more"
    await heard.lost.wait()


@on_a_connection
async def test_a_session_that_is_ended_while_it_is_idle_tells_its_owner(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    [(pid,)] = await connection.fetch(PID, [])
    sql.execute("SELECT pg_terminate_backend(%s)", [integer(pid)])
    await heard.lost.wait()
    assert not connection.is_open
    with pytest.raises(psycopg.OperationalError):
        await connection.fetch(PID, [])


@on_a_connection
async def test_a_server_that_leaves_a_statement_without_an_answer_is_taken_for_lost(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    connection._timeout = 0.2
    for _ in range(3):
        await connection.fetch("SELECT 1", [])
    with pytest.raises(psycopg.OperationalError, match="does not answer"):
        await connection.fetch("SELECT pg_sleep(600)", [])
    assert heard.lost.is_set()


@on_a_connection
async def test_the_end_of_an_answer_is_not_waited_for_in_the_way_of_all_else(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    """libpq's `get_result` blocks while a result is not complete."""
    await connection.fetch("SELECT 1", [])
    get_result, is_busy = type(connection._pgconn).get_result, type(connection._pgconn).is_busy
    asked_while_busy = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(conn, name)

        def get_result(self) -> Any:
            asked_while_busy.append(is_busy(conn))
            return get_result(conn)

    conn, connection._pgconn = connection._pgconn, Watched()  # type: ignore[assignment]
    for statement in ("SELECT 1", "SELEKT", "SELECT generate_series(1, 100000)", "SELECT 1 / 0"):
        with suppress(psycopg.Error):
            await connection.fetch(statement, [])
    assert asked_while_busy
    assert not any(asked_while_busy)


@on_a_connection
async def test_a_connection_that_is_closed_tells_the_statement_under_way(
    connection: CallbackConnection, heard: Heard, sql: Sql
) -> None:
    connection.run(PendingStatement("SELECT pg_sleep(600)", [], partial(heard.note, connection)))
    connection.close()
    answer, _ = heard.answers.get_nowait()
    assert isinstance(answer, psycopg.OperationalError)
    assert not heard.lost.is_set(), "who closes it knows"
