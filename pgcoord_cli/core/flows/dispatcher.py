"""The completion dispatcher: tails the completion events and dispatches each as soon as it is committed.

It keeps no cursor: an event that has not been dispatched has no dispatch time. When its tail has begun, from now, it
dispatches those that were committed before, so that none is missed between the two. An event whose dispatch fails is
left to the reconciler (`core.flows.reconcile`). Any number of dispatchers may run at once; each event is claimed by one
of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from threading import Thread
from typing import Any

from psycopg import Connection

from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.supervisor import Supervisor
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.events.notices import Notice
from pgcoord_cli.core.events.outbox import COMPLETION
from pgcoord_cli.core.events.tail import Tail
from pgcoord_cli.core.flows.dispatch import dispatch_all
from pgcoord_cli.core.flows.reconcile import dispatch_backlog
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.errors import ConnectionFailed, PgcoordError
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.dispatch")

EVENTS_A_TRANSACTION = 100


class CompletionDispatcher:
    """Dispatches completion events in its own thread. `on_error` is called there with one line for each failure."""

    def __init__(self, settings: Settings, on_error: Callable[[str], None]) -> None:
        self._settings = settings
        self._on_error = on_error
        self._wakeup = Wakeup()
        self._stopping = False
        outage = Outage(_log, "only the reconciler dispatches events until this passes", "following the events")
        self._supervisor = Supervisor(self._wakeup, lambda: self._stopping, self._on_trouble, outage=outage)
        self._failures = Outage(_log, "events are left to the reconciler", "events are dispatched")
        self._tail: Tail | None = None
        self._conn: Connection[Any] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the dispatcher within the block; its thread has ended when the block is left."""
        thread = Thread(target=self._run, name="dispatch")
        thread.start()
        try:
            yield
        finally:
            self._stopping = True
            self._wakeup.set()
            if self._tail:
                self._tail.stop()
            thread.join()
            self._wakeup.close()

    def _run(self) -> None:
        try:
            self._supervisor.run(self._follow)
        finally:
            self._close()

    def _follow(self) -> str | None:
        """Follows the events until stopped; returns the error that ended a tail that cannot go on by itself."""
        with closing(Tail(self._settings, COMPLETION, report=self._on_notice)) as self._tail:
            if self._stopping:  # stopped before there was a tail to stop
                return None
            try:
                batches = self._tail.batches()
                next(batches, None)  # from here on the tail delivers every event
                self._dispatch_earlier()
                for batch in batches:
                    self._supervisor.recovered()
                    ids = [event.event_id for event in batch.events]
                    # Short transactions: each holds its edge groups locked until it commits.
                    for start in range(0, len(ids), EVENTS_A_TRANSACTION):
                        self._dispatch(ids[start : start + EVENTS_A_TRANSACTION])
            except PgcoordError as error:
                return error.reason
        return None

    def _on_trouble(self, trouble: str) -> None:
        self._on_error(f"only the reconciler dispatches events until this passes: {trouble}")

    def _dispatch_earlier(self) -> None:
        """Dispatches what was committed before the tail began."""
        self._supervisor.recovered()
        try:
            with mapped_errors():
                self._conn = self._conn or open_session(self._settings, "dispatch", writes=True)
                dispatch_backlog(self._conn, lambda: self._stopping)
        except PgcoordError as error:
            self._failures.failed(error.message)
            self._on_error(f"earlier events are left to the reconciler: {error.message}")
            self._close()

    def _dispatch(self, ids: Sequence[int]) -> None:
        try:
            self._dispatch_once(ids)
        except ConnectionFailed:
            # After a restart of the server the connection is only found to be lost here: once more over a new one.
            self._close()
            self._dispatch_again(ids)
        except PgcoordError as error:
            self._leave(ids, error)

    def _dispatch_again(self, ids: Sequence[int]) -> None:
        try:
            self._dispatch_once(ids)
        except PgcoordError as error:
            self._leave(ids, error)

    def _dispatch_once(self, ids: Sequence[int]) -> None:
        with mapped_errors():
            self._conn = self._conn or open_session(self._settings, "dispatch", writes=True)
            dispatch_all(self._conn, ids)
        self._failures.ended()

    def _leave(self, ids: Sequence[int], error: PgcoordError) -> None:
        # The events keep no dispatch time, so that the reconciler finds them.
        self._failures.failed(error.message, event_ids=list(ids))
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
