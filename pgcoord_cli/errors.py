"""The errors of pgcoord, with the exit codes that they end a process with.

    PgcoordError                1   failed
    ├── CommitRefused           1   the transaction was refused; nothing was written
    │   ├── Conflict                a key that was read has been written since
    │   ├── TooOld                  the read version is below the leader's conflict floor
    │   │   └── TimeLimit           the transaction is older than five seconds
    │   └── Rejected                the request is invalid; the reason says why
    │       ├── KeyTooLarge         longer than an index entry of PostgreSQL can be
    │       ├── ValueTooLarge       longer than 100,000 bytes
    │       └── TransactionTooLarge more than 10,000,000 bytes in all
    ├── UsedDuringCommit        1   a transaction was used while it commits, or afterwards
    ├── TransactionCancelled    1   the transaction was cancelled, or reset
    ├── MigrationEdited         1   an applied migration differs from its file
    ├── PermissionDenied        1   the role lacks a right; `migrate grant` grants it
    ├── ServerUnavailable       1   no PostgreSQL installation for an embedded server
    ├── UsageError              2   an invalid option, argument or setting, which the message names
    ├── ConditionFalse          3   the condition that was asked for is false
    │   └── NoLeader                no candidate holds an unexpired lease
    ├── ConnectionFailed        4   PostgreSQL cannot be reached, or the connection was lost
    │   └── CoordinationError       while a lock was taken or held
    │       └── LockLost            the connection that held the lock was lost
    ├── Busy                    5   another session holds a lock
    │   └── LockNotAcquired         that of a subscription name
    ├── KeyCollision            1   two names have the same lock key
    ├── Fenced                  6   another leader has superseded this one
    ├── SchemaMissing           7   not migrated, or not migrated far enough
    ├── SchemaUnknown           7   has a breaking migration of a newer pgcoord
    ├── CursorExpired           8   older than the events that garbage collection kept
    │   └── HistoryChanged          ids have been given out again since the cursor was stored
    ├── UnsuitableServer        9   a standby, a transaction pooler, an unsupported version
    ├── OutcomeUnknown         10   the commit may or may not have happened; ask again
    ├── TimedOut              124   a deadline passed
    ├── CommandNotExecutable  126   a command of the caller may not be executed
    ├── CommandNotFound       127   a command of the caller does not exist
    ├── Interrupted           130   Ctrl-C, or an unanswered question
    └── Terminated            143   SIGTERM

`code` is a stable word for scripts, which `-o json` prints; `hint` is what to do. Codes and exit codes are a contract:
new ones may be added, the meanings of old ones never change.
"""

from __future__ import annotations

from typing import ClassVar


