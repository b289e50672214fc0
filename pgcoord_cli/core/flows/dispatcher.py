"""The completion dispatcher: tails the completion events and dispatches each as soon as it is committed.

It starts from now and keeps no cursor. An event that it misses, because it was not running or because a dispatch
failed, has no dispatch time, and the reconciler dispatches it (`core.flows.reconcile`). Any number of dispatchers may
run at once; each event is claimed by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any

from psycopg import Connection

from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.events.outbox import COMPLETION
from pgcoord_cli.core.events.tail import Notice, Tail
from pgcoord_cli.core.flows.dispatch import dispatch_all
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.errors import PgcoordError
from pgcoord_cli.settings import Settings

EVENTS_A_TRANSACTION = 100


class CompletionDispatcher:
    """Dispatches completion events in its own thread. `on_error` is called there with one line for each failure."""

    def __init__(self, settings: Settings, on_error: Callable[[str], None]) -> None:
        self._settings = settings
        self._on_error = on_error
        self._tail = Tail(settings, COMPLETION, report=self._on_notice)
        self._conn: Connection[Any] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the dispatcher within the block; its thread has ended when the block is left."""
        thread = Thread(target=self._run, name="dispatch")
        thread.start()
        try:
            yield
        finally:
            self._tail.stop()
            thread.join()
            self._tail.close()

    def _run(self) -> None:
        try:
            for batch in self._tail.batches():
                ids = [event.event_id for event in batch.events]
                # Short transactions: each holds its edge groups locked until it commits.
                for start in range(0, len(ids), EVENTS_A_TRANSACTION):
                    self._dispatch(ids[start : start + EVENTS_A_TRANSACTION])
        except PgcoordError as error:
            # Raised by the tail for an error that persists after a reconnect.
            self._on_error(f"dispatch has stopped; only the reconciler dispatches events now: {error.message}")
        finally:
            self._close()

    def _dispatch(self, ids: Sequence[int]) -> None:
        try:
            with mapped_errors():
                self._conn = self._conn or open_session(self._settings, "dispatch", writes=True)
                dispatch_all(self._conn, ids)
        except PgcoordError as error:
            # The events keep no dispatch time, so skipping them here loses nothing.
            self._on_error(f"{_count(ids)} left to the reconciler: {error.message}")
            self._close()

    def _close(self) -> None:
        if self._conn:
            self._conn.close()
            self._conn = None

    def _on_notice(self, notice: Notice) -> None:
        if notice.type != "connected":
            self._on_error(notice.message)


def _count(ids: Sequence[int]) -> str:
    return f"event {ids[0]}" if len(ids) == 1 else f"{len(ids)} events from {ids[0]} on"
