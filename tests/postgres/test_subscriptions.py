"""Subscriptions: one owner a name, and a checkpoint that only its owner moves, and only forward (rule I13)."""

from __future__ import annotations

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
from pgcoord_cli.core.events.outbox import COMPLETION, LEASE, Outbox
from pgcoord_cli.core.events.subscriptions import Subscription, checkpoint
from pgcoord_cli.core.events.tail import Notice
from pgcoord_cli.errors import Busy, ConnectionFailed, Fenced, UsageError
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until

Conn = psycopg.Connection[Any]


class Owners:
    """Owns subscriptions and gives each back once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._owners: list[Subscription] = []
        self.said: list[str] = []

    def __call__(self, name: str = "mailer", outbox: Outbox = LEASE, settings: Settings | None = None) -> Subscription:
        self._owners.append(Subscription(settings or self._settings, name, outbox, self._hear))
        return self._owners[-1]

    def _hear(self, notice: Notice) -> None:
        self.said.append(f"{notice.type} {from_cursor(notice.cursor, '')}")

    def give_back(self) -> None:
        """All of them."""
        while self._owners:
            self._owners.pop().close()


@pytest.fixture
def acquire(settings: Settings) -> Iterator[Owners]:
    """Owns a subscription; gives back those that are left when the test is over."""
    owners = Owners(settings)
    yield owners
    owners.give_back()


def row_of(sql: Conn, name: str = "mailer") -> tuple[Any, ...] | None:
    """Fence and position."""
    return sql.execute("SELECT fence, last_position FROM subscriptions WHERE subscription_name = %s", [name]).fetchone()


def owner_pid(sql: Conn, name: str = "mailer") -> int | None:
    """The session that holds the lock of that name."""
    query = """
        SELECT pid FROM pg_locks
         WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint << 32 | objid::bigint) = %s
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """
    row = sql.execute(query, [lock_key("pgcoord", f"subscription {name}")]).fetchone()
    return row and row[0]


def cut_off(sql: Conn) -> None:
    """Ends the owner's connection without its knowing."""
    sql.execute("SELECT pg_terminate_backend(%s)", [owner_pid(sql)])
    until(lambda: owner_pid(sql) is None)


# -- one owner


def test_the_first_who_comes_owns_a_name_and_stands_nowhere(sql: Conn, acquire: Owners) -> None:
    assert acquire().load() is None
    assert row_of(sql) == (1, None)


def test_i13_a_second_owner_is_refused_at_once_and_told_who_the_first_is(sql: Conn, acquire: Owners) -> None:
    acquire().save(3)
    with pytest.raises(Busy) as caught:
        acquire()
    assert caught.value.exit_code == 5
    assert f"pid {owner_pid(sql)} (pgcoord/subscription" in caught.value.message
    assert row_of(sql) == (1, 3), "nor has it drawn a fence"


def test_i13_of_many_who_come_at_once_one_owns_the_name(sql: Conn, acquire: Owners) -> None:
    together = Barrier(6)

    def come() -> bool:
        together.wait(TIMEOUT)
        try:
            acquire()
        except Busy:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        came = [pool.submit(come) for _ in range(6)]
    assert sorted(each.result() for each in came) == [False] * 5 + [True]
    assert row_of(sql) == (1, None)


def test_i13_every_owner_draws_the_next_fence_and_stands_where_the_last_one_stood(sql: Conn, acquire: Owners) -> None:
    for number in range(1, 4):
        owner = acquire()
        assert owner.load() == (number - 1 or None)
        owner.save(number)
        assert row_of(sql) == (number, number)
        acquire.give_back()
        until(lambda: owner_pid(sql) is None)


def test_a_name_is_free_again_when_its_owners_connection_ends(sql: Conn, acquire: Owners) -> None:
    acquire().save(3)
    cut_off(sql)
    assert acquire().load() == 3


def test_names_are_apart(sql: Conn, acquire: Owners) -> None:
    names = ["mailer", "Mailer", "mailer ", "billing", "é", "'; DROP TABLE subscriptions; --", "x" * 200]
    for position, name in enumerate(names, start=1):
        acquire(name).save(position)
    assert [row_of(sql, name) for name in names] == [(1, position) for position in range(1, len(names) + 1)]


def test_schemas_are_apart(settings: Settings, sql: Conn, acquire: Owners) -> None:
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


