"""Which of the transactions that were writing at one moment are still at it. Pure.

PostgreSQL's lock table names a transaction by its virtual id. A prepared one keeps it until the server is restarted,
and goes by another kind of name from then on; so whoever waits for some to end counts all of that kind among them.
"""

from __future__ import annotations

from collections.abc import Iterable

PREPARED = "-1/"
"""How the names of transactions that were prepared before the last restart begin in pg_locks."""


class OpenTransactions:
    """The transactions that were writing at one moment and have not been seen to end."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)

    def __bool__(self) -> bool:
        return bool(self._names)

    def keep(self, names: Iterable[str]) -> None:
        """Forgets all but those that are writing at a later moment too."""
        self._names = {name for name in names if name in self._names or name.startswith(PREPARED)}
