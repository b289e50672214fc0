"""No source imports a private name of a dependency: it may be gone with the next release."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pgcoord_cli", "docs", "tests", "benchmarks", ".ci")
OURS = {"pgcoord_cli", "docs", "tests", "benchmarks"}
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def is_dependency(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] not in OURS | sys.stdlib_module_names


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in dotted.split("."))


def dotted_name(node: ast.expr) -> str:
    """Returns `a.b.c` for such an expression, and an empty string for any other."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            return f"{dotted_name(value)}.{attribute}" if dotted_name(value) else ""
        case _:
            return ""


def names(node: ast.AST) -> Iterator[str]:
    """Yields the full names that an import statement imports from dependencies."""
    match node:
        case ast.Import(names=aliases):
            yield from (alias.name for alias in aliases if is_dependency(alias.name))
        case ast.ImportFrom(module=str(module), names=aliases, level=0) if is_dependency(module):
            yield from (f"{module}.{alias.name}" for alias in aliases)


def private_names(source: str) -> list[str]:
    """Returns the private names of dependencies that a source imports, or reads as attributes of what it imports."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    bound = {(alias.asname or alias.name).split(".")[0] for node in imports if any(names(node)) for alias in node.names}
    read = (dotted_name(node) for node in nodes if isinstance(node, ast.Attribute))
    found = {name for node in imports for name in names(node)}
    found |= {name for name in read if name.split(".")[0] in bound}
    return sorted(filter(is_private, found))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_a_dependency_is_imported(path: Path) -> None:
    assert private_names(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from typer._click.core import Command", ["typer._click.core.Command"]),
        ("from typer import _click", ["typer._click"]),
        ("import typer._types as types", ["typer._types"]),
        ("import typer\ntyper.core._main(typer)", ["typer.core._main"]),
        ("import psycopg as pg\npg._cmodule.x", ["pg._cmodule", "pg._cmodule.x"]),
        ("def f():\n    from rich._loop import loop_first", ["rich._loop.loop_first"]),
        ("from typer import Typer, __version__\nimport typer.main\ntyper.main.get_command(x)._y", []),
        ("from __future__ import annotations\nfrom _thread import LockType\nfrom . import _x\nself._x", []),
        ("from pgcoord_cli.cli import _flush\nimport tests.x\ntests.x._y", []),
    ],
)
def test_private_names_are_found(source: str, expected: list[str]) -> None:
    assert private_names(source) == expected


def test_there_are_sources_in_every_folder() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= set(FOLDERS)
