"""Examples in the documentation are run, and print what the documentation says they print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pgcoord_cli.settings import Settings
    from tests.conftest import Cli, StartLeader

ROOT = Path(__file__).resolve().parents[2]


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_client_example_prints_what_the_page_says(settings: Settings, start_leader: StartLeader) -> None:
    start_leader("A").wait_for("elected epoch")
    (program,) = blocks("docs/client.md", "python")
    (printed,) = blocks("docs/client.md", "text")
    assert run(program, settings) == printed


def test_the_tail_example_prints_what_the_page_says(settings: Settings) -> None:
    (program,) = blocks("docs/tails.md", "python")
    (printed,) = blocks("docs/tails.md", "text")
    assert run(program, settings) == printed


def test_the_lock_example_prints_what_the_page_says(settings: Settings) -> None:
    (program,) = blocks("docs/locks.md", "python")
    (printed,) = blocks("docs/locks.md", "text")
    assert run(program, settings) == printed


def run(program: str, settings: Settings) -> str:
    """What a program prints, which has nothing to complain about."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PGCOORD_DSN": settings.dsn}, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("document", ["README.md", "docs/client.md", "docs/tails.md", "docs/locks.md"])
def test_python_in_the_documentation_compiles(document: str) -> None:
    assert blocks(document, "python")
    for program in blocks(document, "python"):
        compile(program, document, "exec")


def test_the_flow_file_of_the_page_is_the_one_that_is_there_to_try() -> None:
    assert blocks("docs/flows.md", "yaml") == [(ROOT / "docs/flow.yaml").read_text()]


def test_the_flow_of_the_page_ends_as_the_page_says(cli: Cli) -> None:
    (session,) = blocks("docs/flows.md", "console")
    shown = session.split("$ pgcoord flow show $FLOW\n")[1]
    flow = cli("flow", "create", "docs/flow.yaml", "-o", "plain").stdout.strip()
    worked = cli("worker", "run", "--once", "-q")
    assert worked.stdout == "building\nreleased\n"
    assert worked.returncode == 1, "lint failed"
    assert cli("flow", "show", flow).stdout == shown
