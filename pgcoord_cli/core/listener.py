"""One LISTEN connection for a process, whatever breaks.

**Protocol.** A single task owns the connection; nobody else touches it. Whoever wants a channel puts it into the set
of channels, wakes the task and waits. The task connects, listens to every channel of the set, tells those who
wait, and calls `on_reconnect`, so that the tables are read once for what was missed. From then on it waits for
the socket, for new channels, and for the heartbeat, whichever comes first. Because the set is read after the
connection is there, and again whenever somebody was added, a channel that is asked for at any moment, in the middle
of a reconnect too, is listened to before its caller is told so.

A silent socket is not trusted: a connection that has not been heard of for a heartbeat is asked for a sign of life,
and replaced when there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg import sql as composed

from pgcoord_cli.core.backoff import Backoff
from pgcoord_cli.core.wakeup import received
from pgcoord_cli.errors import ConnectionFailed, PgcoordError

HEARTBEAT_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.05
LAST_BACKOFF_SECONDS = 2.0

Opener = Callable[[], Awaitable[AsyncConnection[Any]]]


class Listener:
    """Listens to channels and calls `on_notify(channel)`; `on_reconnect()` after every (re)connect."""

    def __init__(self, opener: Opener, on_notify: Callable[[str], None], on_reconnect: Callable[[], None]) -> None:
        self._opener = opener
        self._on_notify = on_notify
        self._on_reconnect = on_reconnect
        self._wanted: dict[str, asyncio.Future[None]] = {}
        self._listening: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def listen(self, channel: str) -> None:
        """Returns once the channel is listened to; raises what makes that impossible, a lost connection aside."""
        if channel not in self._wanted:
            self._wanted[channel] = asyncio.get_running_loop().create_future()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        self._wake.set()
        await asyncio.shield(self._wanted[channel])

    async def close(self) -> None:
        """Ends the task and its connection."""
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        backoff = Backoff(FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS)
        while True:
            try:
                await self._connect_and_serve(backoff)
            except (psycopg.OperationalError, ConnectionFailed, TimeoutError):
                pass
            except (psycopg.Error, PgcoordError) as error:
                self._refuse_waiting(error)
                if not self._wanted:
                    return
            await backoff.pause()

    def _refuse_waiting(self, error: Exception) -> None:
        """Tells those who wait for a channel; who has been listening stays, since the server may be fit again soon."""
        for channel, listened in list(self._wanted.items()):
            if not listened.done():
                del self._wanted[channel]
                listened.set_exception(error)

    async def _connect_and_serve(self, backoff: Backoff) -> None:
        conn = await self._opener()
        try:
            backoff.reset()
            await self._serve(conn)
        finally:
            self._listening.clear()
            await conn.close()

    async def _serve(self, conn: AsyncConnection[Any]) -> None:
        """Everything that happens on one connection, until it breaks."""
        conn.add_notify_handler(lambda notification: self._on_notify(notification.channel))
        await self._listen_to_new(conn)
        self._on_reconnect()
        while True:
            if not await self._readable_or_woken(conn):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await conn.execute("SELECT 1")
            await self._listen_to_new(conn)
            for channel in received(conn):
                self._on_notify(channel)

    async def _listen_to_new(self, conn: AsyncConnection[Any]) -> None:
        self._wake.clear()
        for channel in list(self._wanted.keys() - self._listening):
            await conn.execute(composed.SQL("LISTEN {}").format(composed.Identifier(channel)))
            self._listening.add(channel)
            if not self._wanted[channel].done():
                self._wanted[channel].set_result(None)

    async def _readable_or_woken(self, conn: AsyncConnection[Any]) -> bool:
        """False when neither the socket nor a new channel stirred for a heartbeat."""
        loop = asyncio.get_running_loop()
        loop.add_reader(conn.fileno(), self._wake.set)
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(conn.fileno())
        return True
