"""Writing to an outbox: what any service's plain INSERT does by itself, and what it cannot do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import (
    DivisionByZero,
    FeatureNotSupported,
    GeneratedAlways,
    InFailedSqlTransaction,
    InsufficientPrivilege,
    InvalidTextRepresentation,
    NotNullViolation,
)
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, namedtuple_row, scalar_row
from psycopg.sql import SQL, Identifier

from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.migrations import apply
from pgcoord_cli.core.database.session import command_session, migration_session
from pgcoord_cli.core.events.outbox import (
    COMPLETION,
    LEASE,
    OUTBOXES,
    Outbox,
    append_completion_event,
    append_lease_event,
)
from pgcoord_cli.db.sqlfiles import sql as statement
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value

EVENT_ID = {"lease_events": "lease_events_event_id_seq", "completion_events": "completion_events_event_id_seq"}
"""The sequence that each outbox draws its ids from."""

INSERT = {
    LEASE: "INSERT INTO pgcoord.lease_events (execution_id, event_type) VALUES ('job', 'acquired')",
    COMPLETION: "INSERT INTO pgcoord.completion_events (execution_id, outcome) VALUES (gen_random_uuid(), 'failed')",
}
"""What a service writes in whatever language."""

Conn = psycopg.Connection[Any]

both = pytest.mark.parametrize("outbox", OUTBOXES.values(), ids=OUTBOXES)


def insert(conn: Conn, outbox: Outbox) -> None:
    conn.execute(INSERT[outbox].encode())


def connect(settings: Settings, **options: Any) -> Conn:
    return psycopg.connect(make_conninfo(settings.dsn, **options), autocommit=True)


@pytest.fixture
def service(settings: Settings, sql: Conn) -> Iterator[Conn]:
    """A session of a role that may do what `migrate grant --client` gives, and nothing else."""
    role = f"service_{uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"client": [role]}, dry_run=False)
    with connect(settings, user=role) as conn:
        yield conn


def stored(conn: Conn, outbox: Outbox) -> list[int]:
    table = Identifier("pgcoord", outbox.table)
    return [row[0] for row in conn.execute(SQL("SELECT event_id FROM {} ORDER BY event_id").format(table))]


def drawn(conn: Conn, outbox: Outbox) -> int:
    """How many ids have been drawn."""
    sequence = f"pgcoord.{EVENT_ID[outbox.table]}"
    (last,) = conn.execute("SELECT pg_sequence_last_value(%s::regclass)", [sequence]).fetchone() or (None,)
    return int(last or 0)


def announced(conn: Conn, outbox: Outbox, schema: str = "pgcoord") -> dict[int, str]:
    """By pid: who holds the lock that announces a writer, and whether it has been granted."""
    query = """
        SELECT pid, CASE WHEN granted THEN mode ELSE 'waits' END FROM pg_locks
         WHERE locktype = 'advisory' AND classid = (%s::text)::regclass AND objid = 0 AND objsubid = 2
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """
    return dict(conn.execute(query, [f"{schema}.{outbox.table}"]).fetchall())


# -- plain INSERTs


@both
def test_a_plain_insert_by_a_service_needs_no_more_than_a_clients_rights(
    service: Conn, sql: Conn, outbox: Outbox
) -> None:
    insert(service, outbox)
    row = service.execute(INSERT[outbox].encode() + b" RETURNING event_id").fetchone()
    assert row == (2,)
    assert stored(sql, outbox) == [1, 2]


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("INSERT INTO pgcoord.lease_events (event_id, execution_id, event_type) VALUES (7, '', '')",
                     id="INSERT"),
        pytest.param("INSERT INTO pgcoord.lease_events VALUES (7, '', '', '')", id="INSERT without column names"),
        pytest.param("MERGE INTO pgcoord.lease_events USING (SELECT 7) AS new (id) ON event_id = new.id"
                     " WHEN NOT MATCHED THEN INSERT (event_id, execution_id, event_type) VALUES (new.id, '', '')",
                     id="MERGE"),
        pytest.param("UPDATE pgcoord.lease_events SET event_id = 7", id="UPDATE"),
    ],
)  # fmt: skip
def test_i10_an_explicit_id_is_refused_whoever_gives_it(sql: Conn, statement: str) -> None:
    insert(sql, LEASE)
    with pytest.raises(GeneratedAlways):
        sql.execute(statement.encode())
    assert (stored(sql, LEASE), drawn(sql, LEASE)) == ([1], 1)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO pgcoord.lease_events (event_id, execution_id, event_type) OVERRIDING SYSTEM VALUE"
        " VALUES (7, '', '')",
        "INSERT INTO pgcoord.lease_events (execution_id, event_type, committed_at_ms) VALUES ('', '', 0)",
        "INSERT INTO pgcoord.completion_events (execution_id, outcome, dispatched_at_ms)"
        " VALUES (gen_random_uuid(), '', 0)",
        "UPDATE pgcoord.lease_events SET namespace = 'other'",
        "DELETE FROM pgcoord.lease_events",
        "SELECT setval('pgcoord.lease_events_event_id_seq', 1)",
        "SELECT nextval('pgcoord.lease_events_event_id_seq')",
    ],
)
def test_i10_a_service_may_neither_choose_ids_nor_change_what_was_written(service: Conn, statement: str) -> None:
    insert(service, LEASE)
    with pytest.raises(InsufficientPrivilege):
        service.execute(statement.encode())


def test_i10_a_service_copies_events_without_their_ids_only(service: Conn, sql: Conn) -> None:
    with service.cursor().copy("COPY pgcoord.lease_events (execution_id, event_type) FROM STDIN") as copy:
        copy.write("one\tacquired\ntwo\texpired\n")
    with (
        pytest.raises(InsufficientPrivilege),
        service.cursor().copy("COPY pgcoord.lease_events (event_id, execution_id, event_type) FROM STDIN"),
    ):
        pass
    assert stored(sql, LEASE) == [1, 2]


def test_i10_a_copy_announces_its_writer(sql: Conn, service: Conn) -> None:
    with service.transaction():
        with service.cursor().copy("COPY pgcoord.lease_events (execution_id, event_type) FROM STDIN") as copy:
            copy.write("one\tacquired\n")
        assert announced(sql, LEASE) == {service.info.backend_pid: "ShareLock"}


# -- the announcement


@both
def test_i10_a_writer_is_announced_until_its_transaction_ends(sql: Conn, service: Conn, outbox: Outbox) -> None:
    for ending in ("COMMIT", "ROLLBACK"):
        service.execute("BEGIN")
        assert announced(sql, outbox) == {}
        insert(service, outbox)
        insert(service, outbox)
        assert announced(sql, outbox) == {service.info.backend_pid: "ShareLock"}
        service.execute(ending)
        assert announced(sql, outbox) == {}
    assert stored(sql, outbox) == [1, 2]


@both
def test_i10_a_writer_is_announced_before_it_draws_its_id(
    settings: Settings, sql: Conn, service: Conn, outbox: Outbox
) -> None:
    """Somebody stands in the way of the announcement, so that a writer can be looked at that has only just begun."""
    pid = service.info.backend_pid
    with connect(settings) as obstacle, ThreadPoolExecutor(1) as pool:
        with obstacle.transaction():
            obstacle.execute("SELECT pg_advisory_xact_lock((%s::text)::regclass::integer, 0)",
                             [f"pgcoord.{outbox.table}"])  # fmt: skip
            writing = pool.submit(insert, service, outbox)
            until(lambda: announced(sql, outbox).get(pid) == "waits" or writing.done())
            assert not writing.done()
            assert drawn(sql, outbox) == 0
        writing.result(TIMEOUT)
    assert stored(sql, outbox) == [1]


def test_i10_the_outboxes_are_announced_apart_and_writers_do_not_wait_for_each_other(
    settings: Settings, sql: Conn, service: Conn
) -> None:
    with connect(settings) as other, service.transaction(), other.transaction():
        insert(service, LEASE)
        insert(other, COMPLETION)
        assert announced(sql, LEASE) == {service.info.backend_pid: "ShareLock"}
        assert announced(sql, COMPLETION) == {other.info.backend_pid: "ShareLock"}
        insert(other, LEASE)
        assert len(announced(sql, LEASE)) == 2


def test_i10_a_session_that_applies_replicated_changes_announces_itself_too(sql: Conn) -> None:
    with sql.transaction():
        sql.execute("SET LOCAL session_replication_role = replica")
        insert(sql, LEASE)
        assert announced(sql, LEASE) == {sql.info.backend_pid: "ShareLock"}


def test_i10_whatever_the_search_path_of_a_service_is_its_insert_is_announced(sql: Conn, service: Conn) -> None:
    """Somebody's functions of the same names are not taken for PostgreSQL's."""
    sql.execute("CREATE SCHEMA trap")
    sql.execute("CREATE FUNCTION trap.pg_advisory_xact_lock_shared(integer, integer) RETURNS void"
                " LANGUAGE sql AS 'SELECT'")  # fmt: skip
    sql.execute("GRANT USAGE ON SCHEMA trap TO PUBLIC")
    with service.transaction():
        service.execute("SET LOCAL search_path = trap, pg_catalog")
        insert(service, LEASE)
        assert announced(sql, LEASE) == {service.info.backend_pid: "ShareLock"}


# -- waking


class Ear:
    """A session that listens to an outbox's channel."""

    def __init__(self, conn: Conn, outbox: Outbox, schema: str = "pgcoord") -> None:
        self._conn = conn
        self._channel = f"{schema}.{outbox.table}"
        conn.execute(SQL("LISTEN {}").format(Identifier(self._channel)))

    def heard(self) -> list[tuple[int, str]]:
        """Who notified since the last time, and with which payload; what was committed by now is among it."""
        end = uuid4().hex
        self._conn.execute("SELECT pg_notify(%s, %s)", [self._channel, end])
        heard: list[tuple[int, str]] = []
        for notification in self._conn.notifies(timeout=TIMEOUT):
            if notification.payload == end:
                return heard
            heard.append((notification.pid, notification.payload))
        raise AssertionError("not even its own notification came")


