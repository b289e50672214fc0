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

from pgcoord_cli.core.locks import lock_holder, lock_key
from pgcoord_cli.core.outbox import Outbox
from pgcoord_cli.core.session import open_session
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import Busy, ConnectionFailed, Fenced, UsageError
from pgcoord_cli.settings import Settings

MAX_NAME = 200
"""Characters."""


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

    def __init__(self, settings: Settings, name: str, outbox: Outbox) -> None:
        self._settings = settings
        self._name = name
        self._outbox = outbox
        self._acquire()

    def load(self) -> int | None:
        """Where it stands; None when that has never been said."""
        return self._position

    def save(self, position: int) -> None:
        """Moves it forward. Takes the lock anew if its connection was lost: Busy or Fenced when another has it."""
        try:
            self._save(position)
        except ConnectionFailed:
            self.close()
            self._acquire()
            self._save(position)

    def close(self) -> None:
        """Gives the lock back."""
        self._conn.close()

    def _acquire(self) -> None:
        self._conn = open_session(self._settings, "subscription", writes=True)
        try:
            with mapped_errors():
                self._take_lock()
                self._fence, self._position = self._draw_fence()
        except BaseException:
            self._conn.close()
            raise

    def _take_lock(self) -> None:
        key = subscription_lock(self._settings.schema, self._name)
        row = self._conn.execute(sql("subscriptions", "try_lock"), [key]).fetchone()
        if not (row and row[0]):
            holder = lock_holder(self._conn, key)
            raise Busy(
                f"subscription {self._name!r} is in use by {holder or 'somebody who has just ended'}",
                hint="one tail at a time can use a subscription; choose another name for a second one",
            )

    def _draw_fence(self) -> tuple[int, int | None]:
        row = self._conn.execute(sql("subscriptions", "acquire"), [self._name, self._outbox.table]).fetchone()
        assert row is not None
        fence, position, table = row
        check_outbox(self._name, table, self._outbox)
        return fence, position

    def _save(self, position: int) -> None:
        with mapped_errors():
            row = self._conn.execute(sql("subscriptions", "save"), [self._name, self._fence, position]).fetchone()
        if not (row and row[0]):
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
