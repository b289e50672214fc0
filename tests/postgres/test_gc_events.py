"""Garbage collection of events: which are deleted, which are kept, and that tails notice what was deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Barrier
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import RaiseException
from psycopg.sql import SQL, Identifier

from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.events.event_iterator import tail
from pgcoord_cli.core.events.outbox import COMPLETION, LEASE, OUTBOXES, Outbox
from pgcoord_cli.core.events.start_position import StartPosition
from pgcoord_cli.core.gc import CollectedEvents, collect_events, count_events
from pgcoord_cli.errors import CursorExpired
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT

if TYPE_CHECKING:
    from tests.conftest import Call

HOUR, DAY = 3_600, 86_400

NO_RETENTION = -60
"""A retention that ends before an event is committed, so that every event is old enough."""

Conn = psycopg.Connection[Any]
Collect = Callable[..., CollectedEvents]

both = pytest.mark.parametrize("outbox", OUTBOXES.values(), ids=OUTBOXES)


@pytest.fixture
def session(settings: Settings) -> Iterator[Conn]:
    """A session like that of the command."""
    with command_session(settings, "gc", writes=True) as conn:
        yield conn


@pytest.fixture
def collect(session: Conn) -> Collect:
    """Collects the events of an outbox, by default those older than an hour."""

    def run(outbox: Outbox, older_than: float = HOUR, batch_size: int = 1_000, **how: Any) -> CollectedEvents:
        return collect_events(session, outbox, older_than, batch_size, how.get("progress", always))

    return run


def always(_deleted: int) -> bool:
    return True


def write(conn: Conn, outbox: Outbox, age: float = 0, *, count: int = 1, occurred: float = 0) -> None:
    """Inserts events that count as inserted `age` seconds ago, and whose service gives `occurred` seconds ago."""
    kind = "event_type" if outbox is LEASE else "outcome"
    insert = SQL(
        """
        WITH written AS (
            INSERT INTO pgcoord.{} (execution_id, {}, occurred_at_ms)
            SELECT gen_random_uuid(), 'odd', (extract(epoch FROM clock_timestamp()) - %s)::bigint * 1000
              FROM generate_series(1, %s) RETURNING event_id
        )
        SELECT min(event_id), max(event_id) FROM written
        """
    )
    ids = conn.execute(insert.format(Identifier(outbox.table), Identifier(kind)), [occurred, count]).fetchone()
    assert ids
    if age:
        set_age(conn, outbox, age, *ids)


def set_age(conn: Conn, outbox: Outbox, age: float, first: int, last: int) -> None:
    """Makes events older, and marks completion events as dispatched."""
    dispatched = ", dispatched_at_ms = committed_at_ms" if outbox is COMPLETION else ""
    update = f"UPDATE pgcoord.{outbox.table} SET committed_at_ms = committed_at_ms - %s * 1000{dispatched}"
    conn.execute(f"{update} WHERE event_id BETWEEN %s AND %s".encode(), [age, first, last])


def dispatch_all(conn: Conn) -> None:
    conn.execute("UPDATE pgcoord.completion_events SET dispatched_at_ms = committed_at_ms")


def kept(conn: Conn, outbox: Outbox) -> list[int]:
    return [row[0] for row in conn.execute(f"SELECT event_id FROM pgcoord.{outbox.table} ORDER BY 1".encode())]


def floor(conn: Conn, outbox: Outbox) -> int:
    query = "SELECT collected_through FROM pgcoord.outbox_floors WHERE outbox = %s"
    row = conn.execute(query, [outbox.table]).fetchone()
    assert row
    return int(row[0])


def subscribe(conn: Conn, name: str, outbox: Outbox | None, position: int | None) -> None:
    conn.execute(
        "INSERT INTO subscriptions (subscription_name, outbox, last_position) VALUES (%s, %s, %s)",
        [name, outbox and outbox.table, position],
    )


@contextmanager
def connected(settings: Settings, **options: Any) -> Iterator[Conn]:
    with psycopg.connect(make_conninfo(settings.dsn, **options), autocommit=True) as conn:
        yield conn


@pytest.fixture
def writer(settings: Settings) -> Iterator[Conn]:
    """A session of a service that writes events."""
    with connected(settings) as conn:
        yield conn


# -- by age


@both
def test_events_older_than_the_retention_are_deleted(sql: Conn, collect: Collect, outbox: Outbox) -> None:
    for age in (DAY, HOUR + 60, HOUR - 60):
        write(sql, outbox, age)
    collected = collect(outbox)
    assert (collected.table, collected.deleted, collected.batches, collected.dry_run) == (outbox.table, 2, 1, False)
    assert (kept(sql, outbox), floor(sql, outbox)) == ([3], 2)
    oldest = f"SELECT to_timestamp(committed_at_ms / 1000.0) FROM {outbox.table}".encode()
    assert (collected.oldest_kept,) == sql.execute(oldest).fetchone()


@both
def test_i12_the_age_of_an_event_counts_from_its_insertion_not_from_when_it_occurred(
    sql: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY, occurred=-DAY)
    write(sql, outbox, occurred=DAY)
    dispatch_all(sql)
    assert collect(outbox).deleted == 1
    assert kept(sql, outbox) == [2]


@both
def test_i12_the_time_zone_of_a_session_has_no_effect(
    sql: Conn, session: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, HOUR + 60)
    write(sql, outbox, HOUR - 60)
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        session.execute("SELECT set_config('TimeZone', $1, false)", [zone])
        collect(outbox)
        assert kept(sql, outbox) == [2]


@both
def test_i10_no_event_after_the_first_that_must_stay_is_deleted(sql: Conn, collect: Collect, outbox: Outbox) -> None:
    write(sql, outbox, DAY, count=2)
    write(sql, outbox, 60)
    write(sql, outbox, DAY, count=2)
    for batch_size in (1, 2, 3, 1_000):
        collect(outbox, batch_size=batch_size)
        assert (kept(sql, outbox), floor(sql, outbox)) == ([3, 4, 5], 2)


@both
def test_a_run_on_an_empty_outbox_deletes_nothing(sql: Conn, collect: Collect, outbox: Outbox) -> None:
    collected = collect(outbox)
    assert (collected.deleted, collected.batches, collected.oldest_kept, collected.furthest_behind) == (
        0,
        0,
        None,
        None,
    )
    assert floor(sql, outbox) == 0


# -- up to the position of a subscription


@both
def test_i10_an_event_that_a_subscription_has_not_passed_is_kept(sql: Conn, collect: Collect, outbox: Outbox) -> None:
    write(sql, outbox, DAY, count=5)
    subscribe(sql, "fast", outbox, 4)
    subscribe(sql, "slow", outbox, 2)
    for batch_size in (1, 2, 1_000):
        assert collect(outbox, batch_size=batch_size).furthest_behind == "slow"
        assert (kept(sql, outbox), floor(sql, outbox)) == ([2, 3, 4, 5], 1), "with the event at the lowest position"
    sql.execute("UPDATE subscriptions SET last_position = 5")
    assert collect(outbox).furthest_behind is None
    assert kept(sql, outbox) == [5]


@both
def test_a_subscription_of_another_outbox_or_without_a_position_has_no_effect(
    sql: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY, count=3)
    subscribe(sql, "other", next(other for other in OUTBOXES.values() if other is not outbox), 0)
    subscribe(sql, "of another kind", None, 0)
    subscribe(sql, "without a position", outbox, None)
    assert collect(outbox).deleted == 3


# -- up to open writers


def tailed(settings: Settings, outbox: Outbox, position: int) -> list[int]:
    start = StartPosition.position(position)
    return [event.event_id for event in tail(outbox.noun, settings.dsn, start=start, follow=False)]


@both
def test_i10_events_after_an_open_writer_began_are_kept(
    settings: Settings, sql: Conn, writer: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY)
    with writer.transaction():
        write(writer, outbox)
        write(sql, outbox, count=2)
        dispatch_all(sql)
        assert collect(outbox, NO_RETENTION).deleted == 1
        assert (kept(sql, outbox), floor(sql, outbox)) == ([1 + 2, 1 + 3], 1)
    assert tailed(settings, outbox, position=1) == [2, 3, 4]
    dispatch_all(sql)
    assert collect(outbox, NO_RETENTION).deleted == 3
    assert floor(sql, outbox) == 4


@both
def test_i10_of_several_open_writers_the_first_counts(
    settings: Settings, sql: Conn, writer: Conn, collect: Collect, outbox: Outbox
) -> None:
    with connected(settings) as later, writer.transaction():
        write(writer, outbox)
        write(sql, outbox)
        with later.transaction():
            write(later, outbox)
            dispatch_all(sql)
            assert collect(outbox, NO_RETENTION).deleted == 0
    assert kept(sql, outbox) == [1, 2, 3]


@both
def test_i10_nothing_is_deleted_while_a_prepared_transaction_may_write(
    settings: Settings, sql: Conn, writer: Conn, collect: Collect, outbox: Outbox
) -> None:
    gid = f"{sql.info.dbname} gc"
    writer.execute("BEGIN")
    write(writer, outbox)
    writer.execute(SQL("PREPARE TRANSACTION {}").format(gid))
    try:
        write(sql, outbox, DAY)
        assert collect(outbox).deleted == 0
        assert (kept(sql, outbox), floor(sql, outbox)) == ([2], 0)
    finally:
        sql.execute(SQL("COMMIT PREPARED {}").format(gid))
    assert tailed(settings, outbox, position=0) == [1, 2]
    dispatch_all(sql)
    assert collect(outbox).deleted == 0, "the first event is too young"


@both
def test_a_transaction_that_writes_later_has_no_effect_and_loses_no_event(
    settings: Settings, sql: Conn, writer: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY)
    with writer.transaction():
        write(writer, next(other for other in OUTBOXES.values() if other is not outbox))
        write(sql, outbox)
        dispatch_all(sql)
        assert collect(outbox, NO_RETENTION).deleted == 2
        write(writer, outbox)
    assert tailed(settings, outbox, floor(sql, outbox)) == [3]


@both
def test_a_writer_that_has_ended_has_no_effect(sql: Conn, writer: Conn, collect: Collect, outbox: Outbox) -> None:
    with writer.transaction(force_rollback=True):
        write(writer, outbox)
    write(sql, outbox, DAY)
    assert collect(outbox).deleted == 1
    assert floor(sql, outbox) == 2


def test_i10_a_role_that_may_not_see_when_a_writer_began_deletes_nothing_meanwhile(
    settings: Settings, sql: Conn, writer: Conn
) -> None:
    role = f"operator_{uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"operator": [role]}, dry_run=False)
    write(sql, LEASE, DAY)
    operator = replace(settings, dsn=make_conninfo(settings.dsn, user=role))
    with command_session(operator, "gc", writes=True) as conn:
        with writer.transaction():
            write(writer, LEASE)
            held = collect_events(conn, LEASE, HOUR, 10, always)
            assert (held.deleted, count_events(conn, LEASE, HOUR).held_back) == (0, held.held_back)
            assert f"(pid {writer.info.backend_pid}, role postgres)" in (held.held_back or "")
            assert f"GRANT pg_read_all_stats TO {Identifier(role).as_string()}" in (held.held_back or "")
        free = collect_events(conn, LEASE, HOUR, 10, always)
        assert (free.deleted, free.held_back) == (1, None)


def test_i15_a_role_that_sees_all_statistics_is_told_since_when_a_writer_keeps_events(
    sql: Conn, writer: Conn, collect: Collect
) -> None:
    write(sql, LEASE, DAY)
    with writer.transaction():
        write(writer, LEASE)
        assert (collect(LEASE).held_back, kept(sql, LEASE)) == (None, [])  # it began after the events
        write(sql, LEASE)
        held = collect(LEASE, older_than=NO_RETENTION).held_back or ""
        assert f"(pid {writer.info.backend_pid}, role postgres) since " in held
        assert "pg_read_all_stats" not in held


@both
def test_i15_gc_reports_what_an_unseen_writer_keeps_with_quiet_too(
    settings: Settings, sql: Conn, writer: Conn, outbox: Outbox, call: Call
) -> None:
    role = f"operator_{uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"operator": [role]}, dry_run=False)
    write(sql, outbox, 2 * DAY)
    with writer.transaction():
        write(writer, outbox)
        answer = call("gc", "all", "-q", PGCOORD_DSN=make_conninfo(settings.dsn, user=role))
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (0, "", 1)
    assert answer.err.startswith(f"old {outbox.table} are kept:")


def test_what_gc_says_of_a_writer_has_no_control_character_of_its_role(
    settings: Settings, sql: Conn, call: Call
) -> None:
    role, operator = f"w\x1b[31m\u202e\x9b{uuid4().hex[:8]}", f"operator_{uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} SUPERUSER LOGIN").format(Identifier(role)))
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(operator)))
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"operator": [operator]}, dry_run=False)
    write(sql, LEASE, 2 * DAY)
    with psycopg.connect(make_conninfo(settings.dsn, user=role)) as writer:
        write(writer, LEASE)
        dsn = make_conninfo(settings.dsn, user=operator)
        answers = [call("gc", "all", "-o", output, PGCOORD_DSN=dsn) for output in ("table", "plain", "csv")]
        writer.rollback()
    sql.execute(SQL("DROP ROLE {}").format(Identifier(role)))
    for answer in answers:
        assert r"w\x1b[31m\u202e\x9b" in answer.err
        assert (answer.err + answer.out).replace("\n", "").isprintable()


# -- up to undispatched events


def test_i9_completion_events_are_kept_from_the_first_undispatched_one_on(
    settings: Settings, sql: Conn, collect: Collect
) -> None:
    write(sql, COMPLETION, DAY, count=6)
    sql.execute("UPDATE completion_events SET dispatched_at_ms = NULL WHERE event_id IN (3, 5)")
    for batch_size in (1, 2, 1_000):
        collect(COMPLETION, batch_size=batch_size)
        assert (kept(sql, COMPLETION), floor(sql, COMPLETION)) == ([3, 4, 5, 6], 2)
    assert tailed(settings, COMPLETION, position=2) == [3, 4, 5, 6]
    with pytest.raises(CursorExpired):
        tailed(settings, COMPLETION, position=1)
    dispatch_all(sql)
    assert collect(COMPLETION).deleted == 4
    assert floor(sql, COMPLETION) == 6


def test_a_lease_event_needs_no_dispatch(sql: Conn, collect: Collect) -> None:
    write(sql, LEASE, DAY)
    assert collect(LEASE).deleted == 1


# -- the floor


@both
def test_i10_a_deletion_and_the_floor_are_changed_in_one_transaction(
    sql: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY, count=6)
    sql.execute("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN IF OLD.event_id = 4 THEN RAISE 'refused'; END IF; RETURN OLD; END $$")  # fmt: skip
    trigger = f"CREATE TRIGGER refuse BEFORE DELETE ON {outbox.table} FOR EACH ROW EXECUTE FUNCTION refuse()"
    sql.execute(trigger.encode())
    with pytest.raises(RaiseException):
        collect(outbox, batch_size=2)
    assert (kept(sql, outbox), floor(sql, outbox)) == ([3, 4, 5, 6], 2)


@both
def test_the_floor_is_never_lowered(sql: Conn, collect: Collect, outbox: Outbox) -> None:
    sql.execute("UPDATE outbox_floors SET collected_through = 100")
    write(sql, outbox, DAY)
    assert collect(outbox).deleted == 1
    assert floor(sql, outbox) == 100


@both
def test_each_outbox_is_collected_by_itself(sql: Conn, collect: Collect, outbox: Outbox) -> None:
    for each in OUTBOXES.values():
        write(sql, each, DAY)
    assert collect(outbox).deleted == 1
    assert {each: (kept(sql, each), floor(sql, each)) for each in OUTBOXES.values()} == {
        each: ([], 1) if each is outbox else ([1], 0) for each in OUTBOXES.values()
    }


# -- batches


@both
@pytest.mark.parametrize(("rows", "batches"), [(9, 3), (10, 4), (3, 1), (2, 1)])
def test_events_are_deleted_in_batches_oldest_first(
    rows: int, batches: int, sql: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY, count=rows)
    write(sql, outbox)
    seen: list[int] = []

    def look(deleted: int) -> bool:
        assert (kept(sql, outbox), floor(sql, outbox)) == (list(range(deleted + 1, rows + 2)), deleted)
        seen.append(deleted)
        return True

    collected = collect(outbox, batch_size=3, progress=look)
    assert (collected.deleted, collected.batches) == (rows, batches)
    assert seen[:batches] == list(range(0, rows, 3))


@both
def test_a_stopped_run_keeps_the_rest(sql: Conn, collect: Collect, outbox: Outbox) -> None:
    write(sql, outbox, DAY, count=10)
    collected = collect(outbox, batch_size=3, progress=lambda deleted: deleted < 6)
    assert (collected.deleted, collected.batches) == (6, 2)
    assert (kept(sql, outbox), floor(sql, outbox)) == ([7, 8, 9, 10], 6)


@both
def test_a_dry_run_counts_what_a_run_then_deletes_and_changes_nothing(
    sql: Conn, session: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY, count=5)
    write(sql, outbox, 60)
    subscribe(sql, "slow", outbox, 4)
    counted = count_events(session, outbox, HOUR)
    assert (kept(sql, outbox), floor(sql, outbox)) == ([1, 2, 3, 4, 5, 6], 0)
    assert (counted.dry_run, counted.batches, counted.furthest_behind) == (True, 0, "slow")
    assert counted.deleted == collect(outbox, batch_size=2).deleted == 3


def test_a_dry_run_ends_at_the_same_event_as_a_run(sql: Conn, session: Conn, collect: Collect) -> None:
    write(sql, COMPLETION, DAY, count=5)
    sql.execute("UPDATE completion_events SET dispatched_at_ms = NULL WHERE event_id = 2")
    counted = count_events(session, COMPLETION, HOUR)
    assert collect(COMPLETION).deleted == 1
    assert counted.deleted == 1


# -- concurrent transactions and runs


@both
def test_locked_events_are_left_to_the_next_run(
    settings: Settings, sql: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY, count=6)
    with connected(settings) as other, other.transaction():
        other.execute(f"SELECT FROM pgcoord.{outbox.table} WHERE event_id IN (1, 4, 5) FOR UPDATE".encode())
        assert collect(outbox, batch_size=2).deleted == 3
        assert kept(sql, outbox) == [1, 4, 5]
    assert collect(outbox, batch_size=2).deleted == 3


@both
def test_concurrent_runs_delete_each_event_once(sql: Conn, settings: Settings, outbox: Outbox) -> None:
    write(sql, outbox, DAY, count=1_000)
    together = Barrier(2)

    def collect() -> int:
        with command_session(settings, "gc", writes=True) as conn:
            together.wait(TIMEOUT)
            return collect_events(conn, outbox, HOUR, 10, always).deleted

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(collect) for _ in range(2)]
    assert sum(result.result() for result in results) == 1_000
    assert (kept(sql, outbox), floor(sql, outbox)) == ([], 1_000)


@both
def test_events_written_during_a_run_are_not_lost(
    settings: Settings, sql: Conn, writer: Conn, collect: Collect, outbox: Outbox
) -> None:
    write(sql, outbox, DAY, count=10)

    def write_one(_deleted: int) -> bool:
        write(writer, outbox)
        return True

    collected = collect(outbox, batch_size=2, progress=write_one)
    assert collected.deleted == 10
    assert tailed(settings, outbox, floor(sql, outbox)) == kept(sql, outbox)
    assert len(kept(sql, outbox)) >= collected.batches
