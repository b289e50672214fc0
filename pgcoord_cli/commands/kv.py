"""`pgcoord kv`: reads and writes the transactional key-value data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pgcoord_cli.commands.framework import (
    Limit,
    command,
    duration,
    ended_by_signal,
    noun,
    output_of,
    progress_bar,
    stdout_reader,
    stop_on_signals,
)
from pgcoord_cli.errors import ConditionFalse, UsageError

if TYPE_CHECKING:
    from pgcoord_cli.core.kv.client import Database, Transaction
    from pgcoord_cli.core.kv.key_changes import KeyChanges, Watched
    from pgcoord_cli.core.kv.transaction_file import TransactionFile
    from pgcoord_cli.render import Output
    from pgcoord_cli.settings import Settings

T = TypeVar("T")

app = noun("Read and write the transactional key-value data.")

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


@command(app, "watch")
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


@command(app, "txn")
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
    result = _run_under_leader(
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


@command(app, "load")
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


@command(app, "export")
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
    first, last = _bounds(begin, end, prefix, as_hex=hex_)
    with session.command_session(settings, "kv export", writes=False) as conn:
        for entry in bulk.export(conn, first, last):
            out.json_line(reading.show(entry, as_hex=hex_))


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
    first, last = _bounds(begin, end, prefix, as_hex=hex_)
    with session.command_session(settings, "kv range", writes=False) as conn:
        version, entries = reading.read_range(conn, first, last, limit, reverse=reverse)
    records = [reading.show(entry, as_hex=hex_) for entry in entries]
    out.rows(["key", "value", "encoding"], records, empty=f"no keys in this range at version {version}")


def _bounds(begin: str | None, end: str | None, prefix: str | None, *, as_hex: bool) -> tuple[bytes, bytes | None]:
    """Returns the half-open range of BEGIN and END, or of --prefix. Raises UsageError for both."""
    from pgcoord_cli.core.kv import reading

    if prefix is not None:
        if begin is not None or end is not None:
            raise UsageError("--prefix and BEGIN or END exclude each other")
        return reading.prefix_range(reading.parse_key(prefix, "--prefix", as_hex=as_hex))
    first = reading.parse_key(begin or "", "BEGIN", as_hex=as_hex)
    return first, None if end is None else reading.parse_key(end, "END", as_hex=as_hex)


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

    version = _run_under_leader(settings, out, name, commit, seconds)
    out.value(record | {"version": version}, str(version))


def _run_under_leader(
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
