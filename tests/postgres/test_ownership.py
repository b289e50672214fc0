"""Ownership of a name by an advisory lock (core.locks.ownership): contract, lock and checkpoint (rule I13)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from pgcoord_cli.core.database.advisory_keys import lock_holder
from pgcoord_cli.core.database.migrations import apply
from pgcoord_cli.core.database.session import migration_session
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.locks import ownership
from pgcoord_cli.core.locks.ownership import Ownership, acquire_leadership, subscription_lock
from pgcoord_cli.db.connection import connect
from pgcoord_cli.errors import (
    CoordinationError,
    Fenced,
    KeyCollision,
    LockNotAcquired,
    PermissionDenied,
    PgcoordError,
    SchemaMissing,
    UsageError,
)
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.postgres.ownership_contract import ELSEWHERE, Implementation, Owner, OwnershipContract

Conn = psycopg.Connection[Any]

HOLDER = """
import sys
from pgcoord_cli.core.locks.ownership import acquire_leadership
owner = acquire_leadership(*sys.argv[1:])
print("owned", flush=True)
sys.stdin.read()
"""

FORKING = """
import os, sys
from pgcoord_cli.core.locks.ownership import acquire_leadership
from pgcoord_cli.errors import UsageError

with acquire_leadership(*sys.argv[1:]) as owner:
    if (child := os.fork()) == 0:
        # Everything that a child may do with the inherited owner, including a normal exit.
        for call in (owner.checkpoint.load, lambda: owner.checkpoint.save(7)):
            try:
                call()
            except UsageError as refused:
                assert f"the ownership of 'mailer' was opened by process {os.getppid()}" in refused.message
                assert refused.hint
            else:
                sys.exit("not refused")
        owner.release()
        with owner:
            pass
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    owner.checkpoint.save(3)
    print("owned", flush=True)
    sys.stdin.read()
"""


LEAVES_A_CHILD = """
import os, signal, sys, psycopg
from pgcoord_cli.core.locks.ownership import acquire_leadership

dsn, kind = sys.argv[1:]
target = psycopg.connect(dsn) if kind == "connection" else dsn
owner = acquire_leadership(target, "mailer")
if os.fork() == 0:
    print(os.getpid(), flush=True)
    signal.pause()
sys.stdin.read()
os._exit(0)
"""


def python(text: str, *words: str) -> Sequence[str]:
    """Returns a command that runs this Python text."""
    return [sys.executable, "-c", text, *words]


def holder_pid(sql: Conn, name: str = "mailer") -> int | None:
    """Returns the backend pid of the session that owns the name, or None."""
    # The named statements have $1 parameters, which need a raw cursor.
    with psycopg.connect(sql.info.dsn, cursor_factory=psycopg.RawCursor) as conn:
        holder = lock_holder(conn, subscription_lock("pgcoord", name))
    return holder and holder.pid


def end_session(sql: Conn, name: str = "mailer") -> None:
    """Terminates the owner's session, and waits for its end."""
    pid = holder_pid(sql, name)
    assert pid
    assert value(sql, "SELECT pg_terminate_backend(%s, 30000)", pid)


def no_advisory_locks(sql: Conn) -> bool:
    """Returns whether no session of this database holds an advisory lock; a closed session may take a moment to end."""
    return not value(
        sql,
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )


@pytest.fixture
def elsewhere(settings: Settings) -> None:
    """A second schema in the test's database."""
    with migration_session(replace(settings, schema=ELSEWHERE, schema_given=True), read_only=False) as (conn, _):
        apply(conn, ELSEWHERE, None, lambda _: None)


# -- the contract


class ByDsn:
    """Over a connection that acquire_leadership opens."""

    def __init__(self, dsn: str, sql: Conn) -> None:
        self._dsn = dsn
        self._sql = sql

    def acquire(self, name: str, schema: str) -> Owner:
        return acquire_leadership(self._dsn, name, schema=schema)

    def acquire_without_a_server(self, name: str) -> Owner:
        return acquire_leadership(make_conninfo(self._dsn, host="/nowhere"), name)

    def holder(self, name: str) -> Sequence[str]:
        return python(HOLDER, self._dsn, name)

    def end_session(self, name: str) -> None:
        end_session(self._sql, name)


class ByConnection(ByDsn):
    """Over a connection of the caller, which need not be in autocommit mode."""

    def acquire(self, name: str, schema: str) -> Owner:
        return acquire_leadership(psycopg.connect(self._dsn), name, schema=schema)

    def acquire_without_a_server(self, name: str) -> Owner:
        conn = psycopg.connect(self._dsn)
        assert value(self._sql, "SELECT pg_terminate_backend(%s, 30000)", conn.info.backend_pid)
        return acquire_leadership(conn, name)


