"""What every command shares: global options that work in any place, groups that load when asked for.

**Global options.** `pgcoord -o json leader status` and `pgcoord leader status -o json` mean the same. Each command
and group has the options of section "Global options"; of several values for one option the last counts. The
values are collected in the context and resolved, with the environment, into frozen Settings and a Presentation when a
command asks.

**Lazy groups.** The root has the names of its groups and one line of help for each. A group's module is imported when
one of its commands is called, so that `pgcoord --help` costs little more than Python and Typer.

**Public names.** Typer's own parser has no public names for contexts, commands and formatters. Only the classes of
`typer.core` are subclassed, and what their methods get beside those is typed `Any`.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, TypeVar, cast
from uuid import UUID

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from pgcoord_cli import __version__
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
from pgcoord_cli.render import Output
from pgcoord_cli.settings import (
    LONGEST_WAIT,
    LogFormat,
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


# Global options


def _remember(ctx: Any, parameter: Parameter, value: Any) -> Any:
    if value not in (None, False):
        ctx.find_root().meta.setdefault(_FLAGS, {})[parameter.name] = value
    return value


def _show_version(ctx: Any, _parameter: Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        typer.echo(f"pgcoord {__version__}")
        raise typer.Exit


def _option(name: str, *short: str, **more: Any) -> inspect.Parameter:
    """Declares a global option that takes text.

    Text even where there are few values: they may come from the environment too, and are checked once for both.
    """
    option = typer.Option(name, *short, expose_value=False, **more)
    return _declared(name, Annotated[str | None, option], None)


def _flag(name: str, *short: str, **more: Any) -> inspect.Parameter:
    return _declared(name, Annotated[bool, typer.Option(name, *short, expose_value=False, **more)], False)


def _declared(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    identifier = name.removeprefix("--").replace("-", "_")
    return inspect.Parameter(identifier, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _global_signature() -> None:
    pass


# Declared as a signature, from which Typer makes the options: their constructor is not the same in all its versions.
# Its annotations are objects, since Typer would evaluate text four times at each start.
_global_signature.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        _option("--dsn", metavar="DSN", help="Connection string, URI or keywords. [PGCOORD_DSN, then libpq's own]"),
        _option("--schema", metavar="NAME", help="Schema that holds the cluster. [PGCOORD_SCHEMA, then pgcoord]"),
        _option("--output", "-o", metavar="FORMAT", help=f"{', '.join(OutputFormat)}. [PGCOORD_OUTPUT, then table]"),
        _flag("--quiet", "-q", help="No talk on stderr unless something is wrong."),
        _flag("--verbose", "-v", help="Say more on stderr."),
        _option("--color", metavar="WHEN", help="auto, always or never. [PGCOORD_COLOR, then auto]"),
        _option(
            "--log-format", metavar="|".join(LogFormat),
            help="How log lines on stderr are written. [PGCOORD_LOG_FORMAT, then text]",
        ),
        _flag("--version", is_eager=True, help="Print the version and exit."),
    ]
)  # fmt: skip

_GLOBAL_DECLARATIONS = declarations(_global_signature)

GLOBAL_NAMES = frozenset(_GLOBAL_DECLARATIONS)


@cache
def _global_options() -> list[Any]:
    """Returns the global options, which all commands and groups share."""
    app = typer.Typer(add_completion=False)
    app.command()(_global_signature)
    options: list[Any] = typer.main.get_command(app).params
    for option in options:
        option.callback = _show_version if option.name == "version" else _remember
    return options


# Commands and groups


class NoCommandGiven(UsageError):
    """The call ends with the name of a group; `help` is the help of that group."""

    def __init__(self, ctx: Any) -> None:
        super().__init__("no command was given", hint=help_hint(ctx))
        self.help: str = ctx.get_help()


class _Declared:
    """What commands and groups have in common: parameters as `commands.parameters` converts and describes them."""

    callback: Callable[..., Any] | None
    params: list[Any]

    def add_global_options(self) -> None:
        """Appends the global options to the parameters of the command."""
        self.params.extend(_global_options())

    @cached_property
    def _declarations(self) -> dict[str, Declaration]:
        return _GLOBAL_DECLARATIONS | declarations(self.callback)

    def declaration(self, parameter: Parameter) -> Declaration:
        """Returns what the signature declares of a parameter; `--help` is a flag."""
        return self._declarations.get(parameter.name or "", FLAG)

    def take_over_conversion(self, parameters: list[Any]) -> list[Any]:
        """Replaces Typer's conversion of the parameters, and returns them."""
        for parameter in parameters:
            take_over_conversion(parameter, self.declaration(parameter))
        return parameters

    def write_options(self, parameters: Sequence[Parameter], formatter: Any) -> None:
        """Writes the parameters of the command first, the global options in a section of their own."""
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
    """The root: has every noun's name and one line of help, and imports its module when it is called."""

    catalogue: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Placeholders: Typer lists them, and suggests one for a name that is mistyped.
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
    """The Typer app of one noun's file."""
    return _group_app(PgcoordGroup, help)


def root_group(cls: type[Group], help: str) -> Group:  # noqa: A002
    """Returns the root of the command tree."""
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
    """The Typer app of a noun that is one command, like `demo`."""
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None, context_settings=_HELP_OPTION)


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `name` of `app`, with the global options."""
    return app.command(name, cls=PgcoordCommand, context_settings=_HELP_OPTION)


# What commands begin with


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
