"""All commands that there are, as they are typed."""

from __future__ import annotations

from collections.abc import Iterator

from typer._click.core import Command, Context
from typer.core import TyperGroup

from pgcoord_cli.cli import root


def walk(command: Command, words: tuple[str, ...], parent: Context | None = None) -> Iterator[tuple[str, Command]]:
    """Every command below, with what is typed to call it."""
    ctx = Context(command, parent=parent, info_name=words[-1])
    if isinstance(command, TyperGroup):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            yield " ".join([*words, name]), child
            yield from walk(child, (*words, name), ctx)


TREE = dict(walk(root(), ("pgcoord",)))
LEAVES = {path: command for path, command in TREE.items() if not isinstance(command, TyperGroup)}
"""Those that do something, and are no groups of others."""

NAMES = [path.removeprefix("pgcoord ") for path in LEAVES]
"""The same, as everybody calls them."""
