"""Writing to an outbox: what a plain INSERT of a service does, and which statements are refused."""

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
"""The sequence from which each outbox draws its ids."""

INSERT = {
    LEASE: "INSERT INTO pgcoord.lease_events (execution_id, event_type) VALUES ('job', 'acquired')",
    COMPLETION: "INSERT INTO pgcoord.completion_events (execution_id, outcome) VALUES (gen_random_uuid(), 'failed')",
}
"""The statement of a service in any language."""

Conn = psycopg.Connection[Any]

both = pytest.mark.parametrize("outbox", OUTBOXES.values(), ids=OUTBOXES)


def insert(conn: Conn, outbox: Outbox) -> None:
    conn.execute(INSERT[outbox].encode())


def connect(settings: Settings, **options: Any) -> Conn:
    return psycopg.connect(make_conninfo(settings.dsn, **options), autocommit=True)


@pytest.fixture
def service(settings: Settings, sql: Conn) -> Iterator[Conn]:
    """A session of a role with the privileges that `migrate grant --client` gives, and no others."""
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
    """Returns how many ids have been drawn."""
    sequence = f"pgcoord.{EVENT_ID[outbox.table]}"
    (last,) = conn.execute("SELECT pg_sequence_last_value(%s::regclass)", [sequence]).fetchone() or (None,)
    return int(last or 0)


def outbox_locks(conn: Conn, outbox: Outbox, schema: str = "pgcoord") -> dict[int, str]:
    """Returns, by pid, the mode of the lock that a writer of the outbox holds, or `waits` if it is not granted."""
    query = """
        SELECT pid, CASE WHEN granted THEN mode ELSE 'waits' END FROM pg_locks
         WHERE locktype = 'advisory' AND classid = (%s::text)::regclass AND objid = 0 AND objsubid = 2
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """
    return dict(conn.execute(query, [f"{schema}.{outbox.table}"]).fetchall())


# -- plain INSERTs


@both
def test_a_plain_insert_needs_no_more_than_the_privileges_of_a_client(service: Conn, sql: Conn, outbox: Outbox) -> None:
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
def test_i10_an_explicit_id_is_refused(sql: Conn, statement: str) -> None:
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
def test_i10_a_service_may_neither_choose_ids_nor_change_events(service: Conn, statement: str) -> None:
    insert(service, LEASE)
    with pytest.raises(InsufficientPrivilege):
        service.execute(statement.encode())


def test_i10_a_service_may_copy_events_only_without_ids(service: Conn, sql: Conn) -> None:
    with service.cursor().copy("COPY pgcoord.lease_events (execution_id, event_type) FROM STDIN") as copy:
        copy.write("one\tacquired\ntwo\texpired\n")
    with (
        pytest.raises(InsufficientPrivilege),
        service.cursor().copy("COPY pgcoord.lease_events (event_id, execution_id, event_type) FROM STDIN"),
    ):
        pass
    assert stored(sql, LEASE) == [1, 2]


def test_i10_a_copy_takes_the_outbox_lock(sql: Conn, service: Conn) -> None:
    with service.transaction():
        with service.cursor().copy("COPY pgcoord.lease_events (execution_id, event_type) FROM STDIN") as copy:
            copy.write("one\tacquired\n")
        assert outbox_locks(sql, LEASE) == {service.info.backend_pid: "ShareLock"}


# -- the outbox lock


@both
def test_i10_a_writer_holds_the_outbox_lock_until_its_transaction_ends(
    sql: Conn, service: Conn, outbox: Outbox
) -> None:
    for ending in ("COMMIT", "ROLLBACK"):
        service.execute("BEGIN")
        assert outbox_locks(sql, outbox) == {}
        insert(service, outbox)
        insert(service, outbox)
        assert outbox_locks(sql, outbox) == {service.info.backend_pid: "ShareLock"}
        service.execute(ending)
        assert outbox_locks(sql, outbox) == {}
    assert stored(sql, outbox) == [1, 2]


@both
def test_i10_a_writer_takes_the_outbox_lock_before_it_draws_its_id(
    settings: Settings, sql: Conn, service: Conn, outbox: Outbox
) -> None:
    """An exclusive lock blocks the writer at the outbox lock, so that the test sees whether an id has been drawn."""
    pid = service.info.backend_pid
    with connect(settings) as obstacle, ThreadPoolExecutor(1) as pool:
        with obstacle.transaction():
            obstacle.execute("SELECT pg_advisory_xact_lock((%s::text)::regclass::integer, 0)",
                             [f"pgcoord.{outbox.table}"])  # fmt: skip
            writing = pool.submit(insert, service, outbox)
            until(lambda: outbox_locks(sql, outbox).get(pid) == "waits" or writing.done())
            assert not writing.done()
            assert drawn(sql, outbox) == 0
        writing.result(TIMEOUT)
    assert stored(sql, outbox) == [1]


