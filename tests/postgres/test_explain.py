"""Explaining conflicts: the commit that a request lost to, and the keys that requests conflict over."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.commits import codec, conflicting_keys, explain
from pgcoord_cli.core.commits.codec import Mutation, Op, Range, Request
from pgcoord_cli.core.commits.conflicting_keys import Conflicts
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.db.sqlfiles import sql as statement
from pgcoord_cli.settings import Settings
from tests.asking import value

Connection = psycopg.Connection[Any]


@pytest.fixture
def conn(settings: Settings) -> Iterator[Connection]:
    with command_session(settings, "test", writes=True) as session:
        yield session


def store(
    conn: Connection, *, reads: tuple[bytes, ...] = (), ranges: tuple[Range, ...] = (), writes: tuple[bytes, ...] = (),
    cleared: tuple[Range, ...] = (), read_version: int = 0, version: int | None = None, ago: float = 0.0,
) -> uuid.UUID:  # fmt: skip
    """Stores a settled request: committed at `version`, or else a conflict; returns its request id."""
    request_id = uuid.uuid4()
    mutations = (*(Mutation(Op.SET, key, b"") for key in writes), *(Mutation(Op.CLEAR_RANGE, *r) for r in cleared))
    psycopg.Cursor(conn).execute(
        """
        INSERT INTO commit_requests
               (request_id, epoch, read_version, payload, status, commit_version, created_at, resolved_at)
        VALUES (%s, 1, %s, %s, %s, %s, clock_timestamp() - %s, clock_timestamp() - %s)
        """,
        [
            request_id, read_version, codec.encode(Request(reads, ranges, (), mutations)),
            "conflict" if version is None else "committed", version, timedelta(seconds=ago), timedelta(seconds=ago),
        ],
    )  # fmt: skip
    return request_id


def lost_to(conn: Connection, request_id: uuid.UUID) -> Any:
    explained = explain.explain(conn, request_id)
    assert explained
    return explained["lost_to"]["request_id"]


# The commit that a request lost to


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "PAGE", 3)


@pytest.mark.usefixtures("small_pages")
def test_the_first_commit_that_wrote_what_was_read_is_found_pages_away(conn: Connection) -> None:
    for version in range(1, 20):
        store(conn, writes=(b"k",), version=version)
    first = store(conn, writes=(b"k",), version=20)
    for version in range(21, 40):
        store(conn, writes=(b"k" if version % 2 else b"other",), version=version)
        store(conn, reads=(b"k",), read_version=5)  # pages may be without a commit
    conflict = store(conn, reads=(b"k",), read_version=19)
    store(conn, writes=(b"k",), version=40)
    assert lost_to(conn, conflict) == first


@pytest.mark.usefixtures("small_pages")
def test_a_commit_that_overtook_the_request_is_found_and_a_later_one_is_not(conn: Connection) -> None:
    conflict = store(conn, reads=(b"k",), read_version=1, ago=-60)  # is settled a minute from now
    for version in range(2, 12):
        store(conn, writes=(b"other",), version=version)
    overtaking = store(conn, writes=(b"k",), version=12)
    assert lost_to(conn, conflict) == overtaking
    conn.execute("DELETE FROM commit_requests WHERE request_id = $1", [overtaking])
    store(conn, writes=(b"k",), version=13, ago=-120)
    assert lost_to(conn, conflict) is None


@pytest.fixture
def grown(conn: Connection) -> Connection:
    """A table of 200,000 settled requests, analysed."""
    psycopg.Cursor(conn).execute(
        """
        INSERT INTO commit_requests (request_id, epoch, read_version, payload, status, commit_version, resolved_at)
        SELECT gen_random_uuid(), 1, i - 1, %s, 'committed', i, clock_timestamp() FROM generate_series(1, 200000) AS i
        """,
        [codec.encode(Request((), (), (), (Mutation(Op.SET, b"old", b""),)))],
    )
    conn.execute("ANALYZE commit_requests")
    return conn


@pytest.mark.parametrize("name", ["requests_before", "requests_after", "newest_requests"])
def test_i20_requests_are_read_in_the_order_of_their_ids(name: str, grown: Connection) -> None:
    given: dict[str, list[Any]] = {
        "requests_before": [150_000, 500, 149_000],
        "requests_after": [150_000, 500, 149_000, 150_000],
        "newest_requests": [(1 << 63) - 1, 500, 600.0],
    }
    text = as_literals(statement("commits", name), given[name])
    plan = value(grown, f"EXPLAIN (ANALYZE, FORMAT JSON) {text}")
    scans = scans_of(plan[0]["Plan"])
    assert {scan.get("Index Name") for scan in scans} == {"commit_requests_pkey"}
    assert [scan["Actual Rows"] for scan in scans] == [1, 500][-len(scans) :]


def scans_of(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the scans of a plan, the one with the most rows last."""
    children = [scan for child in node.get("Plans", []) for scan in scans_of(child)]
    own = [node] if "Relation Name" in node else []
    return sorted(own + children, key=lambda scan: scan["Actual Rows"])