class PgcoordError(Exception):
    """The base class: a message of one line, an optional hint, a code and an exit code."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, answered: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.answered = answered
        """Whether stdout already has the command's complete output, from which the error is evident."""

    @property
    def reason(self) -> str:
        """The message and the hint in one line, as a daemon logs an error that it rides out."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class CommitRefused(PgcoordError):
    """The transaction was refused. Nothing of it has been or will be written."""

    code = "refused"


class Conflict(CommitRefused):
    """A key that the transaction read was written after its read version. Run it again."""

    code = "conflict"


class TooOld(CommitRefused):
    """The transaction read so long ago that conflicts can no longer be checked. Run it again."""

    code = "too_old"


class Rejected(CommitRefused):
    """The request is invalid and can never be applied; the message says why."""

    code = "rejected"


class TimeLimit(TooOld):
    """The transaction has been open for longer than five seconds. Run it again."""

    code = "time_limit"


class KeyTooLarge(Rejected):
    """A key, or the bound of a range, is longer than an index entry of PostgreSQL can be."""

    code = "key_too_large"


class ValueTooLarge(Rejected):
    """A value or operand is longer than 100,000 bytes."""

    code = "value_too_large"


class TransactionTooLarge(Rejected):
    """The reads and writes of the transaction have more than 10,000,000 bytes in all."""

    code = "transaction_too_large"


class UsedDuringCommit(PgcoordError):
    """A transaction was used while its commit was in progress or after it; `reset` makes it new."""

    code = "used_during_commit"


class TransactionCancelled(PgcoordError):
    """The transaction was cancelled or reset; nothing of it was sent since."""

    code = "transaction_cancelled"


class MigrationEdited(PgcoordError):
    """A migration that was applied to this database differs from the file in this program."""

    code = "migration_edited"


class PermissionDenied(PgcoordError):
    """The role lacks a right that the statement needs."""

    code = "permission_denied"


class ServerUnavailable(PgcoordError):
    """This machine has no PostgreSQL installation to start an embedded server with."""

    code = "server_unavailable"


class UsageError(PgcoordError):
    """An option, argument or setting is invalid; the message names it."""

    code = "usage"
    exit_code = 2


class ConditionFalse(PgcoordError):
    """The condition that was asked for is false."""

    code = "condition_false"
    exit_code = 3


class NoLeader(ConditionFalse):
    """No candidate holds an unexpired lease, so that commits are not resolved."""

    code = "no_leader"


class ConnectionFailed(PgcoordError):
    """PostgreSQL could not be reached, refused the session, or the connection was lost."""

    code = "cannot_connect"
    exit_code = 4


class CoordinationError(ConnectionFailed):
    """The connection failed while a lock was taken or held. Whether another session holds it is unknown."""


class LockLost(CoordinationError):
    """The connection that held the lock was lost, and the lock was released with it."""

    code = "lock_lost"


class Busy(PgcoordError):
    """Another session holds the lock; the message describes it."""

    code = "busy"
    exit_code = 5


class LockNotAcquired(Busy):
    """Another session owns the subscription name at this moment."""

    def __init__(self, subscription_name: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.subscription_name = subscription_name


class KeyCollision(PgcoordError):
    """Two names have the same 64-bit lock key; one of them has to be changed."""

    code = "key_collision"


class Fenced(PgcoordError):
    """Another leader has superseded this one, which can write nothing any more."""

    code = "fenced"
    exit_code = 6


class SchemaMissing(PgcoordError):
    """The schema is absent or lacks migrations that this program needs."""

    code = "schema_missing"
    exit_code = 7


class SchemaUnknown(PgcoordError):
    """The schema has a breaking migration of a newer pgcoord, which this one cannot work on."""

    code = "schema_unknown"
    exit_code = 7


class CursorExpired(PgcoordError):
    """The cursor points before the oldest event that is still kept; `resume_at` is the first cursor that does not."""

    code = "cursor_expired"
    exit_code = 8
    resume_at = ""
    resume_reason = "resume at the oldest event that is kept"


class HistoryChanged(CursorExpired):
    """The cursor belongs to another history of the outbox: after a restore, a truncation or a loss of commits."""

    code = "history_changed"


class UnsuitableServer(PgcoordError):
    """The server cannot be used for this: a standby, a transaction pooler, an unsupported version."""

    code = "unsuitable_server"
    exit_code = 9


class OutcomeUnknown(PgcoordError):
    """The commit may or may not have happened; ask for its outcome again by the id of the request."""

    code = "outcome_unknown"
    exit_code = 10


class CommandNotExecutable(PgcoordError):
    """A command of the caller may not be executed."""

    code = "command_not_executable"
    exit_code = 126


class CommandNotFound(PgcoordError):
    """A command of the caller does not exist."""

    code = "command_not_found"
    exit_code = 127


class TimedOut(PgcoordError):
    """A deadline passed before the awaited event."""

    code = "timed_out"
    exit_code = 124


class Interrupted(PgcoordError):
    """Ctrl-C, or an unanswered question."""

    code = "interrupted"
    exit_code = 130


class Terminated(PgcoordError):
    """SIGTERM."""

    code = "terminated"
    exit_code = 143


class Termination(KeyboardInterrupt):
    """SIGTERM as an exception, which passes through the same clean-up as Ctrl-C."""


def interruption(stop: BaseException) -> PgcoordError:
    """Returns the error for the signal that ended the command."""
    return Terminated("terminated") if isinstance(stop, Termination) else Interrupted("interrupted")


PERMANENT_ERRORS = (PermissionDenied, SchemaMissing, SchemaUnknown, UsageError)
"""Errors that connecting again does not mend."""
