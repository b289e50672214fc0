"""The public Python interface: which names it has, what loading it costs, and that their types are seen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from inspect import getdoc, isclass, isfunction

import pytest

import pgcoord_cli
import pgcoord_cli.sync
import pgcoord_cli.tuples
from pgcoord_cli import (
    Conflict,
    Database,
    Filters,
    LeaseEvent,
    PgcoordError,
    StartPosition,
    Transaction,
    acquire_leadership,
    append_completion_event,
    append_lease_event,
    connect,
    errors,
    tail,
    tail_async,
)

NAMES = {
    # transactions
    "connect", "Database", "KeySelector", "Transaction", "TransactionOptions", "Watch", "transactional",
    "Subspace", "Versionstamp",
    # events
    "tail", "tail_async", "append_completion_event", "append_lease_event", "AsyncEventIterator", "CompletionEvent",
    "Event", "EventIterator", "Filters", "LeaseEvent", "Notice", "StartPosition",
    # locks
    "acquire_leadership", "Checkpoint", "Ownership",
    # flows
    "open_flows", "Claim", "CreatedFlow", "Flows",
    # errors
    "Busy", "CommitRefused", "ConditionFalse", "Conflict", "ConnectionFailed", "CoordinationError", "CursorExpired",
    "HistoryChanged", "NoLeader", "TransactionCancelled", "UsedDuringCommit",
    "Fenced", "KeyCollision", "KeyTooLarge", "LockNotAcquired", "OutcomeUnknown", "PermissionDenied", "PgcoordError",
    "Rejected", "SchemaMissing", "SchemaUnknown", "TimedOut", "TimeLimit", "TooOld", "TransactionTooLarge",
    "UnsuitableServer", "UsageError", "ValueTooLarge",
}  # fmt: skip
"""The contract: names may be added."""

ERRORS_OF_COMMANDS = {"CommandNotExecutable", "CommandNotFound",
    "Interrupted", "LockLost", "MigrationEdited", "ServerUnavailable", "Terminated",
}  # fmt: skip
"""Raised by commands only."""

HEAVY = {"psycopg", "typer", "rich", "asyncio", "tabulate", "msgpack", "yaml", "logging", "importlib.metadata"}


def python(text: str) -> str:
    """What a program prints, in a new interpreter."""
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout


def test_the_names_are_pinned() -> None:
    assert set(pgcoord_cli.__all__) == NAMES
    assert len(pgcoord_cli.__all__) == len(NAMES)
    assert set(pgcoord_cli.sync.__all__) == {
        "connect", "Database", "KeySelector", "Transaction", "Watch", "transactional",
    }  # fmt: skip
    assert set(pgcoord_cli.tuples.__all__) == {
        "SingleFloat", "Subspace", "Versionstamp", "pack", "pack_with_versionstamp", "range_of", "unpack",
    }  # fmt: skip


def test_every_error_is_public_or_of_commands() -> None:
    def subclasses(kind: type[PgcoordError]) -> Iterator[str]:
        for each in kind.__subclasses__():
            if each.__module__ == errors.__name__:
                yield each.__name__
                yield from subclasses(each)

    public = {name for name in NAMES if getattr(errors, name, None) is getattr(pgcoord_cli, name)}
    assert public | ERRORS_OF_COMMANDS == {"PgcoordError", *subclasses(PgcoordError)}
    assert not public & ERRORS_OF_COMMANDS


def test_a_star_import_gives_each_name_and_no_other() -> None:
    printed = python("from pgcoord_cli import *\nprint(*sorted(name for name in globals() if name[:2] != '__'))")
    assert set(printed.split()) == NAMES
    for module in (pgcoord_cli.sync, pgcoord_cli.tuples):
        load = f"from {module.__name__} import *"
        printed = python(f"{load}\nprint(*sorted(name for name in globals() if name[:2] != '__'))")
        assert set(printed.split()) == set(module.__all__)


def test_the_package_and_its_errors_load_nothing_heavy() -> None:
    load = "import sys, pgcoord_cli; pgcoord_cli.PgcoordError; from pgcoord_cli import Conflict, LockNotAcquired"
    loaded = set(python(f"{load}\nprint(*sys.modules)").split())
    assert loaded & HEAVY == set()
    assert {name for name in loaded if name.startswith("pgcoord_cli")} == {"pgcoord_cli", "pgcoord_cli.errors"}


def test_tuples_load_no_database() -> None:
    loaded = set(python("import sys, pgcoord_cli.tuples\nprint(*sys.modules)").split())
    assert loaded & {"psycopg", "typer", "rich", "asyncio"} == set()


def test_no_name_loads_the_terminal() -> None:
    loaded = set(python("import sys, pgcoord_cli.sync\nfrom pgcoord_cli import *\nprint(*sys.modules)").split())
    assert "psycopg" in loaded, "each of them was loaded"
    terminal = {"typer", "rich", "tabulate", "pgcoord_cli.cli", "pgcoord_cli.commands", "pgcoord_cli.render"}
    assert loaded & terminal == set()


def test_any_other_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'pgcoord_cli' has no attribute 'Settings'"):
        pgcoord_cli.Settings  # type: ignore[attr-defined]  # noqa: B018
    assert set(dir(pgcoord_cli)) >= NAMES


def test_every_name_says_what_it_is() -> None:
    for module in (pgcoord_cli, pgcoord_cli.sync, pgcoord_cli.tuples):
        for name in module.__all__:
            value = getattr(module, name)
            assert getdoc(value), name
            if isclass(value):
                methods = {each: method for each, method in vars(value).items() if isfunction(method)}
                assert [each for each in methods if each[0] != "_" and not getdoc(getattr(value, each))] == []


# -- types: mypy --strict checks these functions, which nothing calls. It reports an annotation that does not fit, and
# an ignored error that is none, as where it takes a name that is loaded lazily for Any.


async def typed_asynchronous(database: Database) -> None:
    async def work(transaction: Transaction) -> bytes | None:
        return await transaction.get(b"key")

    value: bytes | None = await database.run(work)
    value = await typed_asynchronous_transactional(database)
    another: Database = await connect("host=localhost", schema="pgcoord", application="typed")
    async for event in tail_async("completion", start=StartPosition.cursor("02" + 16 * "0")):
        outcome: str = event.outcome
        print(value, another, outcome)


@pgcoord_cli.sync.transactional(retry_limit=3)
def typed_transactional(tr: pgcoord_cli.sync.Transaction, divisor: int) -> int:
    value: bytes | None = tr[b"key"]
    for key, each in tr[b"a":b"b"]:
        count: bytes = key + each
        print(count)
    return len(value or b"") // divisor


@pgcoord_cli.transactional
async def typed_asynchronous_transactional(tr: Transaction) -> bytes | None:
    async for key, each in tr[:b"b":-1]:
        count: bytes = key + each
        print(count)
    return await tr[b"key"]


def typed_blocking() -> None:
    def work(transaction: pgcoord_cli.sync.Transaction) -> int:
        return len(transaction.get(b"key") or b"")

    with pgcoord_cli.sync.connect() as database:
        length: int = database.run(work)
    halved: int = typed_transactional(database, 2)
    print(halved)
    for event in tail("lease", filters=Filters(kinds=["expired"]), follow=False):
        lease: LeaseEvent = event
        event_type: str = event.event_type
        event.outcome  # type: ignore[attr-defined]  # noqa: B018
        print(length, lease, event_type)
    with acquire_leadership(None, "mailer") as owner:
        position: int | None = owner.checkpoint.load()
        print(position, append_lease_event, append_completion_event, Conflict("").hint)
