"""The changes of a key, or of all keys in a range, for programs that act on each of them: `pgcoord kv watch`.

**Protocol.** One connection listens to the channel that every commit notifies, and then reads. Each read is of one
snapshot and is compared with the one before; what differs is the changes. A commit between two reads wakes the next
one: LISTEN comes before the first read, and a notification that arrives during a read ends the next wait at once.
Without notifications the state is read once in a poll interval (rule I7). A connection that is lost is replaced, and
the first read over the new one finds what changed meanwhile.

**Coalescing.** What is reported is the state after a change, not each commit: of several changes of a key between two
reads only the last is seen, and a value that changes and changes back is not.

**Cost.** Without a commit, a read looks at one row. After a commit of any key, it reads the whole range, which is also
kept in memory. Between reads there is a pause of PAUSE_FACTOR times the last read, so that a large range beside a busy
writer does not keep the server busy.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from pgcoord_cli.core.commits.codec import PAST_THE_LAST_KEY
from pgcoord_cli.core.concurrency.backoff import Backoff
from pgcoord_cli.core.concurrency.outage import Outage
from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import Listener
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.kv.reading import Entry, show
from pgcoord_cli.db.binary import int8
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import PgcoordError, TimedOut
from pgcoord_cli.settings import Settings

_log = logging.getLogger("pgcoord.watch")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts to connect."""

ANSWER_SECONDS = 30.0
"""How long a read may go unanswered before the connection counts as lost."""

PAUSE_FACTOR = 9
"""Pause after a read, in multiples of its duration; at most a poll interval."""

UNKNOWN_VERSION = -1
"""Differs from every version, so that the next read returns the range."""


class Watched(NamedTuple):
    """The keys from `begin` up to but without `end` (None: to the last key); or one key, if `key` is given."""

    begin: bytes
    end: bytes | None
    key: bytes | None = None

    @classmethod
    def single(cls, key: bytes) -> Watched:
        """One key. Its absence is part of the present state."""
        return cls(key, key + b"\0", key)


def variables(entry: Entry, *, as_hex: bool) -> dict[str, str]:
    """Returns the environment variables that describe a change to a command. The key is hexadecimal if it is no text.

    A text has no control character other than tab, line feed and carriage return, so it can be in an environment.
    """
    record = show(Entry(entry.key, None, entry.version), as_hex=as_hex)
    return {
        "PGCOORD_KEY": record["key"],
        "PGCOORD_ENCODING": record["encoding"],
        "PGCOORD_VERSION": str(entry.version),
        "PGCOORD_CHANGE": "removed" if entry.value is None else "set",
    }


class KeyChanges:
    """The changes of keys. `changes` blocks; `stop` may be called from a signal handler or another thread."""

    def __init__(
        self, settings: Settings, watched: Watched, *, is_state_wanted: bool = True, seconds: float | None = None
    ) -> None:
        """With `is_state_wanted` the present state comes first, as changes. After `seconds` the watch times out."""
        self._settings = settings
        self._watched = watched
        self._is_state_wanted = is_state_wanted
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._wakeup = Wakeup()
        self._stopping = False
        self._values: dict[bytes, bytes] | None = None
        self._version = UNKNOWN_VERSION
        self._outage = Outage(_log, "disconnected", "connected")

    def stop(self) -> None:
        """Makes `changes` end before the next change."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """Releases the descriptors."""
        self._wakeup.close()

    def changes(self) -> Iterator[Entry]:
        """Yields the state of a key after each change (a value of None: removed), in key order within one snapshot.

        Ends after `stop`. Raises what the first session raises, and TimedOut; later trouble is logged and ridden out
        (rule I17).
        """
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while not self._stopping:
            try:
                yield from self._connected(backoff)
            except TimedOut:
                raise
            except PgcoordError as error:
                if self._stopping:  # which abandoned a read
                    return
                if self._values is None:
                    raise
                self._outage.failed(error.reason)
                self._wakeup.wait(self._seconds_left(backoff.next_pause()))

    def _connected(self, backoff: Backoff) -> Iterator[Entry]:
        """Yields changes until the connection is lost, or `stop`."""
        # It writes nothing, but a standby refuses LISTEN.
        with closing(open_session(self._settings, "kv watch", writes=True)) as conn, mapped_errors():
            notifications = Listener(conn, self._wakeup)
            pipeline = Pipeline(conn, ANSWER_SECONDS, self._wakeup.fileno())
            known = UNKNOWN_VERSION  # not the version of the last connection, at which a restored database may differ
            while not self._stopping:
                # Before the read: what is committed after it is notified, what was committed before is read.
                notifications.listen([channels.data(self._settings.schema)])
                began = time.monotonic()
                known, changed = self._read(pipeline, known)
                pause_until = time.monotonic() + min(PAUSE_FACTOR * (time.monotonic() - began), channels.POLL_SECONDS)
                self._outage.ended()
                backoff.reset()
                if changed:
                    # The caller may take its time, and notifications that are not read fill the server's queue.
                    notifications.unlisten()
                    yield from self._until_stopped(changed)
                else:
                    notifications.wait(self._seconds_left(channels.POLL_SECONDS))
                notifications.pause(self._seconds_left(pause_until - time.monotonic()))

    def _until_stopped(self, entries: list[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if self._stopping:
                return
            yield entry

    def _seconds_left(self, most: float) -> float:
        """Returns `most`, or the time until the deadline if that is shorter. Raises TimedOut after the deadline."""
        left = math.inf if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0 and not self._stopping:
            raise TimedOut(f"the watch has ended after {self._seconds:g}s")
        return min(most, left)

    def _read(self, pipeline: Pipeline, known: int) -> tuple[int, list[Entry]]:
        """Reads the range unless its version is `known`; returns the version and the changes since the last read."""
        begin, end, _ = self._watched
        bounds = [begin, PAST_THE_LAST_KEY if end is None else end]
        rows = pipeline.fetch(sql("kv", "watched_range"), [*bounds, int8(known)])
        version = int(rows[0][0])
        if version == known:
            return version, []
        if version < self._version:
            _log.warning(
                "the version went back from %d to %d: the database was restored, or a failover lost commits",
                self._version, version,
            )  # fmt: skip
        self._version = version
        return version, self._differences({key: value for _, key, value in rows if key is not None})

    def _differences(self, values: dict[bytes, bytes]) -> list[Entry]:
        """Replaces the values of the last read; returns those that differ, in key order."""
        before, self._values = self._values, values
        if before is None:
            if not self._is_state_wanted:
                return []
            keys = sorted(values) or [key for key in [self._watched.key] if key is not None]
        else:
            keys = sorted(key for key in before.keys() | values.keys() if before.get(key) != values.get(key))
        return [Entry(key, values.get(key), self._version) for key in keys]
