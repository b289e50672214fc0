"""Reconcilers: what a crash left behind is found again, once, and one bad event harms only itself."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import psycopg
import pytest

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


class Complaints:
    """What a tick complained of."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, str]] = []

    def __call__(self, event: int, why: str) -> None:
        self.heard.append((event, why))

    def taken(self) -> list[tuple[int, str]]:
        """What was heard since the last time."""
        heard, self.heard = self.heard, []
        return heard


def tick(conn: Conn, scope: Scope = NOW) -> Tick:
    """A tick of the dependency reconciler that has nothing to complain of."""
    complaints = Complaints()
    done = dependency(conn, scope, complaints)
    assert complaints.heard == []
    return done


def fan(leaves: int, **labels: Any) -> FlowPlan:
    """So many executions that nobody waits for."""
    return plan(" ".join(f"e{number}" for number in range(leaves)), **labels)


def end_all(flow: Flow) -> list[int]:
    return [flow.end(name) for name in flow.ids]


def age(sql: Conn, event: int, milliseconds: int, *columns: str) -> None:
    """Moves the times of an event into the past."""
    for name in columns or ("committed_at_ms",):
        sql.execute(f"UPDATE completion_events SET {name} = {name} - %s WHERE event_id = %s".encode(),
                    [milliseconds, event])  # fmt: skip


# -- which events


