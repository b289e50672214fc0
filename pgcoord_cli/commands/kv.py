"""`pgcoord kv`: reads and writes the transactional key-value data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pgcoord_cli.commands import kv_files, kv_watch
from pgcoord_cli.commands.framework import Limit, command, duration, noun, output_of
from pgcoord_cli.commands.kv_options import Begin, End, Hex, Key, Prefix, Timeout, bounds, run_under_leader
from pgcoord_cli.errors import ConditionFalse, UsageError

if TYPE_CHECKING:
    from pgcoord_cli.core.kv.client import Database, Transaction

app = noun("Read and write the transactional key-value data.")


@command(app, "get")
def get(
    ctx: typer.Context,
    key: Key,
    hex_: Hex = False,
    integer: Annotated[bool, typer.Option("--integer", help="Print the value as a little-endian integer.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Write the bytes of the value and nothing else.")] = False,
    at: Annotated[
        int | None, typer.Option("--at", metavar="VERSION", min=0, help="The value at a version of the last seconds.")
    ] = None,
) -> None:
    """Print the value of a key; exit 3 if there is no such key. With `-o plain`, print the value only.

    --raw writes the bytes of the value without a line feed after them, whatever -o is. --at takes a version that a
    commit or another read returned some seconds ago at most; of versions that were committed in one batch, which became
    visible together, it takes the last.

    \b
    Examples:
      pgcoord kv get greeting
      pgcoord kv get greeting -o plain
      pgcoord kv get 00ff --hex -o json
      pgcoord kv get certificate --raw > certificate.der
      pgcoord kv get greeting --at 1042
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.kv import reading

    settings, out = output_of(ctx)
    wanted = reading.parse_key(key, "KEY", as_hex=hex_)
    if raw and integer:
        raise UsageError("--raw and --integer exclude each other")
    with session.command_session(settings, "kv get", writes=False) as conn:
        entry = reading.read_key(conn, wanted) if at is None else reading.read_key_at(conn, wanted, at)
    record = reading.show(entry, as_hex=hex_)
    if integer and entry.value is not None:
        record |= {"value": int.from_bytes(entry.value, "little"), "encoding": "integer"}
    if entry.value is None:
        if out.is_json and not raw:
            out.document(record)
        raise ConditionFalse(f"there is no key {key!r}", answered=True)
    if raw:
        out.raw(entry.value)
        return
    out.value(record, str(record["value"]))


@command(app, "set")
def set_(
    ctx: typer.Context,
    key: Key,
    value: Annotated[
        str | None,
        typer.Argument(metavar="VALUE", help="UTF-8 text, or hexadecimal under --hex; - reads standard input."),
    ] = None,
    value_file: Annotated[
        Path | None, typer.Option("--value-file", metavar="F", help="Read the value from a file, in place of VALUE.")
    ] = None,
    hex_: Hex = False,
    timeout: Timeout = "10s",
) -> None:
    """Set a key, and print the commit version.

    A value from standard input or a file is taken byte for byte, a line feed at its end included, and with --hex too.
    A value that is one hyphen is written as `2d --hex`, with a hexadecimal key.

    \b
    Examples:
      pgcoord kv set greeting hello
      pgcoord kv set 00ff cafe --hex
      pgcoord kv set certificate --value-file certificate.der
      openssl rand 32 | pgcoord kv set secret -
    """
    from pgcoord_cli.core.kv import reading

    wanted = reading.parse_key(key, "KEY", as_hex=hex_)
    if value is None and value_file is None:
        raise UsageError("Missing argument 'VALUE'.", hint="give VALUE, - for standard input, or --value-file F")
    if value is not None and value_file is not None:
        raise UsageError("VALUE and --value-file exclude each other")
    if value_file is not None:
        content = _value_of_file(value_file)
    else:
        content = _value_of_stdin(ctx) if value == "-" else reading.parse_value(value or "", "VALUE", as_hex=hex_)

    async def write(transaction: Transaction) -> None:
        transaction.set(wanted, content)

    _commit(ctx, "kv set", write, {"key": key}, timeout)


def _value_of_file(path: Path) -> bytes:
    from pgcoord_cli.core.kv import reading

    try:
        with path.open("rb") as stream:
            return reading.read_value(stream, f"{str(path)!r}", "--value-file")
    except OSError as error:
        raise UsageError(f"--value-file: cannot read {str(path)!r}: {error.strerror}") from None


def _value_of_stdin(ctx: typer.Context) -> bytes:
    from pgcoord_cli.commands.standard_input import is_typed, stdin_bytes
    from pgcoord_cli.core.kv import reading

    _, out = output_of(ctx)
    if is_typed():
        out.note("reading the value from the terminal; end it with Ctrl-D at the beginning of a line")
    return reading.read_value(stdin_bytes("VALUE"), "standard input", "VALUE")


