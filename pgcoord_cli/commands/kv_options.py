"""What the commands of `pgcoord kv` share: their options, the range that they name, and a commit under a leader."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pgcoord_cli.errors import UsageError

if TYPE_CHECKING:
    from pgcoord_cli.core.kv.client import Database
    from pgcoord_cli.render import Output
    from pgcoord_cli.settings import Settings

T = TypeVar("T")

Key = Annotated[str, typer.Argument(metavar="KEY", help="UTF-8 text, or hexadecimal under --hex.")]
Hex = Annotated[bool, typer.Option("--hex", help="Read and print keys and values as hexadecimal.")]
Timeout = Annotated[
    str,
    typer.Option(
        "--timeout", metavar="DURATION", help="How long to wait for a leader, and for the commit to be settled."
    ),
]
Prefix = Annotated[
    str | None, typer.Option("--prefix", metavar="P", help="All keys that begin with P, in place of BEGIN and END.")
]
Begin = Annotated[str | None, typer.Argument(metavar="BEGIN", help="First key; default: the first of all.")]
End = Annotated[
    str | None, typer.Argument(metavar="END", help="Key after the last one; default: past the last of all.")
]


def bounds(begin: str | None, end: str | None, prefix: str | None, *, as_hex: bool) -> tuple[bytes, bytes | None]:
    """Returns the half-open range of BEGIN and END, or of --prefix. Raises UsageError for both."""
    from pgcoord_cli.core.kv import reading

    if prefix is not None:
        if begin is not None or end is not None:
            raise UsageError("--prefix and BEGIN or END exclude each other")
        return reading.prefix_range(reading.parse_key(prefix, "--prefix", as_hex=as_hex))
    first = reading.parse_key(begin or "", "BEGIN", as_hex=as_hex)
    return first, None if end is None else reading.parse_key(end, "END", as_hex=as_hex)


def run_under_leader(
    settings: Settings, out: Output, name: str, commit: Callable[[Database], Coroutine[Any, Any, T]], seconds: float
) -> T:
    """Waits for a leader and runs `commit`; returns its result. Raises NoLeader after `seconds`."""
    from pgcoord_cli.core.concurrency import event_loop
    from pgcoord_cli.core.kv.client import open_database

    is_led = False

    async def wait_and_commit() -> T:
        nonlocal is_led
        async with await open_database(settings, name, pool_size=1) as database:
            await database.wait_for_leader(seconds)
            is_led = True
            return await commit(database)

    try:
        return event_loop.run(wait_and_commit())
    except KeyboardInterrupt:
        if is_led:
            out.warn("the commit request may have been sent already; see its outcome with: pgcoord commit list")
        raise
