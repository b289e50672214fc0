"""The options that every command and group takes: `--dsn`, `--output`, `--quiet` and the others.

`pgcoord -o json leader status` and `pgcoord leader status -o json` mean the same. Each command and group has these
options; of several values for one option the last counts. The values are collected in the context of the root, and
resolved, with the environment, when a command asks for its Settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

import typer

from pgcoord_cli import __version__
from pgcoord_cli.commands.parameters import Parameter, declarations
from pgcoord_cli.settings import LogFormat, OutputFormat

_FLAGS = "pgcoord.flags"


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

    Its values are checked when a command asks for them, together with those from the environment.
    """
    option = typer.Option(name, *short, expose_value=False, **more)
    return _declared(name, Annotated[str | None, option], None)


def _flag(name: str, *short: str, **more: Any) -> inspect.Parameter:
    return _declared(name, Annotated[bool, typer.Option(name, *short, expose_value=False, **more)], False)


def _declared(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    identifier = name.removeprefix("--").replace("-", "_")
    return inspect.Parameter(identifier, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _signature() -> None:
    pass


# Typer makes the options from this signature, since their constructor is not the same in all its versions.
# The annotations are objects: Typer would evaluate text four times at each start.
_signature.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        _option("--dsn", metavar="DSN", help="Connection string, URI or keywords. [PGCOORD_DSN, then libpq's own]"),
        _option("--schema", metavar="NAME", help="Schema that holds the cluster. [PGCOORD_SCHEMA, then pgcoord]"),
        _option("--output", "-o", metavar="FORMAT", help=f"{', '.join(OutputFormat)}. [PGCOORD_OUTPUT, then table]"),
        _flag("--quiet", "-q", help="Write only warnings and errors to stderr."),
        _flag("--verbose", "-v", help="Write details to stderr."),
        _option("--color", metavar="WHEN", help="auto, always or never. [PGCOORD_COLOR, then auto]"),
        _option(
            "--log-format", metavar="|".join(LogFormat),
            help="How log lines on stderr are written. [PGCOORD_LOG_FORMAT, then text]",
        ),
        _flag("--version", is_eager=True, help="Print the version and exit."),
    ]
)  # fmt: skip

GLOBAL_DECLARATIONS = declarations(_signature)

GLOBAL_NAMES = frozenset(GLOBAL_DECLARATIONS)


@cache
def global_options() -> list[Any]:
    """Returns the global options, which all commands and groups share."""
    app = typer.Typer(add_completion=False)
    app.command()(_signature)
    options: list[Any] = typer.main.get_command(app).params
    for option in options:
        option.callback = _show_version if option.name == "version" else _remember
    return options


def flags_of(ctx: Any) -> Mapping[str, Any]:
    """Returns the global options that were given anywhere in the call, by name."""
    flags: Mapping[str, Any] = ctx.find_root().meta.get(_FLAGS, {})
    return flags
