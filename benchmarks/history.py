"""Commits beside a long history of settled requests, and on a fresh table (rule I20).

Two databases have a leader each. One of them gets its history, and is analysed, while its leader already runs, as in
production: statements that the leader prepared on a small table are planned again for the large one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from benchmarks.measuring import Result
from benchmarks.workloads import WORKLOADS, leading, run_by_leader, run_pgcoord, write_keys
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.settings import Settings

IN_FLIGHT = (1, 32)
"""With one in flight the client commits directly; with 32 the leader has many small batches, each of which claims."""

CHUNK = 100_000

# Settled as the benchmark's own requests are: four of five committed. The versions are below the first commit of the
# database, so that the leader that runs already takes none of them for a later commit.
FILL = """
INSERT INTO pgcoord.commit_requests (request_id, epoch, read_version, payload, status, commit_version, created_at,
                                     resolved_at)
SELECT gen_random_uuid(), 1, number - 1, settled.payload,
       CASE WHEN number %% 5 = 0 THEN 'conflict' ELSE 'committed' END,
       CASE WHEN number %% 5 = 0 THEN NULL ELSE number END, settled.at, settled.at
  FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS number,
       (SELECT clock_timestamp() AS at,
               pgcoord.packed_request(ARRAY['k00000']::bytea[], '{}', '{}', '{}', '{}', '{}',
                                      ARRAY['k00000']::bytea[], ARRAY['1']::bytea[]) AS payload) AS settled
"""


def name_of(requests: int) -> str:
    """Returns the name of the workload beside this many settled requests."""
    return f"rmw-10k beside {requests}"


def fill(settings: Settings, requests: int) -> None:
    """Inserts settled requests beside a leader, and vacuums and analyses them as autovacuum would."""
    with psycopg.connect(settings.dsn, autocommit=True) as conn:
        conn.execute("SET synchronous_commit = off")
        for first in range(1 - requests, 1, CHUNK):
            conn.execute(FILL, {"first": first, "last": min(first + CHUNK - 1, 0)})
            _raise_queue_floor(settings, conn)
        conn.execute("VACUUM (ANALYZE) pgcoord.commit_requests")
        conn.execute("CHECKPOINT")  # the pages are not written during the measurement


def _raise_queue_floor(settings: Settings, conn: psycopg.Connection[Any]) -> None:
    """Commits until the leader's queue floor has passed what was inserted: a leader never settles so many at once."""
    (last_id,) = conn.execute("SELECT max(id) FROM pgcoord.commit_requests").fetchone() or (0,)
    while conn.execute("SELECT 1 FROM pgcoord.leader_lease WHERE queue_floor_id < %s", [last_id]).fetchone():
        run_by_leader(settings, WORKLOADS["rmw-10k"], 32, 0.2)


@contextmanager
def databases(server: Settings, requests: int) -> Iterator[tuple[Settings, Settings]]:
    """Yields a database with that many settled requests, and a fresh one, both with a leader."""
    with ExitStack() as stack:
        full, fresh = (_new_database(server, f"history_{requests}_{name}") for name in ("full", "fresh"))
        for settings in (full, fresh):
            stack.enter_context(leading(settings))
            write_keys(settings)
            # The leader has prepared its statements by now.
            run_pgcoord(settings, WORKLOADS["rmw-10k"], 32, 0.5)
        fill(full, requests)
        yield full, fresh


def contestants(full: Settings, fresh: Settings, in_flight: int, seconds: float) -> dict[str, Callable[[], Result]]:
    """Returns what to measure, by name: beside the history, on the fresh table, and while the history is analysed."""

    def run(settings: Settings) -> Result:
        return run_pgcoord(settings, WORKLOADS["rmw-10k"], in_flight, seconds)

    def run_while_analysed() -> Result:
        analysis = threading.Timer(seconds / 2, _analyse, [full.dsn])
        analysis.start()
        try:
            return run(full)
        finally:
            analysis.join()

    return {
        "pgcoord": lambda: run(full),
        "fresh table": lambda: run(fresh),
        "during ANALYZE": run_while_analysed,
    }


def _new_database(server: Settings, name: str) -> Settings:
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}".encode())
    settings = Settings(dsn=make_conninfo(server.dsn, dbname=name))
    upgrade(settings)
    return settings


def _analyse(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("ANALYZE pgcoord.commit_requests")
