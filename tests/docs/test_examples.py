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
    from tests.conftest import StartLeader

ROOT = Path(__file__).resolve().parents[2]


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_client_example_prints_what_the_page_says(settings: Settings, start_leader: StartLeader) -> None:
    start_leader("A").wait_for("elected epoch")
    (program,) = blocks("docs/client.md", "python")
    (printed,) = blocks("docs/client.md", "text")
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PGCOORD_DSN": settings.dsn}, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == printed


@pytest.mark.parametrize("document", ["README.md", "docs/client.md"])
def test_python_in_the_documentation_compiles(document: str) -> None:
    assert blocks(document, "python")
    for program in blocks(document, "python"):
        compile(program, document, "exec")
