"""The life of a transaction: whether it can be used, is committing, or has ended, and how. Pure.

    open ── commit ──▶ committing ──▶ committed    a further commit returns the same version
                            ├───────▶ refused      every further use raises the same error
                            ├───────▶ unknown      a further commit asks for the outcome of the same request
                            └───────▶ open         nothing was sent
    any but committed ── cancel ──▶ cancelled

A transaction that is reset begins another life. What still waits for the earlier life sees the end of that one.
"""

from __future__ import annotations

from enum import Enum

from pgcoord_cli.core.kv.submissions import Outcome, PendingCommit
from pgcoord_cli.errors import CommitRefused, PgcoordError, TransactionCancelled, UsedDuringCommit

CANCELLED = "the transaction was cancelled"
RESET_HINT = "reset it, or use a new transaction"


class Phase(Enum):
    """The phases of a life."""

    OPEN = "open"
    COMMITTING = "committing"
    COMMITTED = "committed"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    CANCELLED = "cancelled"


class Life:
    """One life of a transaction, from its first use to its end."""

    __slots__ = ("_refusal", "phase", "request", "version", "wrote")

    def __init__(self) -> None:
        self.phase = Phase.OPEN
        self.request: PendingCommit | None = None
        """The request of the commit, once there is one; kept while its outcome is unknown."""
        self.version: int | None = None
        """What `commit` returned."""
        self.wrote = False
        """Whether the transaction committed writes, at `version`."""
        self._refusal: CommitRefused | None = None

    def check_usable(self) -> None:
        """Raises what reading and writing raise, unless the transaction is open."""
        if self.phase is not Phase.OPEN:
            raise self._unusable()

    def check_committing(self) -> None:
        """Raises TransactionCancelled if the transaction was cancelled during its commit."""
        if self.phase is not Phase.COMMITTING:
            raise self._unusable()

    def begin_commit(self) -> None:
        """Begins a commit, or another one whose request is the same. Raises what `check_usable` raises."""
        if self.phase is not Phase.UNKNOWN:
            self.check_usable()
        self.phase = Phase.COMMITTING

    def committed(self, version: int, *, wrote: bool) -> None:
        """Records the version of a commit; also that of one which was cancelled too late."""
        self.phase = Phase.COMMITTED
        self.version = version
        self.wrote = wrote
        self.request = None

    def failed(self, error: BaseException) -> None:
        """Records that a commit ended with an error."""
        if self.phase is not Phase.COMMITTING:  # cancelled meanwhile
            return
        if isinstance(error, CommitRefused):
            self.phase, self._refusal = Phase.REFUSED, error
        elif self.request and self.request.sent:
            self.phase = Phase.UNKNOWN
        else:
            self.phase, self.request = Phase.OPEN, None

    def cancel(self) -> None:
        """Ends the life, and the wait for a commit, whose outcome is unknown then if it was sent."""
        if self.phase is Phase.COMMITTED:
            return
        if self.phase is Phase.COMMITTING and self.request:
            self.request.settle(Outcome(None, None, CANCELLED))
        self.phase = Phase.CANCELLED

    def _unusable(self) -> PgcoordError:
        if self.phase is Phase.REFUSED and self._refusal:
            # A copy: one exception that is raised in several places would collect all their tracebacks.
            return type(self._refusal)(self._refusal.message, hint=self._refusal.hint)
        if self.phase is Phase.COMMITTING:
            return UsedDuringCommit("the transaction is committing", hint="wait for its commit, then reset it")
        if self.phase is Phase.COMMITTED:
            return UsedDuringCommit("the transaction has committed", hint=RESET_HINT)
        if self.phase is Phase.UNKNOWN:
            return UsedDuringCommit(
                "the transaction may have committed", hint="commit it again to ask for the outcome, or reset it"
            )
        return TransactionCancelled(CANCELLED, hint=RESET_HINT)
