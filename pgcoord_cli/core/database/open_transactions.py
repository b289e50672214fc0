"""Which of the transactions that were writing at one moment are still open. Pure.

PostgreSQL's lock table names a transaction by its virtual id. A prepared transaction keeps that name until the server
is restarted, and has another kind of name afterwards, by which it cannot be recognised. So a wait for the end of some
transactions includes every one with a name of the second kind.
"""

from __future__ import annotations

from collections.abc import Iterable

PREPARED = "-1/"
"""Prefix, in pg_locks, of the names of transactions that were prepared before the last restart."""


class OpenTransactions:
    """The transactions that were writing at one moment and have not ended since. False once there is none."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)

    def __bool__(self) -> bool:
        return bool(self._names)

    def keep(self, names: Iterable[str]) -> None:
        """Drops the transactions that are not among `names`, those that are writing at a later moment."""
        self._names = {name for name in names if name in self._names or name.startswith(PREPARED)}