def test_i10_each_outbox_has_its_own_lock_and_writers_do_not_wait_for_each_other(
    settings: Settings, sql: Conn, service: Conn
) -> None:
    with connect(settings) as other, service.transaction(), other.transaction():
        insert(service, LEASE)
        insert(other, COMPLETION)
        assert outbox_locks(sql, LEASE) == {service.info.backend_pid: "ShareLock"}
        assert outbox_locks(sql, COMPLETION) == {other.info.backend_pid: "ShareLock"}
        insert(other, LEASE)
        assert len(outbox_locks(sql, LEASE)) == 2


def test_i10_a_session_in_replica_mode_takes_the_outbox_lock_too(sql: Conn) -> None:
    with sql.transaction():
        sql.execute("SET LOCAL session_replication_role = replica")
        insert(sql, LEASE)
        assert outbox_locks(sql, LEASE) == {sql.info.backend_pid: "ShareLock"}


def test_i10_the_outbox_lock_does_not_depend_on_the_search_path_of_a_service(sql: Conn, service: Conn) -> None:
    """Functions of the same name in another schema are not called."""
    sql.execute("CREATE SCHEMA trap")
    sql.execute("CREATE FUNCTION trap.pg_advisory_xact_lock_shared(integer, integer) RETURNS void"
                " LANGUAGE sql AS 'SELECT'")  # fmt: skip
    sql.execute("GRANT USAGE ON SCHEMA trap TO PUBLIC")
    with service.transaction():
        service.execute("SET LOCAL search_path = trap, pg_catalog")
        insert(service, LEASE)
        assert outbox_locks(sql, LEASE) == {service.info.backend_pid: "ShareLock"}


# -- wakeups


class OutboxListener:
    """A session that listens to the channel of an outbox."""

    def __init__(self, conn: Conn, outbox: Outbox, schema: str = "pgcoord") -> None:
        self._conn = conn
        self._channel = f"{schema}.{outbox.table}"
        conn.execute(SQL("LISTEN {}").format(Identifier(self._channel)))

    def received(self) -> list[tuple[int, str]]:
        """Returns pid and payload of the notifications since the last call, including all that are committed by now."""
        end = uuid4().hex
        self._conn.execute("SELECT pg_notify(%s, %s)", [self._channel, end])
        received: list[tuple[int, str]] = []
        for notification in self._conn.notifies(timeout=TIMEOUT):
            if notification.payload == end:
                return received
            received.append((notification.pid, notification.payload))
        raise AssertionError("the session's own notification did not arrive")


@pytest.fixture
def open_listener(settings: Settings) -> Iterator[Callable[..., OutboxListener]]:
    """Opens listeners on the channel of an outbox, by default in schema `pgcoord`."""
    with connect(settings) as first, connect(settings) as second:
        free = [first, second]
        yield lambda *channel: OutboxListener(free.pop(), *channel)


def request_wakeups(conn: Conn, outbox: Outbox, schema: str = "pgcoord", seconds: float = 3600) -> int:
    """Requests wakeups as a tail does before it waits; returns the value of the sequence."""
    query = "SELECT setval(%s::text::regclass, ((extract(epoch FROM clock_timestamp()) + %s) * 1000000)::bigint)"
    return int(value(conn, query, f"{schema}.{outbox.table}_wake_until", seconds))


def cancel_wakeups(conn: Conn, outbox: Outbox, requested: int) -> None:
    """Cancels a wakeup request as a tail does that reads continuously."""
    with psycopg.RawCursor(conn) as cursor:
        cursor.execute(statement("tail", "cancel_wakeups"), [outbox.table, requested])


OpenListener = Callable[..., OutboxListener]


@both
def test_i7_writers_notify_only_while_wakeups_are_requested(
    sql: Conn, service: Conn, open_listener: OpenListener, outbox: Outbox
) -> None:
    listener, pid = open_listener(outbox), service.info.backend_pid
    insert(service, outbox)
    assert listener.received() == [], "wakeups have never been requested"
    for _ in range(2):
        requested = request_wakeups(sql, outbox)
        insert(service, outbox)
        insert(service, outbox)
        assert listener.received() == [(pid, ""), (pid, "")]
        cancel_wakeups(sql, outbox, requested)
        insert(service, outbox)
        assert listener.received() == []


