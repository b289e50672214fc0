"""Event tails beside the least that would do: `python -m benchmarks.tail`.

**Latency**: from the moment an INSERT has been committed to the line of that event on a pipe; `pgcoord tail` beside a
loop of bare psycopg that listens and selects, on a table whose trigger always notifies. They take turns.

**Catch-up**: a million events from the start to a line each; `pgcoord tail -o jsonl` beside a process that copies the
table out with psycopg's COPY, as blocks that nobody looks at, and beside one that has COPY's rows parsed. Whole
processes, with the peak of their memory, and the same for ten thousand events.

**Insert cost**: pgbench inserts one row a transaction into the outbox, while nobody tails it and while somebody does,
beside the same table without anything: and beside one whose trigger always notifies.
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
from pgcoord_cli.core.embedded.installation import find_programs
from pgcoord_cli.core.embedded.server import throw_away_server
from pgcoord_cli.settings import Settings

COLUMNS = "execution_id, lease_id, event_type, occurred_at_ms, partition_key, namespace, instance_tag"
VALUES = "gen_random_uuid()::text, gen_random_uuid()::text, 'renewed', 1700000000000, 3, 'deploys', 'blue'"

RIVALS = """
CREATE TABLE bare_events (LIKE pgcoord.lease_events INCLUDING ALL);
CREATE TABLE loud_events (LIKE pgcoord.lease_events INCLUDING ALL);
CREATE FUNCTION announce_loudly() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_notify('loud_events', ''); RETURN NULL; END $$;
CREATE TRIGGER announce AFTER INSERT ON loud_events FOR EACH STATEMENT EXECUTE FUNCTION announce_loudly();
"""

LISTEN_LOOP = """
import json, sys, psycopg
conn = psycopg.connect(sys.argv[1], autocommit=True)
conn.execute("LISTEN loud_events")
last = conn.execute("SELECT coalesce(max(event_id), 0) FROM loud_events").fetchone()[0]
print("ready", flush=True)
while True:
    for _ in conn.notifies(stop_after=1):
        pass
    for last, execution_id, event_type in conn.execute(
        "SELECT event_id, execution_id, event_type FROM loud_events WHERE event_id > %s ORDER BY event_id", [last]
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
    """A process that prints a line an event."""
    process = subprocess.Popen(
        command, env=os.environ | {"PGCOORD_DSN": dsn}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def delay(conn: psycopg.Connection[Any], table: str, process: subprocess.Popen[bytes]) -> float:
    """Milliseconds from the end of an INSERT to its line."""
    assert process.stdout
    conn.execute(f"INSERT INTO {table} ({COLUMNS}) VALUES ({VALUES})".encode())
    committed = time.perf_counter()
    select.select([process.stdout], [], [])
    arrived = time.perf_counter()
    process.stdout.readline()
    return (arrived - committed) * 1000


def measure_latency(dsn: str, rounds: int) -> list[Record]:
    """The two in turn, on an otherwise idle server; new processes each round, for much depends on where they run."""
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
    """A hundred inserts for each of the two, after twenty to warm up."""
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
                ("pgcoord tail", "pgcoord.lease_events", tail), ("LISTEN loop", "loud_events", loop),
            ):  # fmt: skip
                found = delay(conn, table, process)
                if number >= 20:
                    delays[name].append(found)


# -- catch-up


def run_measured(command: Sequence[str], dsn: str) -> tuple[float, int]:
    """Seconds, and the peak of resident memory in bytes, of a process whose output goes to a pipe that is drained."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PGCOORD_DSN": dsn}, stdout=subprocess.PIPE)
    assert process.stdout
    descriptor = process.stdout.fileno()
    while os.read(descriptor, 1 << 20):
        pass
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def fill(dsn: str, events: int) -> None:
    """Empties the outbox and puts so many events there."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("TRUNCATE pgcoord.lease_events RESTART IDENTITY")
        conn.execute(
            f"INSERT INTO pgcoord.lease_events ({COLUMNS}) SELECT {VALUES} FROM generate_series(1, {events})".encode()
        )
        conn.execute("VACUUM ANALYZE pgcoord.lease_events")


def measure_catch_up(dsn: str, events: int) -> list[Record]:
    """Each in a process of its own, the best of three."""
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
    """pgbench's rate of one-row transactions."""
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
    """Medians of several rounds, in each of which everybody has a turn."""
    tables = {"bare table": "bare_events", "outbox": "pgcoord.lease_events", "always notifies": "loud_events"}
    rates: dict[tuple[str, int], list[float]] = {}

    def turn(who: str, table: str, clients: int) -> None:
        rates.setdefault((who, clients), []).append(inserts_per_second(bin_dir, dsn, table, clients, seconds))

    for _ in range(rounds):
        for clients in (1, 8):
            for who, table in tables.items():
                turn(who, table, clients)
            with reader([*PGCOORD, "tail", "lease", "-o", "jsonl"], dsn) as tail:
                assert tail.stdout
                drain(tail.stdout.fileno())
                turn("outbox, tailed", "pgcoord.lease_events", clients)
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
    """Has a child process swallow what a pipe brings."""
    subprocess.Popen(["cat"], stdin=descriptor, stdout=subprocess.DEVNULL)


# -- all


def main() -> None:
    """Parses the call, runs the measurements, prints and writes them."""
    parser = call_parser(__doc__, "latency", "catch-up", "inserts")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    programs = find_programs(options.server_version)
    with throw_away_server(programs) as server:
        upgrade(Settings(dsn=server.dsn))
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(RIVALS)
        parts: dict[str, Callable[[], list[Record]]] = {
            "latency": lambda: measure_latency(server.dsn, 3 * options.rounds),
            "catch-up": lambda: [
                *measure_catch_up(server.dsn, 10_000), *measure_catch_up(server.dsn, options.events),
            ],
            "inserts": lambda: measure_inserts(programs.bin_dir, server.dsn, 3, options.rounds),
        }  # fmt: skip
        run_parts(parts, options)


if __name__ == "__main__":
    main()
