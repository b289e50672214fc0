"""A lane: one asyncio connection that runs prepared statements with binary values, one at a time, at little cost.

psycopg's cursors serve every type and every way of use. The commit client sends the same handful of statements tens
of thousands of times a second, and for those most of the time would go into choosing dumpers and into registering and
unregistering the socket with the event loop. A lane registers the socket once, prepares each statement at its first
use, and hands bytes through; `binary` holds the few conversions. It stands on psycopg's own wrapper of libpq.

Notifications that arrive on the connection go to `on_notify`, whenever they arrive, and `on_lost` is called when the
connection turns out to be lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import AsyncConnection, pq
from psycopg.errors import error_from_result

Row = tuple[bytes | None, ...]


class Lane:
    """Runs one statement at a time over a connection that it owns from now on."""

    def __init__(
        self,
        conn: AsyncConnection[Any],
        on_notify: Callable[[str], None] = lambda _channel: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._conn = conn
        self._pgconn = conn.pgconn
        self._pgconn.nonblocking = 1
        self._on_notify = on_notify
        self._on_lost = on_lost
        self._names: dict[str, bytes] = {}
        self._answer: asyncio.Future[list[pq.abc.PGresult]] | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = self._pgconn.socket
        self._loop.add_reader(self._socket, self._on_readable)

    @property
    def is_usable(self) -> bool:
        """Whether the connection is open and no statement was left half way."""
        return not self._conn.closed and self._answer is None

    async def fetch(self, text: str, parameters: Sequence[bytes | None]) -> list[Row]:
        """The rows of a statement. Parameters and values are PostgreSQL's binary formats; raises psycopg.Error."""
        name = self._names.get(text) or await self._prepare(text)
        self._pgconn.send_query_prepared(name, parameters, [1] * len(parameters), 1)
        result = (await self._receive())[-1]
        rows, value = range(result.ntuples), result.get_value
        columns = ([value(row, column) for row in rows] for column in range(result.nfields))
        return list(zip(*columns, strict=True))

    async def _prepare(self, text: str) -> bytes:
        name = b"lane_%d" % len(self._names)
        self._pgconn.send_prepare(name, text.encode())
        await self._receive()
        self._names[text] = name
        return name

    async def _receive(self) -> list[pq.abc.PGresult]:
        self._answer = self._loop.create_future()
        self._flush()
        results = await self._answer
        self._answer = None
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                error = error_from_result(result)
                # Without a state it is libpq that speaks, not the server: the connection is gone.
                raise error if error.sqlstate else psycopg.OperationalError(str(error))
        return results

    def _flush(self) -> None:
        if self._pgconn.flush():
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        if not self._pgconn.flush():
            self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            self._pgconn.consume_input()
            while notification := self._pgconn.notifies():
                self._on_notify(notification.relname.decode())
            if self._answer is None or self._answer.done() or self._pgconn.is_busy():
                return
            results = []
            while result := self._pgconn.get_result():
                results.append(result)
            self._answer.set_result(results)
        except psycopg.Error as error:
            self._break(error)

    def _break(self, error: psycopg.Error) -> None:
        self._forget_socket()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self._pgconn.finish()
        self._on_lost()

    def _forget_socket(self) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)

    async def close(self) -> None:
        """Ends the connection, in whatever state it is."""
        if not self._conn.closed:
            self._forget_socket()
        await self._conn.close()
