"""Is this session a session? Telling a connection to a backend of one's own from one through a transaction pooler.

pgcoord needs sessions: advisory locks, LISTEN, the search path. A pooler in transaction mode hands every transaction to
whichever backend is free, so that locks would stay behind with strangers. It has to be found out before anything is
set or taken (rule I14).

**Suspicion** costs nothing: a pooler greets its client with a process id that it made up, and `prepare_session` sets
nothing where the backend's own process id is another. Without a pooler the two are the same.

**Proof.** Several other connections each hold a transaction open, so that they keep backends busy. If one of them got
the backend that answered our session a moment ago, or our session is answered by another backend than before, or not
at all any more because none is left, the pooler is in transaction mode. In session mode our backend stays ours.
"""

from __future__ import annotations

import select
import time
from contextlib import ExitStack, closing

import psycopg
from psycopg import pq

from pgcoord_cli.db.connection import connect
from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import ConnectionFailed, UnsuitableServer
from pgcoord_cli.settings import Settings

PROBES = 3
PATIENCE_SECONDS = 2.0
"""How long a pooler may take to find a backend for a statement."""


def require_own_backend(settings: Settings, pgconn: pq.abc.PGconn) -> None:
    """UnsuitableServer when the connection goes through a pooler that does not keep a backend for it."""
    if not _has_own_backend(settings, pgconn):
        raise UnsuitableServer(
            "this connection goes through a transaction pooler, which locks and settings do not survive",
            hint="connect to PostgreSQL itself, or to a pool in session mode (PgBouncer: pool_mode = session)",
        )


def _has_own_backend(settings: Settings, pgconn: pq.abc.PGconn) -> bool:
    ours = _ask(pgconn, sql("session", "backend"))
    with ExitStack() as held:
        for _ in range(PROBES):
            try:
                other = held.enter_context(closing(connect(settings, "probe")))
            except ConnectionFailed:
                break  # no connection is left: in session mode that is a full pool
            theirs = _ask(other.pgconn, "BEGIN; " + sql("session", "backend"))
            if theirs is not None:
                held.callback(_ask, other.pgconn, "COMMIT;")  # a pooler ends backends that it gets back half way
            if theirs is not None and theirs == ours:
                return False
            if _ask(pgconn, sql("session", "backend")) != ours:
                return False
    return ours is not None


def _ask(pgconn: pq.abc.PGconn, text: str) -> bytes | None:
    """The value that a statement gives, in the simple protocol; None when none comes in time."""
    try:
        pgconn.send_query(text.encode())
        deadline = time.monotonic() + PATIENCE_SECONDS
        poll = select.poll()
        poll.register(pgconn.socket, select.POLLIN)
        value = None
        while True:
            while pgconn.flush() or pgconn.is_busy():
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return None
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:
                return value
            if result.ntuples:
                value = result.get_value(0, 0)
    except psycopg.Error:
        return None
