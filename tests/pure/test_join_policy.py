"""Policies against a brute force, which tries every way in which the open upstreams could still end."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcoord_cli.core.flows.join_policy import JoinPolicy, JoinVerdict, OnSatisfied, PolicyKind, judge

MOST = 9
"""Upstreams. Two to the power of it are the ways in which they can end."""

sizes = st.integers(1, MOST)
endings = st.lists(st.booleans(), min_size=1, max_size=MOST)
"""Whether each of some upstreams succeeds, in the order in which they end."""


def brute_force(required: int, size: int, successes: int, others: int) -> JoinVerdict:
    """The verdict by looking at every way in which the rest could end."""
    if successes >= required:
        return JoinVerdict.SATISFIED
    ways = product((False, True), repeat=size - successes - others)
    return JoinVerdict.PENDING if any(successes + sum(way) >= required for way in ways) else JoinVerdict.IMPOSSIBLE


@given(st.data(), sizes)
def test_i9_the_verdict_is_what_every_way_to_go_on_says(data: st.DataObject, size: int) -> None:
    required = data.draw(st.integers(1, size))
    successes = data.draw(st.integers(0, size))
    others = data.draw(st.integers(0, size - successes))
    assert judge(required, size, successes, others) == brute_force(required, size, successes, others)


def verdicts(required: int, ended: list[bool]) -> list[JoinVerdict]:
    """The verdict before anything ended, and after each end."""
    counts = [ended[:number] for number in range(len(ended) + 1)]
    return [judge(required, len(ended), sum(some), len(some) - sum(some)) for some in counts]


@given(endings, st.integers(1, MOST))
def test_i9_a_verdict_once_given_stays_and_comes_at_the_last_end_at_the_latest(ended: list[bool], k: int) -> None:
    said = verdicts(min(k, len(ended)), ended)
    decided = [verdict for verdict in said if verdict != JoinVerdict.PENDING]
    assert said[0] == JoinVerdict.PENDING
    assert said[: -len(decided)] == [JoinVerdict.PENDING] * (len(said) - len(decided))
    assert len(set(decided)) == 1


@given(endings, st.integers(1, MOST))
def test_i9_the_order_in_which_upstreams_end_makes_no_difference(ended: list[bool], k: int) -> None:
    required = min(k, len(ended))
    last = verdicts(required, ended)[-1]
    assert verdicts(required, sorted(ended))[-1] == verdicts(required, sorted(ended)[::-1])[-1] == last


@given(sizes, st.data())
def test_all_of_asks_for_all_any_of_for_one_and_a_quorum_for_k(size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    asked = [
        policy.required(size)
        for policy in (JoinPolicy(PolicyKind.ALL_OF), JoinPolicy(PolicyKind.ANY_OF), JoinPolicy(PolicyKind.QUORUM, k))
    ]
    assert asked == [size, 1, k]


def test_what_is_given_without_a_policy_waits_for_all_and_lets_the_others_run() -> None:
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
def test_a_policy_is_stored_in_the_words_of_the_flow_file(policy: JoinPolicy, record: dict[str, object]) -> None:
    assert policy.as_record() == record
