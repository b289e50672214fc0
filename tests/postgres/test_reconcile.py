"""Reconcilers: what a crash left behind is repaired once, and a bad event affects only itself."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege, LockNotAvailable

from pgcoord_cli.core.database import grants
from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.flows import executions, reconcile
from pgcoord_cli.core.flows.dispatch import Advanced, dispatch_completion
from pgcoord_cli.core.flows.flow_file import FlowPlan
from pgcoord_cli.core.flows.join_policy import JoinPolicy, OnSatisfied, PolicyKind
from pgcoord_cli.core.flows.reconcile import (
    EVENTS_A_TRANSACTION,
    MAX_LOST_LEASES,
    QUARANTINE_AFTER,
    Scope,
    Tick,
    dependency,
    lease_expiry,
    list_quarantined,
    orphaned_commits,
    retry_quarantined,
    sibling_cancel,
)
from pgcoord_cli.errors import Fenced
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, value
from tests.postgres.flow_world import (
    ANY_CANCEL,
    Conn,
    Flow,
    Group,
    Make,
    assert_sound,
    chain,
    column,
    duplicate,
    everything,
    mortal_session,
    plan,
    sessions,
)

NOW = Scope(stale_threshold_ms=0)
HOUR_MS = 3_600_000


class Errors:
    """The calls of `on_error` in a tick."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []

    def __call__(self, event: int, why: str) -> None:
        self.calls.append((event, why))

    def taken(self) -> list[tuple[int, str]]:
        """Returns the calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


def tick(conn: Conn, scope: Scope = NOW) -> Tick:
    """Runs one tick of the dependency reconciler, without errors."""
    errors = Errors()
    done = dependency(conn, scope, errors)
    assert errors.calls == []
    return done


def fan(leaves: int, **labels: Any) -> FlowPlan:
    """Returns a plan of that many executions without edges."""
    return plan(" ".join(f"e{number}" for number in range(leaves)), **labels)


def end_all(flow: Flow) -> list[int]:
    return [flow.end(name) for name in flow.ids]


def age(sql: Conn, event: int, milliseconds: int, *columns: str) -> None:
    """Moves the times of an event into the past."""
    for name in columns or ("committed_at_ms",):
        sql.execute(f"UPDATE completion_events SET {name} = {name} - %s WHERE event_id = %s".encode(),
                    [milliseconds, event])  # fmt: skip


# -- which events


def test_i9_an_undispatched_event_is_dispatched(make: Make, conn: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    assert tick(conn) == Tick(scanned=1, reconciled=1)
    assert flow.state("b") == "eligible"
    assert tick(conn) == Tick()


@pytest.mark.parametrize("client_clock", [0.0, 2e9])
def test_i12_only_events_older_than_the_threshold_by_the_servers_clock_are_dispatched(
    make: Make, conn: Conn, sql: Conn, monkeypatch: pytest.MonkeyPatch, client_clock: float
) -> None:
    """The threshold is an hour, which no test takes."""
    monkeypatch.setattr(time, "time", lambda: client_clock)
    flow = make(fan(3))
    young, other_young, old = end_all(flow)
    age(sql, young, HOUR_MS - 60_000)
    age(sql, old, HOUR_MS)
    assert tick(conn, Scope(stale_threshold_ms=HOUR_MS)) == Tick(scanned=1, reconciled=1)
    assert flow.undispatched() == [young, other_young]


@pytest.mark.parametrize("off_by", [HOUR_MS, -HOUR_MS])
def test_i12_the_time_that_a_client_gives_makes_no_difference(make: Make, conn: Conn, sql: Conn, off_by: int) -> None:
    flow = make(fan(2))
    young, old = end_all(flow)
    for event in (young, old):
        age(sql, event, off_by, "occurred_at_ms")
    age(sql, old, 600_000)
    assert tick(conn, Scope(stale_threshold_ms=300_000)) == Tick(scanned=1, reconciled=1)
    assert flow.undispatched() == [young]


def test_the_oldest_events_come_first_up_to_the_batch_limit(make: Make, conn: Conn) -> None:
    flow = make(fan(5))
    events = end_all(flow)
    for left in (3, 1, 0, 0):
        done = tick(conn, NOW._replace(batch_limit=2))
        assert flow.undispatched() == events[len(events) - left :]
        assert done.scanned == done.reconciled <= 2


def test_a_tick_dispatches_more_events_than_fit_into_one_transaction(make: Make, conn: Conn, sql: Conn) -> None:
    number = 2 * EVENTS_A_TRANSACTION + 1
    flow = make(fan(1))
    first = flow.end("e0")
    for _ in range(number - 1):
        duplicate(sql, first)
    assert tick(conn) == Tick(scanned=number, reconciled=number)


def test_filters_are_by_namespace_and_tag_and_the_left_out_events_are_counted(make: Make, conn: Conn) -> None:
    labels = [("x", "1"), ("x", "2"), ("y", "1"), (None, None)]
    flows = [make(fan(1, namespace=namespace, tag=tag)) for namespace, tag in labels]
    for flow in flows:
        end_all(flow)
    assert tick(conn, NOW._replace(namespace="z")) == Tick(filtered=4)
    assert tick(conn, NOW._replace(namespace="x", instance_tag="2")) == Tick(scanned=1, reconciled=1, filtered=3)
    assert [len(flow.undispatched()) for flow in flows] == [1, 0, 1, 1]
    assert tick(conn, NOW._replace(instance_tag="1", batch_limit=1)) == Tick(scanned=1, reconciled=1, filtered=1)
    assert [len(flow.undispatched()) for flow in flows] == [0, 0, 1, 1]
    assert tick(conn) == Tick(scanned=2, reconciled=2)


def test_i9_a_chain_needs_one_tick_for_each_hop(make: Make, conn: Conn) -> None:
    flow = make(chain(10))
    flow.end("n0", "failed")
    for _ in range(10):
        assert tick(conn).reconciled == 1
    assert set(flow.states().values()) == {"failed", "skipped"}
    assert tick(conn).reconciled == 1, "the event of the leaf, which has no downstream"
    assert_sound(flow)


# -- concurrency


def test_i9_an_event_that_another_session_is_dispatching_is_skipped(settings: Settings, make: Make, conn: Conn) -> None:
    flow = make(plan("a b c d", "a>c b>d"))
    first, _ = flow.end("a"), flow.end("b")
    with sessions(settings, 1) as (other,), other.transaction():
        assert dispatch_completion(other, first) == Advanced(1)
        assert tick(conn) == Tick(scanned=2, reconciled=1, noop=1)
    assert [flow.state(name) for name in "cd"] == ["eligible"] * 2
    assert tick(conn) == Tick()


def test_i9_concurrent_reconcilers_share_the_events_and_count_every_edge_once(settings: Settings, make: Make) -> None:
    upstreams = [f"u{number}" for number in range(300)]
    flow = make(plan(" ".join([*upstreams, "all"]), " ".join(f"{name}>all" for name in upstreams)))
    end_all_at_once(flow)
    together = Barrier(4)

    def reconcile_at_once(conn: Conn) -> Tick:
        together.wait(TIMEOUT)
        return tick(conn)

    with sessions(settings, 4) as conns, ThreadPoolExecutor(4) as pool:
        ticks = list(pool.map(reconcile_at_once, conns))
    assert sum(each.reconciled for each in ticks) == 300
    assert all(each.reconciled + each.noop == each.scanned for each in ticks)
    assert flow.group("all") == Group("satisfied", successes=300)
    assert flow.undispatched() == []


def end_all_at_once(flow: Flow) -> None:
    """Ends every eligible execution as a success, in one transaction."""
    with flow.conn.transaction():
        for claim in executions.claim(flow.conn, "tester", limit=1_000):
            executions.complete(flow.conn, claim.execution_id, claim.lease_epoch)


# -- bad events


def spoil(sql: Conn, flow: Flow, name: str) -> None:
    """Makes the counting of every edge to that execution fail."""
    sql.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.downstream_id = '{flow.ids[name]}' THEN RAISE EXCEPTION 'spoiled on purpose'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON edges FOR EACH ROW EXECUTE FUNCTION refuse();
        """.encode()
    )