@pytest.fixture
def open_ear(settings: Settings) -> Iterator[Callable[..., Ear]]:
    """Listens to the channel of an outbox, of a schema if one is named."""
    with connect(settings) as first, connect(settings) as second:
        free = [first, second]
        yield lambda *channel: Ear(free.pop(), *channel)


def fall_asleep(conn: Conn, outbox: Outbox, schema: str = "pgcoord", seconds: float = 3600) -> int:
    """What a tail does that is going to wait; until when it asks to be woken."""
    query = "SELECT setval(%s::text::regclass, ((extract(epoch FROM clock_timestamp()) + %s) * 1000000)::bigint)"
    return int(value(conn, query, f"{schema}.{outbox.table}_wake_until", seconds))


def stay_awake(conn: Conn, outbox: Outbox, asked: int) -> None:
    """What a tail does that reads on."""
    with psycopg.RawCursor(conn) as cursor:
        cursor.execute(statement("tail", "cancel_wakeups"), [outbox.table, asked])


OpenEar = Callable[..., Ear]


@both
def test_i7_writers_notify_only_while_a_tail_sleeps(
    sql: Conn, service: Conn, open_ear: OpenEar, outbox: Outbox
) -> None:
    ear, pid = open_ear(outbox), service.info.backend_pid
    insert(service, outbox)
    assert ear.heard() == [], "no tail has ever slept"
    for _ in range(2):
        asked = fall_asleep(sql, outbox)
        insert(service, outbox)
        insert(service, outbox)
        assert ear.heard() == [(pid, ""), (pid, "")]
        stay_awake(sql, outbox, asked)
        insert(service, outbox)
        assert ear.heard() == []


