"""What every command shares: global options that work in any place, groups that load when asked for.

**Global options.** `pgcoord -o json leader status` and `pgcoord leader status -o json` mean the same. Each command
and group carries the options of section "Global options" itself; whichever place gave a value last, wins. They
are collected in the context and resolved, with the environment, into frozen Settings and a Presentation when a
command asks.

**Lazy groups.** The root knows its groups by name and one line of help. A group's module is imported when one of its
commands is called, so that `pgcoord --help` costs little more than Python and Typer.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any
from uuid import UUID

import typer
from typer._click.core import Command as ClickCommand
from typer._click.core import Context as ClickContext
from typer._click.core import Parameter
from typer._click.formatting import HelpFormatter
from typer.core import TyperCommand, TyperGroup, TyperOption

from pgcoord_cli import __version__
from pgcoord_cli.errors import UsageError
from pgcoord_cli.render import Output
from pgcoord_cli.settings import (
    LONGEST_WAIT,
    OutputFormat,
    Settings,
    parse_duration,
    resolve_presentation,
    resolve_settings,
)

MAX_ROWS = 2**31 - 1

_FLAGS = "pgcoord.flags"

EXIT_CODES = {
    0: "fine, or the asked condition is true",
    1: "failed",
    2: "usage: a word of the call is wrong",
    3: "the asked condition is false (no leader, pending migrations, no such key, unhealthy)",
    4: "cannot connect",
    5: "busy: a lock is held, or waiting for it timed out",
    6: "fenced: another leadership has superseded this one",
    7: "the schema is missing or unknown",
    8: "the cursor has expired",
    9: "unsuitable server: standby, transaction pooler, unsupported version",
    10: "outcome unknown: ask again with pgcoord commit show REQUEST_ID",
    124: "timed out",
    130: "interrupted (Ctrl-C); 143 when terminated",
}

ENVIRONMENT = {
    "PGCOORD_DSN": "connection string, where --dsn is not given; without both, libpq reads PGHOST, PGSERVICE, …",
    "PGCOORD_SCHEMA": "schema, where --schema is not given",
    "PGCOORD_OUTPUT": "output format, where --output is not given",
    "PGCOORD_COLOR": "auto, always or never, where --color is not given; NO_COLOR is honoured too",
    "PGCOORD_LOG_FORMAT": "text or json, where --log-format is not given",
    "PGCOORD_DEV_DIR": "where pgcoord dev keeps its servers, instead of the user's data directory",
    "PGCOORD_CONNECT_TIMEOUT": "longest wait for a connection (default PGCONNECT_TIMEOUT, or else 10s)",
    "PGCOORD_STATEMENT_TIMEOUT": "longest run of one statement (default 30s)",
    "PGCOORD_LOCK_TIMEOUT": "longest wait for a lock inside a statement (default 10s)",
}


def _remember(ctx: ClickContext, param: Parameter, value: Any) -> Any:
    if value not in (None, False):
        ctx.find_root().meta.setdefault(_FLAGS, {})[param.name] = value
    return value


def _show_version(ctx: ClickContext, _param: Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        typer.echo(f"pgcoord {__version__}")
        raise typer.Exit


def global_options() -> list[TyperOption]:
    """Fresh copies of the options that every command and group takes."""

    def option(*names: str, help: str, metavar: str | None = None, flag: bool = False) -> TyperOption:  # noqa: A002
        return TyperOption(
            param_decls=list(names), help=help, metavar=metavar, is_flag=flag, expose_value=False, callback=_remember
        )

    return [
        option("--dsn", help="Connection string, URI or keywords. [PGCOORD_DSN, then libpq's own]", metavar="DSN"),
        option("--schema", help="Schema that holds the cluster. [PGCOORD_SCHEMA, then pgcoord]", metavar="NAME"),
        option("--output", "-o", help=f"{', '.join(OutputFormat)}. [PGCOORD_OUTPUT, then table]", metavar="FORMAT"),
        option("--quiet", "-q", help="No talk on stderr unless something is wrong.", flag=True),
        option("--verbose", "-v", help="Say more on stderr.", flag=True),
        option("--color", help="auto, always or never. [PGCOORD_COLOR, then auto]", metavar="WHEN"),
        option(
            "--log-format",
            help="How log lines on stderr are written. [PGCOORD_LOG_FORMAT, then text]",
            metavar="text|json",
        ),
        TyperOption(
            param_decls=["--version"], is_flag=True, is_eager=True, expose_value=False,
            help="Print the version and exit.", callback=_show_version,
        ),
    ]  # fmt: skip


def _format_options(command: ClickCommand, ctx: ClickContext, formatter: HelpFormatter) -> None:
    """Own options first, global ones in a section of their own."""
    global_names = {option.name for option in global_options()}
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Global options": []}
    for param in command.get_params(ctx):
        if record := param.get_help_record(ctx):
            title = "Arguments" if param.param_type_name == "argument" else "Options"
            sections["Global options" if param.name in global_names else title].append(record)
    for title, records in sections.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


class PgcoordCommand(TyperCommand):
    """A command that also takes the global options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(global_options())

    def format_options(self, ctx: ClickContext, formatter: HelpFormatter) -> None:
        _format_options(self, ctx, formatter)