def as_literals(text: str, parameters: list[Any]) -> str:
    """Returns a statement with its parameters as literals."""
    for number, parameter in enumerate(parameters, start=1):
        text = text.replace(f"${number}", f"'{parameter}'")
    return text


def test_i20_explaining_reads_the_requests_around_only(grown: Connection) -> None:
    commit = store(grown, writes=(b"k",), version=200_001)
    conflict = store(grown, reads=(b"k",), read_version=200_000)
    before = rows_read(grown)
    assert lost_to(grown, conflict) == commit
    assert 0 < rows_read(grown) - before < 3 * explain.PAGE
    assert len(conflicts(grown).keys) == 1
    assert rows_read(grown) - before < 3 * explain.PAGE + conflicting_keys.MAX_REQUESTS + 2 * conflicting_keys.PAGE


def rows_read(conn: Connection) -> int:
    """Returns how many rows of the requests this session has read."""
    conn.execute("SELECT pg_stat_force_next_flush()")
    text = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'commit_requests'"
    conn.execute("SELECT pg_stat_clear_snapshot()")
    return int(value(conn, text))


# Conflicting keys


def conflicts(conn: Connection, *, seconds: float | None = None, limit: int = 20) -> Conflicts:
    return conflicting_keys.conflicting_keys(conn, seconds, limit)


def counted(conn: Connection, **options: Any) -> list[tuple[bytes, int]]:
    return [(key.key, key.conflicts) for key in conflicts(conn, **options).keys]


def test_the_keys_with_the_most_conflicts_come_first(conn: Connection) -> None:
    store(conn, writes=(b"a", b"b"), version=1)
    for _ in range(3):
        store(conn, reads=(b"a", b"c"), read_version=0)
    store(conn, reads=(b"a", b"b"), read_version=0)
    store(conn, writes=(b"b",), version=2)
    store(conn, reads=(b"a", b"b"), read_version=1)  # a was read after its write
    found = conflicts(conn)
    assert [(key.key, key.conflicts) for key in found.keys] == [(b"a", 4), (b"b", 2)]
    assert (found.conflicts, found.requests, found.is_cut) == (5, 7, False)
    assert counted(conn, limit=1) == [(b"a", 4)]
    last = value(conn, "SELECT max(created_at) FROM commit_requests WHERE status = 'conflict'")
    assert found.keys[1].last_at == last


def test_ranges_that_were_read_and_written_count_the_keys_in_them(conn: Connection) -> None:
    store(conn, writes=(b"a1", b"a2", b"b"), version=1)
    store(conn, ranges=((b"a", b"b"),), read_version=0)
    assert counted(conn) == [(b"a1", 1), (b"a2", 1)]
    store(conn, cleared=((b"c", None),), version=2)
    store(conn, reads=(b"c1",), read_version=1)
    store(conn, ranges=((b"d", None),), read_version=1)
    store(conn, ranges=((b"", b"c1"),), read_version=1)
    assert sorted(counted(conn)) == [(b"a1", 1), (b"a2", 1), (b"c", 1), (b"c1", 1), (b"d", 1)]


def test_the_only_key_of_a_request_counts_although_the_commit_is_unknown(conn: Connection) -> None:
    store(conn, reads=(b"only",), read_version=0)
    store(conn, reads=(b"one", b"of two"), read_version=0)
    assert counted(conn) == [(b"only", 1)]
    assert conflicts(conn).conflicts == 2


def test_a_write_after_a_conflict_is_not_its_reason(conn: Connection) -> None:
    store(conn, writes=(b"a",), version=1)
    store(conn, reads=(b"a", b"b"), read_version=0)
    store(conn, writes=(b"b",), version=2)
    assert counted(conn) == [(b"a", 1)]


def test_only_the_newest_requests_of_the_time_are_read(conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    store(conn, reads=(b"old",), ago=3600)
    for number in range(10):
        store(conn, reads=(b"%d" % number,), ago=10 - number)
    monkeypatch.setattr(conflicting_keys, "PAGE", 4)
    assert len(counted(conn)) == 11
    assert len(counted(conn, seconds=600.0)) == 10
    assert counted(conn, seconds=5.5) == [(b"%d" % number, 1) for number in range(5, 10)]
    monkeypatch.setattr(conflicting_keys, "MAX_REQUESTS", 6)
    found = conflicts(conn)
    assert (len(found.keys), found.requests, found.is_cut) == (6, 6, True)


def test_an_undecodable_payload_is_left_out(conn: Connection) -> None:
    store(conn, reads=(b"a",))
    conn.execute("UPDATE commit_requests SET payload = ''")
    assert counted(conn) == []
