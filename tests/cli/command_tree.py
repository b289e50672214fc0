"""All commands, by their command lines."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from pgcoord_cli.cli import root
from pgcoord_cli.commands.framework import PgcoordCommand, PgcoordGroup

Command = PgcoordCommand | PgcoordGroup


def walk(
    command: Command, words: tuple[str, ...], parent: typer.Context | None = None
) -> Iterator[tuple[str, Command]]:
    """Yields every command below `command`, with its command line."""
    ctx = typer.Context(command, parent=parent, info_name=words[-1])
    if isinstance(command, PgcoordGroup):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert isinstance(child, Command)
            yield " ".join([*words, name]), child
            yield from walk(child, (*words, name), ctx)


TREE = dict(walk(root(), ("pgcoord",)))
LEAVES = {path: command for path, command in TREE.items() if isinstance(command, PgcoordCommand)}
"""The commands that are not groups."""

NAMES = [path.removeprefix("pgcoord ") for path in LEAVES]
"""The same, without the name of the program."""