def test_i9_what_nobody_dispatched_is_dispatched(make: Make, conn: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    assert tick(conn) == Tick(scanned=1, reconciled=1)
    assert flow.state("b") == "eligible"
    assert tick(conn) == Tick()


@pytest.mark.parametrize("client_clock", [0.0, 2e9])
def test_i12_only_events_older_than_the_threshold_by_the_servers_clock_are_touched(
    make: Make, conn: Conn, sql: Conn, monkeypatch: pytest.MonkeyPatch, client_clock: float
) -> None:
    """A threshold of an hour, so that no test is slow enough to pass it by itself."""
    monkeypatch.setattr(time, "time", lambda: client_clock)
    flow = make(fan(3))
    young, other_young, old = end_all(flow)
    age(sql, young, HOUR_MS - 60_000)
    age(sql, old, HOUR_MS)
    assert tick(conn, Scope(stale_threshold_ms=HOUR_MS)) == Tick(scanned=1, reconciled=1)
    assert flow.undispatched() == [young, other_young]


@pytest.mark.parametrize("off_by", [HOUR_MS, -HOUR_MS])
def test_i12_what_a_client_says_of_when_it_happened_makes_no_difference(
    make: Make, conn: Conn, sql: Conn, off_by: int
) -> None:
    flow = make(fan(2))
    young, old = end_all(flow)
    for event in (young, old):
        age(sql, event, off_by, "occurred_at_ms")
    age(sql, old, 600_000)
    assert tick(conn, Scope(stale_threshold_ms=300_000)) == Tick(scanned=1, reconciled=1)
    assert flow.undispatched() == [young]


def test_the_oldest_come_first_up_to_the_batch_limit(make: Make, conn: Conn) -> None:
    flow = make(fan(5))
    events = end_all(flow)
    for left in (3, 1, 0, 0):
        done = tick(conn, NOW._replace(batch_limit=2))
        assert flow.undispatched() == events[len(events) - left :]
        assert done.scanned == done.reconciled <= 2


def test_a_tick_takes_more_than_one_transaction_holds(make: Make, conn: Conn, sql: Conn) -> None:
    number = 2 * EVENTS_A_TRANSACTION + 1
    flow = make(fan(1))
    first = flow.end("e0")
    for _ in range(number - 1):
        duplicate(sql, first)
    assert tick(conn) == Tick(scanned=number, reconciled=number)


def test_filters_are_by_namespace_and_tag_and_say_how_many_they_left_out(make: Make, conn: Conn) -> None:
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


def test_i9_a_chain_needs_no_more_ticks_than_it_is_deep(make: Make, conn: Conn) -> None:
    flow = make(chain(10))
    flow.end("n0", "failed")
    for _ in range(10):
        assert tick(conn).reconciled == 1
    assert set(flow.states().values()) == {"failed", "skipped"}
    assert tick(conn).reconciled == 1, "the event of the leaf, below which there is nothing"
    assert_sound(flow)


# -- many at once


def test_i9_what_somebody_else_is_dispatching_is_left_to_them(settings: Settings, make: Make, conn: Conn) -> None:
    flow = make(plan("a b c d", "a>c b>d"))
    first, _ = flow.end("a"), flow.end("b")
    with sessions(settings, 1) as (other,), other.transaction():
        assert dispatch_completion(other, first) == Advanced(1)
        assert tick(conn) == Tick(scanned=2, reconciled=1, noop=1)
    assert [flow.state(name) for name in "cd"] == ["eligible"] * 2
    assert tick(conn) == Tick()


def test_i9_many_reconcilers_at_once_share_the_work_and_count_every_edge_once(settings: Settings, make: Make) -> None:
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
    """Ends everything that is eligible, as a success."""
    with flow.conn.transaction():
        for claim in executions.claim(flow.conn, "tester", limit=1_000):
            executions.complete(flow.conn, claim.execution_id, claim.lease_epoch)


# -- bad events


def spoil(sql: Conn, flow: Flow, name: str) -> None:
    """Has the counting of whatever leads to that execution fail."""
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


def mend(sql: Conn) -> None:
    sql.execute("DROP TRIGGER refuse ON edges")


def end_pauses(sql: Conn) -> None:
    sql.execute("UPDATE dispatch_failures SET retry_at = '-infinity'")


@pytest.fixture
def spoiled(make: Make, sql: Conn) -> Flow:
    """Three that have ended, of which b cannot be carried on."""
    flow = make(plan("a b c d e f", "a>d b>e c>f"))
    spoil(sql, flow, "e")
    for name in "abc":
        flow.end(name)
    return flow


def test_i6_one_bad_event_harms_only_itself(spoiled: Flow, conn: Conn) -> None:
    complaints = Complaints()
    assert dependency(conn, NOW, complaints) == Tick(scanned=3, reconciled=2, errors=1)
    assert complaints.taken() == [(spoiled.event("b"), "spoiled on purpose (attempt 1)")]
    assert [spoiled.state(name) for name in "def"] == ["eligible", "blocked", "eligible"]
    assert spoiled.undispatched() == [spoiled.event("b")]


def test_a_bad_event_backs_off_and_is_quarantined_in_the_end(spoiled: Flow, conn: Conn, sql: Conn) -> None:
    complaints = Complaints()
    bad = spoiled.event("b")
    for attempt in range(1, QUARANTINE_AFTER + 1):
        before = value(sql, "SELECT clock_timestamp()")
        assert dependency(conn, NOW, complaints).errors == 1
        is_last = attempt == QUARANTINE_AFTER
        assert complaints.taken() == [
            (bad, f"spoiled on purpose (attempt {attempt}{', quarantined' if is_last else ''})")
        ]
        pause = f"interval '1 second' * {2 ** (attempt - 1)}"
        in_time = f"SELECT retry_at BETWEEN %s + {pause} AND clock_timestamp() + {pause} FROM dispatch_failures"
        assert value(sql, in_time, before)
        sql.execute("UPDATE dispatch_failures SET retry_at = clock_timestamp() + interval '1 hour'")
        assert tick(conn) == Tick(), "it is left alone until then"
        assert (list_quarantined(conn) != []) == is_last
        end_pauses(sql)
    assert tick(conn) == Tick(), "nor is it tried again after that"
    assert value(sql, "SELECT attempts FROM dispatch_failures") == QUARANTINE_AFTER


@pytest.fixture
def quarantined(spoiled: Flow, conn: Conn, sql: Conn) -> Flow:
    """The same, when b has been given up."""
    for _ in range(QUARANTINE_AFTER):
        dependency(conn, NOW, Complaints())
        end_pauses(sql)
    return spoiled


def test_what_is_quarantined_is_listed_with_its_reason(quarantined: Flow, conn: Conn, sql: Conn) -> None:
    (listed,) = list_quarantined(conn)
    assert listed.pop("quarantined_at") == value(sql, "SELECT quarantined_at FROM dispatch_failures")
    assert listed == {
        "event_id": quarantined.event("b"), "execution_id": quarantined.ids["b"], "flow_id": quarantined.flow_id,
        "outcome": "success", "attempts": QUARANTINE_AFTER, "last_error": "spoiled on purpose",
    }  # fmt: skip


@pytest.mark.parametrize("is_named", [True, False], ids=["one", "all"])
def test_what_is_quarantined_can_be_tried_again(quarantined: Flow, conn: Conn, sql: Conn, is_named: bool) -> None:
    bad = quarantined.event("b")
    assert retry_quarantined(conn, bad + 1) == 0
    mend(sql)
    assert tick(conn) == Tick()
    assert retry_quarantined(conn, bad if is_named else None) == 1
    assert list_quarantined(conn) == []
    assert tick(conn) == Tick(scanned=1, reconciled=1)
    assert quarantined.state("e") == "eligible"


def test_a_retry_begins_to_count_anew_and_leaves_those_alone_that_only_back_off(
    quarantined: Flow, make: Make, conn: Conn
) -> None:
    assert retry_quarantined(conn, None) == 1
    complaints = Complaints()
    dependency(conn, NOW, complaints)
    assert complaints.taken() == [(quarantined.event("b"), "spoiled on purpose (attempt 1)")]
    assert retry_quarantined(conn, None) == 0
    assert tick(conn) == Tick()


def test_a_bad_event_that_is_mended_leaves_no_note_behind(spoiled: Flow, conn: Conn, sql: Conn) -> None:
    dependency(conn, NOW, Complaints())
    mend(sql)
    end_pauses(sql)
    assert tick(conn) == Tick(scanned=1, reconciled=1)
    assert everything(sql)["dispatch_failures"] == []
    assert spoiled.state("e") == "eligible"


def test_bad_events_do_not_stand_in_the_way_of_younger_ones(make: Make, conn: Conn, sql: Conn) -> None:
    """As many of them as a batch holds, all older than the good one."""
    bad = make(plan("u0 u1 u2 all", "u0>all u1>all u2>all"))
    spoil(sql, bad, "all")
    end_all_at_once(bad)
    good = make(fan(1))
    end_all(good)
    scope = NOW._replace(batch_limit=3)
    assert dependency(conn, scope, Complaints()).errors == 3
    assert tick(conn, scope) == Tick(scanned=1, reconciled=1)
    assert good.undispatched() == []


def test_a_tick_whose_connection_is_lost_says_so_and_notes_nothing(make: Make, settings: Settings, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    sql.execute(
        b"""CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_terminate_backend(pg_backend_pid(), 30000); RETURN NULL; END $$;
            CREATE TRIGGER die AFTER UPDATE ON edges FOR EACH STATEMENT EXECUTE FUNCTION die()"""
    )
    before = everything(sql)
    with mortal_session(settings) as mortal, pytest.raises(psycopg.OperationalError):
        dependency(mortal, NOW, Complaints())
    assert everything(sql) == before


# -- leases


def run_out(sql: Conn) -> None:
    sql.execute("UPDATE execution_leases SET expires_at = clock_timestamp() - interval '1 ms'")


def expire(conn: Conn, scope: Scope = NOW) -> Tick:
    return lease_expiry(conn, scope, Complaints())


def test_i12_a_lease_that_has_run_out_is_taken_back_and_no_other(make: Make, conn: Conn, sql: Conn) -> None:
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


def test_leases_are_taken_back_by_namespace_and_tag_up_to_the_batch_limit(make: Make, conn: Conn, sql: Conn) -> None:
    flows = [make(fan(2, namespace=namespace, tag="1")) for namespace in "xy"]
    for flow in flows:
        flow.claim("e1")
    run_out(sql)
    assert expire(conn, NOW._replace(namespace="z")) == expire(conn, NOW._replace(instance_tag="2")) == Tick()
    assert expire(conn, NOW._replace(namespace="y", batch_limit=1)) == Tick(scanned=1, reconciled=1)
    assert list(flows[0].states().values()) == ["running"] * 2
    assert sorted(flows[1].states().values()) == ["eligible", "running"]
    assert expire(conn).reconciled == 3


def test_what_loses_its_worker_too_often_has_failed_and_says_so(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    for loss in range(1, MAX_LOST_LEASES + 2):
        (claim,) = executions.claim(conn, "doomed")
        assert claim.attempt == loss
        run_out(sql)
        assert expire(conn) == Tick(scanned=1, reconciled=1)
        assert flow.state("a") == ("failed" if loss > MAX_LOST_LEASES else "eligible")
    assert value(sql, "SELECT reason FROM executions WHERE name = 'a'") == "its lease expired too often"
    assert column(sql, "SELECT event_type FROM lease_events ORDER BY event_id") == [
        "acquired", *["expired", "reclaimed"] * MAX_LOST_LEASES, "expired",
    ]  # fmt: skip
    assert tick(conn).reconciled == 1
    assert flow.state("b") == "skipped"


def test_many_who_take_leases_back_at_once_take_each_back_once(settings: Settings, make: Make, sql: Conn) -> None:
    flow = make(fan(40))
    executions.claim(flow.conn, "doomed", limit=40)
    run_out(sql)
    with sessions(settings, 4) as conns, ThreadPoolExecutor(4) as pool:
        ticks = list(pool.map(expire, conns))
    assert sum(each.reconciled for each in ticks) == 40
    assert value(sql, "SELECT count(*) FROM lease_events WHERE event_type = 'expired'") == 40
    assert column(sql, "SELECT DISTINCT lost_leases FROM executions") == [1]


def test_what_somebody_else_is_taking_back_is_left_to_them(settings: Settings, make: Make, sql: Conn) -> None:
    flow = make(fan(2))
    for name in flow.ids:
        flow.claim(name)
    run_out(sql)
    with sessions(settings, 1) as (other,), other.transaction():
        assert expire(other, NOW._replace(batch_limit=1)).reconciled == 1
        assert expire(flow.conn) == Tick(scanned=1, reconciled=1)


# -- siblings


def left_over(make: Make, **labels: Any) -> Flow:
    """Siblings that run on although they need not: as when they became so after the policy was judged."""
    flow = make(plan("a b c goal x", "a>goal b>goal c>goal", goal=ANY_CANCEL, **labels))
    flow.claim("b")
    flow.sql.execute("UPDATE edge_groups SET cancel_siblings = false")
    dispatch_completion(flow.conn, flow.end("a"))
    flow.sql.execute("UPDATE edge_groups SET cancel_siblings = true")
    return flow


def test_siblings_that_need_not_run_are_cancelled_once(make: Make, conn: Conn, sql: Conn) -> None:
    flow = left_over(make, namespace="ns")
    assert sibling_cancel(conn, NOW._replace(namespace="other"), Complaints()) == Tick()
    assert sibling_cancel(conn, NOW._replace(batch_limit=1), Complaints()) == Tick(scanned=1, reconciled=1)
    assert sibling_cancel(conn, NOW, Complaints()) == Tick(scanned=1, reconciled=1)
    assert sibling_cancel(conn, NOW, Complaints()) == Tick()
    assert flow.states() == {"a": "success", "b": "cancelled", "c": "cancelled", "goal": "eligible", "x": "eligible"}
    claim = flow.claims["b"]
    with pytest.raises(Fenced):
        executions.complete(conn, claim.execution_id, claim.lease_epoch)
    query = "SELECT event_type FROM lease_events WHERE lease_id = %s ORDER BY event_id"
    assert column(sql, query, str(claim.lease_id)) == ["acquired", "revoked"]


def test_siblings_of_what_may_still_need_them_or_cannot_succeed_any_more_run_on(make: Make, conn: Conn) -> None:
    flow = make(
        plan("a b c goal", "a>goal b>goal c>goal", goal=JoinPolicy(PolicyKind.QUORUM, 3, OnSatisfied.CANCEL_REMAINING))
    )
    assert sibling_cancel(conn, NOW, Complaints()) == Tick()
    dispatch_completion(conn, flow.end("a", "failed"))
    assert flow.group("goal").state == "impossible"
    assert sibling_cancel(conn, NOW, Complaints()) == Tick()


def test_a_sibling_that_is_just_ending_is_left_alone(settings: Settings, make: Make, conn: Conn) -> None:
    flow = left_over(make)
    claim = flow.claims["b"]
    with sessions(settings, 1) as (other,), other.transaction():
        executions.complete(other, claim.execution_id, claim.lease_epoch)
        assert sibling_cancel(conn, NOW, Complaints()) == Tick(scanned=1, reconciled=1)
    assert (flow.state("b"), flow.state("c")) == ("success", "cancelled")


# -- commits


def test_commit_requests_that_outlived_every_leader_are_orphaned(conn: Conn, sql: Conn) -> None:
    """One is old and of an epoch that was superseded, one is too young for that."""
    sql.execute("UPDATE leader_lease SET epoch = 3")
    request = """INSERT INTO commit_requests (request_id, epoch, read_version, payload, created_at)
                 VALUES (gen_random_uuid(), 2, 0, '', clock_timestamp() - %s::interval)"""
    for old in ("1 day", "0"):
        sql.execute(request.encode(), [old])
    assert orphaned_commits(conn, NOW, Complaints()) == Tick(scanned=1, reconciled=1)
    assert column(sql, "SELECT status FROM commit_requests ORDER BY id") == ["orphaned", "pending"]
    assert orphaned_commits(conn, NOW, Complaints()) == Tick()


def test_orphaning_keeps_to_the_batch_limit(conn: Conn, sql: Conn) -> None:
    sql.execute("UPDATE leader_lease SET epoch = 3")
    sql.execute(
        "INSERT INTO commit_requests (request_id, epoch, read_version, payload, created_at)"
        " SELECT gen_random_uuid(), 2, 0, '', clock_timestamp() - interval '1 day' FROM generate_series(1, 5)"
    )
    scope = NOW._replace(batch_limit=3)
    assert [orphaned_commits(conn, scope, Complaints()).reconciled for _ in range(3)] == [3, 2, 0]


# -- all of them


def test_one_tick_of_all_carries_on_what_it_has_ended_itself(make: Make, conn: Conn, sql: Conn) -> None:
    """The order of the reconcilers: an execution that is given up takes the first hop in the same tick."""
    flow = make(plan("a b", "a>b"))
    flow.claim("a")
    sql.execute("UPDATE executions SET lost_leases = %s WHERE name = 'a'", [MAX_LOST_LEASES])
    run_out(sql)
    ticks = {name: run(conn, NOW, Complaints()) for name, run in reconcile.RECONCILERS.items()}
    assert {name: done.reconciled for name, done in ticks.items()} == {
        "dependency": 1, "lease-expiry": 1, "sibling-cancel": 0, "orphaned-commits": 0,
    }  # fmt: skip
    assert flow.states() == {"a": "failed", "b": "skipped"}
