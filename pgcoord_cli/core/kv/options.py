"""The options of transactions: those of a Database, and for one transaction what differs from them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypedDict, Unpack

from pgcoord_cli.core.commits.codec import MAX_TRANSACTION_BYTES
from pgcoord_cli.errors import Conflict, OutcomeUnknown, TooOld, UsageError

TIME_LIMIT_SECONDS = 5.0
"""Seconds from the first read after which a transaction is refused; the conflict window is a second longer."""

LEAST_SIZE_LIMIT_BYTES = 32


class OptionChanges(TypedDict, total=False):
    """Fields of TransactionOptions to change, as keyword arguments."""

    time_limit_seconds: float
    size_limit_bytes: int
    retry_limit: int
    commit_seconds: float
    require_leader: bool
    retry_unknown: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TransactionOptions:
    """What a transaction may cost, and when it gives up. Raises UsageError for a value out of range."""

    time_limit_seconds: float = TIME_LIMIT_SECONDS
    """Seconds from the first read to the commit, after which TimeLimit is raised. At most 5, which is the default."""

    size_limit_bytes: int = MAX_TRANSACTION_BYTES
    """Bytes of reads and writes together, above which a commit raises TransactionTooLarge. From 32 to 10,000,000."""

    retry_limit: int = 100
    """How often `Database.run` and `Transaction.on_error` run a transaction again."""

    commit_seconds: float = 20.0
    """Seconds to wait for a commit; then OutcomeUnknown is raised, or ConnectionFailed if it was not sent."""

    require_leader: bool = False
    """Whether a commit raises NoLeader, and sends nothing, if no leader is there when it begins.

    Otherwise it waits in the queue for the next leader, for `commit_seconds`.
    """

    retry_unknown: bool = False
    """Whether OutcomeUnknown is retried as well: only for work that may be applied twice."""

    def __post_init__(self) -> None:
        _check("time_limit_seconds", self.time_limit_seconds, 0, TIME_LIMIT_SECONDS)
        _check("size_limit_bytes", self.size_limit_bytes, LEAST_SIZE_LIMIT_BYTES, MAX_TRANSACTION_BYTES)
        _check("retry_limit", self.retry_limit, 0, float("inf"))
        _check("commit_seconds", self.commit_seconds, 0, float("inf"))

    def changed(self, **changes: Unpack[OptionChanges]) -> TransactionOptions:
        """Returns the options with some of them changed. Raises UsageError for a value out of range."""
        if not changes:
            return self
        try:
            return _changed(self, tuple(changes.items()))
        except TypeError:  # unhashable: no number either, which the check says
            return replace(self, **changes)

    def is_retryable(self, error: BaseException) -> bool:
        """Whether a transaction that ended with this error is to be run again."""
        return isinstance(error, Conflict | TooOld) or (self.retry_unknown and isinstance(error, OutcomeUnknown))


@lru_cache(maxsize=256)  # the same few options are asked for with every transaction
def _changed(options: TransactionOptions, changes: tuple[tuple[str, Any], ...]) -> TransactionOptions:
    return replace(options, **dict(changes))


def _check(name: str, value: float, least: float, greatest: float) -> None:
    if not isinstance(value, int | float) or not least <= value <= greatest:
        bounds = f"at least {least:g}" if greatest == float("inf") else f"from {least:g} to {greatest:g}"
        raise UsageError(f"{name}: {value!r} is not a number {bounds}")
