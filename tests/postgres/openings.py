"""Connections that can be opened, or not, as a test has it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from psycopg import AsyncConnection

from pgcoord_cli.core.database.session import open_session_async
from pgcoord_cli.errors import ConnectionFailed, PgcoordError
from pgcoord_cli.settings import Settings

DOWN = ConnectionFailed("the server is down")


class Openings:
    """Opens sessions, and counts; those whose numbers are given fail."""

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
