"""The base of all commands: groups that are imported when they are called, and what commands begin with.

**Parameters** are declared by the signature of a command's function (`commands.parameters`); the global options are
added to them (`commands.global_options`).

**Lazy groups.** The root has the names of its groups and one line of help for each. A group's module is imported when
one of its commands is called, so that `pgcoord --help` costs little more than Python and Typer.

**Public names.** Typer's own parser has no public names for contexts, commands and formatters. Only the classes of
`typer.core` are subclassed, and what their methods get beside those is typed `Any`.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, cast
from uuid import UUID

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from pgcoord_cli.commands.global_options import GLOBAL_DECLARATIONS, GLOBAL_NAMES, flags_of, global_options
from pgcoord_cli.commands.parameters import (
    FLAG,
    Declaration,
    Parameter,
    declarations,
    help_hint,
    help_record,
    take_over_conversion,
    usage_word,
)
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import (
    LONGEST_WAIT,
    Settings,
    parse_duration,
    resolve_presentation,
    resolve_settings,
)

if TYPE_CHECKING:
    from pgcoord_cli.render import Output

MAX_ROWS = 2**31 - 1

EXIT_CODES = {
    0: "success, or the condition that was asked for holds",
    1: "failed",
    2: "usage: an option, an argument or a variable is missing or invalid",
    3: "the condition that was asked for does not hold (no leader, pending migrations, no such key, unhealthy)",
    4: "cannot connect",
    5: "busy: another session holds a lock, or waiting for it timed out",
    6: "fenced: a newer term or lease has superseded this one",
    7: "the schema is missing or unknown",
    8: "the cursor has expired: events after it have been deleted",
    9: "unsuitable server: standby, transaction pooler, unsupported version",
    10: "outcome unknown: ask again with pgcoord commit show REQUEST_ID",
    124: "timed out",
    126: "a command given to pgcoord cannot be executed",
    127: "a command given to pgcoord was not found",
    130: "died of SIGINT (Ctrl-C), as a shell shows it; 143 of SIGTERM, which ends a daemon with 0; 141 of SIGPIPE",
}

ENVIRONMENT = {
    "PGCOORD_DSN": "connection string, if --dsn is not given; without both, libpq reads PGHOST, PGSERVICE, …",
    "PGCOORD_SCHEMA": "schema, if --schema is not given",
    "PGCOORD_OUTPUT": "output format, if --output is not given",
    "PGCOORD_COLOR": "auto, always or never, if --color is not given; with auto, NO_COLOR turns colours off",
    "PGCOORD_LOG_FORMAT": "text or json, if --log-format is not given",
    "PGCOORD_DEV_DIR": "directory of the servers of pgcoord dev, instead of the user's data directory",
    "PGCOORD_CONNECT_TIMEOUT": "longest wait for a connection (default: PGCONNECT_TIMEOUT, else 10s)",
    "PGCOORD_STATEMENT_TIMEOUT": "longest run of one statement (default: 30s)",
    "PGCOORD_LOCK_TIMEOUT": "longest wait for a lock within a statement (default: 10s)",
}


# Commands and groups


class NoCommandGiven(UsageError):
    """The call ends with the name of a group; `help` is the help of that group."""

    def __init__(self, ctx: Any) -> None:
        super().__init__("no command was given", hint=help_hint(ctx))
        self.help: str = ctx.get_help()


class _Declared:
    """Base of commands and groups: their parameters are converted and described by `commands.parameters`."""

    callback: Callable[..., Any] | None
    params: list[Any]

    def add_global_options(self) -> None:
        """Appends the global options to the parameters of the command."""
        self.params.extend(global_options())

    @cached_property
    def _declarations(self) -> dict[str, Declaration]:
        return GLOBAL_DECLARATIONS | declarations(self.callback)

    def declaration(self, parameter: Parameter) -> Declaration:
        """Returns the declaration of a parameter in the signature, or that of a flag for `--help`."""
        return self._declarations.get(parameter.name or "", FLAG)

    def take_over_conversion(self, parameters: list[Any]) -> list[Any]:
        """Replaces Typer's conversion of the parameters, and returns them."""
        for parameter in parameters:
            take_over_conversion(parameter, self.declaration(parameter))
        return parameters

    def write_options(self, parameters: Sequence[Parameter], formatter: Any) -> None:
        """Writes the help of arguments, options and global options, each in its own section."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Global options": []}
        for parameter in parameters:
            if record := help_record(parameter, self.declaration(parameter)):
                title = "Arguments" if isinstance(parameter, TyperArgument) else "Options"
                sections["Global options" if parameter.name in GLOBAL_NAMES else title].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class PgcoordCommand(_Declared, TyperCommand):
    """A command, with the global options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_global_options()

    def get_params(self, ctx: Any) -> list[Any]:
        return self.take_over_conversion(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Runs the command. A UsageError that has no hint gets one that names the command's help."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            error.hint = error.hint or help_hint(ctx)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [each for each in self.params if isinstance(each, TyperArgument)]
        return [*filter(None, [self.options_metavar]), *map(usage_word, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.write_options(self.get_params(ctx), formatter)


class PgcoordGroup(_Declared, TyperGroup):
    """A group of PgcoordCommands, with the global options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_global_options()

    def get_params(self, ctx: Any) -> list[Any]:
        return self.take_over_conversion(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            raise NoCommandGiven(ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        self.write_options(self.get_params(ctx), formatter)


class LazyGroup(PgcoordGroup):
    """A group with the names of its commands and a line of help for each; imports the module of one that is called."""

    catalogue: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Placeholders until a module is imported: Typer suggests their names for one that is mistyped.
        self.commands: dict[str, Any] = {name: TyperCommand(name, help=line) for name, line in self.catalogue.items()}
        self._loaded: set[str] = set()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.catalogue and cmd_name not in self._loaded:
            module = importlib.import_module(f"pgcoord_cli.commands.{cmd_name}")
            self.commands[cmd_name] = typer.main.get_command(module.app)
            self._loaded.add(cmd_name)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.catalogue.items()))


_HELP_OPTION = {"help_option_names": ["-h", "--help"]}

Group = TypeVar("Group", bound=PgcoordGroup)


def noun(help: str) -> typer.Typer:  # noqa: A002
    """Returns the Typer app of a noun that is a group of commands."""
    return _group_app(PgcoordGroup, help)


def root_group(cls: type[Group], help: str) -> Group:  # noqa: A002
    """Returns a new root of the command tree, of the given class."""
    return cast(Group, typer.main.get_command(_group_app(cls, help)))


def _group_app(cls: type[PgcoordGroup], help: str) -> typer.Typer:  # noqa: A002
    app = typer.Typer(
        cls=cls, help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
        context_settings=_HELP_OPTION,
    )  # fmt: skip
    app.callback()(_keep_as_group)
    return app


def _keep_as_group() -> None:
    # Without a callback, Typer turns a group of one command into that command.
    pass


def single(help: str) -> typer.Typer:  # noqa: A002
    """Returns the Typer app of a noun that is one command, like `demo`."""
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None, context_settings=_HELP_OPTION)


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `name` of `app`, with the global options."""
    return app.command(name, cls=PgcoordCommand, context_settings=_HELP_OPTION)


# What commands begin with


def settings_of(ctx: typer.Context, **overrides: Any) -> Settings:
    """Returns the Settings of this call, with the fields in `overrides` replaced. Raises UsageError."""
    settings = resolve_settings(flags_of(ctx), os.environ)
    return replace(settings, **overrides) if overrides else settings


def output_of(ctx: typer.Context, *, is_daemon: bool = False) -> tuple[Settings, Output]:
    """Returns the Settings and the Output of this call, and configures logging for it.

    Raises UsageError for a value that cannot be used.
    """
    from pgcoord_cli.render import Output
    from pgcoord_cli.render.log import configure_logging

    presentation = resolve_presentation(flags_of(ctx), os.environ)
    # Before the settings are read, so that their error, too, is logged in the form that was asked for.
    configure_logging(presentation, is_daemon=is_daemon)
    return settings_of(ctx), Output(presentation)


def identifier(text: str, argument: str, hint: str | None = None) -> UUID:
    """Returns the UUID in `text`. Raises UsageError, which names `argument`, if it is none."""
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"{argument}: {text[:80]!r} is not a UUID", hint=hint) from None


def row_count(option: str) -> Callable[[int], int]:
    """Returns a Typer callback that raises UsageError for more rows than fit into an integer of PostgreSQL."""

    def check(rows: int) -> int:
        if rows > MAX_ROWS:
            raise UsageError(f"{option}: {rows} is too many; the most is {MAX_ROWS}")
        return rows

    return check


Limit = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, callback=row_count("--limit"), help="Most rows to list.")
]


