"""`pgcoord kv txn|load|export`: transactions and keys from files of JSON lines, and keys to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgcoord_cli.commands.framework import duration, output_of, progress_bar
from pgcoord_cli.commands.kv_options import Begin, End, Hex, Prefix, Timeout, bounds, run_under_leader
from pgcoord_cli.errors import ConditionFalse, UsageError

if TYPE_CHECKING:
    from pgcoord_cli.core.kv.transaction_file import TransactionFile
    from pgcoord_cli.render import Output


def txn(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines; - for standard input.")],
    timeout: Timeout = "10s",
) -> None:
    """Compare keys and, if every comparison is true, make all mutations at once; exit 3 if one is false.

    One JSON object a line. Comparisons, of the state before the transaction, byte by byte:

    \b
      {"compare": {"key": "a", "value": "1"}}            also with "op": "!=", "<", "<=", ">", ">="
      {"compare": {"key": "a", "absent": true}}          or "exists": true

    Mutations, which apply in the order of the lines: set, add, max, min, bit_and, bit_or, bit_xor, byte_max, byte_min,
    append_if_fits, compare_and_clear, set_versionstamped_key, set_versionstamped_value, clear and clear_range:

    \b
      {"set": {"key": "a", "value": "2"}}
      {"set": {"key": "00ff", "value": "cafe", "encoding": "hex"}}
      {"add": {"key": "n", "amount": 1}}                 as kv add; or an operand as "value"
      {"clear": {"key": "b"}}
      {"clear_range": {"prefix": "c/"}}                  or "begin" and "end"

    The whole file is checked first: exit 2 names the line that is not valid. A conflict is retried until --timeout.

    \b
    Examples:
      pgcoord kv txn transfer.jsonl
      pgcoord kv txn - -o json < transfer.jsonl
    """
    from pgcoord_cli.core.kv import transaction_file

    settings, out = output_of(ctx)
    seconds = duration("--timeout")(timeout) or 0
    parsed = _transaction_file(file, out)
    result = run_under_leader(
        settings, out, "kv txn", lambda database: transaction_file.commit(database, parsed, seconds), seconds
    )
    out.document(result.document())
    if result.false:
        first = result.false[0]
        key = transaction_file.shown(first, result.version)["key"]
        raise ConditionFalse(
            f"line {first.line}: the comparison of {key!r} is false", hint="nothing was written", answered=True
        )


def _transaction_file(name: str, out: Output) -> TransactionFile:
    from pgcoord_cli.commands.standard_input import is_typed, stdin_bytes
    from pgcoord_cli.core.kv import transaction_file

    if name == "-":
        if is_typed():
            out.note("reading the transaction from the terminal; end it with Ctrl-D at the beginning of a line")
        return transaction_file.parse(stdin_bytes(), "stdin")
    try:
        with Path(name).open("rb") as stream:
            return transaction_file.parse(stream, name)
    except OSError as error:
        raise UsageError(f"FILE: cannot read {name!r}: {error.strerror}") from None


def load(
    ctx: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSON lines as `kv export` writes them; - for standard input.")
    ],
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Keys per transaction.")] = 500,
    timeout: Timeout = "10s",
) -> None:
    """Set many keys from a file of JSON lines: {"key": …, "value": …, "encoding": "utf-8" or "hex"}.

    The position in the file is committed with each batch, so that the same call resumes after a crash or Ctrl-C. A load
    from standard input starts from the beginning.

    \b
    Examples:
      pgcoord kv load accounts.jsonl
      pgcoord kv export | pgcoord kv load - --schema other
    """
    from pgcoord_cli.commands.standard_input import stdin_bytes
    from pgcoord_cli.core.concurrency import event_loop
    from pgcoord_cli.core.kv import bulk

    settings, out = output_of(ctx)
    seconds = duration("--timeout")(timeout) or 0
    source = bulk.Source(stdin_bytes(), "stdin", None, None) if file == "-" else bulk.open_source(file)
    with source.stream, progress_bar(out, "loading", source.size) as advance:
        loaded = event_loop.run(bulk.load(settings, source, batch_size, seconds, advance))
    out.document(loaded._asdict())


def export(
    ctx: typer.Context,
    begin: Begin = None,
    end: End = None,
    prefix: Prefix = None,
    hex_: Hex = False,
) -> None:
    """Print keys and values as JSON lines, all from one snapshot.

    \b
    Examples:
      pgcoord kv export > backup.jsonl
      pgcoord kv export --prefix account/ | jq -r .key
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.kv import bulk, reading

    settings, out = output_of(ctx)
    first, last = bounds(begin, end, prefix, as_hex=hex_)
    with session.command_session(settings, "kv export", writes=False) as conn:
        for entry in bulk.export(conn, first, last):
            out.json_line(reading.show(entry, as_hex=hex_))
