"""No module waits by sleeping (rule I7), except core/concurrency/backoff.py, which sleeps between attempts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pgcoord_cli
from pgcoord_cli.db.sqlfiles import sql_root

PACKAGE = Path(pgcoord_cli.__file__).parent


def sleeps(source: str) -> list[int]:
    """The lines that use or import a name that contains `sleep`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = {
            ast.Attribute: lambda node: [node.attr],
            ast.Name: lambda node: [node.id],
            ast.ImportFrom: lambda node: [alias.name for alias in node.names],
        }.get(type(node), lambda _: [])(node)
        if any("sleep" in name.lower() for name in names):
            found.append(node.lineno)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    "source",
    ["time.sleep(1)", "await asyncio.sleep(0)", "from time import sleep as pause", "sleep(1)", "loop.usleep(3)"],
)
def test_the_search_finds_every_kind_of_sleep(source: str) -> None:
    assert sleeps(source)


def test_i7_only_the_backoff_sleeps() -> None:
    found = {
        str(file.relative_to(PACKAGE)): lines for file in PACKAGE.rglob("*.py") if (lines := sleeps(file.read_text()))
    }
    assert list(found) == ["core/concurrency/backoff.py"]
    assert len(found["core/concurrency/backoff.py"]) == 1


def test_i7_no_statement_sleeps() -> None:
    assert [file.name for file in sql_root().rglob("*.sql") if "pg_sleep" in file.read_text()] == []