def duration(option: str, minimum: float = 0.0, longest: float = LONGEST_WAIT) -> Callable[[str | None], float | None]:
    """Returns a Typer callback that converts a text like `10s` to seconds.

    It raises UsageError, which names `option`, unless the seconds are more than `minimum` and at most `longest`.
    """

    def parse(text: str | None) -> float | None:
        if text is None:
            return None
        seconds = parse_duration(text, option, longest)
        if seconds <= minimum:
            raise UsageError(f"{option}: {text!r} is too short; it must be more than {minimum:g}s")
        return seconds

    return parse


def stop_on_signals(stop: Callable[[], None], times: int = 1) -> list[int]:
    """Installs handlers: each of the first `times` SIGINT or SIGTERM calls `stop`; the next one interrupts the command.

    Returns the list to which the handlers append the numbers of the signals.
    """
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: Any) -> None:
        received.append(number)
        stop()
        if len(received) >= times:
            for again, handler in handlers.items():
                signal.signal(again, handler)

    for number in handlers:
        signal.signal(number, on_signal)
    return received


def daemon_exit_code(received: Sequence[int], code: int = 0) -> int:
    """Returns the exit code of a daemon that `received` signals: 0 after SIGTERM, without any `code`.

    A service manager stops a daemon with SIGTERM, so that to end by it is success. Of SIGINT the daemon dies.
    """
    if not received:
        return code
    return 0 if received[0] == signal.SIGTERM else -received[0]


