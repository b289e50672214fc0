"""One LISTEN connection for a process, whatever breaks.

**Protocol.** A single task owns the connection; nobody else touches it. Whoever wants a channel puts it into the set
of channels, wakes the task and waits. The task connects, listens to every channel of the set, tells those who
wait, and calls what was given for each channel, so that the tables are read once for what was missed. From then on it
waits for new channels and for the heartbeat, whichever comes first, while notifications are handed on as they
arrive. Because the set is read after the connection is there, and again whenever somebody was added, a channel that is
asked for at any moment, in the middle of a reconnect too, is listened to before its caller is told so.

A silent socket is not trusted: once in a heartbeat the server is asked for a sign of life, and the connection is
replaced when there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import psycopg
from psycopg import sql as composed

from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.database.pool import CLOSED, Opener
from pgcoord_cli.db.lane import Lane
from pgcoord_cli.errors import ConnectionFailed, PgcoordError

HEARTBEAT_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.05
LAST_BACKOFF_SECONDS = 2.0


class ChannelSubscription(NamedTuple):
    """A channel that somebody wants: what to call when there may be news, and who waits until it is listened to."""

    on_news: Callable[[], None]
    listened: asyncio.Future[None]


class Listener:
    """Listens to channels, and calls what belongs to one when it is notified and after every (re)connect."""

    def __init__(self, opener: Opener) -> None:
        self.trouble: str | None = None
        """Why there is no connection at the moment, once that has been tried."""
        self._opener = opener
        self._wanted: dict[str, ChannelSubscription] = {}
        self._listening: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def listen(self, channel: str, on_news: Callable[[], None]) -> None:
        """Returns once the channel is listened to; raises what makes that impossible, a lost connection aside."""
        if self._closed:
            raise ConnectionFailed(CLOSED)
        if channel not in self._wanted:
            self._wanted[channel] = ChannelSubscription(on_news, asyncio.get_running_loop().create_future())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        self._wake.set()
        await asyncio.shield(self._wanted[channel].listened)

    async def close(self) -> None:
        """Ends the task and its connection."""
        self._closed = True
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff = Backoff(FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS)
        while True:
            try:
                await self._connect_and_serve(backoff)
            except (psycopg.OperationalError, ConnectionFailed, TimeoutError) as error:
                self.trouble = str(error) or "the server does not answer"
            except (psycopg.Error, PgcoordError) as error:
                self._refuse_waiting(error)
                if not self._wanted:
                    return
            await backoff.pause()

    def _refuse_waiting(self, error: Exception) -> None:
        """Tells those who wait for a channel; who has been listening stays, since the server may be fit again soon."""
        for channel, wanted in list(self._wanted.items()):
            if not wanted.listened.done():
                del self._wanted[channel]
                wanted.listened.set_exception(error)

    async def _connect_and_serve(self, backoff: Backoff) -> None:
        lane = Lane(await self._opener(), on_notify=self._on_notify, on_lost=self._wake.set, patience=HEARTBEAT_SECONDS)
        try:
            backoff.reset()
            self.trouble = None
            await self._serve(lane)
        finally:
            self._listening.clear()
            lane.close()

    async def _serve(self, lane: Lane) -> None:
        """Everything that happens on one connection, until it breaks."""
        await self._listen_to_new(lane)
        for wanted in list(self._wanted.values()):
            wanted.on_news()
        while True:
            if not await self._woken():
                await lane.fetch("SELECT 1", [])
            if not lane.is_open:
                return
            await self._listen_to_new(lane)

    def _on_notify(self, channel: str) -> None:
        if wanted := self._wanted.get(channel):
            wanted.on_news()

    async def _listen_to_new(self, lane: Lane) -> None:
        self._wake.clear()
        for channel in list(self._wanted.keys() - self._listening):
            await lane.fetch(composed.SQL("LISTEN {}").format(composed.Identifier(channel)).as_string(), [])
            self._listening.add(channel)
            if not self._wanted[channel].listened.done():
                self._wanted[channel].listened.set_result(None)

    async def _woken(self) -> bool:
        """False when neither a new channel nor a lost connection stirred for a heartbeat."""
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True
