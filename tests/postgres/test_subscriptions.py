"""Subscriptions: one owner of each name, and a checkpoint that only its owner moves, and only forward (rule I13)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from threading import Barrier, Event
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier

from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.advisory_keys import lock_key
from pgcoord_cli.core.database.migrations import apply
from pgcoord_cli.core.database.session import command_session, migration_session
from pgcoord_cli.core.events import subscriptions
from pgcoord_cli.core.events.cursor import from_cursor
from pgcoord_cli.core.events.history import MAX_EXECUTION_ID, PassedEvent
from pgcoord_cli.core.events.notices import Notice
from pgcoord_cli.core.events.outbox import COMPLETION, LEASE, Outbox
from pgcoord_cli.core.events.subscriptions import Subscription, checkpoint
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.errors import Busy, ConnectionFailed, Fenced, UsageError
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until

Conn = psycopg.Connection[Any]


class Owners:
    """Acquires subscriptions, records their notices and releases each once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._owners: list[Subscription] = []
        self.notices: list[str] = []

    def __call__(self, name: str = "mailer", outbox: Outbox = LEASE, settings: Settings | None = None) -> Subscription:
        self._owners.append(Subscription(settings or self._settings, name, outbox, self._on_notice))
        return self._owners[-1]

    def _on_notice(self, notice: Notice) -> None:
        self.notices.append(f"{notice.type} {from_cursor(notice.cursor, '')}")

    def release_all(self) -> None:
        """Closes every subscription."""
        while self._owners:
            self._owners.pop().close()


@pytest.fixture
def acquire(settings: Settings) -> Iterator[Owners]:
    """Acquires subscriptions, and releases those that are left after the test."""
    owners = Owners(settings)
    yield owners
    owners.release_all()


def row_of(sql: Conn, name: str = "mailer") -> tuple[Any, ...] | None:
    """Returns the fence and the position of a subscription."""
    return sql.execute("SELECT fence, last_position FROM subscriptions WHERE subscription_name = %s", [name]).fetchone()


def owner_pid(sql: Conn, name: str = "mailer") -> int | None:
    """Returns the backend pid of the session that holds the lock of a subscription, or None."""
    query = """
        SELECT pid FROM pg_locks
         WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint << 32 | objid::bigint) = %s
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """
    row = sql.execute(query, [lock_key("pgcoord", f"subscription {name}")]).fetchone()
    return row and row[0]


def terminate_owner(sql: Conn) -> None:
    """Terminates the owner's session, and waits until its lock is free."""
    sql.execute("SELECT pg_terminate_backend(%s)", [owner_pid(sql)])
    until(lambda: owner_pid(sql) is None)


# -- one owner


def test_the_first_owner_of_a_name_has_no_position(sql: Conn, acquire: Owners) -> None:
    assert acquire().load() is None
    assert row_of(sql) == (1, None)


def test_i13_a_second_owner_is_refused_at_once_and_the_message_names_the_first(sql: Conn, acquire: Owners) -> None:
    acquire().save(3)
    with pytest.raises(Busy) as caught:
        acquire()
    assert caught.value.exit_code == 5
    assert f"pid {owner_pid(sql)} (pgcoord/subscription" in caught.value.message
    assert row_of(sql) == (1, 3), "the refusal drew no fence"


def test_i13_of_several_concurrent_acquisitions_one_succeeds(sql: Conn, acquire: Owners) -> None:
    together = Barrier(6)

    def compete() -> bool:
        together.wait(TIMEOUT)
        try:
            acquire()
        except Busy:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(compete) for _ in range(6)]
    assert sorted(each.result() for each in results) == [False] * 5 + [True]
    assert row_of(sql) == (1, None)


def test_i13_every_owner_draws_the_next_fence_and_loads_the_last_position(sql: Conn, acquire: Owners) -> None:
    for number in range(1, 4):
        owner = acquire()
        assert owner.load() == (number - 1 or None)
        owner.save(number)
        assert row_of(sql) == (number, number)
        acquire.release_all()
        until(lambda: owner_pid(sql) is None)


def test_a_name_is_free_after_its_owners_session_has_ended(sql: Conn, acquire: Owners) -> None:
    acquire().save(3)
    terminate_owner(sql)
    assert acquire().load() == 3


def test_names_are_independent(sql: Conn, acquire: Owners) -> None:
    names = ["mailer", "Mailer", "mailer ", "billing", "é", "'; DROP TABLE subscriptions; --", "x" * 200]
    for position, name in enumerate(names, start=1):
        acquire(name).save(position)
    assert [row_of(sql, name) for name in names] == [(1, position) for position in range(1, len(names) + 1)]


