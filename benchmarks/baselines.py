"""The baselines of pgcoord's commits: three other ways to run the same transactions on the same server.

serializable   psycopg, one connection for each worker, SERIALIZABLE, retried after a serialization failure
superseded     the design before this one: every transaction inserts the ranges that it read and wrote, and an exclusion
               constraint over them in a GiST index refuses overlaps of reads and writes in overlapping version ranges
pgbench        the C client of PostgreSQL at SERIALIZABLE, with retries
"""

from __future__ import annotations

import random
import re
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import Connection

from benchmarks.measuring import Result, Stopwatch
from pgcoord_cli.core.commits.recent_commits import CONFLICT_WINDOW

KEYS = 10_000
SCAN = 100
WALK = 20
"""Reads of a transaction of dependent reads."""

Work = Callable[[Connection[Any], int], None]

TABLE = """
DROP TABLE IF EXISTS baseline_kv;
CREATE TABLE baseline_kv (key bytea PRIMARY KEY, value bytea NOT NULL) WITH (fillfactor = 80);
INSERT INTO baseline_kv SELECT convert_to('k' || lpad(i::text, 5, '0'), 'UTF8'), '0' FROM generate_series(0, 9999) AS i;
VACUUM ANALYZE baseline_kv;
"""

SUPERSEDED = """
DROP TABLE IF EXISTS baseline_ranges;
DROP TYPE IF EXISTS baseline_bytearange;
DROP SEQUENCE IF EXISTS baseline_version;
CREATE EXTENSION IF NOT EXISTS btree_gist;
CREATE TYPE baseline_bytearange AS RANGE (subtype = bytea);
CREATE SEQUENCE baseline_version;
SELECT nextval('baseline_version');
CREATE TABLE baseline_ranges (
    range_data baseline_bytearange NOT NULL, type text NOT NULL, versions int8range NOT NULL,
    start_version bigint NOT NULL,
    EXCLUDE USING gist (range_data WITH &&, type WITH <>, versions WITH &&, start_version WITH <>)
);
"""


def key_of(number: int) -> bytes:
    """Returns one of the ten thousand keys by its number."""
    return b"k%05d" % number


def next_number(number: int, value: int, keys: int) -> int:
    """Returns the number of the key that a dependent read reads next, after this key with this value."""
    return (number * 31 + value + 7) % keys


def prepare(dsn: str) -> bool:
    """Creates the tables of the baselines. Returns whether the server has btree_gist, for the superseded design."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        for statement in TABLE.strip().split(";\n"):
            conn.execute(statement.rstrip(";").encode())
        try:
            conn.execute(SUPERSEDED.encode())
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile):
            return False
    return True


def read_modify_write(conn: Connection[Any], keys: int) -> None:
    """Increments one of `keys` keys in a transaction."""
    key = key_of(random.randrange(keys))
    with conn.transaction():
        (value,) = conn.execute("SELECT value FROM baseline_kv WHERE key = %s", [key]).fetchone() or (b"0",)
        conn.execute("UPDATE baseline_kv SET value = %s WHERE key = %s", [b"%d" % (int(value) + 1), key])


def scan_and_write(conn: Connection[Any], keys: int) -> None:
    """Reads a hundred adjacent keys and writes one of them, in a transaction."""
    first = random.randrange(keys - SCAN)
    with conn.transaction():
        rows = conn.execute(
            "SELECT key, value FROM baseline_kv WHERE key >= %s AND key < %s", [key_of(first), key_of(first + SCAN)]
        ).fetchall()
        key, value = rows[random.randrange(len(rows))]
        conn.execute("UPDATE baseline_kv SET value = %s WHERE key = %s", [b"%d" % (int(value) + 1), key])


def walk_and_write(conn: Connection[Any], keys: int) -> None:
    """Reads twenty keys one after the other, each named by the value before it, and writes the last one."""
    number, value = random.randrange(keys), 0
    with conn.transaction():
        for step in range(WALK):
            number = next_number(number, value, keys) if step else number
            row = conn.execute("SELECT value FROM baseline_kv WHERE key = %s", [key_of(number)]).fetchone()
            value = int(row[0]) if row else 0
        conn.execute("UPDATE baseline_kv SET value = %s WHERE key = %s", [b"%d" % (value + 1), key_of(number)])


def superseded_write(conn: Connection[Any], keys: int) -> None:
    """Increments one of `keys` keys under the exclusion constraint."""
    key = key_of(random.randrange(keys))
    after = key + b"\0"
    with conn.transaction():
        value, start = conn.execute(
            "SELECT value, (SELECT last_value FROM baseline_version) FROM baseline_kv WHERE key = %s", [key]
        ).fetchone() or (b"0", 1)
        conn.execute(
            "WITH commit AS (SELECT nextval('baseline_version') AS version) "
            "INSERT INTO baseline_ranges SELECT baseline_bytearange(%s, %s), t.type, "
            "int8range(%s, commit.version, '[]'), %s FROM commit, (VALUES ('read'), ('write')) AS t (type)",
            [key, after, start, start],
        )
        conn.execute("UPDATE baseline_kv SET value = %s WHERE key = %s", [b"%d" % (int(value) + 1), key])


def prune_ranges(dsn: str, stop: threading.Event) -> None:
    """Deletes the ranges that are older than pgcoord's conflict window, until `stop` is set."""
    versions: deque[tuple[float, int]] = deque()
    with psycopg.connect(dsn, autocommit=True) as conn:
        while not stop.wait(0.5):
            (version,) = conn.execute("SELECT last_value FROM baseline_version").fetchone() or (0,)
            versions.append((time.monotonic(), version))
            while versions[0][0] < time.monotonic() - CONFLICT_WINDOW.total_seconds():
                conn.execute("DELETE FROM baseline_ranges WHERE upper(versions) < %s", [versions.popleft()[1]])


