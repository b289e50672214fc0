"""Runs the examples of the documentation and compares their output with the documentation."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pgcoord_cli.settings import Settings
    from tests.conftest import Cli, StartLeader

ROOT = Path(__file__).resolve().parents[2]


def blocks(document: str, language: str) -> list[str]:
    """Returns the fenced blocks of one language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


PROGRAMS = [
    (document, number)
    for document in ("docs/client.md", "docs/recipes.md", "docs/tails.md", "docs/locks.md", "docs/flows.md")
    for number in range(len(blocks(document, "python")))
]


def test_every_page_has_its_programs() -> None:
    assert [document for document, _ in PROGRAMS] == [
        *["docs/client.md"] * 4, *["docs/recipes.md"] * 3, *["docs/tails.md"] * 2, "docs/locks.md", "docs/flows.md",
    ]  # fmt: skip


@pytest.mark.parametrize(("document", "number"), PROGRAMS)
def test_the_program_of_a_page_prints_the_output_on_the_page(
    document: str, number: int, settings: Settings, start_leader: StartLeader
) -> None:
    start_leader("A").wait_for("elected epoch")
    assert run(blocks(document, "python")[number], settings) == blocks(document, "text")[number]


def test_the_programs_of_the_readme_run(settings: Settings, start_leader: StartLeader) -> None:
    start_leader("A").wait_for("elected epoch")
    printed = [run(program, settings) for program in blocks("README.md", "python")]
    assert printed == ["[(b'alice', b'-10'), (b'bob', b'10')]\n", "b'hello'\n"]


@pytest.mark.parametrize(
    "document",
    ["README.md", "docs/client.md", "docs/recipes.md", "docs/tails.md", "docs/locks.md", "docs/flows.md"],
)
def test_programs_in_the_documentation_use_only_public_names(document: str) -> None:
    assert not re.search(r"pgcoord_cli\.core|`core\.", (ROOT / document).read_text())
    imported = [line for program in blocks(document, "python") for line in program.splitlines() if "pgcoord" in line]
    imports = [line for line in imported if line.startswith(("from ", "import "))]
    assert imports
    for line in imports:
        module, names = re.fullmatch(r"from (\S+) import (.*)", line).groups()  # type: ignore[union-attr]
        assert module in ("pgcoord_cli", "pgcoord_cli.sync", "pgcoord_cli.tuples")
        assert set(names.split(", ")) <= set(import_module(module).__all__)


def run(program: str, settings: Settings) -> str:
    """Runs a program and returns its output; nothing may be on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PGCOORD_DSN": settings.dsn}, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout


def test_the_flow_file_of_the_page_is_docs_flow_yaml() -> None:
    assert blocks("docs/flows.md", "yaml") == [(ROOT / "docs/flow.yaml").read_text()]


def test_the_flow_of_the_page_has_the_outcome_on_the_page(cli: Cli) -> None:
    (session,) = blocks("docs/flows.md", "console")
    shown = session.split("$ pgcoord flow show $FLOW\n")[1]
    flow = cli("flow", "create", "docs/flow.yaml", "-o", "plain").stdout.strip()
    worked = cli("worker", "run", "--once", "-q")
    assert worked.stdout == "building\nreleased\n"
    assert worked.returncode == 1, "lint failed"
    assert cli("flow", "show", flow).stdout == shown


def test_the_transaction_of_the_page_is_docs_transaction_jsonl() -> None:
    from pgcoord_cli.core.kv.transaction_file import parse

    lines = blocks("docs/kv.md", "json")[0]
    assert lines == (ROOT / "docs/transaction.jsonl").read_text()
    parsed = parse(io.BytesIO(lines.encode()), "docs/kv.md")
    assert (len(parsed.comparisons), len(parsed.mutations)) == (2, 3)