def test_i13_an_owner_that_was_cut_off_saves_nothing_once_another_has_the_name(sql: Conn, acquire: Owners) -> None:
    first = acquire()
    first.save(3)
    cut_off(sql)
    second = acquire()
    with pytest.raises(Busy, match=f"pid {owner_pid(sql)}"):
        first.save(9)
    assert row_of(sql) == (2, 3)
    second.save(4)
    assert row_of(sql) == (2, 4)


def test_i13_a_save_under_an_older_fence_changes_nothing(sql: Conn, acquire: Owners) -> None:
    """As when a pooler or a reset of the session took the lock away, but not the connection."""
    owner = acquire()
    owner.save(3)
    sql.execute("UPDATE subscriptions SET fence = fence + 1")
    with pytest.raises(Fenced) as caught:
        owner.save(9)
    assert caught.value.exit_code == 6
    assert row_of(sql) == (2, 3)


def test_i13_an_owner_that_was_cut_off_takes_its_free_name_again_under_a_new_fence(sql: Conn, acquire: Owners) -> None:
    owner = acquire()
    owner.save(3)
    cut_off(sql)
    owner.save(4)
    assert acquire.said == ["disconnected 4", "connected 4"]
    assert row_of(sql) == (2, 4)
    assert owner_pid(sql)
    with pytest.raises(Busy):
        acquire()


def test_i13_an_owner_that_was_cut_off_does_not_move_back_what_another_did_meanwhile(
    settings: Settings, sql: Conn, acquire: Owners
) -> None:
    first = acquire()
    cut_off(sql)
    with closing(Subscription(settings, "mailer", LEASE)) as second:
        second.save(7)
    until(lambda: owner_pid(sql) is None)
    first.save(4)
    assert row_of(sql) == (3, 7)


def test_a_save_that_waits_for_a_server_gives_up_when_told_to_stop(
    sql: Conn, acquire: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, tried = acquire(), Event()

    def unreachable(*_args: object, **_named: object) -> None:
        tried.set()
        raise ConnectionFailed("the server is down")

    monkeypatch.setattr(subscriptions, "open_session", unreachable)
    cut_off(sql)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(owner.save, 4)
        assert tried.wait(TIMEOUT)
        owner.stop()
        try:
            assert isinstance(saving.exception(TIMEOUT), ConnectionFailed)
        finally:
            monkeypatch.undo()  # one that does not give up would keep the test from ending
    assert row_of(sql) == (1, None)


# -- one outbox


def test_a_subscription_belongs_to_one_outbox(sql: Conn, acquire: Owners) -> None:
    acquire().save(3)
    cut_off(sql)
    with pytest.raises(UsageError, match="'mailer' is a subscription of lease_events, not of completion_events"):
        acquire(outbox=COMPLETION)
    until(lambda: owner_pid(sql) is None)
    assert acquire().load() == 3


def test_a_subscription_that_had_no_outbox_gets_the_first_that_asks(sql: Conn, acquire: Owners) -> None:
    sql.execute("INSERT INTO subscriptions (subscription_name) VALUES ('mailer')")
    acquire(outbox=COMPLETION)
    assert sql.execute("SELECT outbox FROM subscriptions").fetchone() == ("completion_events",)


# -- looking


@pytest.fixture
def looker(settings: Settings) -> Iterator[Conn]:
    with command_session(settings, "tail", writes=False) as conn:
        yield conn


def test_anybody_can_look_where_a_subscription_stands(acquire: Owners, looker: Conn) -> None:
    owner = acquire()
    assert checkpoint(looker, "mailer", LEASE) is None
    owner.save(3)
    assert checkpoint(looker, "mailer", LEASE) == 3
    with pytest.raises(UsageError, match="not of completion_events"):
        checkpoint(looker, "mailer", COMPLETION)
    with pytest.raises(UsageError, match="there is no subscription 'Mailer'"):
        checkpoint(looker, "Mailer", LEASE)


def test_a_clients_rights_are_enough(settings: Settings, sql: Conn, acquire: Owners) -> None:
    role = f"client_{uuid4().hex[:8]}"
    sql.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    with command_session(settings, "migrate grant", writes=True) as conn:
        grants.grant(conn, {"client": [role]}, dry_run=False)
    service = replace(settings, dsn=make_conninfo(settings.dsn, user=role))
    acquire(settings=service).save(3)
    with pytest.raises(Busy, match="by pid"):
        acquire(settings=service)
    assert row_of(sql) == (1, 3)
