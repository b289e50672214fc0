"""A feed: one connection to an outbox, with every statement that a tail runs over it.

The same connection listens and reads, so that one that went silent is noticed by whichever statement comes next: every
statement has to be answered within PATIENCE_SECONDS, and a tail runs one at least once in a poll interval.

Statements that belong together go out as one unit, and their order matters. Each sees what was committed when it
began: the session is READ COMMITTED whatever the server's default.
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
from pgcoord_cli.core.events.outbox import Event, Outbox
from pgcoord_cli.db.binary import int4, int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import BoundStatement, Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.settings import Settings

WAKE_SECONDS = 3
"""How long writers go on waking a tail that has not asked anew: some poll intervals."""

PATIENCE_SECONDS = 8.0
"""How long an answer may take before the connection is taken for dead."""


class Holder(NamedTuple):
    """A transaction that may hold an event that is not yet to be seen; of a prepared one, `application` is its name."""

    pid: int | None
    application: str | None
    since: datetime | None

    def __str__(self) -> str:
        who = f"prepared transaction {self.application}" if self.pid is None else f"pid {self.pid}"
        application = f" ({self.application})" if self.pid and self.application else ""
        return who + application + (f", open since {self.since:%Y-%m-%d %H:%M:%S %Z}" if self.since else "")


class Bounds(NamedTuple):
    """The last event in sight, and up to which garbage collection has deleted."""

    head: int
    collected_through: int


class Reading(NamedTuple):
    """At most `limit` events after a position; of a look, also the announced writers before it and the bounds after."""

    events: list[Event]
    limit: int
    writers: list[str] | None = None
    bounds: Bounds | None = None

    @property
    def is_whole(self) -> bool:
        """Whether these are all that were there."""
        return len(self.events) < self.limit


class TailConnection:
    """A listening connection to one outbox. Raises ConnectionFailed and others of psycopg's errors, translated."""

    def __init__(self, settings: Settings, outbox: Outbox, wakeup: Wakeup) -> None:
        self._outbox = outbox
        self._table = outbox.table.encode()
        self._wake_until: int | None = None
        self._is_woken_until = 0.0
        self._conn = open_session(settings, "tail", writes=True)
        try:
            with mapped_errors():
                self._prepare(settings, wakeup)
        except BaseException:
            self._conn.close()
            raise

    def _prepare(self, settings: Settings, wakeup: Wakeup) -> None:
        self._notifications = listen(self._conn, [channels.outbox(settings.schema, self._outbox.table)], wakeup)
        self._conn.execute(sql("session", "plan_once"))
        self._pipeline = Pipeline(self._conn, PATIENCE_SECONDS)

    def close(self) -> None:
        """Ends the connection.

        What it asked for runs out by itself: to take it back would speak for other tails that wait.
        """
        self._conn.close()

    def wait(self, seconds: float) -> bool:
        """Waits for a notification, the wakeup or the time; whether it was a notification."""
        with mapped_errors():
            return bool(self._notifications.wait(seconds))

    def pause(self, seconds: float) -> None:
        """Waits for the wakeup or the time, whoever notifies."""
        with mapped_errors():
            self._notifications.pause(seconds)

    # -- reading on

    def read(self, position: int, limit: int) -> Reading:
        """The next events. Whether writers wake this tail stays as it is."""
        return Reading(self._events(self._run([self._rows(position, limit)])[0]), limit)

    def read_awake(self, position: int, limit: int, *, looking: bool) -> Reading:
        """The next events, or a look at them; no writer needs to wake this tail from now on."""
        first = self._staying_awake()
        wanted = self._look(position, limit) if looking else [self._rows(position, limit)]
        found = self._run([*first, *wanted])[len(first) :]
        return self._looked(found, limit) if looking else Reading(self._events(found[0]), limit)

    def _staying_awake(self) -> list[BoundStatement]:
        """Takes back what `read_before_waiting` asked for, if it did."""
        asked, self._wake_until, self._is_woken_until = self._wake_until, None, 0.0
        return [] if asked is None else [(sql("tail", "stay_awake"), [self._table, int8(asked)])]

    def read_before_waiting(self, position: int, limit: int) -> Reading:
        """Has the writers wake this tail from now on; lists those who may have missed that; reads."""
        woken_until = time.monotonic() + WAKE_SECONDS
        asking = sql("tail", "ask_to_be_woken"), [self._table, int4(WAKE_SECONDS)]
        wake_until, *found = self._run([asking, *self._look(position, limit)])
        self._wake_until, self._is_woken_until = wake_until[0][0], woken_until
        return self._looked(found, limit)

    def is_woken_for(self, seconds: float) -> bool:
        """Whether the writers wake this tail for at least so long; of those that `read_before_waiting` did not list."""
        return time.monotonic() + seconds < self._is_woken_until

    def _look(self, position: int, limit: int) -> list[BoundStatement]:
        """The bounds come last: what was collected as garbage before the reading shows in them."""
        return [(sql("tail", "writers"), [self._table]), self._rows(position, limit), self._bounds()]

    def _looked(self, found: list[list[tuple[Any, ...]]], limit: int) -> Reading:
        writers, rows, bounds = found
        return Reading(self._events(rows), limit, writers[0][0], Bounds(*bounds[0]))

    def _rows(self, position: int, limit: int) -> BoundStatement:
        return sql("tail", f"{self._outbox.noun}_events"), [int8(position), int4(limit)]

    def _bounds(self) -> BoundStatement:
        return sql("tail", f"{self._outbox.noun}_bounds"), []

    def _events(self, rows: list[tuple[Any, ...]]) -> list[Event]:
        """What `_make` does, without its check of the length: half the time."""
        return list(map(partial(tuple.__new__, self._outbox.event), rows))

    def _run(self, statements: Sequence[BoundStatement]) -> list[list[tuple[Any, ...]]]:
        with mapped_errors():
            return self._pipeline.run(statements)

    # -- looking

    def bounds(self) -> Bounds:
        """Where the outbox begins and ends at this moment."""
        return Bounds(*self._run([self._bounds()])[0][0])

    def gaps_before(self, position: int, depth: int) -> list[tuple[int, int]]:
        """The gaps, among the last `depth` ids up to a position, that a writer may still fill."""
        after = max(0, position - depth)
        writers, gaps = self._run(
            [
                (sql("tail", "writers"), [self._table]),
                (sql("tail", f"{self._outbox.noun}_gaps"), [int8(after), int8(position)]),
            ]
        )
        return [(first, last) for first, last in gaps] if writers[0][0] else []

    def first_at(self, milliseconds: int) -> int | None:
        """The first event that was inserted at a time or later, or so many milliseconds ago if negative."""
        row = self._fetchone(sql("tail", f"{self._outbox.noun}_first_at"), [milliseconds])
        return row[0] if row else None

    def _fetchone(self, statement: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """For what may take long: as long as a statement may take."""
        with mapped_errors():
            return self._conn.execute(statement, values).fetchone()

    def holders(self) -> list[Holder]:
        """Who the announced writers are, longest first."""
        return list_holders(self._conn, self._outbox)


def list_holders(conn: Connection[Any], outbox: Outbox) -> list[Holder]:
    """Who may hold events of an outbox that are not yet to be seen, longest first."""
    with mapped_errors():
        return [Holder(*row) for row in conn.execute(sql("tail", "holders"), [outbox.table])]
