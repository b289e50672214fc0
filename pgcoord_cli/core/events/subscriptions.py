"""Subscriptions: the checkpoints of tails, each owned as `core.locks.ownership` tells, and looked at and set by operators.

**A tail's subscription** outlives its connections. When a save finds the connection lost, it takes the lock anew, which
ends the session that the server may still keep of the lost one; if somebody else has taken the lock meanwhile, that is
the end. A subscription that tails an outbox belongs to it: positions of another would mean nothing.

**Setting** a position takes the lock too, so that it cannot happen under an owner's feet.
"""

from __future__ import annotations

from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.advisory_keys import lock_holder
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.outbox import OUTBOXES, Outbox
from pgcoord_cli.core.events.tail import Notice, ReportNotice, ignore_notice
from pgcoord_cli.core.locks.ownership import draw_fence, subscription_lock, take_lock
from pgcoord_cli.db.binary import int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConditionFalse, ConnectionFailed, Fenced, LockNotAcquired, UsageError
from pgcoord_cli.settings import Settings

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
PATIENCE_SECONDS = 8.0
"""How long a save may go unanswered before the connection is taken for dead."""


class Subscription:
    """The checkpoint of a name, owned. Raises Busy at once when somebody else owns it."""

    def __init__(self, settings: Settings, name: str, outbox: Outbox, report: ReportNotice = ignore_notice) -> None:
        self._settings = settings
        self._report = report
        self._name = name
        self._outbox = outbox
        self._wakeup = Wakeup()
        self._stopping = False
        self._backend_pid: int | None = None
        self._acquire()

    def load(self) -> int | None:
        """Where it stands; None when that has never been said."""
        return self._position

    def save(self, position: int) -> None:
        """Moves it forward. Where the connection was lost, it takes the lock anew, however long that takes.

        Busy or Fenced when somebody else has it by then; ConnectionFailed when told to stop meanwhile.
        """
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            try:
                if self._conn.closed:
                    self._acquire()
                    self._report(Notice("connected", to_cursor(position), "the subscription is in use again"))
                self._save(position)
                return
            except ConnectionFailed as error:
                self._conn.close()
                if self._stopping:
                    raise
                self._report(Notice("disconnected", to_cursor(position), f"not saved yet: {error.message}"))
            self._wakeup.wait(backoff.next_pause())

    def stop(self) -> None:
        """Has a `save` that waits for a connection give up. May be called from a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """Gives the lock back."""
        self._conn.close()
        self._wakeup.close()

    def _acquire(self) -> None:
        self._conn = open_session(self._settings, "subscription", writes=True)
        try:
            with mapped_errors():
                self._take_lock()
                self._fence, self._position = self._draw_fence()
                self._pipeline = Pipeline(self._conn, PATIENCE_SECONDS)
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
            # The lock has just become free, or is held by what the server still keeps of the session that we lost.
            if holder:
                self._conn.execute(sql("locks", "end_session"), [holder.pid])
            raise ConnectionFailed(f"the lock of subscription {self._name!r} is not free yet") from None

    def _draw_fence(self) -> tuple[int, int | None]:
        fence, position, table = draw_fence(self._conn, self._name, self._outbox.table)
        check_outbox(self._name, table, self._outbox)
        return fence, position

    def _save(self, position: int) -> None:
        values = [self._name.encode(), int8(self._fence), int8(position)]
        with mapped_errors():
            save = sql("subscriptions", "save", schema=self._settings.schema)
            (is_saved,) = self._pipeline.fetch(save, values)[0]
        if not is_saved:
            raise Fenced(f"subscription {self._name!r} has another owner by now; nothing was saved")


def checkpoint(conn: Connection[Any], name: str, outbox: Outbox) -> int | None:
    """Where a subscription stands, whoever owns it; UsageError where there is none."""
    row = conn.execute(sql("subscriptions", "checkpoint"), [name]).fetchone()
    if row is None:
        raise UsageError(f"--subscription: there is no subscription {name!r}", hint="a tail with that name makes it")
    table, position = row
    check_outbox(name, table, outbox)
    return None if position is None else int(position)


def check_outbox(name: str, table: str | None, outbox: Outbox) -> None:
    """UsageError unless the subscription counts the events of this outbox."""
    if table != outbox.table:
        raise UsageError(
            f"--subscription: {name!r} is a subscription of {table or 'no outbox'}, not of {outbox.table}",
            hint="choose another name",
        )


def list_subscriptions(conn: Connection[Any], name: str | None = None) -> list[dict[str, Any]]:
    """Every subscription, or the one of that name: where it stands, and how many events of its outbox lie ahead."""
    records = conn.cursor(row_factory=dict_row).execute(sql("subscriptions", "list"), [name]).fetchall()
    for record in records:
        position = record["last_position"]
        record["cursor"] = None if position is None else to_cursor(position)
    return records


def subscription_record(conn: Connection[Any], schema: str, name: str) -> dict[str, Any]:
    """One subscription and who owns it. ConditionFalse when there is none."""
    records = list_subscriptions(conn, name)
    if not records:
        raise ConditionFalse(f"there is no subscription {name!r}", hint="see: pgcoord subscription list")
    holder = lock_holder(conn, subscription_lock(schema, name))
    return records[0] | {"owner": holder._asdict() if holder else None}


def set_position(conn: Connection[Any], schema: str, name: str, position: int, *, force: bool) -> int | None:
    """Moves a checkpoint that nobody owns; returns where it was.

    UsageError: backwards, without `force`, or beyond the end of its outbox.
    """
    record = subscription_record(conn, schema, name)
    take_lock(conn, schema, name)
    _check_end(conn, record["outbox"], position)
    fence, before, _ = draw_fence(conn, name, None)
    if before is not None and position < before and not force:
        raise UsageError(
            f"{name!r} stands at {to_cursor(before)}; {to_cursor(position)} lies before that",
            hint="with --force it goes back, and what lies between is delivered again",
        )
    conn.execute(sql("subscriptions", "set_position"), [name, fence, position])
    return before


def _check_end(conn: Connection[Any], table: str | None, position: int) -> None:
    for outbox in OUTBOXES.values():
        if outbox.table == table:
            head, _ = conn.execute(sql("tail", "bounds", outbox=outbox.table)).fetchone() or (0, 0)
            if position > head:
                raise UsageError(f"{to_cursor(position)} lies beyond the end of {table}, which is {to_cursor(head)}")


def remove(conn: Connection[Any], schema: str, name: str) -> None:
    """Forgets a subscription that nobody owns."""
    subscription_record(conn, schema, name)
    take_lock(conn, schema, name)
    fence, _, _ = draw_fence(conn, name, None)
    conn.execute(sql("subscriptions", "remove"), [name, fence])