def test_i7_a_tail_that_is_awake_again_does_not_speak_for_one_that_fell_asleep_later(
    sql: Conn, service: Conn, open_ear: OpenEar
) -> None:
    ear = open_ear(LEASE)
    first, _second = fall_asleep(sql, LEASE), fall_asleep(sql, LEASE)
    stay_awake(sql, LEASE, first)
    insert(service, LEASE)
    assert len(ear.heard()) == 1


@both
def test_i7_a_tail_that_has_not_asked_anew_is_forgotten(
    sql: Conn, service: Conn, open_ear: OpenEar, outbox: Outbox
) -> None:
    ear = open_ear(outbox)
    fall_asleep(sql, outbox, seconds=-0.001)
    insert(service, outbox)
    assert ear.heard() == []


def test_i7_a_transaction_notifies_once_and_without_a_payload_however_much_it_writes(
    sql: Conn, service: Conn, open_ear: OpenEar
) -> None:
    ear = open_ear(LEASE)
    fall_asleep(sql, LEASE)
    with service.transaction():
        for _ in range(3):
            insert(service, LEASE)
        service.execute("INSERT INTO pgcoord.lease_events (execution_id, event_type)"
                        " SELECT 'job', 'renewed' FROM generate_series(1, 100)")  # fmt: skip
        assert ear.heard() == [], "nothing is said before the commit"
    assert ear.heard() == [(service.info.backend_pid, "")]


