"""Claims, leases and the fence: each execution has one worker, and one whose lease has ended changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from pgcoord_cli.core.flows import executions, flows, reconcile
from pgcoord_cli.core.flows.executions import Claim
from pgcoord_cli.errors import ConditionFalse, Fenced
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, value
from tests.postgres.flow_world import Conn, Flow, Make, column, everything, plan, sessions, until_waiting, uuid_of


def names(claims: list[Claim]) -> list[str]:
    return [claim.name for claim in claims]


VERBS: dict[str, Callable[[Conn, Claim], object]] = {
    "renew": lambda conn, claim: executions.renew(conn, claim.execution_id, claim.lease_epoch, 60),
    "complete": lambda conn, claim: executions.complete(conn, claim.execution_id, claim.lease_epoch),
    "fail": lambda conn, claim: executions.fail(conn, claim.execution_id, claim.lease_epoch, "failed"),
}
"""What a worker does with a lease."""

every_verb = pytest.mark.parametrize("verb", VERBS)


def lease_events(sql: Conn) -> list[str]:
    return column(sql, "SELECT event_type FROM lease_events ORDER BY event_id")


def completions(sql: Conn) -> list[str]:
    return column(sql, "SELECT outcome FROM completion_events ORDER BY event_id")


def expire_leases(sql: Conn) -> None:
    sql.execute("UPDATE execution_leases SET expires_at = clock_timestamp() - interval '1 ms'")


def end_back_offs(sql: Conn) -> None:
    sql.execute("UPDATE executions SET eligible_from = '-infinity'")


# -- claiming


def test_a_claim_takes_the_oldest_eligible_executions(make: Make, conn: Conn) -> None:
    flow = make(plan("late early blocked last", "last>blocked"))
    make(plan("younger"))
    assert names(executions.claim(conn, "me")) == ["late"]
    assert names(executions.claim(conn, "me", limit=2)) == ["early", "last"]
    assert names(executions.claim(conn, "me", limit=9)) == ["younger"]
    assert executions.claim(conn, "me") == []
    assert flow.states() == dict.fromkeys(("late", "early", "last"), "running") | {"blocked": "blocked"}


def test_a_claim_has_everything_that_a_worker_needs(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(plan("a"))
    (claim,) = executions.claim(conn, "me")
    lease = sql.execute("SELECT lease_id, expires_at, owner, lease_epoch FROM execution_leases").fetchone()
    assert lease == (claim.lease_id, claim.expires_at, "me", 1)
    assert claim[:1] + claim[2:7] == (flow.ids["a"], 1, flow.flow_id, "a", ["true"], 1)


def test_a_claim_is_restricted_to_its_namespace_and_tag(make: Make, conn: Conn) -> None:
    for number, (namespace, tag) in enumerate([("x", "1"), ("x", "2"), ("y", "1"), (None, None)]):
        make(plan(f"e{number}", namespace=namespace, tag=tag))
    assert executions.claim(conn, "me", limit=9, namespace="z") == []
    assert names(executions.claim(conn, "me", limit=9, namespace="x", instance_tag="2")) == ["e1"]
    assert names(executions.claim(conn, "me", limit=9, instance_tag="1")) == ["e0", "e2"]
    assert names(executions.claim(conn, "me", limit=9)) == ["e3"]


def test_a_claim_skips_executions_with_an_uncommitted_claim(settings: Settings, make: Make, conn: Conn) -> None:
    make(plan("a b c"))
    with sessions(settings, 1) as (other,):
        with other.transaction(force_rollback=True):
            assert names(executions.claim(other, "other")) == ["a"]
            assert names(executions.claim(conn, "me")) == ["b"]
        assert names(executions.claim(conn, "me", limit=9)) == ["a", "c"]


def test_concurrent_claims_never_get_the_same_execution(settings: Settings, make: Make) -> None:
    wanted = [f"e{number}" for number in range(60)]
    make(plan(" ".join(wanted)))
    together = Barrier(4)

    def claim_all(conn: Conn) -> list[str]:
        got: list[str] = []
        together.wait(TIMEOUT)
        while claims := executions.claim(conn, "me", limit=2):
            got += names(claims)
        return got

    with sessions(settings, 4) as conns, ThreadPoolExecutor(4) as pool:
        got = [name for each in pool.map(claim_all, conns) for name in each]
    assert sorted(got) == sorted(wanted)


def test_i7_workers_are_notified_when_an_execution_becomes_eligible(make: Make, sql: Conn) -> None:
    flow = make(plan("a b", "a>b"))
    flow.end("a")
    sql.execute('LISTEN "pgcoord.executions"')
    flow.settle()
    assert len(list(sql.notifies(timeout=TIMEOUT, stop_after=1))) == 1


# -- the lease


def assert_lasts(sql: Conn, column_: str, seconds: int, move: Callable[[], object]) -> None:
    """Checks that `move` sets a column to that many seconds from now, by the server's clock."""
    before = value(sql, "SELECT clock_timestamp()")
    move()
    query = f"""SELECT {column_} BETWEEN %s + make_interval(secs => %s)
                   AND clock_timestamp() + make_interval(secs => %s) FROM executions LEFT JOIN execution_leases
                 USING (execution_id)"""
    assert value(sql, query, before, seconds, seconds)