def test_i7_a_tail_does_not_cancel_the_later_request_of_another(
    sql: Conn, service: Conn, open_listener: OpenListener
) -> None:
    listener = open_listener(LEASE)
    first, _second = request_wakeups(sql, LEASE), request_wakeups(sql, LEASE)
    cancel_wakeups(sql, LEASE, first)
    insert(service, LEASE)
    assert len(listener.received()) == 1


@both
def test_i7_a_wakeup_request_that_is_not_renewed_expires(
    sql: Conn, service: Conn, open_listener: OpenListener, outbox: Outbox
) -> None:
    listener = open_listener(outbox)
    request_wakeups(sql, outbox, seconds=-0.001)
    insert(service, outbox)
    assert listener.received() == []


def test_i7_a_transaction_notifies_once_and_without_a_payload_however_much_it_writes(
    sql: Conn, service: Conn, open_listener: OpenListener
) -> None:
    listener = open_listener(LEASE)
    request_wakeups(sql, LEASE)
    with service.transaction():
        for _ in range(3):
            insert(service, LEASE)
        service.execute("INSERT INTO pgcoord.lease_events (execution_id, event_type)"
                        " SELECT 'job', 'renewed' FROM generate_series(1, 100)")  # fmt: skip
        assert listener.received() == [], "no notification before the commit"
    assert listener.received() == [(service.info.backend_pid, "")]


def test_i7_a_transaction_that_rolls_back_does_not_notify(
    sql: Conn, service: Conn, open_listener: OpenListener
) -> None:
    listener = open_listener(LEASE)
    request_wakeups(sql, LEASE)
    with service.transaction(force_rollback=True):
        insert(service, LEASE)
    assert listener.received() == []


def test_i7_an_outbox_wakes_its_own_tails_only(sql: Conn, service: Conn, open_listener: OpenListener) -> None:
    lease, completion = open_listener(LEASE), open_listener(COMPLETION)
    request_wakeups(sql, LEASE)
    insert(service, COMPLETION)
    insert(service, LEASE)
    assert len(lease.received()) == 1
    assert completion.received() == []


@pytest.mark.parametrize(("value", "notifies"), [("off", False), ("on", True), ("", True)])
def test_i7_a_service_can_switch_notifications_off(
    sql: Conn, service: Conn, open_listener: OpenListener, value: str, notifies: bool
) -> None:
    listener = open_listener(LEASE)
    request_wakeups(sql, LEASE)
    service.execute("SELECT set_config('pgcoord.notify', %s, false)", [value])
    insert(service, LEASE)
    assert bool(listener.received()) is notifies


# -- two-phase commit


@contextmanager
def prepared(conn: Conn, gid: str) -> Iterator[None]:
    """Prepares the current transaction of `conn`; commits it when the block ends."""
    conn.execute(SQL("PREPARE TRANSACTION {}").format(gid))
    try:
        yield
    finally:
        conn.execute(SQL("COMMIT PREPARED {}").format(gid))


@both
def test_i10_a_transaction_that_does_not_notify_can_be_prepared_while_wakeups_are_requested(
    sql: Conn, service: Conn, outbox: Outbox
) -> None:
    request_wakeups(sql, outbox)
    service.execute("BEGIN")
    service.execute("SET LOCAL pgcoord.notify = off")
    insert(service, outbox)
    with prepared(service, f"{sql.info.dbname} off"):
        assert outbox_locks(sql, outbox) == {None: "ShareLock"}, "the lock is held, but by no session"
        assert stored(sql, outbox) == []
    assert (outbox_locks(sql, outbox), stored(sql, outbox)) == ({}, [1])


def test_a_transaction_that_notifies_cannot_be_prepared(sql: Conn, service: Conn) -> None:
    request_wakeups(sql, LEASE)
    service.execute("BEGIN")
    insert(service, LEASE)
    with pytest.raises(FeatureNotSupported, match="NOTIFY"):
        service.execute("PREPARE TRANSACTION 'refused'")
    service.execute("ROLLBACK")
    assert stored(sql, LEASE) == []


# -- appending from Python