def test_i7_a_transaction_that_is_rolled_back_wakes_nobody(sql: Conn, service: Conn, open_ear: OpenEar) -> None:
    ear = open_ear(LEASE)
    fall_asleep(sql, LEASE)
    with service.transaction(force_rollback=True):
        insert(service, LEASE)
    assert ear.heard() == []


def test_i7_an_outbox_wakes_its_own_tails_only(sql: Conn, service: Conn, open_ear: OpenEar) -> None:
    lease, completion = open_ear(LEASE), open_ear(COMPLETION)
    fall_asleep(sql, LEASE)
    insert(service, COMPLETION)
    insert(service, LEASE)
    assert len(lease.heard()) == 1
    assert completion.heard() == []


@pytest.mark.parametrize(("value", "notifies"), [("off", False), ("on", True), ("", True)])
def test_i7_a_service_can_do_without_notifications(
    sql: Conn, service: Conn, open_ear: OpenEar, value: str, notifies: bool
) -> None:
    ear = open_ear(LEASE)
    fall_asleep(sql, LEASE)
    service.execute("SELECT set_config('pgcoord.notify', %s, false)", [value])
    insert(service, LEASE)
    assert bool(ear.heard()) is notifies


# -- two-phase commit


@contextmanager
def prepared(conn: Conn, gid: str) -> Iterator[None]:
    """Prepares the transaction that `conn` is in; commits it when the block ends."""
    conn.execute(SQL("PREPARE TRANSACTION {}").format(gid))
    try:
        yield
    finally:
        conn.execute(SQL("COMMIT PREPARED {}").format(gid))


@both
def test_i10_a_transaction_that_does_not_notify_can_be_prepared_while_a_tail_sleeps(
    sql: Conn, service: Conn, outbox: Outbox
) -> None:
    fall_asleep(sql, outbox)
    service.execute("BEGIN")
    service.execute("SET LOCAL pgcoord.notify = off")
    insert(service, outbox)
    with prepared(service, f"{sql.info.dbname} off"):
        assert announced(sql, outbox) == {None: "ShareLock"}, "it is announced, though no session has it any more"
        assert stored(sql, outbox) == []
    assert (announced(sql, outbox), stored(sql, outbox)) == ({}, [1])


def test_a_transaction_that_notifies_cannot_be_prepared(sql: Conn, service: Conn) -> None:
    fall_asleep(sql, LEASE)
    service.execute("BEGIN")
    insert(service, LEASE)
    with pytest.raises(FeatureNotSupported, match="NOTIFY"):
        service.execute("PREPARE TRANSACTION 'refused'")
    service.execute("ROLLBACK")
    assert stored(sql, LEASE) == []


# -- appending from Python


@pytest.fixture
def elsewhere(settings: Settings) -> Settings:
    """The same database, migrated in another schema too."""
    other = replace(settings, schema="elsewhere", schema_given=True)
    with migration_session(other, read_only=False) as (conn, _):
        apply(conn, other.schema, None, lambda _: None)
    return other


