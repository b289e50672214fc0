"""Subscriptions: named checkpoints of tails, each with one owner (`core.locks.ownership`), and operations on them.

**A tail's subscription** survives the loss of its connection. When a save finds the connection lost, the subscription
takes the lock again. The server may still keep the session of the lost connection; the subscription terminates it. If
another session holds the lock, the tail ends. A subscription of a tail belongs to one outbox, since a position in one
means nothing in the other.

**Setting** a position takes the lock as well, so that it cannot change under a running owner.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.advisory_keys import lock_holder
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.filters import Filters
from pgcoord_cli.core.events.history import PassedEvent, check_history
from pgcoord_cli.core.events.notices import Notice, OnNotice, ignore_notice
from pgcoord_cli.core.events.outbox import OUTBOXES, Outbox
from pgcoord_cli.core.locks.ownership import Acquisition, Fence, draw_fence, subscription_lock, take_lock
from pgcoord_cli.db.binary import int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import (
    ConditionFalse,
    ConnectionFailed,
    CursorExpired,
    Fenced,
    LockNotAcquired,
    PgcoordError,
    UsageError,
)
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.subscription")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts to connect."""

ANSWER_TIMEOUT_SECONDS = 8.0
"""How long a save may go unanswered before the connection counts as lost."""


class Subscription:
    """The owned checkpoint of one tail. Raises LockNotAcquired at once if the name has another owner."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        outbox: Outbox,
        report: OnNotice = ignore_notice,
        *,
        filters: Filters | None = None,
    ) -> None:
        self._settings = settings
        self._report = report
        self._name = name
        self._outbox = outbox
        self._wakeup = Wakeup()
        self._stopping = False
        self._outage = Outage(_log, f"{name!r} is not saved yet", f"{name!r} is owned", subscription=name)
        self._filters = None if filters is None else json.dumps(filters.document(), ensure_ascii=False)
        self.passed: PassedEvent | None = None
        self._backend_pid: int | None = None
        self._acquire()

    def load(self) -> int | None:
        """Returns the position at the last acquisition, or None if none has been saved."""
        return self._position

    def save(self, position: int, passed: PassedEvent | None = None) -> None:
        """Saves `position`, with the last event passed.

        If that fails, reconnects, takes the lock again and repeats until it is saved.

        Raises LockNotAcquired or Fenced if another owner has acquired the name meanwhile; HistoryChanged if the new
        connection leads to another history; after `stop` any PgcoordError.
        """
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            try:
                if self._conn.closed:
                    # Draws a new fence, so a save that is still in flight on the lost connection is refused.
                    self._acquire()
                    # A failover may have led to another history, in which the position means other events.
                    if passed:
                        check_history(self._conn, self._outbox, position, passed)
                    self._outage.ended(cursor=to_cursor(position))
                    self._report(Notice("connected", to_cursor(position), "the subscription is owned again"))
                self._save(position, passed)
                return
            except (LockNotAcquired, Fenced, CursorExpired):
                raise
            except PgcoordError as error:
                # The save may have been committed; to repeat it is safe, since a position never goes back.
                self._conn.close()
                if self._stopping:
                    raise
                self._outage.failed(error.reason, cursor=to_cursor(position))
                self._report(Notice("disconnected", to_cursor(position), f"not saved yet: {error.message}"))
            self._wakeup.wait(backoff.next_pause())

    def stop(self) -> None:
        """Makes a `save` that waits for a connection raise. May be called from a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """Closes the connection, which releases the lock."""
        self._conn.close()
        self._wakeup.close()

    def _acquire(self) -> None:
        self._conn = open_session(self._settings, "subscription", writes=True)
        try:
            with mapped_errors():
                self._take_lock()
                self._fence = self._draw_fence()
                self._pipeline = Pipeline(self._conn, ANSWER_TIMEOUT_SECONDS)
        except BaseException:
            self._conn.close()
            raise
        self._backend_pid = self._conn.info.backend_pid

    def _take_lock(self) -> None:
        try:
            take_lock(self._conn, self._settings.schema, self._name)
        except LockNotAcquired:
            holder = lock_holder(self._conn, subscription_lock(self._settings.schema, self._name))
            if self._backend_pid is None or (holder and holder.pid != self._backend_pid):
                raise
            # Our own lost session may still hold the lock: until a TCP timeout, the server does not know of the loss.
            if holder:
                self._conn.execute(sql("locks", "end_session"), [holder.pid])
            raise ConnectionFailed(f"the lost session of subscription {self._name!r} still held its lock") from None

    def _draw_fence(self) -> Fence:
        acquired = draw_fence(self._conn, self._name, self._outbox.table, filters=self._filters)
        check_outbox(self._name, acquired.outbox, self._outbox)
        self._position = acquired.position
        self.passed = PassedEvent.from_json(acquired.passed or "")
        self._compare_filters(acquired)
        return acquired.fence

    def _compare_filters(self, acquired: Acquisition) -> None:
        """Reports once that the subscription was begun with other filters."""
        given, self._filters = self._filters, None
        if given and acquired.filters and json.loads(given) != json.loads(acquired.filters):
            cursor = to_cursor(acquired.position or 0)
            message = (
                f"subscription {self._name!r} began with the filters {acquired.filters}, and goes on with {given}; "
                f"events before this cursor that only the new filters pass are not delivered"
            )
            fields = {"event": "filters_changed", "subscription": self._name, "cursor": cursor}
            _log.warning("filters changed at %s: %s", cursor, message, extra=fields)
            self._report(Notice("filters_changed", cursor, message))

    def _save(self, position: int, passed: PassedEvent | None) -> None:
        values = [
            self._name.encode(),
            int8(self._fence.number),
            int8(position),
            self._fence.fence_id.bytes,
            passed.to_json().encode() if passed else None,
        ]
        with mapped_errors():
            save = sql("subscriptions", "save", schema=self._settings.schema)
            (is_saved,) = self._pipeline.fetch(save, values)[0]
        if not is_saved:
            raise Fenced(
                f"subscription {self._name!r} has been acquired by another owner; position {position} was not saved"
            )


