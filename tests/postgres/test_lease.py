"""The lease row and its history: when it may be taken, renewed and released, by the server's clock only."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from pgcoord_cli.core.concurrency.wakeup import Wakeup
from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.advisory_keys import lock_key
from pgcoord_cli.core.database.listener import listen
from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.leader import lease
from pgcoord_cli.core.leader.lease import Renewal, Term
from pgcoord_cli.core.leader.lease_keeper import CANCEL_AGAIN_SECONDS, LeaseKeeper, mark_leader_session, session_key
from pgcoord_cli.db.sqlfiles import sql_root
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value

Conn = psycopg.Connection[Any]


@pytest.fixture
def conn(settings: Settings) -> Iterator[Conn]:
    with closing(open_session(settings, "test", writes=True)) as conn:
        yield conn


@pytest.fixture
def rival(settings: Settings) -> Iterator[Conn]:
    with closing(open_session(settings, "rival", writes=True)) as conn:
        yield conn


@pytest.fixture(params=[0.0, 4e9], ids=["1970", "2096"])
def wrong_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose clock is wrong by decades, in either direction."""
    monkeypatch.setattr(time, "time", lambda: request.param)
    monkeypatch.setattr(time, "time_ns", lambda: int(request.param * 1e9))


def take(conn: Conn, node_id: str = "a", ttl: float = 600, *, lock_held: bool = False) -> Term | None:
    return lease.take_over(conn, "pgcoord", node_id, ttl, lock_held=lock_held)


def taken(conn: Conn, node_id: str = "a", ttl: float = 600, *, lock_held: bool = True) -> Term:
    term = take(conn, node_id, ttl, lock_held=lock_held)
    assert term
    return term


def expire(sql: Conn) -> None:
    """Makes the lease expire now."""
    sql.execute("UPDATE leader_lease SET expires_at = clock_timestamp()")


def ends(conn: Conn) -> list[tuple[int, str, str | None]]:
    """Returns epoch, leader and end reason of every term, oldest first."""
    return [(row.epoch, row.leader_addr, row.end_reason) for row in reversed(lease.history(conn, None, 100))]


def waits_for(sql: Conn, waiting: int, holder: int) -> bool:
    """Whether the session with pid `waiting` waits for a lock of that with pid `holder`."""
    row = sql.execute("SELECT %s = ANY (pg_blocking_pids(%s))", [holder, waiting]).fetchone()
    return row is not None and bool(row[0])


# -- taking over


def test_the_lease_of_a_fresh_database_is_not_held(conn: Conn) -> None:
    fresh = lease.read_lease(conn)
    assert (fresh.epoch, fresh.term_id, fresh.durable_version, fresh.held) == (0, None, 0, False)
    assert fresh.expires_in_seconds == 0
    assert lease.history(conn, None, 10) == []
    assert lease.describe_successor(conn) == "epoch 0 (no leader)"


def test_i2_every_term_has_the_next_epoch_and_its_own_id(conn: Conn) -> None:
    terms = [taken(conn, lock_held=True) for _ in range(3)]
    assert [term.epoch for term in terms] == [1, 2, 3]
    assert len({term.term_id for term in terms}) == 3
    assert lease.read_lease(conn).term_id == terms[-1].term_id


def test_a_held_lease_is_only_taken_with_the_leader_lock(conn: Conn, rival: Conn) -> None:
    first = taken(conn, "a")
    assert take(rival, "b") is None
    assert lease.read_lease(conn).term_id == first.term_id
    assert ends(conn) == [(1, "a", None)], "the history is unchanged"
    assert taken(rival, "b", lock_held=True).epoch == 2
    assert lease.read_lease(conn).leader_addr == "b"


def test_an_expired_or_released_lease_is_taken_without_the_lock(conn: Conn, rival: Conn, sql: Conn) -> None:
    taken(conn, "a")
    expire(sql)
    second = taken(rival, "b")
    assert lease.release(rival, "pgcoord", second, "released")
    assert taken(conn, "c").epoch == 3


def test_a_term_continues_from_the_stored_versions_and_ids(conn: Conn, sql: Conn) -> None:
    sql.execute(
        "UPDATE leader_lease SET durable_version = 40, conflict_floor = 30, window_start_id = 20, queue_floor_id = 25"
    )
    term = taken(conn)
    assert term == (1, term.term_id, 40, 30, 20, 25)


