"""The completion cascade and its reconciler: `python -m benchmarks.cascade`.

**Backlog**: a hundred thousand undispatched completion events, each with one execution that depends on it. `reconcile
dependency` dispatches them. The baseline is one SERIALIZABLE transaction for each event, which updates the edge group
and retries after a serialization failure, on the given number of connections and on a part of the same backlog. If
procrastinate is installed, its worker runs as many empty jobs on the same server.

**Flows**: chains of ten executions, each of which is claimed, completed and dispatched, by several workers in one
process. The published rate of FlowFabric's Rust reference is printed beside it. It was measured on other hardware, with
16 workers and without dependencies, so it gives an order of magnitude and no comparison.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import IsolationLevel

from benchmarks.measuring import Record, call_parser, run_parts
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.core.flows import executions, flows, reconcile
from pgcoord_cli.core.flows.dispatch import dispatch_all
from pgcoord_cli.core.flows.flow_file import FlowPlan, PlannedExecution
from pgcoord_cli.settings import Settings

PUBLISHED_FLOWS_PER_SECOND = 48.2


BACKLOG = """
SET search_path = pgcoord;
TRUNCATE flows, executions, execution_leases, edge_groups, edges, completion_events, dispatch_failures;
INSERT INTO flows (flow_id) VALUES ('00000000-0000-0000-0000-000000000001');
INSERT INTO executions (execution_id, flow_id, name, state, ended_at)
SELECT md5('up' || i)::uuid, '00000000-0000-0000-0000-000000000001', 'up' || i, 'success', clock_timestamp()
  FROM generate_series(1, {number}) AS i;
INSERT INTO executions (execution_id, flow_id, name, state)
SELECT md5('down' || i)::uuid, '00000000-0000-0000-0000-000000000001', 'down' || i, 'blocked'
  FROM generate_series(1, {number}) AS i;
INSERT INTO edge_groups (downstream_id, flow_id, policy, required, running_count)
SELECT md5('down' || i)::uuid, '00000000-0000-0000-0000-000000000001', '{{"kind": "all_of"}}', 1, 1
  FROM generate_series(1, {number}) AS i;
INSERT INTO edges (flow_id, upstream_id, downstream_id)
SELECT '00000000-0000-0000-0000-000000000001', md5('up' || i)::uuid, md5('down' || i)::uuid
  FROM generate_series(1, {number}) AS i;
INSERT INTO completion_events (execution_id, flow_id, outcome)
SELECT md5('up' || i)::uuid, '00000000-0000-0000-0000-000000000001', 'success' FROM generate_series(1, {number}) AS i;
VACUUM ANALYZE executions, edge_groups, edges, completion_events;
"""


def fill_backlog(dsn: str, number: int) -> None:
    """Replaces all flows by `number` undispatched events, each with one execution that depends on it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        for statement in BACKLOG.format(number=number).strip().split(";\n"):
            conn.execute(statement.strip().rstrip(";").encode())


def drain(settings: Settings) -> float:
    """Dispatches the backlog with the reconciler, and returns the events a second."""
    scope = reconcile.Scope(stale_threshold_ms=0)
    done, began = 0, time.perf_counter()
    with command_session(settings, "benchmark", writes=True) as conn:
        while reconciled := reconcile.dependency(conn, scope, print).reconciled:
            done += reconciled
    return done / (time.perf_counter() - began)


def one_by_one(dsn: str, workers: int, number: int) -> float:
    """Dispatches `number` events in a SERIALIZABLE transaction each, and returns the events a second."""
    with psycopg.connect(dsn) as conn:
        pending = [row[0] for row in conn.execute(
            "SELECT event_id FROM pgcoord.completion_events WHERE dispatched_at_ms IS NULL LIMIT %s", [number]
        )]  # fmt: skip
    total = len(pending)
    lock = threading.Lock()

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
            conn.isolation_level = IsolationLevel.SERIALIZABLE
            while True:
                with lock:
                    if not pending:
                        return
                    event = pending.pop()
                dispatch_serializable(conn, event)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total / (time.perf_counter() - began)


