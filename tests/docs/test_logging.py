"""docs/logging.md: its table lists the loggers of the package."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_table_lists_every_logger_and_no_other() -> None:
    sources = [path.read_text() for path in (REPOSITORY / "pgcoord_cli").rglob("*.py")]
    used = {name for source in sources for name in re.findall(r'getLogger\("(pgcoord\.[a-z]+)"\)', source)}
    table = (REPOSITORY / "docs" / "logging.md").read_text()
    assert set(re.findall(r"^\| `(pgcoord\.[a-z]+)` \|", table, re.MULTILINE)) == used
