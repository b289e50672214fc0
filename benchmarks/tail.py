"""Event tails and minimal baselines: `python -m benchmarks.tail`.

**Latency**: from the commit of an INSERT to the line of that event on a pipe. The baseline of `pgcoord tail` is a
psycopg loop that listens and selects, on a table whose trigger always notifies. The two are measured in alternation.

**Catch-up**: a million events from the start, one line each. The baselines of `pgcoord tail -o jsonl` are a process
that copies the table with psycopg's COPY as unparsed blocks, and one that parses the rows of COPY. Whole processes are
measured, with the peak of their memory, also for ten thousand events.

**Insert cost**: pgbench inserts one row a transaction into the outbox, with and without a tail. The baselines are the
same table without a trigger, and with one that always notifies.
"""

from __future__ import annotations

import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.measuring import Record, call_parser, run_parts
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.settings import Settings

COLUMNS = "execution_id, lease_id, event_type, occurred_at_ms, partition_key, namespace, instance_tag"
VALUES = "gen_random_uuid()::text, gen_random_uuid()::text, 'renewed', 1700000000000, 3, 'deploys', 'blue'"

BASELINE_TABLES = """
CREATE TABLE bare_events (LIKE pgcoord.lease_events INCLUDING ALL);
CREATE TABLE notified_events (LIKE pgcoord.lease_events INCLUDING ALL);
CREATE FUNCTION always_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_notify('notified_events', ''); RETURN NULL; END $$;
CREATE TRIGGER announce AFTER INSERT ON notified_events FOR EACH STATEMENT EXECUTE FUNCTION always_notify();
"""

LISTEN_LOOP = """
import json, sys, psycopg
conn = psycopg.connect(sys.argv[1], autocommit=True)
conn.execute("LISTEN notified_events")
last = conn.execute("SELECT coalesce(max(event_id), 0) FROM notified_events").fetchone()[0]
print("ready", flush=True)
while True:
    for _ in conn.notifies(stop_after=1):
        pass
    for last, execution_id, event_type in conn.execute(
        "SELECT event_id, execution_id, event_type FROM notified_events WHERE event_id > %s ORDER BY event_id", [last]
    ):
        print(json.dumps({"event_id": last, "execution_id": execution_id, "event_type": event_type}), flush=True)
"""

COPY_BLOCKS = """
import sys, psycopg
with psycopg.connect(sys.argv[1]) as conn, conn.cursor().copy("COPY pgcoord.lease_events TO STDOUT") as copy:
    for block in copy:
        sys.stdout.buffer.write(block)
"""

COPY_ROWS = """
import sys, psycopg
with psycopg.connect(sys.argv[1]) as conn, conn.cursor().copy("COPY pgcoord.lease_events TO STDOUT") as copy:
    for row in copy.rows():
        print("\\t".join(value or "" for value in row))
"""

PGCOORD = [sys.executable, "-m", "pgcoord_cli"]


# -- latency


