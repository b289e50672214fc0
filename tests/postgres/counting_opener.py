"""An opener of sessions that counts its calls, and fails some of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from psycopg import AsyncConnection

from pgcoord_cli.core.database.session import open_session_async
from pgcoord_cli.errors import ConnectionFailed, PgcoordError
from pgcoord_cli.settings import Settings

DOWN = ConnectionFailed("the server is down")


class CountingOpener:
    """Opens sessions and counts the calls; those whose numbers (from 1) are in `failing` raise `error`."""

    def __init__(self, settings: Settings, failing: Collection[int] = (), error: PgcoordError = DOWN) -> None:
        self._settings = settings
        self._error = error
        self.failing = failing
        self.count = 0

    async def __call__(self) -> AsyncConnection[Any]:
        self.count += 1
        if self.count in self.failing:
            raise self._error
        return await open_session_async(self._settings, "client", writes=True)