def repair(sql: Conn) -> None:
    sql.execute("DROP TRIGGER refuse ON edges")


def end_pauses(sql: Conn) -> None:
    sql.execute("UPDATE dispatch_failures SET retry_at = '-infinity'")


@pytest.fixture
def spoiled(make: Make, sql: Conn) -> Flow:
    """A flow with three ended executions; the event of b cannot be dispatched."""
    flow = make(plan("a b c d e f", "a>d b>e c>f"))
    spoil(sql, flow, "e")
    for name in "abc":
        flow.end(name)
    return flow


def test_i6_a_bad_event_affects_only_itself(spoiled: Flow, conn: Conn) -> None:
    errors = Errors()
    assert dependency(conn, NOW, errors) == Tick(scanned=3, reconciled=2, errors=1)
    assert errors.taken() == [(spoiled.event("b"), "spoiled on purpose (attempt 1)")]
    assert [spoiled.state(name) for name in "def"] == ["eligible", "blocked", "eligible"]
    assert spoiled.undispatched() == [spoiled.event("b")]


def test_a_bad_event_backs_off_and_is_quarantined_after_the_last_attempt(spoiled: Flow, conn: Conn, sql: Conn) -> None:
    errors = Errors()
    bad = spoiled.event("b")
    for attempt in range(1, QUARANTINE_AFTER + 1):
        before = value(sql, "SELECT clock_timestamp()")
        assert dependency(conn, NOW, errors).errors == 1
        is_last = attempt == QUARANTINE_AFTER
        assert errors.taken() == [(bad, f"spoiled on purpose (attempt {attempt}{', quarantined' if is_last else ''})")]
        pause = f"interval '1 second' * {2 ** (attempt - 1)}"
        in_time = f"SELECT retry_at BETWEEN %s + {pause} AND clock_timestamp() + {pause} FROM dispatch_failures"
        assert value(sql, in_time, before)
        sql.execute("UPDATE dispatch_failures SET retry_at = clock_timestamp() + interval '1 hour'")
        assert tick(conn) == Tick(), "it is not dispatched before retry_at"
        assert (list_quarantined(conn) != []) == is_last
        end_pauses(sql)
    assert tick(conn) == Tick(), "a quarantined event is not dispatched"
    assert value(sql, "SELECT attempts FROM dispatch_failures") == QUARANTINE_AFTER


