"""The connection of a tail: one session that listens to an outbox and runs every statement that the tail needs.

One connection both listens and reads, so the next statement detects a connection that no longer answers: each must be
answered within ANSWER_TIMEOUT_SECONDS, and a tail runs at least one in every poll interval.

Statements that belong together are sent as one pipeline, and their order matters. The session is READ COMMITTED
whatever the server's default, so each statement sees what was committed when it began.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from psycopg import Connection

from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.events.history import PassedEvent, check_history, last_passed
from pgcoord_cli.core.events.outbox import Event, Outbox
from pgcoord_cli.db.binary import int4, int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import BoundStatement, Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.settings import Settings

WAKEUP_REQUEST_SECONDS = 3
"""How long writers notify a tail that does not renew its request: a few poll intervals."""

ANSWER_TIMEOUT_SECONDS = 8.0
"""How long a statement may go unanswered before the connection counts as lost."""


class BlockingTransaction(NamedTuple):
    """An open transaction that may still commit an event of an outbox.

    `since` is when it began: None if this role may not see that, or if the session has just ended, which then has no
    `application`. A prepared transaction has no `pid`; its `application` is its global identifier.
    """

    pid: int | None
    application: str | None
    since: datetime | None

    def __str__(self) -> str:
        who = f"prepared transaction {self.application}" if self.pid is None else f"pid {self.pid}"
        application = f" ({self.application})" if self.pid and self.application else ""
        if self.is_hidden:
            return f"{who}{application}, open since a time that only a role with pg_read_all_stats sees"
        return who + application + (f", open since {self.since:%Y-%m-%d %H:%M:%S %Z}" if self.since else "")

    @property
    def is_hidden(self) -> bool:
        """Whether PostgreSQL hides from this role, which is no member of pg_read_all_stats, when it began."""
        return self.since is None and self.application is not None


class Bounds(NamedTuple):
    """`head` is the highest visible event id, `collected_through` the id up to which gc may have deleted events."""

    head: int
    collected_through: int


class Reading(NamedTuple):
    """At most `limit` events after a position, ascending.

    A gap check also holds the transactions that were open before the events were read, and the bounds read after them.
    """

    events: list[Event]
    limit: int
    open_transactions: list[str] | None = None
    bounds: Bounds | None = None

    @property
    def is_whole(self) -> bool:
        """Whether no further event was visible after these."""
        return len(self.events) < self.limit


class TailConnection:
    """A listening connection to one outbox. Raises ConnectionFailed and psycopg's other errors translated."""

    def __init__(self, settings: Settings, outbox: Outbox, wakeup: Wakeup) -> None:
        self._outbox = outbox
        self._table = outbox.table.encode()
        self._requested: int | None = None
        self._requested_until = 0.0
        # It writes no table, but `setval` for the wakeup request is refused on a standby, as any write is.
        self._conn = open_session(settings, "tail", writes=True)
        try:
            with mapped_errors():
                self._prepare(settings, wakeup)
        except BaseException:
            self._conn.close()
            raise

    def _prepare(self, settings: Settings, wakeup: Wakeup) -> None:
        # LISTEN before the first read: what is committed after it is notified, what was committed before is read.
        self._notifications = listen(self._conn, [channels.outbox(settings.schema, self._outbox.table)], wakeup)
        self._conn.execute(sql("session", "plan_once"))
        self._pipeline = Pipeline(self._conn, ANSWER_TIMEOUT_SECONDS)

    def close(self) -> None:
        """Closes the connection."""
        # The wakeup request is left to expire: another tail may rely on the same value of the sequence.
        self._conn.close()

    def wait(self, seconds: float) -> bool:
        """Blocks until a notification, the wakeup or `seconds`; returns whether a notification arrived."""
        with mapped_errors():
            return bool(self._notifications.wait(seconds))

    def pause(self, seconds: float) -> None:
        """Blocks until the wakeup or for `seconds`; notifications do not end it."""
        with mapped_errors():
            self._notifications.pause(seconds)

    # -- reading

    def read(self, position: int, limit: int) -> Reading:
        """Reads the events after `position`. The wakeup request stays as it is."""
        return Reading(self._events(self._run([self._rows(position, limit)])[0]), limit)

    def cancel_wakeups_and_read(self, position: int, limit: int, *, check_gaps: bool) -> Reading:
        """Cancels this tail's wakeup request, then reads the events after `position`, on request as a gap check."""
        cancellation = self._take_cancellation()
        wanted = self._gap_check(position, limit) if check_gaps else [self._rows(position, limit)]
        results = self._run([*cancellation, *wanted])[len(cancellation) :]
        return self._checked_reading(results, limit) if check_gaps else Reading(self._events(results[0]), limit)

    def _take_cancellation(self) -> list[BoundStatement]:
        """Returns the statement that cancels this tail's wakeup request, or none if there is no request."""
        requested, self._requested, self._requested_until = self._requested, None, 0.0
        # The statement compares the value, so that it does not cancel a request that another tail has made since.
        return [] if requested is None else [(sql("tail", "cancel_wakeups"), [self._table, int8(requested)])]

    def request_wakeups_and_read(self, position: int, limit: int) -> Reading:
        """Requests wakeups for WAKEUP_REQUEST_SECONDS, then reads the events after `position` as a gap check."""
        # From before the statement is sent: the server counts from later, so this end is never past the server's.
        requested_until = time.monotonic() + WAKEUP_REQUEST_SECONDS
        request = sql("tail", "request_wakeups"), [self._table, int4(WAKEUP_REQUEST_SECONDS)]
        # The request comes before the list of the gap check: a writer that read the sequence too early to see the
        # request had its lock before, so it is in the list, unless it has committed and its events are in the rows.
        requested, *results = self._run([request, *self._gap_check(position, limit)])
        self._requested, self._requested_until = requested[0][0], requested_until
        return self._checked_reading(results, limit)

    def has_requested_wakeups_for(self, seconds: float) -> bool:
        """Returns whether the wakeup request still lasts for at least `seconds`.

        A transaction that the gap check of the request listed as open may nevertheless commit without notifying.
        """
        return time.monotonic() + seconds < self._requested_until

    def _gap_check(self, position: int, limit: int) -> list[BoundStatement]:
        return [
            # Before the rows: the watermark's proof needs a list that is older than the reading.
            (sql("tail", "open_transactions"), [self._table]),
            self._rows(position, limit),
            # After the rows: gc raises the floor in the transaction that deletes, so rows that it removed show here.
            self._bounds(),
        ]

    def _checked_reading(self, results: list[list[tuple[Any, ...]]], limit: int) -> Reading:
        open_transactions, rows, bounds = results
        return Reading(self._events(rows), limit, open_transactions[0][0], Bounds(*bounds[0]))

    def _rows(self, position: int, limit: int) -> BoundStatement:
        return sql("tail", f"{self._outbox.noun}_events"), [int8(position), int4(limit)]

    def _bounds(self) -> BoundStatement:
        return sql("tail", "bounds", outbox=self._outbox.table), []

    def _events(self, rows: list[tuple[Any, ...]]) -> list[Event]:
        # NamedTuple._make would also check the length of each row, which doubles the time; the SQL fixes it.
        return list(map(partial(tuple.__new__, self._outbox.event), rows))

    def _run(self, statements: Sequence[BoundStatement]) -> list[list[tuple[Any, ...]]]:
        with mapped_errors():
            return self._pipeline.run(statements)

    # -- positions

    def bounds(self) -> Bounds:
        """Returns the bounds of the outbox at this moment."""
        return Bounds(*self._run([self._bounds()])[0][0])

    def check_history(self, position: int, passed: PassedEvent | None) -> None:
        """Raises HistoryChanged or CursorExpired if a tail cannot go on from `position`."""
        check_history(self._conn, self._outbox, position, passed)

    def last_passed(self, position: int) -> PassedEvent | None:
        """Returns the last event up to `position`, or None."""
        return last_passed(self._conn, self._outbox, position)

    def gaps_before(self, position: int, depth: int) -> list[tuple[int, int]]:
        """Returns the gaps in the last `depth` ids up to `position` that an open transaction may still fill.

        Each gap is its first and its last missing id; the list is ascending.
        """
        after = max(0, position - depth)
        open_transactions, gaps = self._run(
            [
                # Before the gaps: a transaction that ends in between has made its events visible to the second.
                (sql("tail", "open_transactions"), [self._table]),
                (sql("tail", "gaps", outbox=self._outbox.table), [int8(after), int8(position)]),
            ]
        )
        return [(first, last) for first, last in gaps] if open_transactions[0][0] else []

    def first_at(self, milliseconds: int) -> int | None:
        """Returns the id of the first event inserted at or after a time, or None if there is none.

        `milliseconds` counts from 1970-01-01 UTC; a negative number counts back from the server's clock.
        """
        row = self._fetchone(sql("tail", "first_at", outbox=self._outbox.table), [milliseconds])
        return row[0] if row else None

    def _fetchone(self, statement: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        # Not through the pipeline: this search may take longer than ANSWER_TIMEOUT_SECONDS; the session's
        # statement_timeout bounds it.
        with mapped_errors():
            return self._conn.execute(statement, values).fetchone()

    def blocking_transactions(self) -> list[BlockingTransaction]:
        """Returns the open transactions that may still commit events, the oldest first."""
        return list_blocking_transactions(self._conn, self._outbox)


def list_blocking_transactions(conn: Connection[Any], outbox: Outbox) -> list[BlockingTransaction]:
    """Returns the open transactions that may still commit events of `outbox`, the oldest first."""
    with mapped_errors():
        rows = conn.execute(sql("tail", "blocking_transactions"), [outbox.table])
        return [BlockingTransaction(*row) for row in rows]