@command(app, "clear")
def clear(
    ctx: typer.Context,
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="UTF-8 text, or hexadecimal under --hex.")] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", metavar="P", help="Clear all keys that begin with P, in place of KEY.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --prefix: clear without confirmation.")] = False,
    hex_: Hex = False,
    timeout: Timeout = "10s",
) -> None:
    """Clear a key, and print the commit version; with --prefix, clear all keys that begin with P in one transaction.

    \b
    Examples:
      pgcoord kv clear greeting
      pgcoord kv clear --prefix account/ --yes
    """
    from pgcoord_cli.core.kv import reading

    if (key is None) == (prefix is None):
        raise UsageError("give either KEY or --prefix")
    if key is not None:
        wanted = reading.parse_key(key, "KEY", as_hex=hex_)
    else:
        begin, end = reading.prefix_range(reading.parse_key(prefix or "", "--prefix", as_hex=hex_))
        if not yes:
            _confirm_clear(prefix or "")

    async def write(transaction: Transaction) -> None:
        if key is not None:
            transaction.clear(wanted)
        else:
            transaction.clear_range(begin, end)

    _commit(ctx, "kv clear", write, {"prefix": prefix} if key is None else {"key": key}, timeout)


def _confirm_clear(prefix: str) -> None:
    """Asks on the terminal whether to clear the keys; exits unless the answer is yes."""
    from pgcoord_cli.commands.standard_input import confirm

    keys = f"all keys that begin with {prefix!r}" if prefix else "all keys"
    confirm(f"Clear {keys}?", f"kv clear --prefix clears {keys}")


@command(app, "clear-range")
def clear_range(
    ctx: typer.Context,
    begin: Annotated[str, typer.Argument(metavar="BEGIN", help="First key to clear.")],
    end: Annotated[str, typer.Argument(metavar="END", help="Key after the last one to clear.")],
    hex_: Hex = False,
    timeout: Timeout = "10s",
) -> None:
    """Clear every key from BEGIN up to, but not including, END.

    \b
    Examples:
      pgcoord kv clear-range account/ account0
    """
    from pgcoord_cli.core.kv import reading

    first = reading.parse_key(begin, "BEGIN", as_hex=hex_)
    last = reading.parse_key(end, "END", as_hex=hex_)
    if first > last:
        raise UsageError(f"END: {end!r} comes before BEGIN {begin!r}")

    async def write(transaction: Transaction) -> None:
        transaction.clear_range(first, last)

    _commit(ctx, "kv clear-range", write, {"begin": begin, "end": end}, timeout)


@command(app, "add")
def add(
    ctx: typer.Context,
    key: Key,
    amount: Annotated[int, typer.Argument(metavar="AMOUNT", help="The number to add; write -- before a negative one.")],
    hex_: Hex = False,
    timeout: Timeout = "10s",
) -> None:
    """Add to a counter, a little-endian integer of eight bytes, without reading it: additions never conflict.

    Read the counter with `kv get --integer`.

    \b
    Examples:
      pgcoord kv add visits 1
      pgcoord kv add visits -- -5
      pgcoord kv get visits --integer -o plain
    """
    from pgcoord_cli.core.kv import reading

    wanted = reading.parse_key(key, "KEY", as_hex=hex_)
    operand = reading.counter(amount, "AMOUNT")

    async def write(transaction: Transaction) -> None:
        transaction.add(wanted, operand)

    _commit(ctx, "kv add", write, {"key": key, "added": amount}, timeout)


command(app, "watch")(kv_watch.watch)
command(app, "txn")(kv_files.txn)
command(app, "load")(kv_files.load)
command(app, "export")(kv_files.export)


@command(app, "range")
def range_(
    ctx: typer.Context,
    begin: Begin = None,
    end: End = None,
    prefix: Prefix = None,
    limit: Limit = 1000,
    reverse: Annotated[bool, typer.Option("--reverse", help="Start at the last key, in reverse order.")] = False,
    hex_: Hex = False,
) -> None:
    """List keys and values from BEGIN up to, but not including, END, all from one snapshot.

    \b
    Examples:
      pgcoord kv range
      pgcoord kv range account/a account/n --limit 10
      pgcoord kv range --prefix account/
      pgcoord kv range --reverse --limit 1 -o json
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.kv import reading

    settings, out = output_of(ctx)
    first, last = bounds(begin, end, prefix, as_hex=hex_)
    with session.command_session(settings, "kv range", writes=False) as conn:
        version, entries = reading.read_range(conn, first, last, limit, reverse=reverse)
    records = [reading.show(entry, as_hex=hex_) for entry in entries]
    out.rows(["key", "value", "encoding"], records, empty=f"no keys in this range at version {version}")


def _commit(
    ctx: typer.Context,
    name: str,
    write: Callable[[Transaction], Awaitable[None]],
    record: dict[str, Any],
    timeout: str,
) -> None:
    """Waits for a leader, runs one transaction, and prints its commit version."""
    settings, out = output_of(ctx)
    seconds = duration("--timeout")(timeout) or 0

    def commit(database: Database) -> Coroutine[Any, Any, int]:
        return database.write(write, commit_seconds=seconds)

    version = run_under_leader(settings, out, name, commit, seconds)
    out.value(record | {"version": version}, str(version))
