"""An asyncio connection that runs prepared statements with binary values, one at a time, and calls back.

psycopg's cursors serve every type and every way of use. The commit client sends the same few statements tens of
thousands of times a second; there, most of the time would go into choosing dumpers, into registering the socket with
the event loop and removing it again, and into tasks that wait for each other. This connection registers the socket
once, prepares each statement at its first use, and passes parameters and rows as bytes (`db.binary` has the few
conversions). It calls back, so that what follows an answer is sent in the same step of the event loop. It is built on
psycopg's public wrapper of libpq, `psycopg.pq`.

Notifications go to `on_notify` whenever they arrive. `on_lost` is called when the connection is found to be lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import AsyncConnection, errors, pq
from psycopg.errors import error_from_result

from pgcoord_cli.db.connection import SESSION_ENDING_SEVERITIES, Unconfirmed, is_unconfirmed
from pgcoord_cli.errors import PgcoordError

T = TypeVar("T")

Row = tuple[bytes | None, ...]
Answer = list[Row] | Exception
"""The rows of a statement, or the error that came instead."""


class PendingStatement(NamedTuple):
    """A statement with `$1`, `$2` …, its parameters in PostgreSQL's binary formats, and the callback for its answer."""

    text: str
    parameters: Sequence[bytes | None]
    done: Callable[[Answer], None]


class UnreadableAnswer(PgcoordError):
    """The server ran the statement, but its answer has not the expected form."""


def read_answer(answer: Answer, read: Callable[[list[Row]], T]) -> T | Exception:
    """Returns what `read` makes of the rows, or the error that came instead of them.

    Returns UnreadableAnswer if `read` raises: an exception in a callback would leave its caller's queue waiting.
    """
    if isinstance(answer, Exception):
        return answer
    try:
        return read(answer)
    except PgcoordError as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever it is, the owner of the callback has to go on
        return UnreadableAnswer(f"the answer of the server cannot be read: {error!r}")


class CallbackConnection:
    """Runs one statement at a time over a connection that it owns and closes.

    A statement without an answer for `timeout` seconds counts as a lost connection; None: no limit.
    """

    def __init__(
        self,
        conn: AsyncConnection[Any],
        on_notify: Callable[[str], None] = lambda _channel: None,
        on_lost: Callable[[], None] = lambda: None,
        timeout: float | None = None,
    ) -> None:
        conn.add_notice_handler(self._on_notice)
        self._conn = conn  # kept because its end would close the libpq connection below
        self._pgconn = conn.pgconn
        self._pgconn.nonblocking = 1
        self._on_notify = on_notify
        self.on_lost = on_lost
        self._timeout = timeout
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._names: dict[str, bytes] = {}
        self._running: PendingStatement | None = None
        self._result: pq.abc.PGresult | None = None
        self._error: Exception | None = None
        self._preparing: bytes | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = self._pgconn.socket
        self._loop.add_reader(self._socket, self._on_readable)

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as libpq knows."""
        return self._pgconn.status != pq.ConnStatus.BAD

    def run(self, statement: PendingStatement) -> None:
        """Sends a statement. Its `done` is called later, with the rows or a psycopg.Error; one statement at a time."""
        assert self._running is None, "a statement is running on this connection"
        self._running = statement
        self._set_deadline()
        try:
            if name := self._names.get(statement.text):
                self._execute(name)
            else:
                self._preparing = b"statement_%d" % len(self._names)
                self._pgconn.send_prepare(self._preparing, statement.text.encode())
            self._flush()
        except psycopg.Error as error:
            # libpq has closed the socket; the next one that is opened may get the same number.
            self._forget_socket()
            self._loop.call_soon(self._break, error)
        except Exception as error:  # noqa: BLE001 - passed to the statement's callback
            # A parameter is not bytes: nothing was sent, and the connection is as it was.
            self._error = error
            self._loop.call_soon(self._end, error)

    def _set_deadline(self) -> None:
        # One timer serves many statements: when it fires, it checks whether the one that runs then is late.
        if self._timeout is not None:
            self._deadline = self._loop.time() + self._timeout
            self._timer = self._timer or self._loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._running and self._loop.time() >= self._deadline:
            self._break(psycopg.OperationalError("the server does not answer"))
        elif self._running:
            self._timer = self._loop.call_at(self._deadline, self._on_timer)

    async def fetch(self, text: str, parameters: Sequence[bytes | None]) -> list[Row]:
        """Runs a statement and returns its rows. Raises psycopg.Error."""
        rows: asyncio.Future[list[Row]] = self._loop.create_future()
        self.run(PendingStatement(text, parameters, partial(settle, rows)))
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
            while self._running and not self._pgconn.is_busy():  # busy: the next result has not arrived whole
                self._take(self._pgconn.get_result())
            while notification := self._pgconn.notifies():
                self._on_notify(notification.relname.decode())
        except psycopg.Error as error:
            self._break(error)

    def _take(self, result: pq.abc.PGresult | None) -> None:
        """Takes one result of the running statement; None follows the last."""
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            self._on_error(error_from_result(result))
        elif result is not None:
            self._result = result
        elif self._preparing and not self._error:
            self._on_prepared(self._preparing)
        else:
            self._end(self._error or _rows(self._result))

    def _on_error(self, error: psycopg.Error) -> None:
        # An error without a SQLSTATE comes from libpq, not from the server: the connection is gone.
        reason = error if error.sqlstate else psycopg.OperationalError(str(error))
        self._error = reason
        if not self.is_open or error.diag.severity_nonlocalized in SESSION_ENDING_SEVERITIES:
            self._break(reason)

    def _on_notice(self, notice: errors.Diagnostic) -> None:
        # It arrives behind the rows, before the end of the statement: an answer that must not count as committed.
        if is_unconfirmed(notice):
            self._error = Unconfirmed("the server stopped waiting for synchronous replication")

    def _on_prepared(self, name: bytes) -> None:
        assert self._running is not None
        self._names[self._running.text] = name
        self._preparing = None
        try:
            self._execute(name)
            self._flush()
        except psycopg.Error:
            raise
        except Exception as error:  # noqa: BLE001 - a parameter is not bytes, and nothing was sent
            self._end(error)

    def _end(self, answer: Answer) -> None:
        statement, self._running = self._running, None
        self._preparing = self._result = self._error = None
        if statement:
            statement.done(answer)

    def _break(self, error: psycopg.Error) -> None:
        self.close(error)
        self.on_lost()

    def close(self, reason: psycopg.Error | None = None) -> None:
        """Closes the connection in any state; a running statement gets `reason` as its answer."""
        self._forget_socket()
        if self._timer:
            self._timer.cancel()
        self._pgconn.finish()
        self._end(reason or psycopg.OperationalError("the connection was closed"))

    def _forget_socket(self) -> None:
        if self._socket >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket = -1


def settle(rows: asyncio.Future[list[Row]], answer: Answer) -> None:
    """Sets a future's result or error, unless it was cancelled."""
    if rows.done():
        return
    if isinstance(answer, Exception):
        rows.set_exception(answer)
    else:
        rows.set_result(answer)


def _rows(result: pq.abc.PGresult | None) -> list[Row]:
    if result is None:
        return []
    rows, value = range(result.ntuples), result.get_value
    columns = ([value(row, column) for row in rows] for column in range(result.nfields))
    return list(zip(*columns, strict=True))
