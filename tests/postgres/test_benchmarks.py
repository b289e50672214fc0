"""A short run of what the benchmark of commits measures; how fast it is does not matter here."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from benchmarks import baselines, history
from benchmarks.workloads import WORKLOADS, run_by_leader, run_pgcoord, set_to_watch, write_keys
from pgcoord_cli.settings import Settings
from tests.postgres.commit_scenarios import needs_leader

COMMITS = "SELECT sum(convert_from(value, 'UTF8')::integer) FROM {}"
"""Every transaction of a workload adds one to one value."""


def commits(sql: psycopg.Connection[Any], table: str) -> int:
    (found,) = sql.execute(COMMITS.format(table).encode()).fetchone() or (0,)
    return int(found)


@needs_leader
@pytest.mark.parametrize("run", [run_pgcoord, run_by_leader])
def test_dependent_reads_and_a_write_commit(settings: Settings, sql: psycopg.Connection[Any], run: Any) -> None:
    write_keys(settings)
    assert run(settings, WORKLOADS["reads20-write1"], 2, 1.0).per_second > 0
    assert commits(sql, "kv") > 1


def test_dependent_reads_and_a_write_commit_through_psycopg(settings: Settings, sql: psycopg.Connection[Any]) -> None:
    baselines.prepare(settings.dsn)
    workload = WORKLOADS["reads20-write1"]
    found = baselines.run_workers(settings.dsn, workload.psycopg, workload.keys, 2, 0.5, serializable=True)
    assert found.per_second > 0
    assert commits(sql, "public.baseline_kv") > 1


@needs_leader
def test_a_set_reaches_its_watch(settings: Settings) -> None:
    found = set_to_watch(settings, 0.5)
    assert found.per_second > 0
    assert found.p50_ms > 0


@needs_leader
def test_commits_go_on_beside_a_history_that_was_filled_in(settings: Settings, sql: psycopg.Connection[Any]) -> None:
    write_keys(settings)
    history.fill(settings, 1_000)
    (floor,) = sql.execute("SELECT queue_floor_id FROM leader_lease")
    assert floor[0] >= 1_000
    assert run_by_leader(settings, WORKLOADS["rmw-10k"], 2, 0.5).per_second > 0
    (settled,) = sql.execute("SELECT count(*) FROM commit_requests WHERE commit_version <= 0 OR status = 'conflict'")
    assert settled[0] >= 1_000
    (analysed,) = sql.execute("SELECT reltuples FROM pg_class WHERE oid = 'commit_requests'::regclass")
    assert analysed[0] >= 1_000
