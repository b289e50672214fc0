"""LISTEN for the event loop: one connection for a process, replaced whenever it breaks. `listener` is for threads.

**Protocol.** One task owns the connection. A caller adds its channel to the set of channels, wakes the task and waits.
The task connects, listens to every channel of the set, completes the waiting callers, and calls each channel's
callback, so that the tables are read once for what was missed. Then it waits for new channels or for the heartbeat,
whichever comes first, while notifications are passed on as they arrive. Because the set is read after the connection
is there, and again whenever a channel was added, a channel that is asked for at any moment, during a reconnect too, is
listened to before its caller continues.

**Idle.** Whatever waits for a channel calls `listen` or `keep` again and again, once in a poll interval. A heartbeat
since whose predecessor neither was called ends the task: it forgets all channels and closes the connection, in one step
of the event loop, and the next call of `listen` starts another.

A silent socket is not trusted: once in a heartbeat the task runs a statement, and replaces a connection that does not
answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

import psycopg
from psycopg import sql as composed

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.database.pool import CLOSED, Opener
from pgcoord_cli.db.callback_connection import CallbackConnection
from pgcoord_cli.db.connection import translate
from pgcoord_cli.errors import ConnectionFailed, PgcoordError

_log = logging.getLogger("pgcoord.listener")

HEARTBEAT_SECONDS = 5.0
FIRST_PAUSE, LAST_PAUSE = 0.05, 2.0
"""Seconds between attempts to connect."""


class ChannelSubscription(NamedTuple):
    """A channel's callback, and a future that is done once the channel is listened to."""

    on_news: Callable[[], None]
    listened: asyncio.Future[None]


class AsyncListener:
    """Calls the callback of a channel at each notification, and after every (re)connect."""

    def __init__(self, opener: Opener, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self.trouble: str | None = None
        """Why there is no connection at the moment, after a failed attempt."""
        self._opener = opener
        self._heartbeat_seconds = heartbeat_seconds
        self._is_used = False
        """Whether `listen` or `keep` was called since the last heartbeat."""
        self._channels: dict[str, ChannelSubscription] = {}
        self._listening: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._outage = Outage(_log, "not listening", "listening")

    async def listen(self, channel: str, on_news: Callable[[], None]) -> None:
        """Returns once the channel is listened to; retries while the server is away.

        Raises the errors that a retry does not mend: missing rights, an unknown schema, an unsuitable server.
        A caller that goes on waiting for notifications repeats the call, or calls `keep`, once in a poll interval.
        """
        if self._closed:
            raise ConnectionFailed(CLOSED)
        self._is_used = True
        if channel not in self._channels:
            self._channels[channel] = ChannelSubscription(on_news, asyncio.get_running_loop().create_future())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        self._wake.set()
        await asyncio.shield(self._channels[channel].listened)

    def keep(self, channel: str) -> bool:
        """Keeps the connection for a heartbeat more; returns whether the channel is still listened to."""
        self._is_used = True
        return channel in self._channels and self._channels[channel].listened.done()

    async def close(self) -> None:
        """Ends the task and its connection."""
        self._closed = True
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff = Backoff(FIRST_PAUSE, LAST_PAUSE)
        while True:
            try:
                await self._connect_and_serve(backoff)
                if not self._channels:
                    return
                self._outage.failed("connection lost")
            except (psycopg.OperationalError, ConnectionFailed, TimeoutError) as error:
                self.trouble = _reason(error)
                self._outage.failed(self.trouble)
            except (psycopg.Error, PgcoordError) as error:
                self._refuse_waiting(error)
                if not self._channels:
                    return
                self._outage.failed(_reason(error))
            except Exception as error:  # noqa: BLE001 - a callback's fault; the channels of others must go on
                self.trouble = repr(error)
                self._outage.failed(self.trouble)
            await backoff.pause()

    def _refuse_waiting(self, error: Exception) -> None:
        # Channels that were listened to before stay: the server may be suitable again a moment later.
        for channel, subscription in list(self._channels.items()):
            if not subscription.listened.done():
                del self._channels[channel]
                subscription.listened.set_exception(error)

    async def _connect_and_serve(self, backoff: Backoff) -> None:
        connection = CallbackConnection(
            await self._opener(), on_notify=self._on_notify, on_lost=self._wake.set, timeout=HEARTBEAT_SECONDS
        )
        try:
            backoff.reset()
            self.trouble = None
            await self._serve(connection)
        finally:
            self._listening.clear()
            connection.close()

    async def _serve(self, connection: CallbackConnection) -> None:
        """Serves the channels over one connection until it breaks, or nothing has used them for a heartbeat."""
        await self._listen_to_new(connection)
        self._outage.ended()
        # Only now: what was committed before LISTEN took effect is seen by the reads that these callbacks start.
        for subscription in list(self._channels.values()):
            subscription.on_news()
        while True:
            if not await self._is_woken():
                if not self._is_used:
                    # No await from here to the end of the task: `listen` finds the task done, or a channel kept.
                    self._channels.clear()
                    return
                self._is_used = False
                await connection.fetch("SELECT 1", [])
            if not connection.is_open:
                return
            await self._listen_to_new(connection)

    def _on_notify(self, channel: str) -> None:
        if subscription := self._channels.get(channel):
            subscription.on_news()

    async def _listen_to_new(self, connection: CallbackConnection) -> None:
        self._wake.clear()
        for channel in list(self._channels.keys() - self._listening):
            await connection.fetch(composed.SQL("LISTEN {}").format(composed.Identifier(channel)).as_string(), [])
            self._listening.add(channel)
            if not self._channels[channel].listened.done():
                self._channels[channel].listened.set_result(None)

    async def _is_woken(self) -> bool:
        """Returns True at a new channel or a lost connection, False after a heartbeat without either."""
        try:
            async with asyncio.timeout(self._heartbeat_seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True


def _reason(error: Exception) -> str:
    if isinstance(error, psycopg.Error):
        error = translate(error)
    return str(error) or "the server does not answer"
