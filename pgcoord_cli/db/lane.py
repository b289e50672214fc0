"""A lane: one asyncio connection that runs prepared statements with binary values, one at a time, at little cost.

psycopg's cursors serve every type and every way of use. The commit client sends the same handful of statements tens
of thousands of times a second, and for those most of the time would go into choosing dumpers, into registering and
unregistering the socket with the event loop, and into tasks that wait for each other. A lane registers the socket
once, prepares each statement at its first use, hands bytes through (`binary` holds the few conversions), and calls
back, so that what follows an answer goes out in the same step of the event loop. It stands on psycopg's own wrapper of
libpq.

Notifications that arrive on the connection go to `on_notify`, whenever they arrive, and `on_lost` is called when the
connection turns out to be lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, pq
from psycopg.errors import error_from_result

Row = tuple[bytes | None, ...]
Answer = list[Row] | Exception
"""The rows of a statement, or what came in their place."""


LAST_WORDS = ("FATAL", "PANIC")
"""Errors of this severity are the last that a session says."""


class Statement(NamedTuple):
    """A statement with `$1` and so on, its parameters in PostgreSQL's binary formats, and who gets the answer."""

    text: str
    parameters: Sequence[bytes | None]
    done: Callable[[Answer], None]


class Lane:
    """Runs one statement at a time over a connection that it owns from now on."""

    def __init__(
        self,
        conn: AsyncConnection[Any],
        on_notify: Callable[[str], None] = lambda _channel: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._conn = conn  # what it is made of ends with it
        self._pgconn = conn.pgconn
        self._pgconn.nonblocking = 1
        self._on_notify = on_notify
        self.on_lost = on_lost
        self._names: dict[str, bytes] = {}
        self._running: Statement | None = None
        self._preparing: bytes | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = self._pgconn.socket
        self._loop.add_reader(self._socket, self._on_readable)

    @property
    def is_open(self) -> bool:
        """Whether the connection still stands, as far as is known."""
        return self._pgconn.status != pq.ConnStatus.BAD

    def run(self, statement: Statement) -> None:
        """Sends a statement; its `done` is called later, with the rows or a psycopg.Error. One at a time."""
        assert self._running is None, "a lane runs one statement at a time"
        self._running = statement
        try:
            if name := self._names.get(statement.text):
                self._execute(name)
            else:
                self._preparing = b"lane_%d" % len(self._names)
                self._pgconn.send_prepare(self._preparing, statement.text.encode())
            self._flush()
        except psycopg.Error as error:
            self._forget_socket()  # libpq has closed it, and the next one opened may get its number
            self._loop.call_soon(self._break, error)

    async def fetch(self, text: str, parameters: Sequence[bytes | None]) -> list[Row]:
        """The rows of a statement; raises psycopg.Error."""
        rows: asyncio.Future[list[Row]] = self._loop.create_future()
        self.run(Statement(text, parameters, partial(settle, rows)))
        return await rows

    def _execute(self, name: bytes) -> None:
        assert self._running is not None
        parameters = self._running.parameters
        self._pgconn.send_query_prepared(name, parameters, [1] * len(parameters), 1)

    def _flush(self) -> None:
        if self._pgconn.flush():
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        try:
            if not self._pgconn.flush():
                self._loop.remove_writer(self._socket)
        except psycopg.Error as error:
            self._break(error)

    def _on_readable(self) -> None:
        try:
            self._pgconn.consume_input()
            if self._running and not self._pgconn.is_busy():
                self._on_results(self._results())
            while notification := self._pgconn.notifies():
                self._on_notify(notification.relname.decode())
        except psycopg.Error as error:
            self._break(error)

    def _results(self) -> list[pq.abc.PGresult]:
        results = []
        while result := self._pgconn.get_result():
            results.append(result)
        return results

    def _on_results(self, results: Sequence[pq.abc.PGresult]) -> None:
        answer = _answer(results)
        if isinstance(answer, psycopg.Error) and self._is_last(answer):
            self._break(answer)
        elif isinstance(answer, list) and self._preparing:
            self._on_prepared(self._preparing)
        else:
            self._end(answer)

    def _is_last(self, error: psycopg.Error) -> bool:
        """Whether nothing will follow, although the socket may not have told yet."""
        return not self.is_open or error.diag.severity_nonlocalized in LAST_WORDS

    def _on_prepared(self, name: bytes) -> None:
        assert self._running is not None
        self._names[self._running.text] = name
        self._preparing = None
        self._execute(name)
        self._flush()

    def _end(self, answer: Answer) -> None:
        statement, self._running, self._preparing = self._running, None, None
        if statement:
            statement.done(answer)

    def _break(self, error: psycopg.Error) -> None:
        self.close(error)
        self.on_lost()

    def close(self, reason: psycopg.Error | None = None) -> None:
        """Ends the connection, in whatever state it is; a statement that is under way gets the reason."""
        self._forget_socket()
        self._pgconn.finish()
        self._end(reason or psycopg.OperationalError("the connection was closed"))

    def _forget_socket(self) -> None:
        if self._socket >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket = -1


def settle(rows: asyncio.Future[list[Row]], answer: Answer) -> None:
    """Hands an answer to whoever still waits for it."""
    if rows.done():
        return
    if isinstance(answer, Exception):
        rows.set_exception(answer)
    else:
        rows.set_result(answer)


def _answer(results: Sequence[pq.abc.PGresult]) -> Answer:
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            error = error_from_result(result)
            # Without a state it is libpq that speaks, not the server: the connection is gone.
            return error if error.sqlstate else psycopg.OperationalError(str(error))
    result = results[-1]
    rows, value = range(result.ntuples), result.get_value
    columns = ([value(row, column) for row in rows] for column in range(result.nfields))
    return list(zip(*columns, strict=True))