@pytest.mark.parametrize("client_clock", [0.0, 2e9])
def test_i12_a_lease_is_measured_by_the_servers_clock(
    make: Make, conn: Conn, sql: Conn, monkeypatch: pytest.MonkeyPatch, client_clock: float
) -> None:
    flow = make(plan("a"))
    monkeypatch.setattr(time, "time", lambda: client_clock)
    assert_lasts(sql, "expires_at", 600, lambda: executions.claim(conn, "me", 600))
    assert_lasts(sql, "expires_at", 20, lambda: executions.renew(conn, flow.ids["a"], 1, 20))


def test_a_renewal_returns_the_new_expiry(make: Make, conn: Conn, sql: Conn) -> None:
    claim = make(plan("a")).claim("a")
    until = executions.renew(conn, claim.execution_id, claim.lease_epoch, 600)
    assert value(sql, "SELECT expires_at FROM execution_leases") == until > claim.expires_at


def test_an_expired_lease_belongs_to_its_worker_until_it_is_ended(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(plan(" ".join(VERBS)))
    for name, verb in VERBS.items():
        flow.claim(name)
        expire_leases(sql)
        verb(conn, flow.claims[name])


def test_a_lease_with_an_uncommitted_renewal_is_not_ended_as_expired(
    settings: Settings, make: Make, conn: Conn, sql: Conn
) -> None:
    """The renewal has returned a new expiry to the worker, so the lease must last until then."""
    flow = make(plan("a"))
    claim = flow.claim("a")
    expire_leases(sql)
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        with other.transaction():
            executions.renew(other, claim.execution_id, claim.lease_epoch, 600)
            expiring = pool.submit(reconcile.lease_expiry, conn, reconcile.Scope(), lambda *_: None)
            until_waiting(sql, conn, expiring)
        expiring.result(TIMEOUT)
    assert flow.state("a") == "running"
    executions.complete(conn, claim.execution_id, claim.lease_epoch)


# -- the fence


Step = Callable[[Flow, Claim], object]


def claim_for_another(flow: Flow, _: Claim) -> None:
    """Claims the eligible execution for another worker."""
    end_back_offs(flow.sql)
    assert executions.claim(flow.conn, "another")


def expire(flow: Flow, _: Claim) -> None:
    """Sets the leases to expired, and ends them as the reconciler does."""
    expire_leases(flow.sql)
    reconcile.lease_expiry(flow.conn, reconcile.Scope(), lambda *_: None)


STEPS: dict[str, Step] = {
    "claim": claim_for_another,
    "renew": lambda flow, claim: VERBS["renew"](flow.conn, claim),
    "complete": lambda flow, claim: VERBS["complete"](flow.conn, claim),
    "fail": lambda flow, claim: VERBS["fail"](flow.conn, claim),
    "revoke": lambda flow, claim: executions.revoke(flow.conn, claim.execution_id),
    "expire": expire,
    "cancel": lambda flow, _: flows.cancel(flow.conn, flow.flow_id),
}
"""Transitions of the lease of a claim, and a claim by another worker."""

LOSSES = ["revoke", "revoke claim", "expire", "expire claim", "cancel", "complete", "fail", "fail claim"]
"""The ways in which a lease ends."""


@pytest.mark.parametrize("loss", LOSSES)
def test_a_worker_whose_lease_has_ended_is_fenced_and_changes_nothing(
    make: Make, conn: Conn, sql: Conn, loss: str
) -> None:
    flow = make(plan("a b", "a>b", max_attempts=2))
    claim = flow.claim("a")
    for step in loss.split():
        STEPS[step](flow, claim)
    assert_fenced(conn, sql, claim)


def test_any_other_epoch_is_fenced_and_changes_nothing(make: Make, conn: Conn, sql: Conn) -> None:
    claim = make(plan("a")).claim("a")
    for wrong_epoch in (0, 2):
        assert_fenced(conn, sql, claim._replace(lease_epoch=wrong_epoch))


@every_verb
def test_a_missing_execution_raises_condition_false(make: Make, conn: Conn, sql: Conn, verb: str) -> None:
    claim = make(plan("a")).claim("a")
    before = everything(sql)
    with pytest.raises(ConditionFalse, match="there is no execution"):
        VERBS[verb](conn, claim._replace(execution_id=uuid_of(1)))
    assert everything(sql) == before


def assert_fenced(conn: Conn, sql: Conn, claim: Claim) -> None:
    """Checks that every call with that claim raises Fenced and changes no row."""
    before = everything(sql)
    for verb in VERBS.values():
        with pytest.raises(Fenced) as caught:
            verb(conn, claim)
        assert caught.value.exit_code == 6
        assert everything(sql) == before


@every_verb
@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
def test_a_worker_waits_for_an_uncommitted_revocation_of_its_lease(
    settings: Settings, make: Make, conn: Conn, sql: Conn, verb: str, ending: str
) -> None:
    flow = make(plan("a", max_attempts=2))
    claim = flow.claim("a")
    with sessions(settings, 1) as (other,), ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN")
        executions.revoke(other, claim.execution_id)
        working = pool.submit(VERBS[verb], conn, claim)
        until_waiting(sql, conn)
        other.execute(ending.encode())
        assert isinstance(working.exception(TIMEOUT), Fenced) == (ending == "COMMIT")
    if ending == "COMMIT":
        assert (flow.state("a"), lease_events(sql), completions(sql)) == ("eligible", ["acquired", "revoked"], [])


@pytest.mark.parametrize("verb", ["complete", "fail"])
def test_an_execution_with_an_uncommitted_result_is_not_reclaimed(
    settings: Settings, make: Make, conn: Conn, sql: Conn, verb: str
) -> None:
    flow = make(plan("a"))
    claim = flow.claim("a")
    expire_leases(sql)
    with sessions(settings, 1) as (other,), other.transaction():
        VERBS[verb](other, claim)
        assert reconcile.lease_expiry(conn, reconcile.Scope(), lambda *_: None).reconciled == 0
    assert completions(sql) == ["success" if verb == "complete" else "failed"]
    assert flow.state("a") in ("success", "failed")


# -- events


def test_every_transition_of_a_lease_writes_an_event(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(plan("a", namespace="ns", tag="blue", max_attempts=9))
    first = flow.claim("a")
    VERBS["renew"](conn, first)
    executions.revoke(conn, first.execution_id)
    (second,) = executions.claim(conn, "me")
    expire(flow, second)
    (third,) = executions.claim(conn, "me")
    VERBS["fail"](conn, third)
    end_back_offs(sql)
    (fourth,) = executions.claim(conn, "me")
    flows.cancel(conn, flow.flow_id)
    leases = [str(claim.lease_id) for claim in (first, second, third, fourth)]
    assert len(set(leases)) == 4
    rows = sql.execute("SELECT lease_id, event_type FROM lease_events ORDER BY event_id").fetchall()
    assert rows == [
        (leases[0], "acquired"), (leases[0], "renewed"), (leases[0], "revoked"),
        (leases[1], "acquired"), (leases[1], "expired"),
        (leases[2], "reclaimed"),
        (leases[3], "acquired"), (leases[3], "revoked"),
    ]  # fmt: skip
    labels = "SELECT DISTINCT execution_id, partition_key, namespace, instance_tag FROM lease_events"
    assert sql.execute(labels.encode()).fetchall() == [
        (str(flow.ids["a"]), flow.flow_id.int % flows.PARTITIONS, "ns", "blue")
    ]


@pytest.mark.parametrize("verb", ["complete", "fail"])
def test_every_end_writes_an_event_with_the_labels_of_the_execution(
    make: Make, conn: Conn, sql: Conn, verb: str
) -> None:
    flow = make(plan("a", namespace="ns", tag="blue"))
    VERBS[verb](conn, flow.claim("a"))
    query = """SELECT execution_id, flow_id, outcome, partition_key, namespace, instance_tag, dispatched_at_ms
                 FROM completion_events"""
    outcome = "success" if verb == "complete" else "failed"
    partition = flow.flow_id.int % flows.PARTITIONS
    assert sql.execute(query.encode()).fetchall() == [
        (flow.ids["a"], flow.flow_id, outcome, partition, "ns", "blue", None)
    ]
    assert (flow.state("a"), value(sql, "SELECT count(*) FROM execution_leases")) == (outcome, 0)


@pytest.mark.parametrize("transition", STEPS)
def test_a_transition_that_rolls_back_leaves_neither_event_nor_state(
    make: Make, conn: Conn, sql: Conn, transition: str
) -> None:
    flow = make(plan("a b"))
    claim = flow.claim("a")
    expire_leases(sql)
    before = everything(sql)
    with conn.transaction(force_rollback=True):
        flow.sql = conn  # so that every statement is in this transaction
        STEPS[transition](flow, claim)
        inside = everything(conn)
    assert inside != before
    assert len(inside["lease_events"] + inside["completion_events"]) > 1, "the transition wrote its event"
    assert everything(sql) == before


# -- attempts


def test_i12_a_failed_attempt_is_repeated_after_a_pause_that_doubles(
    make: Make, conn: Conn, sql: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    flow = make(plan("a", max_attempts=13))
    for attempt in range(1, 13):
        (claim,) = executions.claim(conn, "me")
        assert claim.attempt == attempt
        assert_lasts(sql, "eligible_from", min(2 ** (attempt - 1), 600), lambda: VERBS["fail"](conn, claim))  # noqa: B023
        assert flow.state("a") == "eligible"
        sql.execute("UPDATE executions SET eligible_from = clock_timestamp() + interval '1 hour'")
        assert executions.claim(conn, "me") == []
        assert 3_000 < (executions.seconds_to_next(conn, None, None) or 0) <= 3_600
        end_back_offs(sql)
        assert executions.seconds_to_next(conn, None, None) is None
    assert executions.fail(conn, *claim_one(conn), "for good") == "failed"
    row = sql.execute("SELECT state, failures, reason, ended_at IS NOT NULL FROM executions").fetchone()
    assert row == ("failed", 13, "for good", True)
    assert completions(sql) == ["failed"]


def test_the_pause_is_bounded_after_many_attempts(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(plan("a", max_attempts=200))
    sql.execute("UPDATE executions SET failures = 99")
    claim = flow.claim("a")
    assert_lasts(sql, "eligible_from", 600, lambda: VERBS["fail"](conn, claim))


def claim_one(conn: Conn) -> tuple[Any, int]:
    """Claims an execution; returns its id and lease epoch."""
    (claim,) = executions.claim(conn, "me")
    return claim.execution_id, claim.lease_epoch


def test_a_failed_attempt_that_is_repeated_writes_no_completion_event(make: Make, conn: Conn, sql: Conn) -> None:
    flow = make(plan("a b", "a>b", max_attempts=2))
    assert VERBS["fail"](conn, flow.claim("a")) == "eligible"
    assert completions(sql) == []
    end_back_offs(sql)
    executions.complete(conn, *claim_one(conn))
    assert completions(sql) == ["success"]


def test_the_next_back_off_is_that_of_the_namespace_and_tag(make: Make, conn: Conn, sql: Conn) -> None:
    make(plan("a", namespace="ns", tag="blue"))
    sql.execute("UPDATE executions SET eligible_from = clock_timestamp() + interval '1 hour'")
    asked = [("ns", "blue"), ("ns", None), (None, "blue"), ("other", None), (None, "green")]
    found = [executions.seconds_to_next(conn, *labels) is not None for labels in asked]
    assert found == [True, True, True, False, False]


# -- revocation and records


def test_a_revoked_execution_can_be_claimed_at_once(make: Make, conn: Conn) -> None:
    flow = make(plan("a b"))
    claim = flow.claim("a")
    executions.revoke(conn, claim.execution_id)
    assert flow.state("a") == "eligible"
    (again,) = executions.claim(conn, "another")
    assert (again.name, again.lease_epoch, again.attempt) == ("a", 2, 1)
    assert again.lease_id != claim.lease_id


@pytest.mark.parametrize("state", ["eligible", "blocked", "success", "skipped"])
def test_an_execution_that_is_not_running_cannot_be_revoked(make: Make, conn: Conn, sql: Conn, state: str) -> None:
    flow = make(plan("success bad eligible blocked skipped", "bad>skipped eligible>blocked"))
    flow.end("success")
    flow.end("bad", "failed")
    flow.settle()
    before = everything(sql)
    with pytest.raises(ConditionFalse, match=f"is not running: it is {state}"):
        executions.revoke(conn, flow.ids[state])
    assert everything(sql) == before


def test_a_missing_execution_cannot_be_revoked(conn: Conn) -> None:
    with pytest.raises(ConditionFalse, match="there is no execution"):
        executions.revoke(conn, uuid_of(1))


def test_an_execution_record_shows_its_lease(make: Make, conn: Conn) -> None:
    flow = make(plan("a", namespace="ns"))
    assert executions.execution_record(conn, flow.ids["a"])["owner"] is None
    claim = flow.claim("a")
    record = executions.execution_record(conn, flow.ids["a"])
    shown = [record[name] for name in ("name", "state", "namespace", "owner", "lease_id", "lease_epoch", "expires_at")]
    assert shown == ["a", "running", "ns", "tester", claim.lease_id, 1, claim.expires_at]