def append(conn: Conn, outbox: Outbox, **columns: Any) -> int:
    """An event, through the function that there is for the outbox."""
    if outbox is LEASE:
        return append_lease_event(conn, "job", "acquired", **columns)
    return append_completion_event(conn, UUID(int=7), "success", **columns)


@both
def test_an_append_is_part_of_the_callers_transaction(sql: Conn, service: Conn, outbox: Outbox) -> None:
    with service.transaction(force_rollback=True):
        assert append(service, outbox) == 1
        assert stored(sql, outbox) == []
    assert stored(sql, outbox) == []
    with service.transaction():
        assert append(service, outbox) == 2
        with service.transaction(force_rollback=True):
            append(service, outbox)
    assert stored(sql, outbox) == [2]


@both
def test_i15_an_append_ignores_the_search_path_of_the_caller(
    service: Conn, sql: Conn, elsewhere: Settings, outbox: Outbox
) -> None:
    sql.execute("SET search_path = elsewhere")
    for path in ("pg_temp", "elsewhere"):
        service.execute("SELECT set_config('search_path', %s, false)", [path])
        append(service, outbox)
    assert append(sql, outbox, schema="elsewhere") == 1
    assert stored(sql, outbox) == [1, 2]


def hostile_schema(sql: Conn) -> str:
    """A schema with a type, a function and an operator that the append statements would use if they named none."""
    sql.execute("CREATE SCHEMA hostile")
    sql.execute("CREATE DOMAIN hostile.text AS pg_catalog.text CHECK (VALUE = 'hostile')")
    sql.execute("CREATE DOMAIN hostile.uuid AS pg_catalog.uuid CHECK (VALUE IS NULL)")
    sql.execute("CREATE FUNCTION hostile.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
                " AS 'SELECT to_timestamp(0)'")  # fmt: skip
    sql.execute("CREATE FUNCTION hostile.zero(numeric, integer) RETURNS numeric LANGUAGE sql AS 'SELECT 0.0'")
    sql.execute("CREATE OPERATOR hostile.* (FUNCTION = hostile.zero, LEFTARG = numeric, RIGHTARG = integer)")
    sql.execute("GRANT USAGE ON SCHEMA hostile TO PUBLIC")
    return "hostile, pg_catalog"


@both
def test_i18_an_append_uses_only_what_is_in_pg_catalog(service: Conn, sql: Conn, outbox: Outbox) -> None:
    service.execute("SELECT set_config('search_path', %s, false)", [hostile_schema(sql)])
    append(service, outbox)
    assert value(sql, f"SELECT clock_timestamp() - to_timestamp(occurred_at_ms / 1000.0) < '1h' FROM {outbox.table}")


@both
@pytest.mark.parametrize("row_factory", [dict_row, namedtuple_row, scalar_row], ids=lambda factory: factory.__name__)
def test_an_append_works_with_the_row_and_cursor_factories_of_the_caller(
    settings: Settings, sql: Conn, row_factory: Any, outbox: Outbox
) -> None:
    options = {"row_factory": row_factory, "cursor_factory": psycopg.ClientCursor}
    with psycopg.connect(settings.dsn, **options) as conn:
        assert append(conn, outbox) == 1
        assert stored(sql, outbox) == [], "it is not committed yet"
        assert (conn.row_factory, conn.cursor_factory, conn.autocommit) == (*options.values(), False)
    assert stored(sql, outbox) == [1]


@both
def test_an_append_is_one_of_the_statements_of_a_pipeline(sql: Conn, service: Conn, outbox: Outbox) -> None:
    with service.pipeline(), service.transaction():
        service.execute("SELECT 1")
        assert append(service, outbox) == 1
        assert append(service, outbox) == 2
    assert stored(sql, outbox) == [1, 2]


@both
def test_an_append_in_a_failed_transaction_is_refused_and_leaves_it_to_the_caller(
    sql: Conn, service: Conn, outbox: Outbox
) -> None:
    service.execute("BEGIN")
    with pytest.raises(DivisionByZero):
        service.execute("SELECT 1 / 0")
    with pytest.raises(InFailedSqlTransaction):
        append(service, outbox)
    assert service.info.transaction_status is TransactionStatus.INERROR
    service.execute("ROLLBACK")
    append(service, outbox)
    assert stored(sql, outbox) == [1]