def ended_by_signal(number: int) -> typer.Exit:
    """Returns the exception that makes the process die of a signal once it has cleaned up (`process_end`)."""
    return typer.Exit(-number)


def event_writer(out: Output) -> Callable[[Mapping[str, Any]], None]:
    """Returns a function that writes an event of a daemon to stdout with JSON; else the log on stderr has to do.

    A reader that is gone, or a full disk, does not end the daemon: it is logged once, until a write succeeds again.
    """
    import logging

    from pgcoord_cli.core.concurrency.outage import Outage

    outage = Outage(logging.getLogger("pgcoord"), "events are not written to stdout", "events are written to stdout")

    def write(event: Mapping[str, Any]) -> None:
        if not out.is_json:
            return
        try:
            out.next_document(event)
        except OSError as error:
            outage.failed(error.strerror or str(error))
        else:
            outage.ended()

    return write


class StdoutReader:
    """The reader of stdout, if that is a pipe."""

    def __init__(self, *, is_needed: bool) -> None:
        self.is_needed = is_needed
        """Whether there is more to write, so that it matters if the reader has gone."""
        self.is_gone = False


@contextmanager
def stdout_reader(stop: Callable[[], None] = lambda: None, *, is_needed: bool = True) -> Iterator[StdoutReader]:
    """Calls `stop` when the reader of stdout closes its pipe (`| head`) within the block, even if nothing is written.

    A reader that is gone ends the block silently. If it is still needed, the process dies of SIGPIPE like any filter.
    """
    reader = StdoutReader(is_needed=is_needed)

    def on_end() -> None:
        reader.is_gone = True
        stop()

    _watch_stdout(on_end)
    try:
        yield reader
    except BrokenPipeError:
        reader.is_gone = True
    if reader.is_gone and reader.is_needed:
        raise ended_by_signal(signal.SIGPIPE)


def _watch_stdout(on_end: Callable[[], None]) -> None:
    from pgcoord_cli.render.events import watch_reader

    with suppress(OSError, ValueError):
        if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            Thread(target=watch_reader, args=[on_end], daemon=True).start()


def spare_the_collector() -> None:
    """Makes garbage collections rare, for a command that creates millions of small objects and no cycles of them.

    Collections over these objects and over all imported modules took a fifth of the time of a tail's catch-up.
    """
    gc.freeze()
    gc.set_threshold(20_000)


@contextmanager
def progress_bar(out: Output, title: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Yields a function that advances a progress bar on stderr. Without a terminal, and with -q, there is no bar."""
    if out.quiet or not sys.stderr.isatty():
        yield lambda _amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(task, amount)
