"""Whether a leader is there, for commits that are not to wait in the queue for one."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.async_listener import AsyncListener
from pgcoord_cli.core.database.pool import Pool
from pgcoord_cli.db.callback_connection import Answer, Row, read_answer
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import NoLeader

RUN_HINT = "start a leader with: pgcoord leader run"


class LeaderCheck:
    """Reads the lease over the connections of a client."""

    def __init__(self, schema: str, pool: Pool, listener: AsyncListener) -> None:
        self._channel = channels.leadership(schema)
        self._pool = pool
        self._listener = listener
        self._news = asyncio.Event()

    async def require(self) -> None:
        """Raises NoLeader unless a leader holds an unexpired lease, and ConnectionFailed."""
        if not await self._is_held():
            raise NoLeader("no leader: the commit was not sent", hint=RUN_HINT)

    async def wait(self, seconds: float) -> None:
        """Waits until a leader holds an unexpired lease. Raises NoLeader after `seconds`, and ConnectionFailed."""
        if await self._is_held():
            return
        try:
            async with asyncio.timeout(seconds):
                await self._wait()
        except TimeoutError:
            raise NoLeader(f"no leader was elected within {seconds:g}s", hint=RUN_HINT) from None

    async def _wait(self) -> None:
        while True:
            # Each time, because a listener that is not used gives its connection back.
            await self._listener.listen(self._channel, self._news.set)
            # Cleared before the read: an election during the read causes another one.
            self._news.clear()
            if await self._is_held():
                return
            with suppress(TimeoutError):  # a notification may be lost (rule I7)
                async with asyncio.timeout(channels.POLL_SECONDS):
                    await self._news.wait()

    async def _is_held(self) -> bool:
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def settle(answer: Answer) -> None:
            held = read_answer(answer, _is_true)
            if answered.done():  # its caller was cancelled
                return
            if isinstance(held, Exception):
                answered.set_exception(held)
            else:
                answered.set_result(held)

        self._pool.run(sql("lease", "is_held"), [], settle)
        with mapped_errors():
            return await answered


def _is_true(rows: list[Row]) -> bool:
    return rows[0][0] == b"\x01"
