"""`pgcoord gc`: its output, when it is silent, and what it refuses."""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from pgcoord_cli.settings import Settings
    from tests.conftest import Call

COLLECTED = {"table", "deleted", "batches", "orphaned", "oldest_kept", "dry_run"}


@pytest.fixture
def offline(offline: Call) -> Call:
    """Runs `pgcoord gc commit-requests …`."""
    return partial(offline, "gc", "commit-requests")


def store(sql: psycopg.Connection[Any], status: str, age: str, number: int = 1) -> None:
    """Inserts requests that were created, and settled unless pending, a given time ago."""
    sql.execute(
        """
        INSERT INTO commit_requests (request_id, epoch, read_version, payload, status, created_at, resolved_at)
        SELECT gen_random_uuid(), 0, 0, '', %(status)s, clock_timestamp() - %(age)s::interval,
               CASE WHEN %(status)s <> 'pending' THEN clock_timestamp() - %(age)s::interval END
          FROM generate_series(1, %(number)s)
        """,
        {"status": status, "age": age, "number": number},
    )


def stored(sql: psycopg.Connection[Any]) -> list[Any]:
    return sql.execute("SELECT * FROM commit_requests ORDER BY id").fetchall()


def test_the_document_has_what_was_deleted_and_what_is_kept(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, "conflict", "11 minutes", 5)
    store(sql, "conflict", "9 minutes")
    collected = call("--batch-size", "2", "-o", "json").document["commit_requests"]
    assert collected.keys() == COLLECTED
    assert (collected["deleted"], collected["batches"], collected["dry_run"]) == (5, 3, False)
    oldest = sql.execute("SELECT created_at FROM commit_requests").fetchall()[0][0]
    assert time_of(sql, collected["oldest_kept"]) == oldest
    again = call("-o", "json").document["commit_requests"]
    assert (again["deleted"], again["batches"]) == (0, 0)


def time_of(sql: psycopg.Connection[Any], text: str) -> Any:
    """Parses a printed time on the server."""
    return sql.execute("SELECT %s::timestamptz", [text]).fetchall()[0][0]


def test_quiet_prints_only_when_something_was_done(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, "pending", "1 day")
    assert call("-q") == (0, "", "")
    store(sql, "too_old", "1 day")
    deleted = call("-q")
    assert (deleted.code, deleted.err) == (0, "")
    assert "deleted      1\n" in deleted.out
    assert call("-q") == (0, "", "")
    sql.execute("UPDATE leader_lease SET epoch = 1")
    assert "orphaned     1\n" in call("-q").out
    assert call("-q") == (0, "", "")
    assert call("-q", "-o", "json").document["commit_requests"]["deleted"] == 0


def test_i11_a_dry_run_changes_nothing_and_counts_what_a_run_deletes(call: Call, sql: psycopg.Connection[Any]) -> None:
    sql.execute("UPDATE leader_lease SET epoch = 1")
    store(sql, "pending", "1 day", 3)
    store(sql, "rejected", "1 day", 4)
    store(sql, "rejected", "1 minute")
    before = stored(sql)
    counted = call("--dry-run", "-o", "json").document["commit_requests"]
    assert stored(sql) == before
    assert (counted["deleted"], counted["dry_run"]) == (4, True)
    assert call("-o", "json").document["commit_requests"]["deleted"] == 4


def test_a_dry_run_needs_no_right_to_change_anything(
    call: Call, settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    store(sql, "rejected", "1 day")
    role = f"reader_{uuid.uuid4().hex[:8]}"
    sql.execute(f"CREATE ROLE {role} LOGIN")
    sql.execute(f"GRANT USAGE ON SCHEMA pgcoord TO {role}")
    sql.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA pgcoord TO {role}")
    dsn = make_conninfo(settings.dsn, user=role)
    assert call("--dry-run", "-o", "json", PGCOORD_DSN=dsn).document["commit_requests"]["deleted"] == 1
    refused = call("-o", "json", PGCOORD_DSN=dsn)
    assert (refused.code, refused.error["code"]) == (1, "permission_denied")


def test_i11_the_retention_has_a_minimum(call: Call, sql: psycopg.Connection[Any]) -> None:
    for age in ("50 seconds", "70 seconds", "2 hours", "40 days"):
        store(sql, "conflict", age)
    deleted = {
        wanted: call("--older-than", wanted, "--dry-run", "-o", "json").document["commit_requests"]["deleted"]
        for wanted in ("60s", "1m", "1h", "30d", "36500d")
    }
    assert deleted == {"60s": 3, "1m": 3, "1h": 2, "30d": 1, "36500d": 0}


def test_no_batch_begins_after_the_longest_runtime(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, "conflict", "1 day", 3)
    collected = call("--max-runtime", "0.000001ms", "-o", "json").document["commit_requests"]
    assert (collected["deleted"], collected["batches"]) == (0, 0)
    assert len(stored(sql)) == 3


def test_verbose_reports_every_batch_on_stderr(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, "conflict", "1 day", 4)
    told = call("-v", "--batch-size", "2", "-o", "json")
    assert told.err.splitlines() == [f"commit_requests: {deleted} deleted" for deleted in (0, 2, 4)]
    assert told.document["commit_requests"]["deleted"] == 4


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--older-than", "59s"), "--older-than: 59s is shorter than 60s"),
        (("--older-than", "59999ms"), "--older-than"),
        (("--older-than", "0"), "--older-than"),
        (("--older-than", "-1h"), "--older-than"),
        (("--older-than", "yesterday"), "--older-than: 'yesterday' is not a duration"),
        (("--older-than", "36501d"), "--older-than: '36501d' is too long"),
        (("--batch-size", "0"), "--batch-size"),
        (("--batch-size", "-5"), "--batch-size"),
        (("--batch-size", "1.5"), "--batch-size"),
        (("--batch-size", "2147483648"), "--batch-size: 2147483648 is too many"),
        (("--max-runtime", "0"), "--max-runtime"),
        (("--max-runtime", "25d"), "--max-runtime: '25d' is too long"),
    ],
)
def test_an_invalid_argument_is_named_before_a_connection_is_opened(
    words: tuple[str, ...], named: str, offline: Call
) -> None:
    assert named in offline(*words, "-o", "json").refusal
