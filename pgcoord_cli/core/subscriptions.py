"""Subscriptions: named checkpoints, one owner each.

**Owner.** Whoever wants to move a checkpoint takes the advisory lock of that name over a connection of its own, at
once or not at all, and holds it as long as that connection lives. Nothing is renewed, and nobody waits.

**Fence.** With the lock, the owner draws the next fence, and every save names it. An owner whose connection was ended
without its knowing loses the lock to another; from then on the other's fence is in force, and the first one's saves
change nothing (rule I13). Positions only grow.

**Outbox.** A subscription that tails an outbox belongs to it: positions of another would mean nothing.
"""

from __future__ import annotations

from typing import Any

from psycopg import Connection

from pgcoord_cli.core.backoff import jittered
from pgcoord_cli.core.cursor import to_cursor
from pgcoord_cli.core.locks import lock_holder, lock_key
from pgcoord_cli.core.outbox import Outbox
from pgcoord_cli.core.session import open_session
from pgcoord_cli.core.tail import Notice, Report, silently
from pgcoord_cli.core.wakeup import Wakeup
from pgcoord_cli.db.binary import int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Busy, ConnectionFailed, Fenced, UsageError
from pgcoord_cli.settings import Settings

MAX_NAME = 200
"""Characters."""

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
PATIENCE_SECONDS = 8.0
"""How long a save may go unanswered before the connection is taken for dead."""


def check_name(name: str, option: str) -> str:
    """`name`, or UsageError when it cannot be one."""
    if not 0 < len(name) <= MAX_NAME or "\0" in name:
        raise UsageError(f"{option}: a name has 1 to {MAX_NAME} characters")
    return name


def subscription_lock(schema: str, name: str) -> int:
    """The advisory lock key of a subscription's owner."""
    return lock_key(schema, f"subscription {name}")


class Subscription:
    """The checkpoint of a name, owned. Raises Busy at once when somebody else owns it."""

    def __init__(self, settings: Settings, name: str, outbox: Outbox, report: Report = silently) -> None:
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
        pause = FIRST_PAUSE
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
            self._wakeup.wait(jittered(pause))
            pause = min(pause * 2, LONGEST_PAUSE)

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
        key = subscription_lock(self._settings.schema, self._name)
        row = self._conn.execute(sql("subscriptions", "try_lock"), [key]).fetchone()
        if row and row[0]:
            return
        holder = lock_holder(self._conn, key)
        if self._backend_pid is not None and (holder is None or holder.pid == self._backend_pid):
            # It has just ended, or is what the server still keeps of the session that we lost.
            if holder:
                self._conn.execute(sql("subscriptions", "end_session"), [holder.pid])
            raise ConnectionFailed(f"the lock of subscription {self._name!r} is not free yet")
        raise Busy(
            f"subscription {self._name!r} is in use by {holder}",
            hint="one tail at a time can use a subscription; choose another name for a second one",
        )

    def _draw_fence(self) -> tuple[int, int | None]:
        row = self._conn.execute(sql("subscriptions", "acquire"), [self._name, self._outbox.table]).fetchone()
        assert row is not None
        fence, position, table = row
        check_outbox(self._name, table, self._outbox)
        return fence, position

    def _save(self, position: int) -> None:
        values = [self._name.encode(), int8(self._fence), int8(position)]
        with mapped_errors():
            (is_saved,) = self._pipeline.fetch(sql("subscriptions", "save"), values)[0]
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