def test_schemas_are_independent(settings: Settings, sql: Conn, acquire: Owners) -> None:
    elsewhere = replace(settings, schema="elsewhere", schema_given=True)
    with migration_session(elsewhere, read_only=False) as (conn, _):
        apply(conn, elsewhere.schema, None, lambda _: None)
    acquire().save(3)
    acquire(settings=elsewhere).save(7)
    assert row_of(sql) == (1, 3)


# -- the checkpoint


def test_i13_a_position_only_grows(sql: Conn, acquire: Owners) -> None:
    owner = acquire()
    for position, expected in ((0, 0), (5, 5), (3, 5), (5, 5), (2**63 - 1, 2**63 - 1), (6, 2**63 - 1)):
        owner.save(position)
        assert row_of(sql) == (1, expected)


def test_i13_an_owner_that_lost_its_session_cannot_save_after_another_acquisition(sql: Conn, acquire: Owners) -> None:
    first = acquire()
    first.save(3)
    terminate_owner(sql)
    second = acquire()
    with pytest.raises(Busy, match=f"pid {owner_pid(sql)}"):
        first.save(9)
    assert row_of(sql) == (2, 3)
    second.save(4)
    assert row_of(sql) == (2, 4)


def test_i13_a_save_under_an_older_fence_changes_nothing(sql: Conn, acquire: Owners) -> None:
    """As when a pooler or DISCARD ALL released the lock but kept the connection."""
    owner = acquire()
    owner.save(3)
    sql.execute("UPDATE subscriptions SET fence = fence + 1")
    with pytest.raises(Fenced) as caught:
        owner.save(9)
    assert caught.value.exit_code == 6
    assert row_of(sql) == (2, 3)


def test_i13_an_owner_that_lost_its_session_acquires_its_free_name_again_with_a_new_fence(
    sql: Conn, acquire: Owners
) -> None:
    owner = acquire()
    owner.save(3)
    terminate_owner(sql)
    owner.save(4)
    assert acquire.notices == ["disconnected 4", "connected 4"]
    assert row_of(sql) == (2, 4)
    assert owner_pid(sql)
    with pytest.raises(Busy):
        acquire()


def test_i13_an_owner_that_lost_its_session_does_not_move_back_the_position_of_another(
    settings: Settings, sql: Conn, acquire: Owners
) -> None:
    first = acquire()
    terminate_owner(sql)
    with closing(Subscription(settings, "mailer", LEASE)) as second:
        second.save(7)
    until(lambda: owner_pid(sql) is None)
    first.save(4)
    assert row_of(sql) == (3, 7)


