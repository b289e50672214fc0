"""A follower: carries completions on as soon as they are committed, by tailing their outbox.

It starts from now, and keeps no cursor: what it misses, because it was not running or because a dispatch failed, is an
event without a dispatch time, and those are the reconciler's. Any number may follow at once; each event is claimed by
one of them.
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
    """Dispatches completion events in a thread of its own; `complain` hears what went wrong."""

    def __init__(self, settings: Settings, complain: Callable[[str], None]) -> None:
        self._settings = settings
        self._complain = complain
        self._tail = Tail(settings, COMPLETION, report=self._on_notice)
        self._conn: Connection[Any] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, completions are carried on."""
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
                for start in range(0, len(ids), EVENTS_A_TRANSACTION):
                    self._dispatch(ids[start : start + EVENTS_A_TRANSACTION])
        except PgcoordError as error:
            self._complain(f"dispatch has ended, the rest is left to the reconciler: {error.message}")
        finally:
            self._close()

    def _dispatch(self, ids: Sequence[int]) -> None:
        try:
            with mapped_errors():
                self._conn = self._conn or open_session(self._settings, "dispatch", writes=True)
                dispatch_all(self._conn, ids)
        except PgcoordError as error:
            self._complain(f"left to the reconciler: {error.message}")
            self._close()

    def _close(self) -> None:
        if self._conn:
            self._conn.close()
            self._conn = None

    def _on_notice(self, notice: Notice) -> None:
        if notice.type != "connected":
            self._complain(notice.message)
