"""The command tree, and the only place where an error becomes an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer._click.exceptions import ClickException, NoArgsIsHelpError

from pgcoord_cli.commands.framework import RootGroup
from pgcoord_cli.errors import PgcoordError, UsageError
from pgcoord_cli.render import render_error
from pgcoord_cli.settings import OutputFormat

HELP = """Coordination kept in PostgreSQL, and the operations command for it.

\b
Start here:
  pgcoord demo                     see it work on a throw-away PostgreSQL
  pgcoord migrate up               put the schema into your database
  pgcoord leader run               stand for election and resolve commits
  pgcoord leader status            who leads, how far, how long the queue is

Exit codes and environment variables are in the manual page pgcoord(1).
"""

CATALOGUE = {
    "migrate": "Bring the schema up to date, and say whether it is.",
    "leader": "Run, inspect and watch the elected leader.",
    "kv": "Read and write the transactional key-value data.",
    "commit": "Look at commit requests and what became of them.",
    "gc": "Collect garbage: settled requests that nobody can ask for any more.",
    "dev": "Keep a PostgreSQL of your own to try things on.",
    "demo": "Show the whole thing at work on a throw-away PostgreSQL.",
}


def root() -> RootGroup:
    """The command tree. Modules of its groups are imported when a command of theirs is called."""
    return RootGroup(
        name="pgcoord", catalogue=CATALOGUE, help=HELP, no_args_is_help=True, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Runs one call and returns its exit code; every error ends here."""
    try:
        with root().make_context("pgcoord", list(argv)) as ctx:
            ctx.command.invoke(ctx)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return UsageError.exit_code
    except BrokenPipeError:
        return _quiet_end()
    except (ClickException, PgcoordError, KeyboardInterrupt, typer.Abort) as error:
        failure = _failure(error)
        render_error(failure, as_json=wants_json(argv))
        return failure.exit_code


class Interrupted(PgcoordError):
    """Ctrl-C, or a question left unanswered."""

    code = "interrupted"
    exit_code = 128 + signal.SIGINT


def _failure(error: BaseException) -> PgcoordError:
    if isinstance(error, PgcoordError):
        return error
    if isinstance(error, ClickException):
        ctx = getattr(error, "ctx", None)
        return UsageError(error.format_message(), hint=f"see: {ctx.command_path} --help" if ctx else None)
    return Interrupted("interrupted")


def _quiet_end() -> int:
    """The reader of stdout is gone (`| head`): nothing is wrong, and nothing more can be said."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def wants_json(argv: Sequence[str]) -> bool:
    """Whether the call asks for JSON, as far as can be told even where its words could not be parsed."""
    chosen = os.environ.get("PGCOORD_OUTPUT", "")
    for position, word in enumerate(argv):
        if word == "--":
            break
        following = argv[position + 1] if position + 1 < len(argv) else ""
        if word in ("-o", "--output"):
            chosen = following
        elif word.startswith(("--output=", "-o")) and not word.startswith("-o="):
            chosen = word.removeprefix("--output=").removeprefix("-o")
    return chosen in (OutputFormat.JSON, OutputFormat.JSONL)


def main() -> NoReturn:
    """The `pgcoord` program."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _quiet_end()
    sys.exit(code)