def checkpoint(conn: Connection[Any], name: str, outbox: Outbox) -> tuple[int | None, PassedEvent | None]:
    """Returns the position of a subscription, owned or not, and the last event passed.

    Raises UsageError if there is none for this outbox.
    """
    row = conn.execute(sql("subscriptions", "checkpoint"), [name]).fetchone()
    if row is None:
        raise UsageError(
            f"--subscription: there is no subscription {name!r}",
            hint="the first tail with that name creates it; see: pgcoord subscription list",
        )
    table, position, passed = row
    check_outbox(name, table, outbox)
    return position, PassedEvent.from_json(passed or "")


def check_outbox(name: str, table: str | None, outbox: Outbox) -> None:
    """Raises UsageError if the positions of the subscription, whose outbox is `table`, belong to another outbox."""
    if table != outbox.table:
        raise UsageError(
            f"--subscription: {name!r} is a subscription of {table or 'no outbox'}, not of {outbox.table}",
            hint="choose another name",
        )


def list_subscriptions(conn: Connection[Any], name: str | None = None) -> list[dict[str, Any]]:
    """Returns every subscription, or the one of that name: its position, cursor and number of events after it."""
    records = conn.cursor(row_factory=dict_row).execute(sql("subscriptions", "list"), [name]).fetchall()
    for record in records:
        position = record["last_position"]
        # Without an outbox, a position is the application's own: it may be negative, which no cursor is.
        record["cursor"] = None if position is None or position < 0 else to_cursor(position)
    return records


def subscription_record(conn: Connection[Any], schema: str, name: str) -> dict[str, Any]:
    """Returns a subscription with the session that owns it. Raises ConditionFalse if there is no such subscription."""
    records = list_subscriptions(conn, name)
    if not records:
        raise ConditionFalse(f"there is no subscription {name!r}", hint="see: pgcoord subscription list")
    holder = lock_holder(conn, subscription_lock(schema, name))
    return records[0] | {"owner": holder._asdict() if holder else None}


def set_position(conn: Connection[Any], schema: str, name: str, position: int, *, force: bool) -> int | None:
    """Sets the position of a subscription without an owner; returns the position before.

    Raises LockNotAcquired if it has an owner; UsageError if `position` is beyond the last event of its outbox, or lower
    than before and `force` is not given.
    """
    record = subscription_record(conn, schema, name)
    take_lock(conn, schema, name)
    _check_end(conn, record["outbox"], position)
    # A new fence: an owner whose session was terminated may not know it, and must not save over this position.
    fence, before, *_ = draw_fence(conn, name, None)
    if before is not None and position < before and not force:
        raise UsageError(
            f"subscription {name!r} is at {to_cursor(before)}, and {to_cursor(position)} is before that",
            hint="to move it back, so that the events in between are delivered again, use --force",
        )
    conn.execute(sql("subscriptions", "set_position"), [name, fence.number, position, fence.fence_id])
    return before


def _check_end(conn: Connection[Any], table: str | None, position: int) -> None:
    for outbox in OUTBOXES.values():
        if outbox.table == table:
            head, _ = conn.execute(sql("tail", "bounds", outbox=outbox.table)).fetchone() or (0, 0)
            if position > head:
                raise UsageError(f"{to_cursor(position)} is beyond the last event of {table}, {to_cursor(head)}")


def remove(conn: Connection[Any], schema: str, name: str) -> None:
    """Clears the position of a subscription without an owner. Raises LockNotAcquired and ConditionFalse."""
    subscription_record(conn, schema, name)
    take_lock(conn, schema, name)
    fence, *_ = draw_fence(conn, name, None)
    conn.execute(sql("subscriptions", "remove"), [name, fence.number, fence.fence_id])
