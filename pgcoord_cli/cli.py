"""The command tree. All errors of a call are converted to an exit code and a message here, and only here."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

import typer

from pgcoord_cli.commands.framework import LazyGroup, NoCommandGiven, root_group
from pgcoord_cli.commands.parameters import help_hint
from pgcoord_cli.errors import PgcoordError, Termination, UsageError, interruption
from pgcoord_cli.process_end import end_process
from pgcoord_cli.settings import ColorMode, OutputFormat

HELP = """Coordination kept in PostgreSQL, and the operations command for it.

\b
Start here:
  pgcoord demo                     watch it work on a temporary PostgreSQL server
  pgcoord migrate up               create the schema in your database
  pgcoord leader run               stand for election and resolve commits
  pgcoord leader status            show the leader, the durable version and the queue

Exit codes and environment variables are in the manual page pgcoord(1).
"""

CATALOGUE = {
    "migrate": "Apply, list and check the migrations of the schema, and grant rights on it.",
    "leader": "Run candidates for the leader, and inspect the elected one.",
    "kv": "Read and write the transactional key-value data.",
    "commit": "Show commit requests and their outcomes.",
    "flow": "Create, show and cancel flows: graphs of executions that depend on each other.",
    "execution": "Claim executions, renew their leases, and end them.",
    "worker": "Run commands for executions as they become eligible.",
    "reconcile": "Dispatch events, end leases and cancel executions that crashes left behind.",
    "tail": "Follow an event outbox from a cursor on, without missing an event.",
    "lock": "Run a command under a lock, and show or break locks.",
    "subscription": "Show and set the checkpoints of subscriptions.",
    "gc": "Delete settled commit requests and old events that are no longer needed.",
    "dev": "Run a development PostgreSQL server.",
    "bench": "Measure the commit rate and latency of this database.",
    "demo": "Show commits, failover and flows on a temporary PostgreSQL server.",
}


_terminations: list[int] = []
"""The SIGTERMs received. A list, since appending to it is atomic: a handler can be interrupted by the next signal."""


class Root(LazyGroup):
    """The root of the command tree."""

    catalogue = CATALOGUE


def root() -> Root:
    """Returns the command tree. The module of a group is imported when one of its commands is called."""
    return root_group(Root, HELP)


def run(argv: Sequence[str]) -> int:
    """Runs one call and returns its exit code; a negative one is a signal (`process_end`). Errors are reported."""
    try:
        with root().make_context("pgcoord", list(argv)) as ctx:
            ctx.command.invoke(ctx)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        return 0  # the reader has closed stdout (`| head`), which is no failure
    except (typer.TyperException, PgcoordError, KeyboardInterrupt, typer.Abort, OSError) as error:
        with suppress(OSError):  # stderr cannot be written: the exit code is all that is left
            _report(error, argv)
        return _exit_code(error)
    finally:
        if "pgcoord_cli.render.log" in sys.modules:  # not loaded by a call that ended before its command began
            from pgcoord_cli.render.log import stop_logging

            stop_logging()


def _exit_code(error: BaseException) -> int:
    # A prompt turns Ctrl-C into Abort, which is also the end of the input.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return -(signal.SIGTERM if _terminations else signal.SIGINT)
    return _failure(error).exit_code


def _report(error: BaseException, argv: Sequence[str]) -> None:
    as_json = wants_json(argv)
    if isinstance(error, NoCommandGiven) and not as_json:
        typer.echo(error.help, err=True)
        return
    from pgcoord_cli.render.log import report_failure  # loads logging, which a call that succeeds may not need

    report_failure(_failure(error), as_json=as_json, color=_wanted_color(argv))


def _failure(error: BaseException) -> PgcoordError:
    if isinstance(error, PgcoordError):
        return error
    if isinstance(error, typer.TyperException):
        ctx = getattr(error, "ctx", None)
        return UsageError(error.format_message(), hint=help_hint(ctx) if ctx else None)
    if isinstance(error, OSError):
        return PgcoordError(str(error) or type(error).__name__)
    return interruption(Termination() if _terminations else error)


# Patterns are compiled when an error is reported, not at each start.
_OUTPUT_WORD = r"--output(?:=(.*))?|-[a-zA-Z]*?o(.*)"
_COLOR_WORD = r"--color(?:=(.*))?"


def wants_json(argv: Sequence[str]) -> bool:
    """Returns whether the call asks for JSON. Also for words that cannot be parsed, as far as possible."""
    return _last_word(argv, _OUTPUT_WORD, "PGCOORD_OUTPUT") in (OutputFormat.JSON, OutputFormat.JSONL)


def _wanted_color(argv: Sequence[str]) -> ColorMode:
    chosen = _last_word(argv, _COLOR_WORD, "PGCOORD_COLOR")
    return ColorMode(chosen) if chosen in tuple(ColorMode) else ColorMode.AUTO


def _last_word(argv: Sequence[str], option: str, variable: str) -> str:
    """Returns the last value of an option, in its own word or in the next, else that of the variable."""
    chosen = os.environ.get(variable, "")
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--":
            break
        if found := re.fullmatch(option, word, re.DOTALL):
            chosen = next(filter(None, found.groups()), following)
    return chosen


def main() -> NoReturn:
    """Runs the `pgcoord` program and exits."""
    _prepare_streams()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt as again:  # a second signal, while the first one was being handled
        code = _exit_code(again)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    end_process(_flush(code))


def _prepare_streams() -> None:
    """Opens /dev/null for a closed stdout or stderr, and has undecodable bytes written as escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        elif isinstance(stream := getattr(sys, name), TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM like SIGINT: under asyncio, its handler cancels the main task; else Termination is raised."""
    _terminations.append(number)
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt) and interrupt is not signal.default_int_handler:
        interrupt(number, frame)
    else:
        raise Termination


def _flush(code: int) -> int:
    """Flushes stdout and stderr, and returns the exit code.

    A full disk under stdout is a failure, a closed pipe is none. Trouble with stderr never changes the code.
    """
    trouble = _flush_stream(sys.stdout)
    if code == 0 and trouble and not isinstance(trouble, BrokenPipeError):
        code = PgcoordError.exit_code
        with suppress(OSError):
            print(f"error: cannot write: {trouble.strerror}", file=sys.stderr)
    _flush_stream(sys.stderr)
    return code


def _flush_stream(stream: TextIO) -> OSError | None:
    try:
        stream.flush()
    except OSError as error:
        # Python flushes again at exit; to /dev/null, so that it does not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
