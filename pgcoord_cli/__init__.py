"""pgcoord: coordination kept in PostgreSQL. This is its public Python interface.

    from pgcoord_cli import connect, tail, acquire_leadership

Transactions: `connect` opens a Database for asyncio; `pgcoord_cli.sync` has the same with calls that block.
Keys: `Subspace` packs tuples into keys that sort like them; `pgcoord_cli.tuples` has the functions for it.
Events: `tail` and `tail_async` follow an outbox, `append_lease_event` and `append_completion_event` write to one.
Locks: `acquire_leadership` takes the ownership of a name. Flows: `open_flows` creates flows and claims executions.
Every error is a PgcoordError.

Each of them takes the database alike: a connection string of libpq and a schema, and what is left out comes from
PGCOORD_DSN, PGCOORD_SCHEMA and libpq's environment, as on the command line.

The names of `__all__` are loaded when they are first used, so that `import pgcoord_cli` and catching an error cost
nothing. Everything that is not in `__all__` here, in `pgcoord_cli.sync` or in `pgcoord_cli.tuples` is private
to the project:

    cli         the command tree; the only place where an error becomes an exit code
    commands/   one file per noun: parse, open, call core, render
    sync        the blocking face of the transaction client
    tuples      keys made of tuples
    render/     records to table, plain, json, jsonl, csv, markdown
    core/       the four systems: protocols in prose, verbs, frozen records
    db/         connections and named SQL statements; knows nothing of what they mean
    settings    flags, arguments, environment and defaults, frozen
    errors      one hierarchy, exit code on the class

Imports run one way, from the top of that list to its bottom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgcoord_cli.core.events.async_tail import AsyncEventIterator, tail_async
    from pgcoord_cli.core.events.event_iterator import EventIterator, tail
    from pgcoord_cli.core.events.filters import Filters
    from pgcoord_cli.core.events.notices import Notice
    from pgcoord_cli.core.events.outbox import (
        CompletionEvent,
        Event,
        LeaseEvent,
        append_completion_event,
        append_lease_event,
    )
    from pgcoord_cli.core.events.start_position import StartPosition
    from pgcoord_cli.core.flows.client import Flows, open_flows
    from pgcoord_cli.core.flows.executions import Claim
    from pgcoord_cli.core.flows.flows import CreatedFlow
    from pgcoord_cli.core.kv.client import Database, connect
    from pgcoord_cli.core.kv.key_selector import KeySelector
    from pgcoord_cli.core.kv.options import TransactionOptions
    from pgcoord_cli.core.kv.subspace import Subspace
    from pgcoord_cli.core.kv.transaction import Transaction
    from pgcoord_cli.core.kv.transactional import transactional
    from pgcoord_cli.core.kv.tuple_encoding import Versionstamp
    from pgcoord_cli.core.kv.watches import Watch
    from pgcoord_cli.core.locks.ownership import Checkpoint, Ownership, acquire_leadership
    from pgcoord_cli.errors import (
        Busy,
        CommitRefused,
        ConditionFalse,
        Conflict,
        ConnectionFailed,
        CoordinationError,
        CursorExpired,
        Fenced,
        HistoryChanged,
        KeyCollision,
        KeyTooLarge,
        LockNotAcquired,
        NoLeader,
        OutcomeUnknown,
        PermissionDenied,
        PgcoordError,
        Rejected,
        SchemaMissing,
        SchemaUnknown,
        TimedOut,
        TimeLimit,
        TooOld,
        TransactionCancelled,
        TransactionTooLarge,
        UnsuitableServer,
        UsageError,
        UsedDuringCommit,
        ValueTooLarge,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncEventIterator",
    "Busy",
    "Checkpoint",
    "Claim",
    "CommitRefused",
    "CompletionEvent",
    "ConditionFalse",
    "Conflict",
    "ConnectionFailed",
    "CoordinationError",
    "CreatedFlow",
    "CursorExpired",
    "Database",
    "Event",
    "EventIterator",
    "Fenced",
    "Filters",
    "Flows",
    "HistoryChanged",
    "KeyCollision",
    "KeySelector",
    "KeyTooLarge",
    "LeaseEvent",
    "LockNotAcquired",
    "NoLeader",
    "Notice",
    "OutcomeUnknown",
    "Ownership",
    "PermissionDenied",
    "PgcoordError",
    "Rejected",
    "SchemaMissing",
    "SchemaUnknown",
    "StartPosition",
    "Subspace",
    "TimeLimit",
    "TimedOut",
    "TooOld",
    "Transaction",
    "TransactionCancelled",
    "TransactionOptions",
    "TransactionTooLarge",
    "UnsuitableServer",
    "UsageError",
    "UsedDuringCommit",
    "ValueTooLarge",
    "Versionstamp",
    "Watch",
    "acquire_leadership",
    "append_completion_event",
    "append_lease_event",
    "connect",
    "open_flows",
    "tail",
    "tail_async",
    "transactional",
]

_MODULES = {
    "core.events.async_tail": ("AsyncEventIterator", "tail_async"),
    "core.events.event_iterator": ("EventIterator", "tail"),
    "core.events.outbox": ("CompletionEvent", "Event", "LeaseEvent", "append_completion_event", "append_lease_event"),
    "core.events.filters": ("Filters",),
    "core.events.notices": ("Notice",),
    "core.events.start_position": ("StartPosition",),
    "core.flows.client": ("Flows", "open_flows"),
    "core.flows.executions": ("Claim",),
    "core.flows.flows": ("CreatedFlow",),
    "core.kv.client": ("Database", "connect"),
    "core.kv.key_selector": ("KeySelector",),
    "core.kv.options": ("TransactionOptions",),
    "core.kv.subspace": ("Subspace",),
    "core.kv.transaction": ("Transaction",),
    "core.kv.transactional": ("transactional",),
    "core.kv.tuple_encoding": ("Versionstamp",),
    "core.kv.watches": ("Watch",),
    "core.locks.ownership": ("Checkpoint", "Ownership", "acquire_leadership"),
}
"""Where the names of `__all__` are defined; those that are not listed are errors."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # a type checker would take any name for one that __getattr__ knows

    def __getattr__(name: str) -> Any:
        """Loads a name of `__all__` at its first use (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, 'errors')}"), name)
        # The next use finds it without coming here.
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