def test_what_is_appended_is_what_is_stored(sql: Conn) -> None:
    then = datetime(2026, 1, 31, 12, 0, 0, 123_000, tzinfo=UTC)
    labels: dict[str, Any] = {"partition_key": 3, "namespace": "n", "instance_tag": "t", "occurred_at": then}
    execution, lease, flow = uuid4(), uuid4(), uuid4()
    append_lease_event(sql, execution, "revoked", lease_id=lease, **labels)
    append_completion_event(sql, execution, "skipped", flow_id=flow, **labels)
    columns = "partition_key, namespace, instance_tag, occurred_at_ms"
    stored_labels = (3, "n", "t", 1_769_860_800_123)
    row = sql.execute(f"SELECT execution_id, lease_id, event_type, {columns} FROM lease_events".encode()).fetchone()
    assert row == (str(execution), str(lease), "revoked", *stored_labels)
    row = sql.execute(f"SELECT execution_id, flow_id, outcome, {columns} FROM completion_events".encode()).fetchone()
    assert row == (execution, flow, "skipped", *stored_labels)


@both
def test_i12_what_is_left_out_is_the_servers_time_and_no_label(
    service: Conn, sql: Conn, monkeypatch: pytest.MonkeyPatch, outbox: Outbox
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    append(service, outbox)
    age = "clock_timestamp() - to_timestamp({} / 1000.0) < interval '1 hour'"
    columns = [
        "partition_key",
        "namespace",
        "instance_tag",
        age.format("occurred_at_ms"),
        age.format("committed_at_ms"),
    ]
    row = sql.execute(f"SELECT {', '.join(columns)} FROM {outbox.table}".encode()).fetchone()
    assert row == (0, None, None, True, True)


def test_an_append_that_postgresql_refuses_says_so(service: Conn, sql: Conn) -> None:
    with pytest.raises(InvalidTextRepresentation):
        append_completion_event(service, "not a uuid", "success")
    with pytest.raises(NotNullViolation):
        append_lease_event(service, "job", "acquired", partition_key=None)  # type: ignore[arg-type]
    assert stored(sql, LEASE) == stored(sql, COMPLETION) == []


@pytest.mark.parametrize("columns", [{"kind": "success"}, {"schema": "a.b"}, {"schema": 'x"; DROP TABLE kv; --'}])
def test_an_append_that_makes_no_sense_is_refused_before_the_transaction_fails(
    service: Conn, sql: Conn, columns: dict[str, Any]
) -> None:
    with service.transaction():
        with pytest.raises(UsageError):
            append_lease_event(service, "job", columns.pop("kind", "acquired"), **columns)
        assert append(service, LEASE) == 1
    assert stored(sql, LEASE) == [1]


@both
def test_an_append_goes_to_the_schema_of_the_environment_where_none_is_given(
    sql: Conn, elsewhere: Settings, monkeypatch: pytest.MonkeyPatch, outbox: Outbox
) -> None:
    monkeypatch.setenv("PGCOORD_SCHEMA", elsewhere.schema)
    assert append(sql, outbox, schema="pgcoord") == 1
    append(sql, outbox)
    assert append(sql, outbox) == 2, "the second one of the schema elsewhere"
    assert stored(sql, outbox) == [1]


# -- two schemas


@both
def test_two_schemas_in_one_database_neither_wake_nor_announce_each_other(
    sql: Conn, elsewhere: Settings, open_ear: OpenEar, outbox: Outbox
) -> None:
    here, there = open_ear(outbox), open_ear(outbox, "elsewhere")
    fall_asleep(sql, outbox)
    fall_asleep(sql, outbox, "elsewhere")
    with sql.transaction():
        append(sql, outbox, schema="elsewhere")
        assert announced(sql, outbox) == {}
        assert announced(sql, outbox, "elsewhere") == {sql.info.backend_pid: "ShareLock"}
    assert here.heard() == []
    assert there.heard() == [(sql.info.backend_pid, "")]
    assert append(sql, outbox) == 1