def run_superseded(dsn: str, keys: int, workers: int, seconds: float) -> Result:
    """Measures the superseded design, while old ranges are pruned."""
    stop = threading.Event()
    pruner = threading.Thread(target=prune_ranges, args=(dsn, stop))
    pruner.start()
    try:
        return run_workers(dsn, superseded_write, keys, workers, seconds, serializable=False)
    finally:
        stop.set()
        pruner.join()


def run_workers(dsn: str, work: Work, keys: int, workers: int, seconds: float, *, serializable: bool) -> Result:
    """Runs `work` repeatedly in `workers` threads, each with a connection of its own, for `seconds`."""
    watch = Stopwatch(seconds)

    def worker() -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            if serializable:
                conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            while watch.is_running():
                began = time.perf_counter()
                _retry_until_done(conn, work, keys, watch)
                watch.note(began)

    threads = [threading.Thread(target=worker) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return watch.result()


def _retry_until_done(conn: Connection[Any], work: Work, keys: int, watch: Stopwatch) -> None:
    while watch.is_running():
        try:
            work(conn, keys)
            return
        except (
            psycopg.errors.SerializationFailure,
            psycopg.errors.DeadlockDetected,
            psycopg.errors.ExclusionViolation,
        ):
            continue


PGBENCH = {
    "rmw": """
\\set n random(0, {last})
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT convert_from(value, 'UTF8')::int AS v FROM baseline_kv
 WHERE key = convert_to('k' || lpad(:n::text, 5, '0'), 'UTF8') \\gset
UPDATE baseline_kv SET value = convert_to((:v + 1)::text, 'UTF8')
 WHERE key = convert_to('k' || lpad(:n::text, 5, '0'), 'UTF8');
COMMIT;
""",
    "scan": """
\\set n random(0, {last} - 100)
\\set m :n + random(0, 99)
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT count(value) AS c FROM baseline_kv WHERE key >= convert_to('k' || lpad(:n::text, 5, '0'), 'UTF8')
   AND key < convert_to('k' || lpad((:n + 100)::text, 5, '0'), 'UTF8') \\gset
UPDATE baseline_kv SET value = convert_to(:c::text, 'UTF8')
 WHERE key = convert_to('k' || lpad(:m::text, 5, '0'), 'UTF8');
COMMIT;
""",
}


def run_pgbench(bin_dir: Path, dsn: str, script: str, keys: int, workers: int, seconds: float) -> Result:
    """Runs pgbench with `workers` connections for `seconds`, and reads its log of latencies."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(PGBENCH[script].format(last=keys - 1))
        file.flush()
        with tempfile.TemporaryDirectory() as logs:
            done = subprocess.run(
                [
                    bin_dir / "pgbench", "-n", "-f", file.name, "-c", str(workers), "-j", str(min(workers, 2)),
                    "-T", str(max(1, round(seconds))), "-M", "prepared", "--max-tries=0", "-l",
                    f"--log-prefix={logs}/log", dsn,
                ],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            latencies = sorted(
                int(line.split()[2]) / 1000 for path in Path(logs).iterdir() for line in path.read_text().splitlines()
            )
    match = re.search(r"tps = ([\d.]+)", done.stdout)
    assert match, done.stdout
    return Result(float(match[1]), latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)])