class PgcoordGroup(TyperGroup):
    """A group whose commands are PgcoordCommands and that also takes the global options itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(global_options())

    def format_options(self, ctx: ClickContext, formatter: HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        _format_options(self, ctx, formatter)


class RootGroup(PgcoordGroup):
    """The root: knows every noun by name and one line of help, and imports its module when it is called."""

    def __init__(self, *args: Any, catalogue: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.catalogue = catalogue
        self.commands: dict[str, ClickCommand] = {
            name: TyperCommand(name, help=line) for name, line in catalogue.items()
        }
        self._loaded: set[str] = set()

    def get_command(self, ctx: ClickContext, cmd_name: str) -> ClickCommand | None:
        if cmd_name in self.catalogue and cmd_name not in self._loaded:
            module = importlib.import_module(f"pgcoord_cli.commands.{cmd_name}")
            self.commands[cmd_name] = typer.main.get_command(module.app)
            self._loaded.add(cmd_name)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: ClickContext, formatter: HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.catalogue.items()))


def noun(help: str) -> typer.Typer:  # noqa: A002
    """The Typer app of one noun's file."""
    app = typer.Typer(
        cls=PgcoordGroup, help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_keep_as_group)
    return app


def _keep_as_group() -> None:
    # Without a callback, Typer turns a group of one command into that command.
    pass


def single(help: str) -> typer.Typer:  # noqa: A002
    """The Typer app of a noun that is one command, like `demo`."""
    return typer.Typer(
        help=help, add_completion=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `name` of `app`, with the global options."""
    return app.command(name, cls=PgcoordCommand, context_settings={"help_option_names": ["-h", "--help"]})


def settings_of(ctx: typer.Context, **overrides: Any) -> Settings:
    """The frozen Settings of this call; `overrides` are the command's own last word."""
    settings = resolve_settings(_flags(ctx), os.environ)
    return replace(settings, **overrides) if overrides else settings


def _flags(ctx: typer.Context) -> Mapping[str, Any]:
    flags: Mapping[str, Any] = ctx.find_root().meta.get(_FLAGS, {})
    return flags


def output_of(ctx: typer.Context) -> tuple[Settings, Output]:
    """Returns the Settings and the Output of this call. Raises UsageError for a value that cannot be used."""
    return settings_of(ctx), Output(resolve_presentation(_flags(ctx), os.environ))


def identifier(text: str, argument: str, hint: str | None = None) -> UUID:
    """The UUID that an argument has to be; UsageError otherwise."""
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"{argument}: {text!r} is not a UUID", hint=hint) from None


def row_count(option: str) -> Callable[[int], int]:
    """A Typer callback that refuses more rows than PostgreSQL counts in an integer."""

    def check(rows: int) -> int:
        if rows > MAX_ROWS:
            raise UsageError(f"{option}: {rows} is too many; the most is {MAX_ROWS}")
        return rows

    return check


Limit = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, callback=row_count("--limit"), help="At most so many.")
]


def duration(option: str, minimum: float = 0.0, longest: float = LONGEST_WAIT) -> Callable[[str | None], float | None]:
    """A Typer callback that turns `10s` into seconds and refuses less than or equal to `minimum`, or over `longest`."""

    def parse(text: str | None) -> float | None:
        if text is None:
            return None
        seconds = parse_duration(text, option, longest)
        if seconds <= minimum:
            raise UsageError(f"{option}: {text!r} is too short; it has to be more than {minimum:g}s")
        return seconds

    return parse


def stop_on_signals(stop: Callable[[], None], times: int = 1) -> list[int]:
    """Has the first SIGINT or SIGTERM, or as many as `times`, call `stop`; the next one breaks off at once.

    Returns the list that they are noted in.
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


def spare_the_collector() -> None:
    """For a command that makes millions of small objects, none of them in cycles.

    To look for some in them, and in all that was imported, took a fifth of a tail's catch-up.
    """
    gc.freeze()
    gc.set_threshold(20_000)


@contextmanager
def progress_bar(out: Output, title: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Within the block, the yielded function advances a bar on stderr; it shows on terminals only, and not under -q."""
    if out.quiet or not sys.stderr.isatty():
        yield lambda _amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(task, amount)