def test_stop_ends_a_save_that_waits_for_a_connection(
    sql: Conn, acquire: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, tried = acquire(), Event()

    def unreachable(*_args: object, **_named: object) -> None:
        tried.set()
        raise ConnectionFailed("the server is down")

    monkeypatch.setattr(subscriptions, "open_session", unreachable)
    terminate_owner(sql)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(owner.save, 4)
        assert tried.wait(TIMEOUT)
        owner.stop()
        try:
            assert isinstance(saving.exception(TIMEOUT), ConnectionFailed)
        finally:
            monkeypatch.undo()  # a save that went on would keep the test from ending
    assert row_of(sql) == (1, None)


# -- one outbox


def test_a_subscription_belongs_to_one_outbox(sql: Conn, acquire: Owners) -> None:
    acquire().save(3)
    terminate_owner(sql)
    with pytest.raises(UsageError, match="'mailer' is a subscription of lease_events, not of completion_events"):
        acquire(outbox=COMPLETION)
    until(lambda: owner_pid(sql) is None)
    assert acquire().load() == 3


def test_a_subscription_without_an_outbox_gets_that_of_its_first_tail(sql: Conn, acquire: Owners) -> None:
    sql.execute("INSERT INTO subscriptions (subscription_name) VALUES ('mailer')")
    acquire(outbox=COMPLETION)
    assert sql.execute("SELECT outbox FROM subscriptions").fetchone() == ("completion_events",)


# -- reading the position


@pytest.fixture
def reader(settings: Settings) -> Iterator[Conn]:
    with command_session(settings, "tail", writes=False) as conn:
        yield conn


def test_the_position_of_an_owned_subscription_can_be_read(acquire: Owners, reader: Conn) -> None:
    owner = acquire()
    assert checkpoint(reader, "mailer", LEASE) == (None, None)
    owner.save(3)
    assert checkpoint(reader, "mailer", LEASE) == (3, None)
    with pytest.raises(UsageError, match="not of completion_events"):
        checkpoint(reader, "mailer", COMPLETION)
    with pytest.raises(UsageError, match="there is no subscription 'Mailer'"):
        checkpoint(reader, "Mailer", LEASE)


def test_the_privileges_of_a_client_are_enough(settings: Settings, sql: Conn, acquire: Owners) -> None:
    role = f"client_{uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"client": [role]}, dry_run=False)
    service = replace(settings, dsn=make_conninfo(settings.dsn, user=role))
    acquire(settings=service).save(3)
    with pytest.raises(Busy, match="by pid"):
        acquire(settings=service)
    assert row_of(sql) == (1, 3)


# -- values that a client wrote itself

EVENT = {"event_id": 3, "execution_id": "e", "committed_at_ms": 1}


@pytest.mark.parametrize(
    ("column", "bad", "constraint"),
    [
        ("subscription_name", "", "name_has_1_to_200_characters"),
        ("subscription_name", "x" * 201, "name_has_1_to_200_characters"),
        ("outbox", "kv", "outbox_exists"),
        ("outbox", "", "outbox_exists"),
        ("last_position", -1, "position_in_an_outbox_is_not_negative"),
        ("fence", -1, "fence_is_not_negative"),
        *(
            ("passed", text, "passed_identifies_an_event")
            for text in (
                "null",
                "[]",
                "{}",
                '"text"',
                *(
                    json.dumps(EVENT | change)
                    for change in (
                        {"event_id": None},
                        {"event_id": "3"},
                        {"event_id": -3},
                        {"event_id": 3.5},
                        {"event_id": 2**63},
                        {"execution_id": 7},
                        {"committed_at_ms": "now"},
                        {"committed_at_ms": 10**30},
                    )
                ),
            )
        ),
        *(("filters", text, "filters_are_an_object") for text in ("null", "[]", '"text"', "7")),
        *(
            ("updated_at", text, "updated_at_is_a_date")
            for text in ("infinity", "-infinity", "10000-01-02", "0044-03-15 BC")
        ),
    ],
)
def test_a_value_that_no_command_could_read_is_refused(column: str, bad: Any, constraint: str, sql: Conn) -> None:
    values = {"subscription_name": "mailer", "outbox": "lease_events", "last_position": 3} | {column: bad}
    names = SQL(", ").join(map(Identifier, values))
    insert = SQL("INSERT INTO subscriptions ({}) VALUES ({})").format(names, SQL(", ").join([SQL("%s")] * len(values)))
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        sql.execute(insert, list(values.values()))
    assert refused.value.diag.constraint_name == constraint


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_a_lock_name_that_no_command_takes_is_refused(name: str, sql: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="name_has_1_to_200_characters"):
        sql.execute("INSERT INTO lock_names VALUES (1, %s)", [name])


@pytest.mark.parametrize(
    "passed",
    [
        PassedEvent(3, "", 0),
        PassedEvent(2**63 - 1, 'a "quoted" é name', 2**63 - 1),
        PassedEvent(1, "e" * MAX_EXECUTION_ID, -(2**63)),
    ],
)
def test_every_event_that_a_tail_can_pass_is_saved_and_shown(passed: PassedEvent, acquire: Owners, sql: Conn) -> None:
    acquire(name="x" * 200).save(passed.event_id, passed)
    (stored,) = sql.execute("SELECT passed::text FROM subscriptions").fetchone() or (None,)
    assert PassedEvent.from_json(stored or "") == passed
    assert str(passed).startswith(f"execution {passed.execution_id}, inserted at ")


def test_positions_of_an_application_may_be_negative_and_are_no_cursors(settings: Settings, reader: Conn) -> None:
    with acquire_leadership(settings.dsn, "mailer") as owner:
        owner.checkpoint.save(-7)
        assert owner.checkpoint.load() == -7
    (listed,) = subscriptions.list_subscriptions(reader)
    assert (listed["last_position"], listed["cursor"]) == (-7, None)


def test_the_row_of_an_application_does_not_become_one_of_a_tail(
    settings: Settings, sql: Conn, acquire: Owners
) -> None:
    with acquire_leadership(settings.dsn, "mailer") as owner:
        owner.checkpoint.save(7)
    with pytest.raises(UsageError, match="'mailer' is a subscription of no outbox, not of lease_events"):
        acquire()
    assert sql.execute("SELECT outbox, last_position FROM subscriptions").fetchone() == (None, 7)