class TestByDsn(OwnershipContract):
    @pytest.fixture
    def implementation(self, settings: Settings, sql: Conn, elsewhere: None) -> Implementation:
        return ByDsn(settings.dsn, sql)


class TestByConnection(OwnershipContract):
    @pytest.fixture
    def implementation(self, settings: Settings, sql: Conn, elsewhere: None) -> Implementation:
        return ByConnection(settings.dsn, sql)


# -- the lock


Acquire = Callable[..., Ownership]


@pytest.fixture
def acquire(settings: Settings) -> Iterator[Acquire]:
    """Acquires names, and releases them after the test."""
    owners: list[Ownership] = []

    def own(name: str = "mailer", target: str | Conn = settings.dsn) -> Ownership:
        owners.append(acquire_leadership(target, name))
        return owners[-1]

    yield own
    for owner in owners:
        owner.release()


def test_the_block_of_an_owner_releases_the_name_after_an_error_too(settings: Settings, sql: Conn) -> None:
    with pytest.raises(ZeroDivisionError), acquire_leadership(settings.dsn, "mailer"):
        assert holder_pid(sql)
        raise ZeroDivisionError
    until(lambda: holder_pid(sql) is None)


def test_a_refusal_names_the_holder_and_draws_no_fence(sql: Conn, acquire: Acquire) -> None:
    acquire()
    with pytest.raises(LockNotAcquired, match=rf"held by pid {holder_pid(sql)} \(pgcoord/leadership, local\) since"):
        acquire()
    assert value(sql, "SELECT fence FROM subscriptions") == 1


def test_a_connection_of_the_caller_holds_the_lock(settings: Settings, sql: Conn, acquire: Acquire) -> None:
    conn = psycopg.connect(settings.dsn, application_name="mine")
    owner = acquire(target=conn)
    assert holder_pid(sql) == conn.info.backend_pid
    with pytest.raises(LockNotAcquired, match="mine"):
        acquire()
    owner.release()
    assert conn.closed


def test_a_connection_of_the_caller_is_closed_after_a_refusal(settings: Settings, sql: Conn, acquire: Acquire) -> None:
    acquire()
    conn = psycopg.connect(settings.dsn)
    with pytest.raises(LockNotAcquired):
        acquire(target=conn)
    assert conn.closed


def test_a_connection_that_is_closed_or_in_a_transaction_is_a_coordination_error(settings: Settings, sql: Conn) -> None:
    closed, busy = psycopg.connect(settings.dsn), psycopg.connect(settings.dsn)
    closed.close()
    busy.execute("SELECT 1")
    for conn in (closed, busy):
        with pytest.raises(CoordinationError):
            acquire_leadership(conn, "mailer")
    assert busy.closed
    assert value(sql, "SELECT count(*) FROM subscriptions") == 0


def test_a_save_without_the_privilege_raises_permission_denied(settings: Settings, sql: Conn) -> None:
    with (
        acquire_leadership(settings.dsn, "billing") as owner,
        sql.transaction(force_rollback=True),
        pytest.raises(PermissionDenied, match="subscriptions"),
    ):
        sql.execute("CREATE ROLE role_without_checkpoints")
        sql.execute("GRANT USAGE ON SCHEMA pgcoord TO role_without_checkpoints")
        sql.execute("SET LOCAL ROLE role_without_checkpoints")
        owner.checkpoint.save(7, sql)


def test_a_forked_child_does_not_release_the_name_of_its_parent(
    settings: Settings, sql: Conn, acquire: Acquire
) -> None:
    command = python(FORKING, settings.dsn, "mailer")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"owned\n"
        assert holder_pid(sql)
        with pytest.raises(LockNotAcquired):
            acquire()
        assert parent.stdin
        parent.stdin.close()
    assert parent.returncode == 0
    until(lambda: holder_pid(sql) is None)
    assert acquire().checkpoint.load() == 3


@pytest.mark.parametrize("kind", ["dsn", "connection"])
def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_name(
    settings: Settings, sql: Conn, kind: str
) -> None:
    command = python(LEAVES_A_CHILD, settings.dsn, kind)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as parent:
        assert parent.stdout
        assert parent.stdin
        child = int(parent.stdout.readline())
        try:
            assert holder_pid(sql)
            parent.stdin.close()
            assert parent.wait(TIMEOUT) == 0
            until(lambda: holder_pid(sql) is None)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["dsn", "connection"])
