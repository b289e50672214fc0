"""Join policies against a brute force that tries every outcome of the upstreams without one."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcoord_cli.core.flows.join_policy import JoinPolicy, JoinVerdict, OnSatisfied, PolicyKind, judge

MAX_UPSTREAMS = 9
"""The brute force tries two to the power of this."""

sizes = st.integers(1, MAX_UPSTREAMS)
successes_in_order = st.lists(st.booleans(), min_size=1, max_size=MAX_UPSTREAMS)
"""Whether each upstream succeeds, in the order in which they end."""


def brute_force(required: int, size: int, successes: int, others: int) -> JoinVerdict:
    """Returns the verdict from every possible outcome of the rest."""
    if successes >= required:
        return JoinVerdict.SATISFIED
    ways = product((False, True), repeat=size - successes - others)
    return JoinVerdict.PENDING if any(successes + sum(way) >= required for way in ways) else JoinVerdict.IMPOSSIBLE


@given(st.data(), sizes)
def test_i9_the_verdict_equals_that_of_the_brute_force(data: st.DataObject, size: int) -> None:
    required = data.draw(st.integers(1, size))
    successes = data.draw(st.integers(0, size))
    others = data.draw(st.integers(0, size - successes))
    assert judge(required, size, successes, others) == brute_force(required, size, successes, others)


def verdicts(required: int, ended: list[bool]) -> list[JoinVerdict]:
    """Returns the verdicts before the first end and after each."""
    counts = [ended[:number] for number in range(len(ended) + 1)]
    return [judge(required, len(ended), sum(some), len(some) - sum(some)) for some in counts]


@given(successes_in_order, st.integers(1, MAX_UPSTREAMS))
def test_i9_a_decided_verdict_never_changes_and_is_decided_by_the_last_end(ended: list[bool], k: int) -> None:
    results = verdicts(min(k, len(ended)), ended)
    decided = [verdict for verdict in results if verdict != JoinVerdict.PENDING]
    assert results[0] == JoinVerdict.PENDING
    assert results[: -len(decided)] == [JoinVerdict.PENDING] * (len(results) - len(decided))
    assert len(set(decided)) == 1


@given(successes_in_order, st.integers(1, MAX_UPSTREAMS))
def test_i9_the_order_of_the_ends_makes_no_difference(ended: list[bool], k: int) -> None:
    required = min(k, len(ended))
    last = verdicts(required, ended)[-1]
    assert verdicts(required, sorted(ended))[-1] == verdicts(required, sorted(ended)[::-1])[-1] == last


@given(sizes, st.data())
def test_all_of_requires_all_any_of_one_and_a_quorum_k(size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    required = [
        policy.required(size)
        for policy in (JoinPolicy(PolicyKind.ALL_OF), JoinPolicy(PolicyKind.ANY_OF), JoinPolicy(PolicyKind.QUORUM, k))
    ]
    assert required == [size, 1, k]


def test_the_default_policy_is_all_of_with_let_run() -> None:
    assert JoinPolicy() == JoinPolicy(PolicyKind.ALL_OF, None, OnSatisfied.LET_RUN)


@pytest.mark.parametrize(
    ("policy", "record"),
    [
        (JoinPolicy(), {"kind": "all_of", "on_satisfied": "let_run"}),
        (JoinPolicy(PolicyKind.ANY_OF, None, OnSatisfied.CANCEL_REMAINING),
         {"kind": "any_of", "on_satisfied": "cancel_remaining"}),
        (JoinPolicy(PolicyKind.QUORUM, 2), {"kind": "quorum", "on_satisfied": "let_run", "k": 2}),
    ],
)  # fmt: skip
def test_a_policy_is_stored_with_the_keys_of_the_flow_file(policy: JoinPolicy, record: dict[str, object]) -> None:
    assert policy.as_record() == record