@pytest.fixture
def quarantined(spoiled: Flow, conn: Conn, sql: Conn) -> Flow:
    """The same flow after the event of b has been quarantined."""
    for _ in range(QUARANTINE_AFTER):
        dependency(conn, NOW, Errors())
        end_pauses(sql)
    return spoiled


def test_quarantined_events_are_listed_with_their_error(quarantined: Flow, conn: Conn, sql: Conn) -> None:
    (listed,) = list_quarantined(conn)
    assert listed.pop("quarantined_at") == value(sql, "SELECT quarantined_at FROM dispatch_failures")
    assert listed == {
        "event_id": quarantined.event("b"), "execution_id": quarantined.ids["b"], "flow_id": quarantined.flow_id,
        "outcome": "success", "attempts": QUARANTINE_AFTER, "last_error": "spoiled on purpose",
    }  # fmt: skip


def test_a_failed_dispatch_is_logged_as_a_warning_and_a_quarantine_as_an_error(
    quarantined: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    bad = quarantined.event("b")
    levels = ["WARNING"] * (QUARANTINE_AFTER - 1) + ["ERROR"]
    records = [record for record in caplog.get_records("setup") if record.name == "pgcoord.reconcile"]
    assert [record.levelname for record in records] == levels
    assert [vars(record)["event_id"] for record in records] == [bad] * QUARANTINE_AFTER
    assert records[-1].message == f"event {bad}: spoiled on purpose (attempt {QUARANTINE_AFTER}, quarantined)"


@pytest.mark.parametrize("is_named", [True, False], ids=["one", "all"])
def test_quarantined_events_can_be_retried(quarantined: Flow, conn: Conn, sql: Conn, is_named: bool) -> None:
    bad = quarantined.event("b")
    assert retry_quarantined(conn, bad + 1) == 0
    repair(sql)
    assert tick(conn) == Tick()
    assert retry_quarantined(conn, bad if is_named else None) == 1
    assert list_quarantined(conn) == []
    assert tick(conn) == Tick(scanned=1, reconciled=1)
    assert quarantined.state("e") == "eligible"


def test_a_retry_resets_the_attempts_and_does_not_release_events_in_back_off(
    quarantined: Flow, make: Make, conn: Conn
) -> None:
    assert retry_quarantined(conn, None) == 1
    errors = Errors()
    dependency(conn, NOW, errors)
    assert errors.taken() == [(quarantined.event("b"), "spoiled on purpose (attempt 1)")]
    assert retry_quarantined(conn, None) == 0
    assert tick(conn) == Tick()


def test_a_bad_event_that_is_dispatched_later_leaves_no_failure_row(spoiled: Flow, conn: Conn, sql: Conn) -> None:
    dependency(conn, NOW, Errors())
    repair(sql)
    end_pauses(sql)
    assert tick(conn) == Tick(scanned=1, reconciled=1)
    assert everything(sql)["dispatch_failures"] == []
    assert spoiled.state("e") == "eligible"


def test_bad_events_do_not_block_younger_ones(make: Make, conn: Conn, sql: Conn) -> None:
    """As many bad events as fit into a batch, all older than the good one."""
    bad = make(plan("u0 u1 u2 all", "u0>all u1>all u2>all"))
    spoil(sql, bad, "all")
    end_all_at_once(bad)
    good = make(fan(1))
    end_all(good)
    scope = NOW._replace(batch_limit=3)
    assert dependency(conn, scope, Errors()).errors == 3
    assert tick(conn, scope) == Tick(scanned=1, reconciled=1)
    assert good.undispatched() == []


def test_a_tick_that_loses_its_connection_raises_and_records_no_failure(
    make: Make, settings: Settings, sql: Conn
) -> None:
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    sql.execute(
        b"""CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_terminate_backend(pg_backend_pid(), 30000); RETURN NULL; END $$;
            CREATE TRIGGER die AFTER UPDATE ON edges FOR EACH STATEMENT EXECUTE FUNCTION die()"""
    )
    before = everything(sql)
    with mortal_session(settings) as mortal, pytest.raises(psycopg.OperationalError):
        dependency(mortal, NOW, Errors())
    assert everything(sql) == before


# -- trouble that passes


def assert_works_again(flow: Flow, conn: Conn, sql: Conn) -> None:
    """Asserts that no attempt was counted, and that the next tick dispatches the event of a."""
    assert everything(sql)["dispatch_failures"] == []
    assert tick(conn).reconciled == 1
    assert flow.state("b") == "eligible"


def test_i17_events_whose_rows_are_locked_for_many_ticks_are_dispatched_afterwards(
    make: Make, settings: Settings, sql: Conn
) -> None:
    """The lock outlasts lock_timeout at each tick, and does not concern the event of another flow."""
    locked, free = make(plan("a b", "a>b")), make(plan("a b", "a>b"))
    with mortal_session(settings, lock_timeout="1ms") as conn:
        with sql.transaction():
            sql.execute("SELECT FROM edge_groups WHERE flow_id = %s FOR UPDATE", [locked.flow_id])
            locked.end("a")
            free.end("a")
            for _ in range(QUARANTINE_AFTER + 2):
                errors = Errors()
                with pytest.raises(LockNotAvailable):
                    dependency(conn, NOW, errors)
                assert errors.calls == []
                with mortal_session(settings) as other:
                    other.execute("UPDATE dispatch_failures SET retry_at = '-infinity'")
            assert free.state("b") == "eligible"
        assert_works_again(locked, conn, sql)


def test_i17_events_are_dispatched_once_a_right_is_given_back(make: Make, settings: Settings, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    role = f"operator_{uuid.uuid4().hex[:8]}"
    sql.execute(f"CREATE ROLE {role} LOGIN".encode())
    with command_session(settings, "migrate grant", writes=True) as granting:
        grants.grant(granting, {"operator": [role]}, dry_run=False)
    as_operator = replace(settings, dsn=make_conninfo(settings.dsn, user=role))
    with mortal_session(as_operator) as conn:
        sql.execute(f"REVOKE UPDATE ON completion_events FROM {role}".encode())
        for _ in range(QUARANTINE_AFTER + 2):
            with pytest.raises(InsufficientPrivilege):
                dependency(conn, NOW, Errors())
            end_pauses(sql)
        sql.execute(f"GRANT UPDATE ON completion_events TO {role}".encode())
        assert_works_again(flow, conn, sql)


PASSING = ["25006", "3F000", "40001", "42501", "42P01", "53100", "53200", "53300", "55P03", "57014", "58030", "XX000"]
"""SQLSTATEs of trouble of the server, the session or the role."""

EVENTS_OWN = ["09000", "21000", "22023", "23514", "27000", "44000", "54000", "P0001"]
"""SQLSTATEs of an event that cannot be dispatched."""


def refuse_with(sql: Conn, state: str) -> None:
    """Makes the counting of every edge fail with that SQLSTATE."""
    sql.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{state}'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON edges FOR EACH ROW EXECUTE FUNCTION refuse();
        """.encode()
    )


@pytest.mark.parametrize("state", PASSING)
def test_i17_trouble_of_the_server_counts_for_no_event(make: Make, conn: Conn, sql: Conn, state: str) -> None:
    flow = make(plan("a b c", "a>b"))
    refuse_with(sql, state)
    flow.end("a")
    flow.end("c")
    errors = Errors()
    with pytest.raises(psycopg.Error, match="refused"):
        dependency(conn, NOW, errors)
    assert errors.calls == []
    repair(sql)
    assert everything(sql)["dispatch_failures"] == []
    assert tick(conn).reconciled in (1, 2)
    assert (flow.state("b"), flow.undispatched()) == ("eligible", [])


@pytest.mark.parametrize("state", EVENTS_OWN)
def test_i17_an_error_in_the_data_of_an_event_counts_for_that_event(
    make: Make, conn: Conn, sql: Conn, state: str
) -> None:
    flow = make(plan("a b c", "a>b"))
    refuse_with(sql, state)
    flow.end("a")
    flow.end("c")
    errors = Errors()
    assert dependency(conn, NOW, errors) == Tick(scanned=2, reconciled=1, errors=1)
    assert errors.calls == [(flow.event("a"), "refused (attempt 1)")]


def test_i17_a_tick_ends_some_time_after_trouble_began(
    make: Make, conn: Conn, sql: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without time to go on, it raises at the second event that it cannot dispatch, and tries none after that."""
    monkeypatch.setattr(reconcile, "GO_ON_SECONDS", 0.0)
    flow = make(plan("a b c d e f g", "a>d b>e"))
    refuse_with(sql, "55P03")
    flow.end("a")
    flow.end("b")
    flow.end("c")
    with pytest.raises(LockNotAvailable):
        dependency(conn, NOW, Errors())
    assert flow.undispatched() == [flow.event(name) for name in "abc"]


# -- leases


def expire_leases(sql: Conn) -> None:
    sql.execute("UPDATE execution_leases SET expires_at = clock_timestamp() - interval '1 ms'")


def expire(conn: Conn, scope: Scope = NOW) -> Tick:
    return lease_expiry(conn, scope, Errors())


def test_i12_an_expired_lease_is_ended_and_no_other(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(fan(3))
    claims = [flow.claim(name) for name in flow.ids]
    assert expire(conn) == Tick()
    sql.execute("UPDATE execution_leases SET expires_at = clock_timestamp() - interval '1 ms' WHERE lease_id = %s",
                [claims[1].lease_id])  # fmt: skip
    assert expire(conn) == Tick(scanned=1, reconciled=1)
    assert flow.states() == {"e0": "running", "e1": "eligible", "e2": "running"}
    with pytest.raises(Fenced):
        executions.complete(conn, claims[1].execution_id, claims[1].lease_epoch)
    (again,) = executions.claim(conn, "another")
    assert (again.name, again.lease_epoch, again.attempt) == ("e1", 2, 2)


def test_leases_are_ended_by_namespace_and_tag_up_to_the_batch_limit(make: Make, conn: Conn, sql: Conn) -> None:
    flows = [make(fan(2, namespace=namespace, tag="1")) for namespace in "xy"]
    for flow in flows:
        flow.claim("e1")
    expire_leases(sql)
    assert expire(conn, NOW._replace(namespace="z")) == expire(conn, NOW._replace(instance_tag="2")) == Tick()
    assert expire(conn, NOW._replace(namespace="y", batch_limit=1)) == Tick(scanned=1, reconciled=1)
    assert list(flows[0].states().values()) == ["running"] * 2
    assert sorted(flows[1].states().values()) == ["eligible", "running"]
    assert expire(conn).reconciled == 3


def test_an_execution_whose_lease_expires_too_often_fails_with_that_reason(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    for loss in range(1, MAX_LOST_LEASES + 2):
        (claim,) = executions.claim(conn, "lost worker")
        assert claim.attempt == loss
        expire_leases(sql)
        assert expire(conn) == Tick(scanned=1, reconciled=1)
        assert flow.state("a") == ("failed" if loss > MAX_LOST_LEASES else "eligible")
    assert value(sql, "SELECT reason FROM executions WHERE name = 'a'") == "its lease expired too often"
    assert column(sql, "SELECT event_type FROM lease_events ORDER BY event_id") == [
        "acquired", *["expired", "reclaimed"] * MAX_LOST_LEASES, "expired",
    ]  # fmt: skip
    assert tick(conn).reconciled == 1
    assert flow.state("b") == "skipped"


def test_concurrent_reconcilers_end_each_lease_once(settings: Settings, make: Make, sql: Conn) -> None:
    flow = make(fan(40))
    executions.claim(flow.conn, "lost worker", limit=40)
    expire_leases(sql)
    with sessions(settings, 4) as conns, ThreadPoolExecutor(4) as pool:
        ticks = list(pool.map(expire, conns))
    assert sum(each.reconciled for each in ticks) == 40
    assert value(sql, "SELECT count(*) FROM lease_events WHERE event_type = 'expired'") == 40
    assert column(sql, "SELECT DISTINCT lost_leases FROM executions") == [1]


def test_a_lease_that_another_session_is_ending_is_skipped(settings: Settings, make: Make, sql: Conn) -> None:
    flow = make(fan(2))
    for name in flow.ids:
        flow.claim(name)
    expire_leases(sql)
    with sessions(settings, 1) as (other,), other.transaction():
        assert expire(other, NOW._replace(batch_limit=1)).reconciled == 1
        assert expire(flow.conn) == Tick(scanned=1, reconciled=1)


# -- siblings


def with_needless_siblings(make: Make, **labels: Any) -> Flow:
    """Makes a flow with siblings that a satisfied group no longer needs, which its dispatch did not cancel."""
    flow = make(plan("a b c goal x", "a>goal b>goal c>goal", goal=ANY_CANCEL, **labels))
    flow.claim("b")
    flow.sql.execute("UPDATE edge_groups SET cancel_siblings = false")
    dispatch_completion(flow.conn, flow.end("a"))
    flow.sql.execute("UPDATE edge_groups SET cancel_siblings = true")
    return flow


def test_siblings_of_a_satisfied_group_are_cancelled_once(make: Make, conn: Conn, sql: Conn) -> None:
    flow = with_needless_siblings(make, namespace="ns")
    assert sibling_cancel(conn, NOW._replace(namespace="other"), Errors()) == Tick()
    assert sibling_cancel(conn, NOW._replace(batch_limit=1), Errors()) == Tick(scanned=1, reconciled=1)
    assert sibling_cancel(conn, NOW, Errors()) == Tick(scanned=1, reconciled=1)
    assert sibling_cancel(conn, NOW, Errors()) == Tick()
    assert flow.states() == {"a": "success", "b": "cancelled", "c": "cancelled", "goal": "eligible", "x": "eligible"}
    claim = flow.claims["b"]
    with pytest.raises(Fenced):
        executions.complete(conn, claim.execution_id, claim.lease_epoch)
    query = "SELECT event_type FROM lease_events WHERE lease_id = %s ORDER BY event_id"
    assert column(sql, query, str(claim.lease_id)) == ["acquired", "revoked"]


def test_siblings_of_a_pending_or_impossible_group_are_not_cancelled(make: Make, conn: Conn) -> None:
    flow = make(
        plan("a b c goal", "a>goal b>goal c>goal", goal=JoinPolicy(PolicyKind.QUORUM, 3, OnSatisfied.CANCEL_REMAINING))
    )
    assert sibling_cancel(conn, NOW, Errors()) == Tick()
    dispatch_completion(conn, flow.end("a", "failed"))
    assert flow.group("goal").state == "impossible"
    assert sibling_cancel(conn, NOW, Errors()) == Tick()


def test_a_sibling_with_an_uncommitted_result_is_skipped(settings: Settings, make: Make, conn: Conn) -> None:
    flow = with_needless_siblings(make)
    claim = flow.claims["b"]
    with sessions(settings, 1) as (other,), other.transaction():
        executions.complete(other, claim.execution_id, claim.lease_epoch)
        assert sibling_cancel(conn, NOW, Errors()) == Tick(scanned=1, reconciled=1)
    assert (flow.state("b"), flow.state("c")) == ("success", "cancelled")


# -- commits


def test_old_commit_requests_of_superseded_epochs_are_orphaned(conn: Conn, sql: Conn) -> None:
    """One request is old enough, the other is not; both are of a superseded epoch."""
    sql.execute("UPDATE leader_lease SET epoch = 3")
    request = """INSERT INTO commit_requests (request_id, epoch, read_version, payload, created_at)
                 VALUES (gen_random_uuid(), 2, 0, '', clock_timestamp() - %s::interval)"""
    for old in ("1 day", "0"):
        sql.execute(request.encode(), [old])
    assert orphaned_commits(conn, NOW, Errors()) == Tick(scanned=1, reconciled=1)
    assert column(sql, "SELECT status FROM commit_requests ORDER BY id") == ["orphaned", "pending"]
    assert orphaned_commits(conn, NOW, Errors()) == Tick()


def test_orphaning_stops_at_the_batch_limit(conn: Conn, sql: Conn) -> None:
    sql.execute("UPDATE leader_lease SET epoch = 3")
    sql.execute(
        "INSERT INTO commit_requests (request_id, epoch, read_version, payload, created_at)"
        " SELECT gen_random_uuid(), 2, 0, '', clock_timestamp() - interval '1 day' FROM generate_series(1, 5)"
    )
    scope = NOW._replace(batch_limit=3)
    assert [orphaned_commits(conn, scope, Errors()).reconciled for _ in range(3)] == [3, 2, 0]


# -- all reconcilers


def test_one_tick_of_all_dispatches_the_events_that_it_wrote(make: Make, conn: Conn, sql: Conn) -> None:
    """The event of an execution that lease-expiry fails is dispatched in the same tick."""
    flow = make(plan("a b", "a>b"))
    flow.claim("a")
    sql.execute("UPDATE executions SET lost_leases = %s WHERE name = 'a'", [MAX_LOST_LEASES])
    expire_leases(sql)
    ticks = {name: run(conn, NOW, Errors()) for name, run in reconcile.RECONCILERS.items()}
    assert {name: done.reconciled for name, done in ticks.items()} == {
        "dependency": 1, "lease-expiry": 1, "sibling-cancel": 0, "orphaned-commits": 0,
    }  # fmt: skip
    assert flow.states() == {"a": "failed", "b": "skipped"}
