"""Detecting a transaction pooler between this process and PostgreSQL.

pgcoord needs sessions: for advisory locks, LISTEN and the search path. A pooler in transaction mode assigns each
transaction to any backend that is free, so that locks and settings would stay behind with backends that other clients
use. It has to be detected before anything is set or taken (rule I14).

**Suspicion** costs nothing: a pooler greets its client with a process id that it made up, and `prepare_session` sets
nothing if the backend's own process id is another. Without a pooler the two are the same.

**Proof.** Several other connections each hold a transaction open, so that they occupy backends. The pooler is in
transaction mode if one of them got the backend that answered our session before, or if our session is then answered by
another backend, or by none because none is free. In session mode our session keeps its backend.
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
"""Number of other connections that occupy backends during the check."""

TIMEOUT_SECONDS = 2.0
"""How long to wait for the answer to a statement, for which a pooler has to find a backend."""


def require_own_backend(settings: Settings, pgconn: pq.abc.PGconn) -> None:
    """Raises UnsuitableServer if the connection goes through a pooler that does not keep a backend for it."""
    if not _has_own_backend(settings, pgconn):
        raise UnsuitableServer(
            "this connection goes through a transaction pooler, which keeps neither locks nor settings of a session",
            hint="connect to PostgreSQL itself, or to a pool in session mode (PgBouncer: pool_mode = session)",
        )


def _has_own_backend(settings: Settings, pgconn: pq.abc.PGconn) -> bool:
    own_backend = _ask(pgconn, sql("session", "backend"))
    with ExitStack() as held:
        for _ in range(PROBES):
            try:
                other = held.enter_context(closing(connect(settings, "probe")))
            except ConnectionFailed:
                break  # no connection is free: in session mode the pool is full, and the earlier probes decide
            # The open transaction keeps the backend of this probe occupied while the next ones ask.
            probe_backend = _ask(other.pgconn, "BEGIN; " + sql("session", "backend"))
            if probe_backend is not None:
                # A pooler would close a backend that comes back with a transaction open.
                held.callback(_ask, other.pgconn, "COMMIT;")
            if probe_backend is not None and probe_backend == own_backend:
                return False
            if _ask(pgconn, sql("session", "backend")) != own_backend:
                return False
    return own_backend is not None


def _ask(pgconn: pq.abc.PGconn, text: str) -> bytes | None:
    """Executes a statement in the simple protocol and returns its value, or None after TIMEOUT_SECONDS or an error."""
    try:
        pgconn.send_query(text.encode())
        deadline = time.monotonic() + TIMEOUT_SECONDS
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