@contextmanager
def reader(command: Sequence[str], dsn: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command that prints one line for each event, with its output on a pipe."""
    process = subprocess.Popen(
        command, env=os.environ | {"PGCOORD_DSN": dsn}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def delay(conn: psycopg.Connection[Any], table: str, process: subprocess.Popen[bytes]) -> float:
    """Inserts one event, and returns the milliseconds from the end of the INSERT to its line."""
    assert process.stdout
    conn.execute(f"INSERT INTO {table} ({COLUMNS}) VALUES ({VALUES})".encode())
    committed = time.perf_counter()
    select.select([process.stdout], [], [])
    arrived = time.perf_counter()
    process.stdout.readline()
    return (arrived - committed) * 1000


def measure_latency(dsn: str, rounds: int) -> list[Record]:
    """Measures both on an idle server, in new processes each round: the latency depends on the CPUs they run on."""
    delays: dict[str, list[float]] = {"pgcoord tail": [], "LISTEN loop": []}
    with psycopg.connect(dsn, autocommit=True) as conn:
        for _ in range(rounds):
            measure_pair(conn, dsn, delays)
    ours = statistics.median(delays["pgcoord tail"])
    return [
        {
            "who": who,
            "p50_ms": round(statistics.median(found), 3),
            "p99_ms": round(sorted(found)[int(len(found) * 0.99)], 3),
            "ratio": round(ours / statistics.median(found), 2),
        }
        for who, found in delays.items()
    ]


def measure_pair(conn: psycopg.Connection[Any], dsn: str, delays: dict[str, list[float]]) -> None:
    """Measures a hundred inserts for each of the two, after twenty for the warm-up."""
    with (
        reader([*PGCOORD, "tail", "lease", "-o", "jsonl"], dsn) as tail,
        reader([sys.executable, "-c", LISTEN_LOOP, dsn], dsn) as loop,
    ):
        assert loop.stdout
        loop.stdout.readline()
        while not conn.execute("SELECT 1 FROM pg_stat_activity WHERE application_name = 'pgcoord/tail'").fetchone():
            time.sleep(0.1)
        time.sleep(1.5)
        for number in range(120):
            for name, table, process in (
                ("pgcoord tail", "pgcoord.lease_events", tail), ("LISTEN loop", "notified_events", loop),
            ):  # fmt: skip
                found = delay(conn, table, process)
                if number >= 20:
                    delays[name].append(found)


# -- catch-up


def run_measured(command: Sequence[str], dsn: str) -> tuple[float, int]:
    """Runs a command, drains its output, and returns its seconds and its peak of resident memory in bytes."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PGCOORD_DSN": dsn}, stdout=subprocess.PIPE)
    assert process.stdout
    descriptor = process.stdout.fileno()
    while os.read(descriptor, 1 << 20):
        pass
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def fill(dsn: str, events: int) -> None:
    """Replaces the contents of the outbox by `events` events."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("TRUNCATE pgcoord.lease_events RESTART IDENTITY")
        conn.execute(
            f"INSERT INTO pgcoord.lease_events ({COLUMNS}) SELECT {VALUES} FROM generate_series(1, {events})".encode()
        )
        conn.execute("VACUUM ANALYZE pgcoord.lease_events")


def measure_catch_up(dsn: str, events: int) -> list[Record]:
    """Measures each command in a process of its own, and takes the fastest of three runs."""
    commands = {
        "pgcoord tail": [*PGCOORD, "tail", "lease", "--from-start", "--no-follow", "-o", "jsonl"],
        "COPY, blocks": [sys.executable, "-c", COPY_BLOCKS, dsn],
        "COPY, rows": [sys.executable, "-c", COPY_ROWS, dsn],
    }
    fill(dsn, events)
    best = {who: min(run_measured(command, dsn) for _ in range(3)) for who, command in commands.items()}
    ours = best["pgcoord tail"][0]
    return [
        {
            "who": who,
            "events": events,
            "per_second": round(events / seconds),
            "ratio": round(seconds / ours, 2),
            "peak_mib": round(peak / 2**20),
        }
        for who, (seconds, peak) in best.items()
    ]


# -- insert cost


def inserts_per_second(bin_dir: Path, dsn: str, table: str, clients: int, seconds: int) -> float:
    """Returns the one-row transactions a second that pgbench reaches on a table."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(f"INSERT INTO {table} ({COLUMNS}) VALUES ({VALUES});\n")
        file.flush()
        done = subprocess.run(
            [
                bin_dir / "pgbench", "-n", "-M", "prepared", "-f", file.name, "-c", str(clients), "-j", "1",
                "-T", str(seconds), dsn,
            ],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    match = re.search(r"tps = ([\d.]+)", done.stdout)
    assert match, done.stdout
    return float(match[1])


def measure_inserts(bin_dir: Path, dsn: str, seconds: int, rounds: int) -> list[Record]:
    """Measures all tables in each round, and returns the medians of the rounds."""
    tables = {"bare table": "bare_events", "outbox": "pgcoord.lease_events", "always notifies": "notified_events"}
    rates: dict[tuple[str, int], list[float]] = {}

    def run(who: str, table: str, clients: int) -> None:
        rates.setdefault((who, clients), []).append(inserts_per_second(bin_dir, dsn, table, clients, seconds))

    for _ in range(rounds):
        for clients in (1, 8):
            for who, table in tables.items():
                run(who, table, clients)
            with reader([*PGCOORD, "tail", "lease", "-o", "jsonl"], dsn) as tail:
                assert tail.stdout
                drain(tail.stdout.fileno())
                run("outbox, tailed", "pgcoord.lease_events", clients)
    return [
        {
            "who": who,
            "clients": clients,
            "per_second": round(statistics.median(found)),
            "cost": f"{statistics.median(rates['bare table', clients]) / statistics.median(found) - 1:+.0%}",
        }
        for (who, clients), found in rates.items()
    ]


def drain(descriptor: int) -> None:
    """Starts a process that reads and discards what arrives on a pipe."""
    subprocess.Popen(["cat"], stdin=descriptor, stdout=subprocess.DEVNULL)


# -- all


def main() -> None:
    """Parses the call, runs the measurements, prints and writes them."""
    parser = call_parser(__doc__, "latency", "catch-up", "inserts")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    installation = find_installation(options.server_version)
    with temporary_server(installation) as server:
        upgrade(Settings(dsn=server.dsn))
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(BASELINE_TABLES)
        parts: dict[str, Callable[[], list[Record]]] = {
            "latency": lambda: measure_latency(server.dsn, 3 * options.rounds),
            "catch-up": lambda: [
                *measure_catch_up(server.dsn, 10_000), *measure_catch_up(server.dsn, options.events),
            ],
            "inserts": lambda: measure_inserts(installation.bin_dir, server.dsn, 3, options.rounds),
        }  # fmt: skip
        run_parts(parts, options)


if __name__ == "__main__":
    main()
