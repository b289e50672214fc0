"""When an execution may run, given what became of those it waits for. Pure.

Every policy asks for a number of successes among n upstreams: `all_of` for n, `any_of` for one, `quorum` for k. It is
satisfied once there are as many, and impossible once the upstreams that are still open could not make up for what is
missing. In between it is pending. Whatever is not a success (failed, cancelled, skipped) counts the same here. The
database judges by the same rule (`judge_groups` in the migration of flows); what follows is what it is tested against.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple


class Kind(StrEnum):
    """How many upstreams have to succeed."""

    ALL_OF = "all_of"
    ANY_OF = "any_of"
    QUORUM = "quorum"


class OnSatisfied(StrEnum):
    """What becomes of the upstreams that are still open when enough have succeeded."""

    CANCEL_REMAINING = "cancel_remaining"
    LET_RUN = "let_run"


class JoinVerdict(StrEnum):
    """What a policy says of its upstreams at some moment."""

    PENDING = "pending"
    SATISFIED = "satisfied"
    IMPOSSIBLE = "impossible"


class JoinPolicy(NamedTuple):
    """A policy as a flow file states it; `k` belongs to quorum alone."""

    kind: Kind = Kind.ALL_OF
    k: int | None = None
    on_satisfied: OnSatisfied = OnSatisfied.LET_RUN

    def required(self, size: int) -> int:
        """How many of `size` upstreams have to succeed."""
        if self.kind == Kind.QUORUM:
            assert self.k is not None
            return self.k
        return size if self.kind == Kind.ALL_OF else 1

    def as_record(self) -> dict[str, Any]:
        """As it is stored and shown."""
        record: dict[str, Any] = {"kind": self.kind, "on_satisfied": self.on_satisfied}
        return record | ({"k": self.k} if self.k is not None else {})


def judge(required: int, size: int, successes: int, others: int) -> JoinVerdict:
    """The verdict when `successes` of `size` upstreams have succeeded and `others` ended otherwise."""
    if successes >= required:
        return JoinVerdict.SATISFIED
    return JoinVerdict.IMPOSSIBLE if size - others < required else JoinVerdict.PENDING
