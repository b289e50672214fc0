"""`pgcoord kv watch`: prints the changes of keys, or runs a command for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pgcoord_cli.commands.framework import duration, ended_by_signal, output_of, stdout_reader, stop_on_signals
from pgcoord_cli.commands.kv_options import Hex
from pgcoord_cli.errors import UsageError

if TYPE_CHECKING:
    from pgcoord_cli.core.kv.key_changes import KeyChanges, Watched
    from pgcoord_cli.render import Output


def watch(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY] [-- CMD...]", help="The key, unless --prefix is given; a command to run for each change."
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", metavar="P", help="Watch all keys that begin with P, in place of KEY.")
    ] = None,
    changes_only: Annotated[
        bool, typer.Option("--changes-only", help="Leave out the present state; start with the first change after it.")
    ] = False,
    most: Annotated[int | None, typer.Option("--max", metavar="N", min=1, help="End after N records.")] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="End after this time, with exit code 124.")
    ] = None,
    attempts: Annotated[
        int | None,
        typer.Option(
            "--attempts", metavar="N", min=1, help="With CMD: exit after N failed runs in a row. [default: no limit]"
        ),
    ] = None,
    hex_: Hex = False,
) -> None:
    """Print the present value of a key, and each change from then on; a value of null says that there is no such key.

    Of several changes between two reads only the last is printed. A lost connection is replaced, and what changed
    meanwhile is printed then.

    With CMD, run it for each change, one at a time, in place of printing: the value is on its standard input, and
    PGCOORD_KEY, PGCOORD_VERSION, PGCOORD_CHANGE (set or removed) and PGCOORD_ENCODING (of the key: utf-8 or hex) are in
    its environment. A run that fails is repeated with the same value, after a pause; with --attempts, N failures in a
    row end the watch with the exit code of CMD. Options after -- belong to CMD.

    \b
    Examples:
      pgcoord kv watch greeting
      pgcoord kv watch --prefix config/ --changes-only -o jsonl
      pgcoord kv watch ready --changes-only --max 1 --timeout 30s
      pgcoord kv watch nginx.conf --attempts 3 -- sh -c 'cat > /etc/nginx/nginx.conf && nginx -s reload'
    """
    from contextlib import closing

    from pgcoord_cli.core.kv.key_changes import KeyChanges

    settings, out = output_of(ctx, is_daemon=True)
    command_words = list(words or [])
    watched = _watched(command_words, prefix, as_hex=hex_)
    if attempts is not None and not command_words:
        raise UsageError("--attempts requires a command", hint="write: -- CMD...")
    seconds = duration("--timeout")(timeout)
    with closing(KeyChanges(settings, watched, is_state_wanted=not changes_only, seconds=seconds)) as changes:
        if command_words:
            _run_for_each(changes, command_words, attempts, most, as_hex=hex_)
        else:
            _print_each(changes, out, most, as_hex=hex_)


def _watched(words: list[str], prefix: str | None, *, as_hex: bool) -> Watched:
    """Returns what is watched. Takes KEY from `words`, so that the command is left."""
    from pgcoord_cli.core.kv import reading
    from pgcoord_cli.core.kv.key_changes import Watched

    if prefix is not None:
        return Watched(*reading.prefix_range(reading.parse_key(prefix, "--prefix", as_hex=as_hex)))
    if not words:
        raise UsageError("Missing argument 'KEY'.", hint="give KEY or --prefix P")
    return Watched.single(reading.parse_key(words.pop(0), "KEY", as_hex=as_hex))


def _print_each(changes: KeyChanges, out: Output, most: int | None, *, as_hex: bool) -> None:
    from itertools import islice

    from pgcoord_cli.core.kv import reading
    from pgcoord_cli.render.changes import ChangeStream

    stream = ChangeStream(out)
    received = stop_on_signals(changes.stop)
    with stdout_reader(changes.stop) as reader:
        stream.begin()
        for number, entry in enumerate(islice(changes.changes(), most), start=1):
            stream.write(reading.show(entry, as_hex=as_hex))
            reader.is_needed = number != most
    if received:
        raise ended_by_signal(received[0])


def _run_for_each(
    changes: KeyChanges, words: list[str], attempts: int | None, most: int | None, *, as_hex: bool
) -> None:
    import logging
    from contextlib import closing
    from itertools import islice

    from pgcoord_cli.core.concurrency.delivery import Delivery
    from pgcoord_cli.core.kv import key_changes

    def stop() -> None:
        changes.stop()
        delivery.signal(received[-1])

    with closing(Delivery(words, attempts, "the change")) as delivery:
        received = stop_on_signals(stop)
        for entry in islice(changes.changes(), most):
            if code := delivery.deliver(entry.value or b"", key_changes.variables(entry, as_hex=as_hex)):
                logging.getLogger("pgcoord.watch").warning("%s exited with %d; the watch ends", words[0], code)
                raise typer.Exit(code)
            if code is None:
                break
    if received:
        raise ended_by_signal(received[0])
