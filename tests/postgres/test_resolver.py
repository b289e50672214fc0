"""The resolver on a database: what a batch writes, and what remains of it after a failure at any step."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import msgpack
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pytest_postgresql.executors import NoopExecutor

from pgcoord_cli.core.commits import codec, recent_commits
from pgcoord_cli.core.commits.codec import Mutation, Op, Range, Request
from pgcoord_cli.core.commits.recent_commits import RecentCommits
from pgcoord_cli.core.database.migrations import apply, migration_lock
from pgcoord_cli.core.database.session import migration_session, open_session
from pgcoord_cli.core.embedded.installation import Installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.core.leader import lease, resolver
from pgcoord_cli.core.leader.lease import Term
from pgcoord_cli.core.leader.resolver import Resolver
from pgcoord_cli.db.sqlfiles import sql as statement
from pgcoord_cli.errors import Fenced
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

Sql = psycopg.Connection[Any]

INSERT = """
    INSERT INTO commit_requests (request_id, epoch, term_id, read_version, payload, reply_channel)
    SELECT %s, epoch, coalesce(%s, last_term_id), %s, %s, %s FROM leader_lease RETURNING id
"""


def writes(*keys: bytes, value: bytes = b"1", reads: Sequence[bytes] = (), ranges: Sequence[Range] = ()) -> bytes:
    """Returns the payload of a transaction that has read `reads` and `ranges`, and sets `keys`."""
    return codec.encode(Request(tuple(reads), tuple(ranges), (), tuple(Mutation(Op.SET, key, value) for key in keys)))


def packed(fields: Any) -> bytes:
    """Packs any content as a payload, like a faulty or hostile client."""
    return b"\x01" + bytes(msgpack.packb(fields))


def submit(
    sql: Sql,
    payload: bytes,
    read_version: int = 0,
    request_id: UUID | None = None,
    reply: str | None = None,
    term_id: UUID | None = None,
) -> int:
    """Puts a request into the queue, read under a term (by default the last one); returns its id."""
    row = sql.execute(INSERT, [request_id or uuid4(), term_id, read_version, payload, reply]).fetchone()
    assert row
    return int(row[0])


class Row(NamedTuple):
    """The outcome of a request, as stored."""

    status: str
    version: int | None
    reason: str | None


def outcome(sql: Sql, number: int) -> Row:
    row = sql.execute("SELECT status, commit_version, reason FROM commit_requests WHERE id = %s", [number]).fetchone()
    assert row
    return Row(*row)


def outcomes(sql: Sql) -> list[tuple[str, int | None]]:
    """Returns the status and commit version of every request, in queue order."""
    return sql.execute("SELECT status, commit_version FROM commit_requests ORDER BY id").fetchall()


def data(sql: Sql) -> dict[bytes, bytes]:
    return dict(sql.execute("SELECT key, value FROM kv").fetchall())


def everything(sql: Sql) -> list[Any]:
    """Returns all that a batch can change: data, requests, and the versions and floors of the lease row."""
    return [
        sql.execute("SELECT * FROM kv ORDER BY key").fetchall(),
        sql.execute("SELECT * FROM commit_requests ORDER BY id").fetchall(),
        sql.execute("SELECT durable_version, conflict_floor, queue_floor_id FROM leader_lease").fetchall(),
    ]


def drain(leader: Resolver) -> int:
    """Resolves batches until the queue is empty, and returns their number."""
    batches = 0
    while leader.resolve_batch():
        batches += 1
    return batches


def begin_term(conn: psycopg.Connection[Any], ttl: float = 600) -> Term:
    term = lease.take_over(conn, "pgcoord", "test", ttl, lock_held=True)
    assert term
    return term


@pytest.fixture
def leader_conn(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    """A session with the settings of a leader's: no statement and lock timeouts."""
    leader_settings = replace(settings, lock_timeout=0, statement_timeout=0)
    with open_session(leader_settings, "leader run", writes=True) as conn:
        yield conn


@pytest.fixture
def leader(leader_conn: psycopg.Connection[Any]) -> Resolver:
    """A resolver under the first term of the database."""
    return Resolver(leader_conn, begin_term(leader_conn))


@pytest.fixture
def other(settings: Settings) -> Iterator[Sql]:
    """Another session, with transactions of its own."""
    with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as conn:
        yield conn


def blockers(sql: Sql, waiting: psycopg.Connection[Any]) -> list[int]:
    row = sql.execute("SELECT pg_blocking_pids(%s)", [waiting.info.backend_pid]).fetchone()
    assert row
    return list(row[0])


@contextmanager
def stuck_batch(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any], number: int
) -> Iterator[Future[int]]:
    """Blocks a batch that has written its keys, at the row of a request that `other` has locked; then releases it."""
    other.execute("SELECT FROM commit_requests WHERE id = %s FOR UPDATE", [number])
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(leader.resolve_batch)
        while not batch.done() and other.info.backend_pid not in blockers(sql, leader_conn):
            pass
        assert not batch.done(), "the batch must wait for the row"
        try:
            yield batch
        finally:
            other.rollback()