def test_a_released_name_is_free_when_release_returns(settings: Settings, sql: Conn, kind: str) -> None:
    for _ in range(20):
        owner = acquire_leadership(settings.dsn if kind == "dsn" else psycopg.connect(settings.dsn), "mailer")
        owner.release()
        assert value(sql, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


def test_release_returns_when_the_session_has_been_terminated(settings: Settings, sql: Conn) -> None:
    owner = acquire_leadership(settings.dsn, "mailer")
    sql.execute("SELECT pg_terminate_backend(%s, 10000)", [holder_pid(sql)])
    owner.release()
    owner.release()
    assert holder_pid(sql) is None


def test_a_key_under_a_name_that_does_not_have_it_is_reported_with_its_cure(settings: Settings, sql: Conn) -> None:
    key = subscription_lock("pgcoord", "mailer")
    sql.execute("INSERT INTO lock_names VALUES (%s, 'other')", [key])
    with pytest.raises(PgcoordError, match="the row of 'mailer' in lock_names has the name 'other'") as refused:
        acquire_leadership(settings.dsn, "mailer")
    assert refused.value.hint
    sql.execute(refused.value.hint.partition(": ")[2])
    acquire_leadership(settings.dsn, "mailer").release()


def test_a_fence_at_its_maximum_is_reported(settings: Settings, sql: Conn) -> None:
    acquire_leadership(settings.dsn, "mailer").release()
    sql.execute("UPDATE subscriptions SET fence = 9223372036854775807")
    with pytest.raises(PgcoordError, match="the fence of 'mailer' is at its maximum"):
        acquire_leadership(settings.dsn, "mailer")
    until(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0)
    sql.execute("UPDATE subscriptions SET fence = 1")
    with acquire_leadership(settings.dsn, "mailer") as owner:
        assert owner.fence == 2


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b"])
def test_an_invalid_name_is_refused_before_a_connection_is_opened(name: str) -> None:
    with pytest.raises(UsageError, match="subscription_name: a name must have 1 to 200 characters"):
        acquire_leadership("host=/nowhere", name)


# -- a failure is not a refusal


@pytest.mark.parametrize("change", [{"host": "/nowhere"}, {"dbname": "missing"}, {"user": "missing"}], ids=str)
def test_a_wrong_address_is_a_coordination_error(settings: Settings, change: dict[str, str]) -> None:
    with pytest.raises(CoordinationError) as failed:
        acquire_leadership(make_conninfo(settings.dsn, **change), "mailer")
    assert failed.value.exit_code == 4
    assert not isinstance(failed.value, LockNotAcquired)


def test_an_invalid_connection_string_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        acquire_leadership("host", "mailer")


def test_a_schema_that_was_not_migrated_raises_schema_missing(settings: Settings) -> None:
    with pytest.raises(SchemaMissing):
        acquire_leadership(settings.dsn, "mailer", schema="elsewhere")


def test_omitted_arguments_come_from_the_environment(
    settings: Settings, sql: Conn, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCOORD_DSN", settings.dsn)
    monkeypatch.setenv("PGCOORD_SCHEMA", ELSEWHERE)
    with acquire_leadership(None, "mailer") as owner, acquire_leadership(None, "mailer", schema="pgcoord"):
        owner.checkpoint.save(4)
    with acquire_leadership(psycopg.connect(settings.dsn), "another"):
        pass
    assert value(
        sql, f"SELECT array_agg(subscription_name ORDER BY subscription_name) FROM {ELSEWHERE}.subscriptions"
    ) == [
        "another",
        "mailer",
    ]
    assert value(sql, f"SELECT last_position FROM {ELSEWHERE}.subscriptions WHERE subscription_name = 'mailer'") == 4


@pytest.mark.parametrize("schema", ["", "Upper", "a.b", 'x"; DROP TABLE kv; --', "pg_catalog"])
def test_an_invalid_schema_is_a_usage_error(settings: Settings, schema: str) -> None:
    with psycopg.connect(settings.dsn) as conn:
        for target in (settings.dsn, conn):
            with pytest.raises(UsageError, match="schema: "):
                acquire_leadership(target, "mailer", schema=schema)
        assert not conn.closed, "the connection is left open"


def test_a_target_that_is_not_a_connection_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="target: dict"):
        acquire_leadership({"host": "localhost"}, "mailer")  # type: ignore[arg-type]


def test_a_stopped_server_is_a_coordination_error_for_every_call_of_an_owner(
    own_server: EmbeddedServer, own_settings: Settings
) -> None:
    with acquire_leadership(own_settings.dsn, "mailer") as owner:
        own_server.stop()
        for attempt in (owner.checkpoint.load, lambda: owner.checkpoint.save(1)):
            with pytest.raises(CoordinationError):
                attempt()
        with pytest.raises(CoordinationError):
            acquire_leadership(own_settings.dsn, "mailer")


def test_two_names_with_one_key_are_reported(sql: Conn, acquire: Acquire, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two names with the same key are known, so every name gets the same one."""
    key = subscription_lock("pgcoord", "mailer")
    monkeypatch.setattr(ownership, "subscription_lock", lambda _schema, _name: key)
    sql.execute("INSERT INTO lock_names (lock_key, lock_name) VALUES (%s, 'billing')", [key])
    with pytest.raises(KeyCollision, match="'mailer' has the same 64-bit lock key as 'billing'"):
        acquire()
    until(lambda: no_advisory_locks(sql))
    assert value(sql, "SELECT count(*) FROM subscriptions") == 0


def test_an_acquisition_that_fails_after_the_lock_releases_it(settings: Settings, sql: Conn) -> None:
    """The lock is taken, but no fence can be drawn. Twice, since a lock left by the first would refuse the second."""
    sql.execute("ALTER TABLE subscriptions ADD CHECK (fence < 1)")
    for _ in range(2):
        with pytest.raises(CoordinationError) as failed:
            acquire_leadership(settings.dsn, "mailer")
        assert not isinstance(failed.value, LockNotAcquired)
        until(lambda: no_advisory_locks(sql))


# -- the checkpoint


@pytest.fixture
def service(settings: Settings) -> Iterator[Conn]:
    """The connection of a service, with its own transactions and search_path."""
    with psycopg.connect(settings.dsn) as conn:
        yield conn


def position(sql: Conn) -> int | None:
    """Returns the committed position of the subscription."""
    found: int | None = value(sql, "SELECT last_position FROM subscriptions")
    return found


def test_a_checkpoint_is_none_at_first_and_is_loaded_as_it_was_saved(acquire: Acquire) -> None:
    owner = acquire()
    assert owner.checkpoint.load() is None
    for number in (0, 7, 2**63 - 1):
        owner.checkpoint.save(number)
        assert owner.checkpoint.load() == number


def test_i13_a_position_never_goes_back(sql: Conn, acquire: Acquire, service: Conn) -> None:
    owner = acquire()
    for number, expected in ((5, 5), (3, 5), (5, 5), (6, 6), (0, 6)):
        owner.checkpoint.save(number, service)
        service.commit()
        assert position(sql) == expected


def test_i13_a_save_is_part_of_the_callers_transaction(sql: Conn, acquire: Acquire, service: Conn) -> None:
    owner = acquire()
    sql.execute("CREATE TABLE public.invoices (number integer)")
    for end, expected in ((service.rollback, (0, None)), (service.commit, (1, 4))):
        service.execute("INSERT INTO invoices VALUES (1)")
        owner.checkpoint.save(4, service)
        assert (owner.checkpoint.load(), position(sql)) == (None, None), (
            "it is invisible to other sessions before the commit"
        )
        end()
        assert (value(sql, "SELECT count(*) FROM public.invoices"), position(sql)) == expected


def test_every_acquisition_draws_a_greater_fence(sql: Conn, acquire: Acquire) -> None:
    for number in (1, 2, 3):
        assert acquire().fence == number
        end_session(sql)


def test_i13_an_owner_whose_session_ended_can_save_until_another_acquires(
    sql: Conn, acquire: Acquire, service: Conn
) -> None:
    """An owner does not learn that its session has ended; it must not save after another acquisition."""
    first = acquire()
    end_session(sql)
    first.checkpoint.save(1, service)
    service.commit()
    second = acquire()
    assert second.checkpoint.load() == 1
    with pytest.raises(Fenced) as refused:
        first.checkpoint.save(2, service)
    assert refused.value.exit_code == 6
    service.rollback()
    assert position(sql) == 1


def test_i13_an_acquisition_fences_the_former_owner_before_the_first_save(
    sql: Conn, acquire: Acquire, service: Conn
) -> None:
    first = acquire()
    first.release()
    until(lambda: holder_pid(sql) is None)
    second = acquire()
    service.execute("CREATE TABLE public.invoices (number integer)")
    with pytest.raises(Fenced):
        first.checkpoint.save(9, service)
    service.rollback()
    assert position(sql) is None
    assert value(sql, "SELECT to_regclass('public.invoices')") is None, "its writes roll back with the save"
    second.checkpoint.save(1, service)
    service.commit()
    assert position(sql) == 1


def test_i13_a_save_over_a_terminated_connection_is_a_coordination_error(sql: Conn, acquire: Acquire) -> None:
    first = acquire()
    end_session(sql)
    acquire()
    with pytest.raises(CoordinationError):
        first.checkpoint.save(9)
    assert position(sql) is None


@pytest.mark.parametrize(("is_kept", "loaded"), [(True, 5), (False, None)], ids=["committed", "rolled back"])
def test_i13_an_acquisition_waits_for_an_uncommitted_save_and_loads_its_outcome(
    is_kept: bool, loaded: int | None, sql: Conn, acquire: Acquire, service: Conn
) -> None:
    """Otherwise it would load an older position than the former owner then commits."""
    first = acquire()
    first.checkpoint.save(5, service)
    end_session(sql)
    with ThreadPoolExecutor(1) as pool:
        acquired = pool.submit(acquire)
        until(lambda: waits_for(sql, service) or acquired.done())
        assert not acquired.done(), "it did not wait"
        (service.commit if is_kept else service.rollback)()
        assert acquired.result().checkpoint.load() == loaded


def waits_for(sql: Conn, conn: Conn) -> bool:
    """Returns whether a session waits for a lock that this connection holds."""
    text = "SELECT count(*) FROM pg_locks WHERE %s = ANY (pg_blocking_pids(pid))"
    return bool(value(sql, text, conn.info.backend_pid))


def test_i13_a_save_that_waits_for_an_acquisition_is_refused_after_it(
    settings: Settings, sql: Conn, acquire: Acquire, service: Conn
) -> None:
    """The statement compares the fence with the committed row, not with the row of its snapshot."""
    first = acquire()
    end_session(sql)
    successor = psycopg.connect(settings.dsn)
    successor.execute("UPDATE pgcoord.subscriptions SET fence = fence + 1")
    with ThreadPoolExecutor(1) as pool, successor:
        saved = pool.submit(first.checkpoint.save, 9, service)
        until(lambda: waits_for(sql, successor))
        successor.commit()
        with pytest.raises(Fenced):
            saved.result()
    service.rollback()
    assert position(sql) is None


def test_i15_a_save_does_not_depend_on_the_search_path_of_the_caller(
    settings: Settings, elsewhere: None, sql: Conn
) -> None:
    with (
        acquire_leadership(settings.dsn, "mailer", schema=ELSEWHERE) as owner,
        psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as service,
    ):
        owner.checkpoint.save(4, service)
        service.commit()
    assert value(sql, f"SELECT last_position FROM {ELSEWHERE}.subscriptions") == 4
    assert value(sql, "SELECT count(*) FROM pgcoord.subscriptions") == 0


def test_i18_a_save_uses_only_what_is_in_pg_catalog(acquire: Acquire, sql: Conn, service: Conn) -> None:
    sql.execute("CREATE SCHEMA hostile")
    sql.execute("CREATE FUNCTION hostile.no(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT false'")
    sql.execute("CREATE OPERATOR hostile.= (FUNCTION = hostile.no, LEFTARG = bigint, RIGHTARG = bigint)")
    service.execute("SET search_path = hostile, pg_catalog")
    acquire().checkpoint.save(4, service)
    service.commit()
    assert position(sql) == 4


def test_connections_with_any_row_factory_can_own_and_save(settings: Settings, sql: Conn) -> None:
    owning, saving = (psycopg.connect(settings.dsn, row_factory=dict_row) for _ in range(2))
    with acquire_leadership(owning, "mailer") as owner, saving:
        owner.checkpoint.save(4, saving)
        assert owner.checkpoint.load() is None, "not committed yet"
    assert position(sql) == 4


def test_connections_with_raw_cursors_can_save(settings: Settings, sql: Conn, acquire: Acquire) -> None:
    owner = acquire()
    with connect(settings, "test") as conn, conn.transaction():
        owner.checkpoint.save(4, conn)
    assert position(sql) == 4


def test_every_error_is_a_pgcoord_error() -> None:
    for kind in (LockNotAcquired, CoordinationError, KeyCollision, Fenced):
        assert issubclass(kind, PgcoordError)
    assert not issubclass(LockNotAcquired, CoordinationError)
    assert not issubclass(CoordinationError, LockNotAcquired)
