"""Garbage collection of commit requests: which rows are deleted, kept, orphaned, or skipped because they are locked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.commits.requests import SHORTEST_RETENTION, Status
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.gc import check_retention, collect_commit_requests, count_commit_requests
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

HOUR, DAY, YEAR = 3_600, 86_400, 31_536_000
TERMINAL = [status for status in Status if status is not Status.PENDING]

Session = psycopg.Connection[Any]


@pytest.fixture
def session(settings: Settings) -> Iterator[Session]:
    """A session like that of the command, but without a wait for locks."""
    with command_session(replace(settings, lock_timeout=0.001), "gc", writes=True) as conn:
        yield conn


def store(sql: Session, status: str, age: float, *, number: int = 1, resolved: float | None = None) -> None:
    """Inserts requests of epoch 0, created `age` and settled `resolved` (by default `age`) seconds ago."""
    sql.execute(
        """
        INSERT INTO commit_requests
               (request_id, epoch, read_version, payload, status, commit_version, created_at, resolved_at)
        SELECT gen_random_uuid(), 0, 0, '', %(status)s, CASE WHEN %(status)s = 'committed' THEN 1 END,
               clock_timestamp() - make_interval(secs => %(age)s),
               CASE WHEN %(status)s <> 'pending' THEN clock_timestamp() - make_interval(secs => %(resolved)s) END
          FROM generate_series(1, %(number)s)
        """,
        {"status": status, "age": age, "number": number, "resolved": age if resolved is None else resolved},
    )


def kept(sql: Session) -> list[tuple[int, str]]:
    return sql.execute("SELECT id, status FROM commit_requests ORDER BY id").fetchall()


def lead(sql: Session, *, expires_in: float | None, epoch: int = 1) -> None:
    """Sets the epoch, and a lease that expires in so many seconds; None: a released one."""
    sql.execute(
        """
        UPDATE leader_lease
           SET epoch = %s, term_id = CASE WHEN %s THEN gen_random_uuid() END,
               expires_at = clock_timestamp() + make_interval(secs => %s)
        """,
        [epoch, expires_in is not None, expires_in or 0],
    )


@contextmanager
def locked(settings: Settings, where: str) -> Iterator[None]:
    """Locks the rows that `where` selects in another session within the block."""
    with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as other, other.transaction():
        other.execute(f"SELECT FROM commit_requests WHERE {where} FOR UPDATE")
        yield


def always(_deleted: int) -> bool:
    return True


# What is deleted and what is kept


def test_i11_settled_requests_older_than_the_retention_are_deleted(sql: Session, session: Session) -> None:
    for status in TERMINAL:
        store(sql, status, HOUR + 60)
        store(sql, status, HOUR - 60)
    collected = collect_commit_requests(session, HOUR, 1_000, always)
    assert (collected.deleted, collected.batches, collected.orphaned) == (len(TERMINAL), 1, 0)
    assert kept(sql) == [(2 * place, status) for place, status in enumerate(TERMINAL, start=1)]
    oldest = sql.execute("SELECT min(created_at) FROM commit_requests").fetchone()
    assert (collected.oldest_kept,) == oldest


def test_i11_pending_requests_of_any_age_are_never_deleted(sql: Session, session: Session) -> None:
    store(sql, "pending", 50 * YEAR, number=3)
    store(sql, "committed", 50 * YEAR)
    for expires_in in (HOUR, -HOUR, None):
        lead(sql, expires_in=expires_in, epoch=0)
        collect_commit_requests(session, SHORTEST_RETENTION, 1, always)
        assert kept(sql) == [(1, "pending"), (2, "pending"), (3, "pending")]


def test_i11_the_retention_begins_when_a_request_is_settled(sql: Session, session: Session) -> None:
    store(sql, "committed", age=YEAR, resolved=HOUR - 60)
    assert collect_commit_requests(session, HOUR, 10, always).deleted == 0
    assert kept(sql) == [(1, "committed")]


def test_i12_the_time_zone_of_a_session_has_no_effect(sql: Session, session: Session) -> None:
    store(sql, "committed", HOUR + 60)
    store(sql, "committed", HOUR - 60)
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        session.execute("SELECT set_config('TimeZone', $1, false)", [zone])
        collect_commit_requests(session, HOUR, 10, always)
        assert kept(sql) == [(2, "committed")]


@pytest.mark.parametrize("seconds", [0, 1, SHORTEST_RETENTION - 0.001])
def test_i11_a_retention_shorter_than_clients_and_leaders_need_is_refused(seconds: float) -> None:
    assert check_retention(SHORTEST_RETENTION) == SHORTEST_RETENTION
    with pytest.raises(UsageError, match="--older-than"):
        check_retention(seconds)


def test_a_run_on_an_empty_table_deletes_nothing(session: Session) -> None:
    collected = collect_commit_requests(session, HOUR, 10, always)
    assert (collected.deleted, collected.batches, collected.oldest_kept) == (0, 0, None)


# Batches


@pytest.mark.parametrize(("rows", "batches"), [(9, 3), (10, 4), (3, 1), (2, 1)])
def test_rows_are_deleted_in_batches_oldest_first(rows: int, batches: int, sql: Session, session: Session) -> None:
    store(sql, "committed", HOUR + 60, number=rows)
    store(sql, "committed", 0)
    seen: list[int] = []

    def look(deleted: int) -> bool:
        assert [request for request, _ in kept(sql)] == list(range(deleted + 1, rows + 2))
        seen.append(deleted)
        return True

    collected = collect_commit_requests(session, HOUR, 3, look)
    assert (collected.deleted, collected.batches) == (rows, batches)
    assert seen[:batches] == list(range(0, rows, 3))


def test_a_stopped_run_keeps_the_rest(sql: Session, session: Session) -> None:
    store(sql, "committed", HOUR + 60, number=10)
    collected = collect_commit_requests(session, HOUR, 3, lambda deleted: deleted < 6)
    assert (collected.deleted, collected.batches) == (6, 2)
    assert [request for request, _ in kept(sql)] == [7, 8, 9, 10]


def test_young_and_pending_rows_between_old_ones_do_not_end_a_run(sql: Session, session: Session) -> None:
    for _ in range(3):
        store(sql, "pending", YEAR)
        store(sql, "committed", 0, number=5)
        store(sql, "committed", DAY, number=2)
    assert collect_commit_requests(session, HOUR, 2, always).deleted == 6
    assert len(kept(sql)) == 18


def test_a_dry_run_counts_what_a_run_then_deletes_and_changes_nothing(sql: Session, session: Session) -> None:
    lead(sql, expires_in=None)
    for status in Status:
        store(sql, status, DAY, number=3)
        store(sql, status, 0)
    before = sql.execute("SELECT * FROM commit_requests ORDER BY id").fetchall()
    counted = count_commit_requests(session, HOUR)
    assert sql.execute("SELECT * FROM commit_requests ORDER BY id").fetchall() == before
    assert counted.dry_run
    assert counted.orphaned is None
    assert counted.deleted == collect_commit_requests(session, HOUR, 2, always).deleted == 3 * len(TERMINAL)


# Concurrent transactions and runs


def test_locked_rows_are_skipped(sql: Session, session: Session, settings: Settings) -> None:
    store(sql, "committed", DAY, number=10)
    with locked(settings, "id IN (1, 5, 6)"):
        assert collect_commit_requests(session, HOUR, 2, always).deleted == 7
        assert [request for request, _ in kept(sql)] == [1, 5, 6]
    assert collect_commit_requests(session, HOUR, 2, always).deleted == 3


def test_concurrent_runs_delete_each_row_once(sql: Session, settings: Settings) -> None:
    store(sql, "committed", DAY, number=2_000)
    together = threading.Barrier(2)

    def collect() -> int:
        with command_session(settings, "gc", writes=True) as conn:
            together.wait(TIMEOUT)
            return collect_commit_requests(conn, HOUR, 10, always).deleted

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(collect) for _ in range(2)]
    left = len(kept(sql))
    assert sum(result.result() for result in results) == 2_000 - left
    # Each run skipped the rows that the other had locked, and the other deleted them.
    assert left == 0


# Abandoned requests


def test_i11_abandoned_requests_become_orphaned_and_are_kept_one_retention_more(sql: Session, session: Session) -> None:
    lead(sql, expires_in=None)
    store(sql, "pending", DAY, number=3)
    store(sql, "pending", HOUR - 60)
    first = collect_commit_requests(session, HOUR, 2, always)
    assert (first.orphaned, first.deleted) == (3, 0)
    assert kept(sql) == [(1, "orphaned"), (2, "orphaned"), (3, "orphaned"), (4, "pending")]
    again = collect_commit_requests(session, HOUR, 2, always)
    assert (again.orphaned, again.deleted) == (0, 0)
    sql.execute("UPDATE commit_requests SET resolved_at = resolved_at - interval '61 minutes'")
    assert collect_commit_requests(session, HOUR, 2, always).deleted == 3
    assert kept(sql) == [(4, "pending")]


def test_abandoned_requests_are_marked_in_batches_until_the_run_is_stopped(sql: Session, session: Session) -> None:
    lead(sql, expires_in=None)
    store(sql, "pending", DAY, number=7)
    answers = iter([True, False])
    collected = collect_commit_requests(session, HOUR, 2, lambda _deleted: next(answers, False))
    assert (collected.orphaned, collected.deleted) == (4, 0)
    assert [status for _, status in kept(sql)] == ["orphaned"] * 4 + ["pending"] * 3
    assert collect_commit_requests(session, HOUR, 2, always).orphaned == 3


def test_i3_an_orphaned_request_has_no_version_but_a_reason(sql: Session, session: Session) -> None:
    lead(sql, expires_in=-1)
    store(sql, "pending", DAY)
    collect_commit_requests(session, HOUR, 2, always)
    rows = sql.execute("SELECT status, commit_version, reason FROM commit_requests").fetchall()
    assert rows == [("orphaned", None, "no leader resolved it in time")]


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(lambda sql: lead(sql, expires_in=HOUR), id="while a leader holds the lease"),
        pytest.param(lambda sql: lead(sql, expires_in=None, epoch=0), id="of an epoch that is not superseded"),
        pytest.param(lambda sql: lead(sql, expires_in=-HOUR, epoch=0), id="of a leader that may be elected again"),
    ],
)
def test_i11_nothing_is_orphaned(prepare: Callable[[Session], None], sql: Session, session: Session) -> None:
    prepare(sql)
    store(sql, "pending", YEAR, number=2)
    assert collect_commit_requests(session, HOUR, 10, always).orphaned == 0
    assert kept(sql) == [(1, "pending"), (2, "pending")]


def test_a_locked_pending_row_blocks_no_other(sql: Session, session: Session, settings: Settings) -> None:
    lead(sql, expires_in=None)
    store(sql, "pending", DAY, number=2)
    store(sql, "committed", DAY)
    with locked(settings, "id = 1"):
        collected = collect_commit_requests(session, HOUR, 10, always)
    assert (collected.orphaned, collected.deleted) == (1, 1)
    assert kept(sql) == [(1, "pending"), (2, "orphaned")]
