"""A pipeline: several prepared statements sent as one unit over a synchronous connection.

Without BEGIN, PostgreSQL runs all statements before a Sync message as one transaction: all take effect or none, and a
sender that freezes leaves no transaction open. psycopg has a pipeline mode of its own; this class prepares every
statement at its first use and takes parameters in binary format (`binary` encodes them), which takes a third of the
time in the leader.

It waits for the socket in `poll`, which releases the interpreter's lock, so that other threads run meanwhile.
Notifications that arrive meanwhile stay in the connection until they are read from it.
"""

from __future__ import annotations

import select
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import psycopg
from psycopg import Connection, pq
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result

# Names of prepared statements live as long as the session, and several pipelines may use one connection in turn.
_numbers = count()

BoundStatement = tuple[str, Sequence[bytes | None]]
"""A statement with `$1` and so on, and its parameters in PostgreSQL's binary format; None is null."""


class Unanswered(psycopg.OperationalError):
    """The server has not answered in time. The connection has been closed; the outcome is unknown."""


class Pipeline:
    """Runs prepared statements over `conn`, which has no other user while one of them runs.

    A server that does not answer for `timeout` seconds counts as lost; None: no limit. So does one that has not
    answered when the descriptor `abandon` becomes readable. Nothing is cancelled: the connection is closed, and a
    commit that waits for a standby goes on waiting (rule I16).
    """

    def __init__(self, conn: Connection[Any], timeout: float | None = None, abandon: int | None = None) -> None:
        self._timeout = None if timeout is None else timeout * 1000  # milliseconds, as `poll` takes it
        self._pgconn = conn.pgconn
        self._names: dict[str, bytes] = {}
        self._loader = Transformer(conn)
        self._readable = select.poll()
        self._readable.register(self._pgconn.socket, select.POLLIN)
        self._either = select.poll()
        self._either.register(self._pgconn.socket, select.POLLIN | select.POLLOUT)
        self._abandon = abandon
        if abandon is not None:
            self._readable.register(abandon, select.POLLIN)
            self._either.register(abandon, select.POLLIN)

    def fetch(self, text: str, parameters: Sequence[bytes | None]) -> list[tuple[Any, ...]]:
        """Runs one statement and returns its rows, with values as psycopg loads them. Raises psycopg.Error."""
        return self.run([(text, parameters)])[0]

    def run(self, statements: Sequence[BoundStatement]) -> list[list[tuple[Any, ...]]]:
        """Runs statements that take effect together or not at all; returns the rows of each. Raises psycopg.Error."""
        for text, _ in statements:
            if text not in self._names:
                self._prepare(text)
        self._pgconn.enter_pipeline_mode()
        for text, parameters in statements:
            self._pgconn.send_query_prepared(self._names[text], parameters, [1] * len(parameters), 1)
        return [self._rows(result) for result in self._end_unit()]

    def _prepare(self, text: str) -> None:
        """Prepares a statement in a unit of its own, so that it stays prepared if the unit that uses it fails."""
        name = b"pipeline_%d" % next(_numbers)
        self._pgconn.enter_pipeline_mode()
        self._pgconn.send_prepare(name, text.encode())
        self._end_unit()
        self._names[text] = name

    def _end_unit(self) -> list[pq.abc.PGresult]:
        """Ends the unit and returns one result for each statement. Raises the error that rolled the unit back."""
        self._pgconn.pipeline_sync()
        results = list(self._results())
        # Also after an error, so that the connection can be used again; libpq allows it once all results were read.
        self._pgconn.exit_pipeline_mode()
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise error_from_result(result)
        return results

    def _rows(self, result: pq.abc.PGresult) -> list[tuple[Any, ...]]:
        self._loader.set_pgresult(result)
        return self._loader.load_rows(0, result.ntuples, tuple)

    def _results(self) -> Iterator[pq.abc.PGresult]:
        """Yields the results up to the end of the unit. Raises psycopg.OperationalError if the connection is lost."""
        while True:
            self._wait_for_result()
            result = self._pgconn.get_result()
            if result is not None and result.status == pq.ExecStatus.PIPELINE_SYNC:
                return
            if result is not None:
                yield result
            elif self._pgconn.status == pq.ConnStatus.BAD:  # otherwise None ends the results of one statement
                raise psycopg.OperationalError("the connection was lost")

    def _wait_for_result(self) -> None:
        # While sending, input is read too: with both buffers full, client and server would wait for each other.
        while self._pgconn.flush():
            for events in self._ready(self._either):
                if events & ~select.POLLOUT:
                    self._pgconn.consume_input()
        while self._pgconn.is_busy():
            self._ready(self._readable)
            self._pgconn.consume_input()

    def _ready(self, poll: select.poll) -> list[int]:
        ready = poll.poll(self._timeout)
        if not ready or any(descriptor == self._abandon for descriptor, _ in ready):
            # Closed, because a late answer would be taken for the answer to the next statement.
            self._pgconn.finish()
            raise Unanswered("the server does not answer")
        return [events for _, events in ready]