def dispatch_serializable(conn: psycopg.Connection[Any], event: int) -> None:
    """Dispatches one event in one transaction; retries after a serialization failure."""
    while True:
        try:
            with conn.transaction():
                (execution, outcome) = conn.execute(
                    "SELECT execution_id, outcome FROM completion_events WHERE event_id = %s", [event]
                ).fetchone() or (None, None)
                for edge, downstream in conn.execute(
                    "SELECT edge_id, downstream_id FROM edges WHERE upstream_id = %s AND outcome IS NULL", [execution]
                ).fetchall():
                    conn.execute("UPDATE edges SET outcome = %s WHERE edge_id = %s", [outcome, edge])
                    successes, required = conn.execute(
                        "UPDATE edge_groups SET success_count = success_count + 1, running_count = running_count - 1"
                        " WHERE downstream_id = %s RETURNING success_count, required",
                        [downstream],
                    ).fetchone() or (0, 1)
                    if successes >= required:
                        conn.execute(
                            "UPDATE edge_groups SET state = 'satisfied' WHERE downstream_id = %s", [downstream]
                        )
                        conn.execute("UPDATE executions SET state = 'eligible' WHERE execution_id = %s", [downstream])
                conn.execute("UPDATE completion_events SET dispatched_at_ms = 1 WHERE event_id = %s", [event])
            return
        except psycopg.errors.SerializationFailure:
            continue


PROCRASTINATE = """
import asyncio, sys, time, procrastinate
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=sys.argv[1], max_size=20))
@app.task(name="nothing")
async def nothing(): pass
async def main():
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await nothing.batch_defer_async(*({} for _ in range(int(sys.argv[2]))))
        began = time.perf_counter()
        await app.run_worker_async(wait=False, concurrency=int(sys.argv[3]), install_signal_handlers=False,
                                   listen_notify=False)
        print(int(sys.argv[2]) / (time.perf_counter() - began))
asyncio.run(main())
"""


def procrastinate_jobs(dsn: str, number: int, concurrency: int) -> float | None:
    """Runs empty jobs with procrastinate's worker, and returns the jobs a second; None if it is not installed."""
    done = subprocess.run(
        [sys.executable, "-c", PROCRASTINATE, dsn, str(number), str(concurrency)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"procrastinate is left out: {(done.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        return None
    return float(done.stdout)


def measure_backlog(settings: Settings, number: int, workers: int) -> list[Record]:
    """Measures the reconciler on the whole backlog and the baselines on a part, one after the other."""
    fill_backlog(settings.dsn, number)
    part = max(1_000, number // 20)
    rates: dict[str, float | None] = {
        f"one transaction each, {workers} connections": one_by_one(settings.dsn, workers, part)
    }
    rates["one transaction each, 1 connection"] = one_by_one(settings.dsn, 1, part)
    rates["procrastinate, jobs"] = procrastinate_jobs(settings.dsn, part, workers)
    fill_backlog(settings.dsn, number)
    rates = {"pgcoord reconcile": drain(settings)} | rates
    ours = rates["pgcoord reconcile"] or 0
    return [
        {"who": who, "events": number if who.startswith("pgcoord") else part, "per_second": round(rate),
         "ratio": round(ours / rate, 2)}
        for who, rate in rates.items() if rate
    ]  # fmt: skip


LINE = FlowPlan(
    None, None, [PlannedExecution(str(number)) for number in range(10)],
    [(str(number), str(number + 1)) for number in range(9)], {},
)  # fmt: skip


def measure_flows(settings: Settings, workers: int, seconds: float) -> list[Record]:
    """Measures chains of ten, run by several workers that claim, complete and dispatch."""
    finished = [0] * workers
    ends_at = time.monotonic() + seconds

    def work(number: int) -> None:
        with command_session(settings, "benchmark", writes=True) as conn:
            while time.monotonic() < ends_at:
                run_line(conn, f"worker-{number}")
                finished[number] += 1

    threads = [threading.Thread(target=work, args=[number]) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [
        {"who": f"pgcoord, {workers} workers, here", "flows_per_second": round(sum(finished) / seconds, 1)},
        {
            "who": "FlowFabric, published: 16 workers, other hardware, no dependencies",
            "flows_per_second": PUBLISHED_FLOWS_PER_SECOND,
        },
    ]


def run_line(conn: psycopg.Connection[Any], owner: str) -> None:
    """Creates one chain, and runs ten executions, of this chain or of any other that is eligible."""
    flows.create(conn, LINE)
    for _ in range(10):
        for claim in executions.claim(conn, owner):
            executions.complete(conn, claim.execution_id, claim.lease_epoch)
            events = conn.execute(
                "SELECT event_id FROM completion_events WHERE execution_id = $1 AND dispatched_at_ms IS NULL",
                [claim.execution_id],
            )
            dispatch_all(conn, [row[0] for row in events])


def main() -> None:
    """Parses the call, runs the measurements, prints and writes them."""
    parser = call_parser(__doc__, "backlog", "flows")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    with temporary_server(find_installation(options.server_version)) as server:
        settings = Settings(dsn=server.dsn)
        upgrade(settings)
        parts: dict[str, Callable[[], list[Record]]] = {
            "backlog": lambda: measure_backlog(settings, options.events, options.workers),
            "flows": lambda: measure_flows(settings, options.workers, options.seconds),
        }
        run_parts(parts, options)


if __name__ == "__main__":
    main()