@pytest.mark.parametrize("lock_held", [True, False])
def test_i2_of_two_takeovers_at_once_the_second_sees_the_lease_of_the_first(
    conn: Conn, rival: Conn, sql: Conn, lock_held: bool
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with conn.transaction():
            taken(conn, "a", lock_held=lock_held)
            second = pool.submit(take, rival, "b", lock_held=lock_held)
            until(lambda: second.done() or waits_for(sql, rival.info.backend_pid, conn.info.backend_pid))
            assert not second.done()
        term = second.result(TIMEOUT)
    if lock_held:
        assert term
        assert ends(conn) == [(1, "a", "lost"), (2, "b", None)]
    else:
        assert term is None
        assert ends(conn) == [(1, "a", None)]


def test_i7_a_takeover_and_a_release_notify_the_leadership_channel(conn: Conn, rival: Conn) -> None:
    with closing(Wakeup()) as wakeup:
        notifications = listen(rival, [channels.leadership("pgcoord")], wakeup)
        term = taken(conn)
        assert notifications.wait(TIMEOUT)
        lease.renew(conn, term, 600)
        assert not notifications.wait(0), "a renewal notifies no session"
        lease.release(conn, "pgcoord", term, "released")
        assert notifications.wait(TIMEOUT)


# -- renewing


def test_a_renewal_extends_the_lease_from_now_on(conn: Conn) -> None:
    term = taken(conn, ttl=600)
    before = lease.read_lease(conn)
    assert lease.renew(conn, term, 1_200) == Renewal.RENEWED
    after = lease.read_lease(conn)
    assert before.renewed_at and after.renewed_at and before.expires_at and after.expires_at
    assert after.renewed_at > before.renewed_at
    assert after.expires_at > before.expires_at
    assert 600 < after.expires_in_seconds <= 1_200
    assert after._replace(renewed_at=None, expires_at=None, expires_in_seconds=0) == before._replace(
        renewed_at=None, expires_at=None, expires_in_seconds=0
    )


def test_i2_a_term_ends_when_its_lease_expires_even_if_it_is_not_taken_over(conn: Conn, sql: Conn) -> None:
    term = taken(conn)
    expire(sql)
    assert lease.renew(conn, term, 600) == Renewal.TERM_ENDED
    assert not lease.read_lease(conn).held


@pytest.mark.parametrize("column", ["epoch = epoch + 1", "term_id = gen_random_uuid()", "term_id = NULL"])
def test_i2_a_renewal_checks_epoch_and_term(conn: Conn, sql: Conn, column: str) -> None:
    term = taken(conn)
    sql.execute(f"UPDATE leader_lease SET {column}")
    before = lease.read_lease(conn)
    assert lease.renew(conn, term, 600) == Renewal.TERM_ENDED
    assert lease.read_lease(conn).expires_at == before.expires_at


def test_i12_a_renewal_that_waited_for_the_row_compares_the_time_after_the_wait(
    conn: Conn, rival: Conn, sql: Conn
) -> None:
    """The lease expires while the renewal waits for the row."""
    term = taken(conn)
    with ThreadPoolExecutor(1) as pool:
        with rival.transaction():
            rival.execute("UPDATE leader_lease SET expires_at = clock_timestamp()")
            renewal = pool.submit(lease.renew, conn, term, 600)
            until(lambda: renewal.done() or waits_for(sql, conn.info.backend_pid, rival.info.backend_pid))
            assert not renewal.done()
        assert renewal.result(TIMEOUT) == Renewal.TERM_ENDED


def test_the_next_renewal_returns_a_request_to_step_down(conn: Conn, rival: Conn) -> None:
    assert lease.ask_to_step_down(rival, "pgcoord") is None
    term = taken(conn, "a")
    assert lease.ask_to_step_down(rival, "pgcoord") == (1, "a")
    assert lease.renew(conn, term, 600) == Renewal.STEP_DOWN
    lease.release(conn, "pgcoord", term, Renewal.STEP_DOWN)
    successor = taken(rival, "b")
    assert lease.renew(rival, successor, 600) == Renewal.RENEWED, "only the leader of that epoch was asked"
    assert ends(conn) == [(1, "a", "stepped down"), (2, "b", None)]


# -- releasing


def test_a_released_lease_is_free_at_once(conn: Conn) -> None:
    term = taken(conn, "a")
    assert lease.release(conn, "pgcoord", term, "released")
    free = lease.read_lease(conn)
    assert (free.epoch, free.term_id, free.leader_addr, free.held, free.expires_in_seconds) == (1, None, None, False, 0)
    assert lease.renew(conn, term, 600) == Renewal.TERM_ENDED
    assert lease.describe_successor(conn) == "epoch 1 (no leader)"


def test_i2_a_superseded_leader_cannot_release_its_successors_lease(conn: Conn, rival: Conn) -> None:
    old = taken(conn, "a")
    taken(rival, "b", lock_held=True)
    assert not lease.release(conn, "pgcoord", old, "released")
    assert lease.read_lease(conn).leader_addr == "b"
    assert ends(conn) == [(1, "a", "lost"), (2, "b", None)]


def test_a_lease_is_released_once(conn: Conn) -> None:
    term = taken(conn)
    assert lease.release(conn, "pgcoord", term, "released")
    assert not lease.release(conn, "pgcoord", term, "again")
    assert ends(conn) == [(1, "a", "released")]


# -- history


def test_the_history_holds_how_every_term_ended_and_its_versions(conn: Conn, sql: Conn) -> None:
    def commit(number: int) -> None:
        sql.execute("UPDATE leader_lease SET durable_version = durable_version + %s", [number])

    first = taken(conn, "a")
    commit(5)
    lease.release(conn, "pgcoord", first, "released")
    taken(conn, "b")
    commit(2)
    expire(sql)
    taken(conn, "c")
    taken(conn, "d", lock_held=True)
    commit(1)
    rows = list(reversed(lease.history(conn, None, 100)))
    assert [(row.epoch, row.leader_addr, row.end_reason) for row in rows] == [
        (1, "a", "released"),
        (2, "b", "expired"),
        (3, "c", "lost"),
        (4, "d", None),
    ]
    assert [(row.first_version, row.last_version) for row in rows] == [(1, 5), (6, 7), (8, 7), (8, 8)]
    for row, following in pairwise(rows):
        assert row.ended_at is not None
        assert row.acquired_at <= row.ended_at <= following.acquired_at
    assert rows[-1].ended_at is None


def test_a_released_term_is_not_recorded_as_expired_later(conn: Conn) -> None:
    lease.release(conn, "pgcoord", taken(conn, "a"), "released")
    taken(conn, "b")
    assert ends(conn) == [(1, "a", "released"), (2, "b", None)]


def test_the_history_can_be_cut_by_number_and_by_age(conn: Conn, sql: Conn) -> None:
    for name in "abc":
        taken(conn, name, lock_held=True)
    assert [row.leader_addr for row in lease.history(conn, None, 2)] == ["c", "b"]
    sql.execute("UPDATE leader_history SET ended_at = ended_at - interval '1 hour' WHERE leader_addr = 'a'")
    assert [row.leader_addr for row in lease.history(conn, 1_800, 10)] == ["c", "b"]


# -- rule I12


@pytest.mark.usefixtures("wrong_clock")
def test_i12_no_decision_about_the_lease_depends_on_the_clients_clock(conn: Conn, rival: Conn, sql: Conn) -> None:
    term = taken(conn, "a", 600)
    assert lease.read_lease(conn).held
    assert 0 < lease.read_lease(conn).expires_in_seconds <= 600
    assert take(rival, "b") is None
    assert lease.renew(conn, term, 600) == Renewal.RENEWED
    found = sql.execute(
        "SELECT acquired_at <= renewed_at, renewed_at <= clock_timestamp(), expires_at > clock_timestamp(),"
        " expires_at <= clock_timestamp() + interval '600 seconds' FROM leader_lease"
    ).fetchone()
    assert found == (True, True, True, True)
    expire(sql)
    assert lease.renew(conn, term, 600) == Renewal.TERM_ENDED
    assert taken(rival, "b").epoch == 2


@pytest.mark.usefixtures("wrong_clock")
def test_i12_a_keeper_with_a_wrong_clock_is_elected_and_renews_its_lease(settings: Settings, sql: Conn) -> None:
    with keeper_of(settings, ttl=1.0) as keeper:
        for _ in range(3):
            renewed_at = value(sql, "SELECT renewed_at FROM leader_lease")
            until(partial(value, sql, "SELECT renewed_at > %s FROM leader_lease", renewed_at))
        assert keeper.end_reason is None
        assert value(sql, "SELECT epoch FROM leader_lease") == 1


def test_i12_no_code_reads_the_clients_clock_or_the_start_of_a_transaction() -> None:
    """`now()` is the start of the transaction, which may be long before the statement that decides."""
    program = Path(lease.__file__).parent
    for file in sorted(program.glob("*.py")):
        assert not re.search(r"\btime\.time\(|\bdatetime\.(now|utcnow|today)\(", file.read_text()), file
    for file in sorted(sql_root().rglob("*/*.sql")):
        assert not re.search(r"(?i)\bnow\(\)|\bcurrent_timestamp\b|\btransaction_timestamp\b", file.read_text()), file


# -- the keeper: leader lock, lease, and the sessions of the previous leader


@contextmanager
def keeper_of(settings: Settings, ttl: float = 600, *, elected: bool = True) -> Iterator[LeaseKeeper]:
    """Starts a keeper, by default waits until it is elected, and stops it at the end."""
    with closing(Wakeup()) as wakeup:
        keeper = LeaseKeeper(settings, "keeper", ttl, wakeup)
        keeper.start()
        try:
            if elected:
                # Set twice: when the keeper stands for election, and when it is elected.
                while keeper.term is None and keeper.end_reason is None:
                    wakeup.wait(TIMEOUT)
                assert keeper.term, keeper.end_reason
            yield keeper
        finally:
            keeper.stop()


def leader_lock(conn: Conn) -> None:
    conn.execute("SELECT pg_advisory_lock($1)", [lock_key("pgcoord", "election")])


def keeper_pid(sql: Conn) -> int | None:
    row = sql.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/leader keeper'").fetchone()
    return row[0] if row else None


def is_alive(sql: Conn, pid: int) -> bool:
    return bool(value(sql, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)", pid))


def test_a_keeper_that_gets_the_lock_is_elected_at_once_even_if_the_old_lease_is_valid(
    settings: Settings, conn: Conn, sql: Conn
) -> None:
    """The free lock shows that the previous leader's session has ended."""
    taken(conn, "dead", 600)
    with keeper_of(settings):
        assert ends(conn) == [(1, "dead", "lost"), (2, "keeper", None)]
    assert ends(conn)[-1] == (2, "keeper", "released")
    until(lambda: value(sql, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0)


def test_a_keeper_waits_for_a_leader_that_holds_lock_and_lease(
    settings: Settings, conn: Conn, rival: Conn, sql: Conn
) -> None:
    leader_lock(conn)
    mark_leader_session(conn, "pgcoord", taken(conn, "leader", 600).term_id)
    mine = conn.info.backend_pid
    with keeper_of(settings, elected=False) as keeper:
        until(lambda: (pid := keeper_pid(sql)) and waits_for(sql, pid, mine))
        assert keeper.term is None
        assert is_alive(sql, mine)
        conn.close()
        until(lambda: keeper.term)
    assert ends(rival) == [(1, "leader", "lost"), (2, "keeper", "released")]


def test_i16_a_keeper_stopped_during_its_takeover_completes_it_and_releases(
    settings: Settings, conn: Conn, rival: Conn, sql: Conn
) -> None:
    """A stop cancels the wait for the leader lock, never a statement after it, which may be committing."""
    rival.execute("BEGIN")
    rival.execute("SELECT FROM leader_lease FOR UPDATE")
    with closing(Wakeup()) as wakeup:
        keeper = LeaseKeeper(settings, "keeper", 600, wakeup)
        keeper.start()
        until(lambda: waits_for(sql, keeper_pid(sql) or 0, rival.info.backend_pid))
        stop = threading.Thread(target=keeper.stop)
        stop.start()
        stop.join(3 * CANCEL_AGAIN_SECONDS)  # long enough for a cancellation that must not be sent
        rival.execute("ROLLBACK")
        stop.join()
    assert ends(conn) == [(1, "keeper", "released")]


def test_the_lock_of_a_frozen_leader_takes_no_lease_from_its_successor(conn: Conn, rival: Conn, sql: Conn) -> None:
    """The successor took an expired lease without the lock; then the frozen leader's session ends, and frees it."""
    assert take(conn, "frozen", 600, lock_held=True)
    expire(sql)
    successor = take(rival, "successor", 600, lock_held=False)
    assert successor
    assert take(conn, "candidate", 600, lock_held=True) is None
    lease.renew(rival, successor, 600, lock_held=True)
    assert take(conn, "candidate", 600, lock_held=True), "it has got the lock, and then its session has ended"


def test_i2_a_keeper_terminates_the_sessions_of_a_leader_whose_lease_expired(
    settings: Settings, conn: Conn, rival: Conn, sql: Conn, caplog: pytest.LogCaptureFixture
) -> None:
    """They are frozen or cut off and may hold any lock: here, one on a table that the next leader needs."""
    leader_lock(conn)
    term = taken(conn, "frozen", 600)
    for session in (conn, rival):
        mark_leader_session(session, "pgcoord", term.term_id)
    rival.execute("BEGIN")
    rival.execute("LOCK TABLE kv")
    expire(sql)
    with keeper_of(settings):
        assert not any(is_alive(sql, session.info.backend_pid) for session in (conn, rival))
        sql.execute("SELECT FROM kv")
    (record,) = [record for record in caplog.records if record.name == "pgcoord.leader"]
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith(": terminated 2 sessions of the leader whose lease had expired")


def test_a_keeper_does_not_terminate_a_candidate_that_got_the_lock_first(
    settings: Settings, conn: Conn, sql: Conn
) -> None:
    """That candidate holds the leader lock and has not yet taken the expired lease."""
    taken(conn, "dead", 600)
    expire(sql)
    leader_lock(conn)
    with keeper_of(settings):
        assert is_alive(sql, conn.info.backend_pid)
        assert value(sql, "SELECT leader_addr FROM leader_lease") == "keeper"


def test_a_keeper_elected_without_the_lock_takes_it_when_it_becomes_free(
    settings: Settings, conn: Conn, sql: Conn
) -> None:
    leader_lock(conn)
    with keeper_of(settings, ttl=1.0):
        pid = keeper_pid(sql)
        conn.close()
        until(
            lambda: value(
                sql,
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = %s"
                " AND mode = 'ExclusiveLock'",
                pid,
            )
        )


def test_a_keeper_retries_while_another_session_keeps_the_lease_row_locked(
    settings: Settings, conn: Conn, sql: Conn
) -> None:
    """Each wait for the row ends with a timeout and is begun again."""

    def waiting_since() -> Any:
        text = (
            "SELECT query_start FROM pg_stat_activity WHERE application_name = 'pgcoord/leader keeper'"
            " AND wait_event_type = 'Lock' AND %s = ANY (pg_blocking_pids(pid))"
        )
        row = sql.execute(text, [conn.info.backend_pid]).fetchone()
        return row[0] if row else None

    conn.execute("BEGIN")
    conn.execute("SELECT FROM leader_lease FOR UPDATE")
    with keeper_of(settings, ttl=1.0, elected=False) as keeper:
        until(waiting_since)
        first = waiting_since()
        until(lambda: waiting_since() not in (first, None))
        assert keeper.end_reason is None
        conn.execute("ROLLBACK")
        until(lambda: keeper.term or keeper.end_reason)
        assert keeper.end_reason is None


def test_a_keeper_can_be_stopped_while_it_waits_for_the_lock(settings: Settings, conn: Conn, sql: Conn) -> None:
    leader_lock(conn)
    taken(conn, "leader", 600)
    with keeper_of(settings, elected=False) as keeper:
        until(lambda: (pid := keeper_pid(sql)) and waits_for(sql, pid, conn.info.backend_pid))
    assert not keeper.is_alive()
    assert keeper.term is None
    assert lease.read_lease(conn).leader_addr == "leader"


def test_i2_a_superseded_keeper_gives_its_successor_and_is_not_trusted(settings: Settings, conn: Conn) -> None:
    with keeper_of(settings, ttl=1.0) as keeper:
        assert keeper.is_trusted()
        taken(conn, "rival", lock_held=True)
        until(lambda: keeper.end_reason)
        assert keeper.end_reason == "superseded by epoch 2 (rival)"
        assert not keeper.is_trusted()
    assert lease.read_lease(conn).leader_addr == "rival"


def test_i2_a_superseded_keeper_that_is_stopped_does_not_report_a_release(settings: Settings, conn: Conn) -> None:
    with keeper_of(settings, ttl=600) as keeper:
        taken(conn, "rival", lock_held=True)
    assert keeper.end_reason == "superseded by epoch 2 (rival)"


def test_a_keeper_whose_session_was_terminated_gives_that_as_its_end_reason(settings: Settings, sql: Conn) -> None:
    with keeper_of(settings, ttl=600) as keeper:
        sql.execute("SELECT pg_terminate_backend(%s)", [keeper_pid(sql)])
        until(lambda: keeper.end_reason)
        assert "connection lost" in (keeper.end_reason or "")
        assert not keeper.is_trusted()


def test_a_keeper_closes_its_files_and_ends_its_thread(settings: Settings) -> None:
    """A candidate makes one for each term, and one a second while the server is down."""
    unreachable = Settings(dsn="host=/nowhere connect_timeout=1")
    with keeper_of(settings):
        pass
    before = open_files(), threading.active_count()
    for _ in range(5):
        with keeper_of(settings):
            pass
        with keeper_of(unreachable, elected=False) as keeper:
            until(partial(getattr, keeper, "end_reason"))
    assert (open_files(), threading.active_count()) == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_two_schemas_have_two_elections() -> None:
    assert lock_key("one", "election") != lock_key("two", "election")
    term_id = uuid4()
    assert session_key("one", term_id) != session_key("two", term_id) != session_key("two", uuid4())