# -- rule I5


def test_i5_the_first_write_of_a_fresh_database_commits_at_the_first_try_as_version_1(
    sql: Sql, leader: Resolver
) -> None:
    number = submit(sql, writes(b"k"))
    assert leader.resolve_batch() == 1
    assert outcome(sql, number) == ("committed", 1, None)
    assert data(sql) == {b"k": b"1"}
    assert leader.durable_version == 1


def test_i5_versions_are_dense_over_batches_and_terms(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    for _ in range(3):
        submit(sql, writes(b"a", reads=[b"z"]))
        submit(sql, b"garbage")
        submit(sql, writes(b"b"))
    assert leader.resolve_batch(limit=4) == 4
    second = Resolver(leader_conn, begin_term(leader_conn))
    assert drain(second) == 1
    assert [version for _, version in outcomes(sql)] == [1, None, 2, 3, None, 4, 5, None, 6]
    assert second.durable_version == lease.read_lease(leader_conn).durable_version == 6


def test_i5_keys_statuses_and_version_become_visible_together(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    submit(sql, writes(b"old"))
    leader.resolve_batch()
    submit(sql, writes(b"new"), 1)
    last = submit(sql, codec.encode(Request((), (), (), (Mutation(Op.CLEAR_RANGE, b"o", None),))), 1)
    before = everything(sql)
    with stuck_batch(sql, other, leader, leader_conn, last) as batch:
        assert everything(sql) == before
    assert batch.result(TIMEOUT) == 2
    assert outcomes(sql) == [("committed", 1), ("committed", 2), ("committed", 3)]
    assert data(sql) == {b"new": b"1"}
    assert lease.read_lease(leader_conn).durable_version == 3


def test_i5_a_batch_applies_its_mutations_in_commit_order(sql: Sql, leader: Resolver) -> None:
    sql.execute("INSERT INTO kv VALUES ('a', '0'), ('b', '0'), ('c', '0'), ('\\xff', '0')")
    changes = [
        [Mutation(Op.SET, b"a", b"1"), Mutation(Op.CLEAR, b"c", None)],
        [Mutation(Op.CLEAR_RANGE, b"a", b"b"), Mutation(Op.SET, b"aa", b"2")],
        [Mutation(Op.CLEAR_RANGE, b"\xff", None), Mutation(Op.CLEAR_RANGE, b"z", None), Mutation(Op.SET, b"z", b"3")],
        [Mutation(Op.CLEAR_RANGE, b"b", b"b"), Mutation(Op.SET, b"", b"4")],
    ]
    for mutations in changes:
        submit(sql, codec.encode(Request((), (), (), tuple(mutations))))
    assert drain(leader) == 1
    assert data(sql) == {b"aa": b"2", b"b": b"0", b"z": b"3", b"": b"4"}


def test_clearing_a_small_range_does_not_read_the_rest_of_the_table(sql: Sql, leader_conn: Sql) -> None:
    sql.execute("INSERT INTO kv SELECT int4send(i), '' FROM generate_series(1, 20000) AS i")
    sql.execute("ANALYZE kv")
    ranges = [[b"\0\0\0\x01", b"\0\0\1\1"], [b"\0\0\0\x03", b"\0\0\1\2"]]
    with leader_conn.transaction():
        leader_conn.execute(statement("commits", "write_data"), [*ranges, [], [], [], 0])
        read = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'kv'"
        assert leader_conn.execute(read).fetchone() == (3,)
    assert sql.execute("SELECT count(*) FROM kv").fetchone() == (20_000 - 3,)


def rows_discarded(plan: Any) -> int:
    """Returns the number of rows that the nodes of a plan read and discarded."""
    if isinstance(plan, list):
        return sum(map(rows_discarded, plan))
    if not isinstance(plan, dict):
        return 0
    here = sum(count for name, count in plan.items() if name.startswith("Rows Removed by"))
    return int(here) + sum(map(rows_discarded, plan.values()))


# -- rule I6

HOSTILE: dict[str, bytes] = {
    "garbage": b"\x01\xc1\xff\x00",
    "nothing": b"",
    "another format": b"\x63\x94\x90\x90\x90\x90",
    "a random key of 3 kB": packed([[], [], [], [[0, os.urandom(3_000), b"v"]]]),
    "a range that runs backwards": packed([[], [], [], [[2, b"b", b"a"]]]),
    "a read range that runs backwards": packed([[], [[b"b", b"a"]], [], []]),
    "an unknown mutation": packed([[], [], [], [[99, b"k", b"v"]]]),
    "a mutation nested too deeply to be printed": b"\x01\x94\x90\x90\x90\x91\x93" + b"\x91" * 1_000 + b"\xc0\xc4\0\xc0",
    "text for a key": packed([[], [], [], [[0, "text\0", b"v"]]]),
    "a value that is too long": packed([[], [], [], [[0, b"k", b"v" * 100_001]]]),
    "too many bytes": b"\x01" + b"\xc1" * codec.MAX_TRANSACTION_BYTES,
}


def test_i6_of_a_batch_with_hostile_requests_only_those_are_rejected(sql: Sql, leader: Resolver) -> None:
    good, bad = [submit(sql, writes(b"first"))], []
    for name, payload in HOSTILE.items():
        bad.append(submit(sql, payload))
        good.append(submit(sql, writes(name.encode())))
    epoch = sql.execute("SELECT epoch, term_id FROM leader_lease").fetchall()
    assert drain(leader) == 1
    assert [outcome(sql, number) for number in good] == [("committed", n + 1, None) for n in range(len(good))]
    for number in bad:
        assert outcome(sql, number).status == "rejected"
        assert outcome(sql, number).reason
    assert data(sql).keys() == {b"first", *(name.encode() for name in HOSTILE)}
    assert sql.execute("SELECT epoch, term_id FROM leader_lease").fetchall() == epoch


def test_i6_only_the_request_with_a_key_that_postgresql_refuses_is_rejected(
    sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_KEY_BYTES", 10_000)
    # More rounds than psycopg needs to prepare a statement: a failed pipeline must not leave it in a wrong state.
    for _ in range(8):
        before = leader.durable_version
        good = [submit(sql, writes(b"a"), before)]
        bad = [submit(sql, writes(os.urandom(3_000)), before)]
        good.append(submit(sql, writes(b"b", reads=[b"c"]), before))
        conflicting = submit(sql, writes(b"d", reads=[b"a"]), before)
        bad.append(submit(sql, writes(b"e", os.urandom(4_000), b"f"), before))
        good.append(submit(sql, writes(b"g"), before))
        drain(leader)
        assert [outcome(sql, number) for number in good] == [("committed", before + n, None) for n in (1, 2, 3)]
        assert [outcome(sql, number).status for number in bad] == ["rejected", "rejected"]
        assert "violates check constraint" in (outcome(sql, bad[0]).reason or "")
        assert outcome(sql, conflicting).status == "conflict"
        assert data(sql).keys() == {b"a", b"b", b"g"}
    assert sql.execute("SELECT epoch FROM leader_lease").fetchone() == (1,)


def test_i6_once_the_bad_request_is_found_batches_are_whole_again(
    sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_KEY_BYTES", 10_000)
    for payload in (writes(b"a"), writes(os.urandom(3_000)), writes(b"b")):
        submit(sql, payload)
    drain(leader)
    for _ in range(5):
        submit(sql, writes(b"c"), 2)
    assert leader.resolve_batch() == 5


def test_a_request_that_postgresql_refused_is_logged_with_the_reason(
    sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pgcoord")
    monkeypatch.setattr(codec, "MAX_KEY_BYTES", 10_000)
    refused = submit(sql, writes(os.urandom(3_000)))
    submit(sql, writes(b"a"))
    drain(leader)
    reason = outcome(sql, refused).reason
    rolled_back, again, rejected = [record for record in caplog.records if record.name == "pgcoord.resolver"]
    assert [record.levelname for record in (rolled_back, again, rejected)] == ["DEBUG", "DEBUG", "INFO"]
    assert rolled_back.getMessage() == f"a batch of 2 was rolled back: {reason}"
    assert again.getMessage() == f"a batch of 1 was rolled back: {reason}"
    assert rejected.getMessage() == f"request {refused} is rejected: {reason}"
    assert (vars(rejected)["request"], vars(rejected)["epoch"]) == (refused, 1)


def test_i6_a_request_that_postgresql_refused_leaves_nothing_in_the_conflict_window(
    sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_KEY_BYTES", 10_000)
    refused = submit(sql, writes(b"a", os.urandom(3_000)))
    reader = submit(sql, writes(b"b", reads=[b"a"]))
    drain(leader)
    assert outcome(sql, refused).status == "rejected"
    assert outcome(sql, reader) == ("committed", 1, None)


@pytest.mark.parametrize("channel", ["", "c" * 64, "ä" * 32, "c" * 100_000, 'a"b;\n'])
def test_i6_a_reply_channel_that_postgresql_refuses_fails_no_request(sql: Sql, leader: Resolver, channel: str) -> None:
    numbers = [submit(sql, writes(b"a")), submit(sql, writes(b"b"), reply=channel), submit(sql, writes(b"c"))]
    drain(leader)
    assert [outcome(sql, number).version for number in numbers] == [1, 2, 3]


def test_i6_a_batch_ends_at_its_size_limit_and_skips_no_request(
    sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = writes(b"k", value=b"v" * 100)
    monkeypatch.setattr(resolver, "BATCH_BYTES", len(payload) * 2 + 1)
    for _ in range(7):
        submit(sql, payload)
    taken = []
    while count := leader.resolve_batch():
        taken.append(count)
    assert taken == [3, 3, 1], "the payload that reaches the limit is included"
    assert [version for _, version in outcomes(sql)] == [1, 2, 3, 4, 5, 6, 7]


# -- rule I2


def supersede_with_next_epoch(sql: Sql, settings: Settings) -> None:
    with open_session(settings, "test", writes=True) as conn:
        begin_term(conn)


def reissue_the_epoch_with_another_term(sql: Sql, settings: Settings) -> None:
    """Like a new leader on a database that was restored from a backup."""
    sql.execute("UPDATE leader_lease SET term_id = gen_random_uuid()")


def let_the_lease_run_out(sql: Sql, settings: Settings) -> None:
    sql.execute("UPDATE leader_lease SET expires_at = clock_timestamp()")


def release_the_lease(sql: Sql, settings: Settings) -> None:
    sql.execute("UPDATE leader_lease SET term_id = NULL, expires_at = clock_timestamp()")


def move_the_durable_version_back(sql: Sql, settings: Settings) -> None:
    """Like a restored database that has the same epoch and term, but lacks commits."""
    sql.execute("UPDATE leader_lease SET durable_version = durable_version - 1")


ENDINGS: list[Callable[[Sql, Settings], None]] = [
    supersede_with_next_epoch,
    reissue_the_epoch_with_another_term,
    let_the_lease_run_out,
    release_the_lease,
    move_the_durable_version_back,
]


@pytest.mark.parametrize("end_the_term", ENDINGS)
@pytest.mark.parametrize("payload", [writes(b"k"), b"garbage"])
def test_i2_a_leader_whose_term_is_over_writes_nothing(
    sql: Sql, leader: Resolver, settings: Settings, end_the_term: Callable[[Sql, Settings], None], payload: bytes
) -> None:
    submit(sql, writes(b"before"))
    leader.resolve_batch()
    submit(sql, payload, 1)
    end_the_term(sql, settings)
    before = everything(sql)
    for _ in range(2):
        with pytest.raises(Fenced):
            leader.resolve_batch()
    assert everything(sql) == before


@pytest.mark.parametrize("end_the_term", ENDINGS)
def test_i2_a_leader_superseded_in_the_middle_of_a_batch_writes_nothing_of_it(
    sql: Sql,
    other: Sql,
    leader: Resolver,
    leader_conn: psycopg.Connection[Any],
    settings: Settings,
    end_the_term: Callable[[Sql, Settings], None],
) -> None:
    submit(sql, writes(b"before"))
    drain(leader)
    submit(sql, writes(b"a"))
    last = submit(sql, writes(b"b"))
    with stuck_batch(sql, other, leader, leader_conn, last) as batch:
        end_the_term(sql, settings)
        before = everything(sql)
    with pytest.raises(Fenced):
        batch.result(TIMEOUT)
    assert everything(sql) == before


def test_i2_a_refused_batch_of_a_superseded_leader_is_not_rejected_under_its_name(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction that rejects the request is fenced like the one that was refused."""
    monkeypatch.setattr(codec, "MAX_KEY_BYTES", 10_000)
    number = submit(sql, writes(os.urandom(3_000)))
    reload = leader._load

    def superseded_meanwhile(floor: int, start_id: int) -> RecentCommits:
        sql.execute("UPDATE leader_lease SET epoch = epoch + 1")
        return reload(floor, start_id)

    monkeypatch.setattr(leader, "_load", superseded_meanwhile)
    with pytest.raises(Fenced):
        leader.resolve_batch()
    assert outcome(sql, number).status == "pending"


def test_i2_a_takeover_waits_for_a_settlement_in_progress_and_continues_after_it(
    sql: Sql, settings: Settings, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    """The settlement has passed the fence, but has not committed when the candidate takes over."""
    submit(sql, writes(b"k"))
    with open_session(settings, "test", writes=True) as candidate, ThreadPoolExecutor(1) as pool:
        with leader_conn.transaction():
            leader.resolve_batch()
            election = pool.submit(begin_term, candidate)
            while not election.done() and leader_conn.info.backend_pid not in blockers(sql, candidate):
                pass
            assert not election.done()
        term = election.result(TIMEOUT)
        assert (term.epoch, term.durable_version) == (2, 1)
        successor = Resolver(candidate, term)
        number = submit(sql, writes(b"j", reads=[b"k"]), 0)
        drain(successor)
        assert outcome(sql, number).status == "conflict"


def test_i2_what_a_lost_term_committed_is_too_old_although_its_epoch_and_versions_are_given_out_again(
    sql: Sql, leader_conn: psycopg.Connection[Any]
) -> None:
    """A standby that lagged is promoted: it has the first term up to version 2, and nothing of the second."""
    first = begin_term(leader_conn)
    commit_each(sql, Resolver(leader_conn, first), b"a", b"b")
    standby = {
        table: sql.execute(f"SELECT * FROM {table}".encode()).fetchall()
        for table in ("kv", "commit_requests", "leader_lease", "leader_history")
    }
    commit_each(sql, Resolver(leader_conn, first), b"c")
    lost = begin_term(leader_conn)
    commit_each(sql, Resolver(leader_conn, lost), b"d")
    promote(sql, standby)
    leader = Resolver(leader_conn, begin_term(leader_conn))
    commit_each(sql, leader, b"x", b"y", b"z")
    third = Resolver(leader_conn, begin_term(leader_conn))
    reads = writes(b"k", reads=[b"never written"])
    asked = [(first, 2), (first, 3), (lost, 3), (lost, 4), (lost, 0), (leader._term, 5), (third._term, 5)]
    numbers = [submit(sql, reads, version, term_id=term.term_id) for term, version in asked]
    drain(third)
    assert lost.epoch == leader._term.epoch
    statuses = [outcome(sql, number).status for number in numbers]
    assert statuses == ["committed", *["too_old"] * 4, "committed", "committed"]


@pytest.mark.parametrize("is_copy", [False, True])
def test_i3_a_request_that_was_pending_before_a_failover_is_not_committed_after_it(
    sql: Sql, leader_conn: psycopg.Connection[Any], leader: Resolver, is_copy: bool
) -> None:
    number = submit(sql, writes(b"k"))
    if is_copy:  # the client may have been told `conflict` by a settlement that did not reach this copy
        sql.execute("UPDATE leader_lease SET wal_history = regexp_replace(wal_history, '.$', 'F')")
    drain(Resolver(leader_conn, begin_term(leader_conn)))
    assert outcome(sql, number).status == ("too_old" if is_copy else "committed")


def commit_each(sql: Sql, leader: Resolver, *keys: bytes) -> None:
    for key in keys:
        submit(sql, writes(key), leader.durable_version)
        drain(leader)


def promote(sql: Sql, standby: dict[str, list[Any]]) -> None:
    """Replaces the tables by the state that the standby had received."""
    for table, rows in standby.items():
        sql.execute(f"DELETE FROM {table}".encode())
        for row in rows:
            override = "OVERRIDING SYSTEM VALUE" if table == "commit_requests" else ""
            places = ", ".join(["%s"] * len(row))
            sql.execute(f"INSERT INTO {table} {override} VALUES ({places})".encode(), row)


def test_i2_a_batch_cut_off_in_the_middle_leaves_nothing(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    submit(sql, writes(b"a"))
    last = submit(sql, writes(b"b"))
    before = everything(sql)
    with stuck_batch(sql, other, leader, leader_conn, last) as batch:
        sql.execute("SELECT pg_terminate_backend(%s)", [leader_conn.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            batch.result(TIMEOUT)
    assert everything(sql) == before


# -- rule I3


def enqueue(conn: psycopg.Connection[Any], request_id: UUID, payload: bytes, read_version: int = 0) -> None:
    """Enqueues like a client that does not know whether an earlier attempt arrived."""
    (term_id,) = conn.execute("SELECT last_term_id FROM leader_lease").fetchone() or (None,)
    arguments = [[request_id], [1], [term_id], [read_version], [payload], "pgcoord.reply.test", "pgcoord.commits"]
    conn.execute(statement("commits", "enqueue_again"), arguments)


def test_i3_a_request_id_applies_once_however_often_it_is_submitted(
    sql: Sql, settings: Settings, leader: Resolver
) -> None:
    request_id = uuid4()
    with open_session(settings, "client", writes=True) as client:
        for _ in range(2):
            enqueue(client, request_id, writes(b"k", value=b"once"))
        drain(leader)
        submit(sql, writes(b"k", value=b"later"), 1)
        drain(leader)
        enqueue(client, request_id, writes(b"k", value=b"once"), 2)
        drain(leader)
    assert outcomes(sql) == [("committed", 1), ("committed", 2)]
    assert data(sql) == {b"k": b"later"}


@pytest.mark.parametrize("status", ["orphaned", "rejected"])
def test_i3_a_request_that_another_session_settled_meanwhile_keeps_its_status(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any], status: str
) -> None:
    submit(sql, writes(b"before"))
    taken = submit(sql, writes(b"a"))
    submit(sql, writes(b"b", reads=[b"a"]))
    with stuck_batch(sql, other, leader, leader_conn, taken) as batch:
        other.execute(
            "UPDATE commit_requests SET status = %s, resolved_at = clock_timestamp() WHERE id = %s", [status, taken]
        )
        other.commit()
    assert batch.result(TIMEOUT) == 3, "rolled back as a whole, to be claimed again"
    assert data(sql) == {}
    drain(leader)
    assert outcomes(sql) == [("committed", 1), (status, None), ("committed", 2)]
    assert data(sql) == {b"before": b"1", b"b": b"1"}


def test_i3_a_request_that_was_deleted_meanwhile_is_not_applied(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    taken = submit(sql, writes(b"a"))
    submit(sql, writes(b"b"))
    with stuck_batch(sql, other, leader, leader_conn, taken) as batch:
        other.execute("DELETE FROM commit_requests WHERE id = %s", [taken])
        other.commit()
    batch.result(TIMEOUT)
    drain(leader)
    assert outcomes(sql) == [("committed", 1)]
    assert data(sql) == {b"b": b"1"}


def test_a_deadlock_with_another_session_only_rolls_the_batch_back(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    first, last = submit(sql, writes(b"a")), submit(sql, writes(b"b"))
    other.execute("SET deadlock_timeout = '1h'")  # so that PostgreSQL chooses the leader as the victim
    with stuck_batch(sql, other, leader, leader_conn, last) as batch:
        other.execute("SELECT FROM commit_requests WHERE id = %s FOR UPDATE", [first])
    assert batch.result(TIMEOUT) == 2
    drain(leader)
    assert outcomes(sql) == [("committed", 1), ("committed", 2)]


# -- the queue floor


@pytest.fixture
def always_observing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the resolver raise the queue floor at every chance, even for few settled requests."""
    monkeypatch.setattr(resolver, "OBSERVE_AFTER", -1)


def test_the_queue_floor_rises_after_a_number_of_settled_requests(sql: Sql, leader: Resolver) -> None:
    for _ in range(resolver.OBSERVE_AFTER):
        last = submit(sql, writes(b"k"))
    drain(leader)
    claim_empty_queue(leader)
    assert floor_of(leader) == 0
    for _ in range(4):
        last = submit(sql, writes(b"k"))
        drain(leader)
    assert floor_of(leader) > last - 4


def floor_of(leader: Resolver) -> int:
    return leader._floor.id


def claim_empty_queue(leader: Resolver) -> None:
    """Claims from the empty queue as often as raising the floor takes at most."""
    for _ in range(4):
        assert leader.resolve_batch() == 0


@pytest.mark.usefixtures("always_observing")
def test_i3_a_request_whose_id_becomes_visible_late_is_resolved_too(sql: Sql, other: Sql, leader: Resolver) -> None:
    early = submit(other, writes(b"early"))
    later = submit(sql, writes(b"later"))
    drain(leader)
    claim_empty_queue(leader)
    assert outcome(sql, later).status == "committed"
    assert floor_of(leader) < early
    other.commit()
    drain(leader)
    assert outcome(sql, early) == ("committed", 2, None)
    claim_empty_queue(leader)
    assert floor_of(leader) == later


@pytest.mark.usefixtures("always_observing")
def test_the_queue_floor_passes_ids_that_were_rolled_back(sql: Sql, other: Sql, leader: Resolver) -> None:
    submit(sql, writes(b"k"))
    drawn = submit(other, writes(b"never"))
    drain(leader)
    claim_empty_queue(leader)
    assert floor_of(leader) < drawn
    other.rollback()
    claim_empty_queue(leader)
    assert floor_of(leader) == drawn


@pytest.mark.usefixtures("always_observing")
def test_the_queue_floor_rises_under_writers_that_never_pause(sql: Sql, settings: Settings, leader: Resolver) -> None:
    """At any time some transaction that has drawn an id is open, but none stays open."""
    with (
        psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as one,
        psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as two,
    ):
        submit(one, writes(b"k"))
        floors = []
        for ends, begins in [(one, two), (two, one)] * 5:
            submit(begins, writes(b"k"))
            ends.commit()
            leader.resolve_batch()
            floors.append(floor_of(leader))
    assert floors[-1] >= 5
    assert floors == sorted(floors)


@pytest.mark.usefixtures("always_observing")
def test_a_session_that_only_locks_rows_does_not_hold_the_queue_floor_back(
    sql: Sql, other: Sql, leader: Resolver
) -> None:
    other.execute("SELECT FROM commit_requests FOR UPDATE")
    number = submit(sql, writes(b"k"))
    drain(leader)
    claim_empty_queue(leader)
    assert floor_of(leader) == number


@pytest.mark.usefixtures("always_observing")
def test_a_writer_in_another_database_does_not_hold_the_queue_floor_back(
    sql: Sql, migrated_template: NoopExecutor, settings: Settings, leader: Resolver
) -> None:
    """The tables of two copies of one template have the same oids."""
    copy = f"copy_{uuid4().hex[:12]}"
    sql.execute(f"CREATE DATABASE {copy} TEMPLATE {migrated_template.template_dbname}")
    try:
        with psycopg.connect(
            make_conninfo(settings.dsn, dbname=copy), options="-c search_path=pgcoord"
        ) as foreign_writer:
            submit(foreign_writer, writes(b"k"))
            number = submit(sql, writes(b"k"))
            drain(leader)
            claim_empty_queue(leader)
            assert floor_of(leader) == number
    finally:
        sql.execute(f"DROP DATABASE {copy} WITH (FORCE)")


@pytest.mark.usefixtures("always_observing")
def test_i3_a_request_of_a_prepared_transaction_is_not_passed_over(installation: Installation) -> None:
    """PREPARE TRANSACTION changes the virtual transaction id that pg_locks shows."""
    with temporary_server(installation, {"max_prepared_transactions": "2"}) as server:
        settings = Settings(dsn=server.dsn)
        with (
            migration_session(settings, read_only=False) as (conn, _),
            migration_lock(conn, settings.schema, TIMEOUT, lambda _: None),
        ):
            apply(conn, settings.schema, None, lambda _: None)
        with (
            psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as writer,
            psycopg.connect(settings.dsn, autocommit=True, options="-c search_path=pgcoord") as sql,
            open_session(settings, "leader run", writes=True) as leader_conn,
        ):
            leader = Resolver(leader_conn, begin_term(leader_conn))
            number = submit(writer, writes(b"k"))
            assert leader.resolve_batch() == 0
            writer.execute("PREPARE TRANSACTION 'two phases'")
            claim_empty_queue(leader)
            sql.execute("COMMIT PREPARED 'two phases'")
            drain(leader)
            assert outcome(sql, number).status == "committed"
            claim_empty_queue(leader)
            assert floor_of(leader) == number


@pytest.mark.usefixtures("always_observing")
def test_i20_a_claim_above_the_floor_reads_no_settled_history(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    for _ in range(300):
        submit(sql, writes(b"k"))
    drain(leader)
    claim_empty_queue(leader)
    submit(sql, writes(b"k"))
    drain(leader)
    sql.execute("ANALYZE commit_requests")
    stored = lease.read_lease(leader_conn).queue_floor_id
    assert stored == 300, "it is stored with the next settlement"

    def rows_read_needlessly(floor: int) -> int:
        text = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement('commits', 'claim')}"
        plan = leader_conn.execute(text, [floor, 1_000, 1_000_000, 1_000, leader._term.term_id]).fetchone()
        assert plan
        assert "Seq Scan" not in json.dumps(plan[0]) or floor == 0
        return rows_discarded(plan[0])

    assert rows_read_needlessly(0) >= 300
    assert rows_read_needlessly(stored) == 1, "the one request that was settled above the floor"


@pytest.mark.usefixtures("always_observing")
def test_i8_the_next_leader_continues_from_the_stored_queue_floor(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    for _ in range(3):
        submit(sql, writes(b"k"))
        drain(leader)
        claim_empty_queue(leader)
    successor = Resolver(leader_conn, begin_term(leader_conn))
    assert floor_of(successor) == 2


# -- rules I4 and I8


def raise_floor_to_last_commit(monkeypatch: pytest.MonkeyPatch, sql: Sql, leader: Resolver) -> int:
    """Raises the conflict floor to the last commit, makes one more commit, and returns the floor."""
    floor = leader.durable_version
    with monkeypatch.context() as patch:
        patch.setattr(recent_commits, "CONFLICT_WINDOW", timedelta(0))
        submit(sql, writes(b"unrelated"), floor)
        drain(leader)
    return floor


def test_i4_a_read_below_the_floor_is_too_old_for_ever_also_after_a_takeover(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        submit(sql, writes(b"k"), leader.durable_version)
        drain(leader)
    floor = raise_floor_to_last_commit(monkeypatch, sql, leader)
    assert floor == 3
    for _ in range(3):
        old = submit(sql, writes(b"j", reads=[b"never written"]), floor - 1)
        recent = submit(sql, writes(b"j", reads=[b"never written"]), floor)
        drain(leader)
        assert outcome(sql, old).status == "too_old"
        assert outcome(sql, recent).status == "committed"
        leader = Resolver(leader_conn, begin_term(leader_conn))


def test_i4_a_batch_of_too_old_requests_stores_the_floor_that_they_were_compared_with(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(sql, writes(b"k"))
    drain(leader)
    with monkeypatch.context() as patch:
        patch.setattr(recent_commits, "CONFLICT_WINDOW", timedelta(0))
        old = submit(sql, writes(b"j"), 0)
        drain(leader)
    successor = Resolver(leader_conn, begin_term(leader_conn))
    again = submit(sql, writes(b"j"), 0)
    drain(successor)
    assert [outcome(sql, number).status for number in (old, again)] == ["too_old", "too_old"]


def test_i8_a_new_leader_decides_like_the_one_before(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared = codec.encode(Request((), (), (), (Mutation(Op.CLEAR_RANGE, b"m", b"p"),)))
    pretended = codec.encode(Request((), (), ((b"x", None),), ()))
    for payload in (writes(b"a"), writes(b"b")):
        submit(sql, payload, leader.durable_version)
        drain(leader)
    floor = raise_floor_to_last_commit(monkeypatch, sql, leader)
    for payload in (writes(b"b"), cleared, writes(b"a"), pretended):
        submit(sql, payload, leader.durable_version)
        drain(leader)
    durable = leader.durable_version
    assert (floor, durable) == (2, 7)
    reads: list[tuple[list[bytes], list[Range]]] = [
        ([b"a"], []), ([b"b"], []), ([b"c"], []), ([b"n"], []), ([b"y"], []), ([], [(b"", b"a")]), ([], [(b"", b"b")]),
        ([], [(b"o", b"q")]), ([], [(b"p", b"q")]), ([], [(b"q", None)]), ([b"unrelated"], []),
    ]  # fmt: skip
    asked = [(version, *read) for version in range(floor - 1, durable + 2) for read in reads]

    def answers(deciding: Resolver) -> list[Row]:
        """Decides each question by itself. Nothing is written, so that no answer changes the next."""
        window, version = deciding._recent.window, deciding.durable_version
        verdicts = []
        for read_version, keys, ranges in asked:
            request = codec.encode(Request(tuple(keys), tuple(ranges), (), ()))
            claimed = resolver.Claimed(1, None, read_version, request, leader_started)
            verdicts += resolver.decide(window, version, [claimed])
        return [Row(verdict.status, verdict.version, verdict.reason) for verdict in verdicts]

    started = sql.execute("SELECT clock_timestamp()").fetchone()
    assert started
    leader_started = started[0]
    warm = answers(leader)
    assert {row.status for row in warm} == {"committed", "conflict", "too_old", "rejected"}
    assert answers(Resolver(leader_conn, begin_term(leader_conn))) == warm


@pytest.mark.usefixtures("always_observing")
def test_i8_the_window_reaches_back_to_a_commit_whose_id_became_visible_late(
    sql: Sql, other: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    """Its id is below the queue floor that later settlements store, while its version is above theirs."""
    late = submit(other, writes(b"late"))
    submit(sql, writes(b"k"))
    drain(leader)
    other.commit()
    drain(leader)
    claim_empty_queue(leader)
    submit(sql, writes(b"k"), 2)
    drain(leader)
    stored = lease.read_lease(leader_conn)
    assert stored.window_start_id < late < stored.queue_floor_id
    successor = Resolver(leader_conn, begin_term(leader_conn))
    conflicting = submit(sql, writes(b"j", reads=[b"late"]), 1)
    fine = submit(sql, writes(b"j", reads=[b"j"]), 1)
    drain(successor)
    assert outcome(sql, conflicting).status == "conflict"
    assert outcome(sql, fine).status == "committed"


@pytest.mark.usefixtures("always_observing")
def test_i8_the_window_start_follows_the_floor(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a new leader reads only the commits of the window, not the whole history."""
    for _ in range(20):
        submit(sql, writes(b"k"), leader.durable_version)
        drain(leader)
        claim_empty_queue(leader)
    raise_floor_to_last_commit(monkeypatch, sql, leader)
    stored = lease.read_lease(leader_conn)
    assert (stored.conflict_floor, stored.window_start_id) == (20, 20)


def test_i8_a_new_leader_for_each_batch_decides_like_a_single_leader(
    sql: Sql, settings: Settings, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    """Forty requests, with a new leader for each."""
    payloads = [writes(b"%d" % (n % 5), reads=[b"%d" % (n % 7)]) for n in range(40)]
    read_versions = [max(0, n // 2 - n % 3) for n in range(40)]
    for payload, read_version in zip(payloads, read_versions, strict=True):
        submit(sql, payload, min(read_version, leader.durable_version))
        leader = Resolver(leader_conn, begin_term(leader_conn))
        assert leader.resolve_batch() == 1
    changing = outcomes(sql)
    stored = sql.execute("SELECT read_version, payload FROM commit_requests ORDER BY id").fetchall()
    sql.execute("TRUNCATE commit_requests, kv, leader_lease RESTART IDENTITY")
    sql.execute("INSERT INTO leader_lease DEFAULT VALUES")
    single = Resolver(leader_conn, begin_term(leader_conn))
    for read_version, payload in stored:
        submit(sql, payload, read_version)
        single.resolve_batch()
    assert outcomes(sql) == changing
    assert len({status for status, _ in changing}) > 1


def test_i8_garbage_collected_commits_raise_the_floor_of_a_new_leader(
    sql: Sql, leader: Resolver, leader_conn: psycopg.Connection[Any]
) -> None:
    for key in (b"a", b"b", b"c"):
        submit(sql, writes(key), leader.durable_version)
        drain(leader)
    sql.execute("DELETE FROM commit_requests WHERE commit_version = 2")
    successor = Resolver(leader_conn, begin_term(leader_conn))
    numbers = [submit(sql, writes(b"j", reads=[key]), version) for version, key in [(1, b"z"), (2, b"b"), (2, b"c")]]
    drain(successor)
    assert [outcome(sql, number).status for number in numbers] == ["too_old", "committed", "conflict"]


def test_i8_a_leader_decides_as_before_after_a_batch_was_rolled_back(
    sql: Sql, leader: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in (b"a", b"b"):
        submit(sql, writes(key), leader.durable_version)
        drain(leader)
    monkeypatch.setattr(codec, "MAX_KEY_BYTES", 10_000)
    submit(sql, writes(os.urandom(3_000)), 2)
    drain(leader)
    reads = [(0, b"a"), (1, b"a"), (1, b"b"), (2, b"b"), (0, b"c")]
    numbers = [submit(sql, writes(b"j", reads=[key]), version) for version, key in reads]
    drain(leader)
    assert [outcome(sql, number).status for number in numbers] == [
        "conflict", "committed", "conflict", "committed", "committed",
    ]  # fmt: skip
