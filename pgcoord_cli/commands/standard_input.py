"""Standard input: data, and answers to questions. If the caller closed it, `sys.stdin` is None."""

from __future__ import annotations

import sys
from typing import BinaryIO

import typer

from pgcoord_cli.errors import UsageError


def stdin_bytes(argument: str = "FILE") -> BinaryIO:
    """Returns standard input as bytes. Raises UsageError, which names the argument, if it is closed."""
    if sys.stdin is None:
        raise UsageError(f"{argument}: standard input is closed")
    return sys.stdin.buffer


def is_typed() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def confirm(question: str, refusal: str) -> None:
    """Asks on the terminal; exits with 1 unless the answer is yes. Raises UsageError(refusal) without a terminal."""
    if not is_typed():
        raise UsageError(f"{refusal}, and standard input is no terminal to confirm that on", hint="add --yes")
    from pgcoord_cli.render.visible import visible_message

    # Not typer.confirm, which writes a space to stdout even where it asks on stderr.
    print(f"{visible_message(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:  # Ctrl-D
        raise typer.Abort
    if answer.strip().lower() not in ("y", "yes"):
        raise typer.Exit(1)