@pytest.fixture
def elsewhere(settings: Settings) -> Settings:
    """Settings for a second schema in the same database."""
    other = replace(settings, schema="elsewhere", schema_given=True)
    with migration_session(other, read_only=False) as (conn, _):
        apply(conn, other.schema, None, lambda _: None)
    return other


def append(conn: Conn, outbox: Outbox, **columns: Any) -> int:
    """Appends an event with the function of the outbox; returns its id."""
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
    """Creates types, a function and an operator that unqualified names would resolve to; returns a search_path."""
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
        assert stored(sql, outbox) == [], "not committed yet"
        assert (conn.row_factory, conn.cursor_factory, conn.autocommit) == (*options.values(), False)
    assert stored(sql, outbox) == [1]


@both
def test_an_append_works_in_a_pipeline(sql: Conn, service: Conn, outbox: Outbox) -> None:
    with service.pipeline(), service.transaction():
        service.execute("SELECT 1")
        assert append(service, outbox) == 1
        assert append(service, outbox) == 2
    assert stored(sql, outbox) == [1, 2]


@both
def test_an_append_in_a_failed_transaction_raises_and_leaves_the_transaction_to_the_caller(
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


def test_every_argument_of_an_append_is_stored(sql: Conn) -> None:
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
def test_i12_defaults_are_the_servers_clock_and_no_labels(
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


def test_an_append_raises_the_error_of_postgresql(service: Conn, sql: Conn) -> None:
    with pytest.raises(InvalidTextRepresentation):
        append_completion_event(service, "not a uuid", "success")
    with pytest.raises(NotNullViolation):
        append_lease_event(service, "job", "acquired", partition_key=None)  # type: ignore[arg-type]
    assert stored(sql, LEASE) == stored(sql, COMPLETION) == []


@pytest.mark.parametrize("columns", [{"kind": "success"}, {"schema": "a.b"}, {"schema": 'x"; DROP TABLE kv; --'}])
def test_an_invalid_argument_is_refused_before_the_transaction_fails(
    service: Conn, sql: Conn, columns: dict[str, Any]
) -> None:
    with service.transaction():
        with pytest.raises(UsageError, match=r"^(schema|event_type): "):
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
    assert append(sql, outbox) == 2, "the second event in schema elsewhere"
    assert stored(sql, outbox) == [1]


# -- two schemas


@both
def test_two_schemas_in_one_database_share_neither_wakeups_nor_locks(
    sql: Conn, elsewhere: Settings, open_listener: OpenListener, outbox: Outbox
) -> None:
    here, there = open_listener(outbox), open_listener(outbox, "elsewhere")
    request_wakeups(sql, outbox)
    request_wakeups(sql, outbox, "elsewhere")
    with sql.transaction():
        append(sql, outbox, schema="elsewhere")
        assert outbox_locks(sql, outbox) == {}
        assert outbox_locks(sql, outbox, "elsewhere") == {sql.info.backend_pid: "ShareLock"}
    assert here.received() == []
    assert there.received() == [(sql.info.backend_pid, "")]
    assert append(sql, outbox) == 1


@pytest.mark.parametrize("outbox", ["lease_events", "completion_events"])
def test_i18_an_insert_that_a_foreign_lock_holds_up_names_its_holder(
    outbox: str, settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    role = f"stranger_{uuid4().hex[:8]}"
    sql.execute(f"CREATE ROLE {role} LOGIN".encode())
    warnings: list[str] = []
    column = "event_type" if outbox == "lease_events" else "outcome"
    insert = f"INSERT INTO pgcoord.{outbox} (execution_id, {column}) VALUES (gen_random_uuid(), 'x')"
    with (
        psycopg.connect(make_conninfo(settings.dsn, user=role), autocommit=True) as stranger,
        psycopg.connect(settings.dsn, autocommit=True, options="-c lock_timeout=1") as writer,
    ):
        writer.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
        oid = value(sql, "SELECT %s::regclass::oid::integer", f"pgcoord.{outbox}")
        stranger.execute("SELECT pg_advisory_lock(%s, 0)", [oid])
        holder = f"held by pid {stranger.info.backend_pid} (, role {role})"
        with pytest.raises(psycopg.errors.LockNotAvailable) as refused:
            writer.execute(insert.encode())
        assert holder in (refused.value.diag.message_primary or "")
        assert [holder in warning for warning in warnings] == [True]
        stranger.execute("SELECT pg_advisory_unlock_all()")
        assert writer.execute(insert.encode()).rowcount == 1
    assert len(warnings) == 1
