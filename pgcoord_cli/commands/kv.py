"""`pgcoord kv`: read and write the transactional key-value data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pgcoord_cli.commands.framework import Limit, command, duration, noun, output_of
from pgcoord_cli.errors import ConditionFalse

if TYPE_CHECKING:
    from pgcoord_cli.core.client import Transaction

app = noun("Read and write the transactional key-value data.")

Key = Annotated[str, typer.Argument(metavar="KEY", help="UTF-8 text, or hexadecimal under --hex.")]
Hex = Annotated[bool, typer.Option("--hex", help="Keys and values are hexadecimal, in and out.")]
Timeout = Annotated[
    str, typer.Option("--timeout", metavar="DURATION", help="How long to wait for a leader, and for the commit.")
]


@command(app, "get")
def get(ctx: typer.Context, key: Key, hex_: Hex = False) -> None:
    """Print what a key holds; exit 3 when there is no such key. With `-o plain`, just the value.

    \b
    Examples:
      pgcoord kv get greeting
      pgcoord kv get greeting -o plain
      pgcoord kv get 00ff --hex -o json
    """
    from pgcoord_cli.core import kv, session

    settings, out = output_of(ctx)
    wanted = kv.parse_key(key, "KEY", as_hex=hex_)
    with session.command_session(settings, "kv get", writes=False) as conn:
        entry = kv.read_key(conn, wanted)
    record = kv.show(entry, as_hex=hex_)
    if entry.value is None:
        if out.is_json:
            out.document(record)
        raise ConditionFalse(f"there is no key {key!r}", answered=True)
    out.value(record, record["value"])


@command(app, "set")
def set_(
    ctx: typer.Context,
    key: Key,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="UTF-8 text, or hexadecimal under --hex.")],
    hex_: Hex = False,
    timeout: Timeout = "10s",
) -> None:
    """Write a key through the leader, and print the version at which that took effect.

    \b
    Examples:
      pgcoord kv set greeting hello
      pgcoord kv set 00ff cafe --hex
    """
    from pgcoord_cli.core import kv

    wanted = kv.parse_key(key, "KEY", as_hex=hex_)
    content = kv.parse_value(value, "VALUE", as_hex=hex_)

    async def write(transaction: Transaction) -> None:
        transaction.set(wanted, content)

    _commit(ctx, "kv set", write, {"key": key}, timeout)


@command(app, "clear")
def clear(ctx: typer.Context, key: Key, hex_: Hex = False, timeout: Timeout = "10s") -> None:
    """Remove a key through the leader, and print the version at which that took effect.

    \b
    Examples:
      pgcoord kv clear greeting
    """
    from pgcoord_cli.core import kv

    wanted = kv.parse_key(key, "KEY", as_hex=hex_)

    async def write(transaction: Transaction) -> None:
        transaction.clear(wanted)

    _commit(ctx, "kv clear", write, {"key": key}, timeout)


@command(app, "range")
def range_(
    ctx: typer.Context,
    begin: Annotated[str, typer.Argument(metavar="BEGIN", help="First key; empty for the very first.")] = "",
    end: Annotated[str | None, typer.Argument(metavar="END", help="Key to stop before; none: to the last.")] = None,
    limit: Limit = 1000,
    reverse: Annotated[bool, typer.Option("--reverse", help="From the end backwards.")] = False,
    hex_: Hex = False,
) -> None:
    """List keys and values from BEGIN up to but without END, all of one snapshot.

    \b
    Examples:
      pgcoord kv range
      pgcoord kv range account/ account0 --limit 10
      pgcoord kv range --reverse --limit 1 -o json
    """
    from pgcoord_cli.core import kv, session

    settings, out = output_of(ctx)
    first = kv.parse_key(begin, "BEGIN", as_hex=hex_)
    last = None if end is None else kv.parse_key(end, "END", as_hex=hex_)
    with session.command_session(settings, "kv range", writes=False) as conn:
        version, entries = kv.read_range(conn, first, last, limit, reverse=reverse)
    records = [kv.show(entry, as_hex=hex_) for entry in entries]
    out.rows(["key", "value", "encoding"], records, empty=f"no keys there at version {version}")


def _commit(
    ctx: typer.Context,
    name: str,
    write: Callable[[Transaction], Awaitable[None]],
    record: dict[str, Any],
    timeout: str,
) -> None:
    """Waits for a leader, runs one transaction, and prints the version that it got."""
    import asyncio

    from pgcoord_cli.core import leader, session
    from pgcoord_cli.core.client import connect

    settings, out = output_of(ctx)
    seconds = duration("--timeout")(timeout) or 0

    async def commit() -> int:
        async with await connect(settings, name, pool_size=1) as database:
            return await database.write(write, commit_seconds=seconds)

    with session.command_session(settings, name, writes=True) as conn:
        leader.wait_for_leader(conn, settings.schema, seconds)
    try:
        version = asyncio.run(commit())
    except KeyboardInterrupt:
        out.warn("the request may have been sent already: pgcoord commit list shows it and what becomes of it")
        raise
    out.value(record | {"version": version}, str(version))
