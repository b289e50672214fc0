"""Everything that can go wrong, and the exit code it ends the process with.

    PgcoordError                1   failed
    ├── CommitRefused           1   the resolver said no; nothing was written
    │   ├── Conflict                a key that was read has been written since
    │   ├── TooOld                  the read version is below the leader's conflict floor
    │   │   └── TimeLimit           the transaction is older than five seconds
    │   └── Rejected                the request itself is wrong; the reason says how
    │       ├── KeyTooLarge         longer than an index entry of PostgreSQL takes
    │       ├── ValueTooLarge       longer than 100,000 bytes
    │       └── TransactionTooLarge more than 10,000,000 bytes in all
    ├── MigrationEdited         1   an applied migration differs from its file
    ├── PermissionDenied        1   the role may not; `migrate grant` gives it the right
    ├── ServerUnavailable       1   no PostgreSQL programs to start an embedded server with
    ├── UsageError              2   the words of the call are off; names the option
    ├── ConditionFalse          3   what was asked is not so
    │   └── NoLeader                nobody holds an unexpired lease
    ├── ConnectionFailed        4   PostgreSQL cannot be reached, or went away
    │   └── CoordinationError       while taking or holding a lock
    │       └── LockLost            the connection that held it is gone
    ├── Busy                    5   a lock is held by someone else
    │   └── LockNotAcquired         of a subscription name
    ├── KeyCollision            1   two names share one lock key
    ├── Fenced                  6   another leadership has superseded this one
    ├── SchemaMissing           7   not migrated, or not migrated far enough
    ├── SchemaUnknown           7   migrated by a newer pgcoord in a way this one cannot serve
    ├── CursorExpired           8   older than what garbage collection kept
    ├── UnsuitableServer        9   a standby, a transaction pooler, an unsupported version
    ├── OutcomeUnknown         10   the commit may or may not have happened; ask again
    ├── TimedOut              124   a deadline passed
    ├── Interrupted           130   Ctrl-C, or a question left unanswered
    └── Terminated            143   SIGTERM

`code` is the stable word for scripts (`-o json` prints it); `hint` is the next thing to try.
Codes and exit codes are a contract: new ones may come, old ones keep their meaning.
"""

from __future__ import annotations

from typing import ClassVar


class PgcoordError(Exception):
    """Base of all: one line of message, an optional hint, a code and an exit code."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, answered: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.answered = answered
        """The command's whole answer is on stdout already, and says the same."""


class CommitRefused(PgcoordError):
    """The resolver decided against the transaction. Nothing of it was written, nor will be."""

    code = "refused"


class Conflict(CommitRefused):
    """A key that the transaction read was written after its read version; run it again."""

    code = "conflict"


class TooOld(CommitRefused):
    """The transaction read so long ago that nobody can tell whether it conflicts; run it again."""

    code = "too_old"


class Rejected(CommitRefused):
    """The request itself cannot be applied, now or later; the message says why."""

    code = "rejected"


class TimeLimit(TooOld):
    """The transaction has been open for longer than five seconds; run it again."""

    code = "time_limit"


class KeyTooLarge(Rejected):
    """A key, or the bound of a range, is longer than an index entry of PostgreSQL takes."""

    code = "key_too_large"


class ValueTooLarge(Rejected):
    """A value or operand is longer than 100,000 bytes."""

    code = "value_too_large"


class TransactionTooLarge(Rejected):
    """Everything that the transaction read and wrote is more than 10,000,000 bytes."""

    code = "transaction_too_large"


class MigrationEdited(PgcoordError):
    """A migration that this database has applied differs from the file that the program carries."""

    code = "migration_edited"


class PermissionDenied(PgcoordError):
    """The role lacks a privilege."""

    code = "permission_denied"


class ServerUnavailable(PgcoordError):
    """There are no PostgreSQL programs on this machine to start an embedded server with."""

    code = "server_unavailable"


class UsageError(PgcoordError):
    """A word of the call is wrong; the message names the option or argument."""

    code = "usage"
    exit_code = 2


class ConditionFalse(PgcoordError):
    """The condition that was asked for does not hold."""

    code = "condition_false"
    exit_code = 3


class NoLeader(ConditionFalse):
    """Nobody holds an unexpired lease, so nobody would resolve a commit."""

    code = "no_leader"


class ConnectionFailed(PgcoordError):
    """PostgreSQL could not be reached, refused the session, or ended it."""

    code = "cannot_connect"
    exit_code = 4


class CoordinationError(ConnectionFailed):
    """Trouble with the database while a lock was taken: says nothing about who holds it."""


class LockLost(CoordinationError):
    """The connection that held the lock is gone, and the lock with it."""

    code = "lock_lost"


class Busy(PgcoordError):
    """Somebody else holds the lock; the message names them."""

    code = "busy"
    exit_code = 5


class LockNotAcquired(Busy):
    """Somebody else owns the subscription name at this moment."""

    def __init__(self, subscription_name: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.subscription_name = subscription_name


class KeyCollision(PgcoordError):
    """Another name has the same 64-bit lock key; one of the two has to be called otherwise."""

    code = "key_collision"


class Fenced(PgcoordError):
    """This leadership has been superseded; nothing is written under it any more."""

    code = "fenced"
    exit_code = 6


class SchemaMissing(PgcoordError):
    """The schema is absent or lacks migrations that this program needs."""

    code = "schema_missing"
    exit_code = 7


class SchemaUnknown(PgcoordError):
    """A newer pgcoord has changed the schema in a way that this one must not touch."""

    code = "schema_unknown"
    exit_code = 7


class CursorExpired(PgcoordError):
    """The cursor points before the oldest event that is still kept; `resume_at` is the first cursor that does not."""

    code = "cursor_expired"
    exit_code = 8
    resume_at = ""


class UnsuitableServer(PgcoordError):
    """The server cannot carry this work: a standby, a transaction pooler, an unsupported version."""

    code = "unsuitable_server"
    exit_code = 9


class OutcomeUnknown(PgcoordError):
    """The commit may or may not have happened. `request_id` is what to ask with."""

    code = "outcome_unknown"
    exit_code = 10


class TimedOut(PgcoordError):
    """A deadline passed before what was waited for came."""

    code = "timed_out"
    exit_code = 124


class Interrupted(PgcoordError):
    """Ctrl-C, or a question left unanswered."""

    code = "interrupted"
    exit_code = 130


class Terminated(PgcoordError):
    """SIGTERM."""

    code = "terminated"
    exit_code = 143


class Termination(KeyboardInterrupt):
    """SIGTERM on its way out, through every clean-up that Ctrl-C goes through."""


def interruption(stop: BaseException) -> PgcoordError:
    """What to say of the signal that ended the command."""
    return Terminated("terminated") if isinstance(stop, Termination) else Interrupted("interrupted")


FINAL = (PermissionDenied, SchemaMissing, SchemaUnknown, UsageError)
"""What does not get better by connecting again."""
