"""Join policies: when an execution may run, given the outcomes of its upstreams. Pure.

Each policy requires a number of successes among n upstreams: `all_of` requires n, `any_of` one, `quorum` k. A policy is
satisfied when that number is reached, impossible when the upstreams without an outcome cannot reach it any more, and
pending in between. Every other outcome (failed, cancelled, skipped) counts the same.

The database applies the same rule (`judge_groups` in migration 0005); `judge` is the model that it is tested against.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple


class PolicyKind(StrEnum):
    """How many upstreams have to succeed."""

    ALL_OF = "all_of"
    ANY_OF = "any_of"
    QUORUM = "quorum"


class OnSatisfied(StrEnum):
    """What happens to the upstreams without an outcome when the policy is satisfied."""

    CANCEL_REMAINING = "cancel_remaining"
    LET_RUN = "let_run"


class JoinVerdict(StrEnum):
    """The state of a policy for the outcomes so far."""

    PENDING = "pending"
    SATISFIED = "satisfied"
    IMPOSSIBLE = "impossible"


class JoinPolicy(NamedTuple):
    """A policy of a flow file. `k` is set for `quorum` only."""

    kind: PolicyKind = PolicyKind.ALL_OF
    k: int | None = None
    on_satisfied: OnSatisfied = OnSatisfied.LET_RUN

    def required(self, size: int) -> int:
        """Returns how many of `size` upstreams have to succeed."""
        if self.kind == PolicyKind.QUORUM:
            assert self.k is not None
            return self.k
        return size if self.kind == PolicyKind.ALL_OF else 1

    def as_record(self) -> dict[str, Any]:
        """Returns the policy as `edge_groups.policy` stores it."""
        record: dict[str, Any] = {"kind": self.kind, "on_satisfied": self.on_satisfied}
        return record | ({"k": self.k} if self.k is not None else {})


def judge(required: int, size: int, successes: int, others: int) -> JoinVerdict:
    """Returns the verdict when `successes` of `size` upstreams have succeeded and `others` have ended otherwise."""
    if successes >= required:
        return JoinVerdict.SATISFIED
    # Even if every upstream without an outcome succeeded, `size - others` is the most that can succeed.
    return JoinVerdict.IMPOSSIBLE if size - others < required else JoinVerdict.PENDING
