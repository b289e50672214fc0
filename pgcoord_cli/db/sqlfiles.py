"""Named SQL statements, read from `sql/`.

A query file holds statements, each headed by its name and one line of purpose:

    -- name: read_lease
    -- Who leads, until when, and how far the committed data has got.
    SELECT …;

Parameters are the server's own `$1`, so that psql's PREPARE and other drivers run the same text; psycopg's
raw cursors pass it through untouched. Object names are unqualified: the session's `search_path` names the
schema (`session.prepare_session` sets it).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

_HEADER = re.compile(r"^-- name: (\w+)\n-- (.+)\n", re.MULTILINE)


class NamedStatement(NamedTuple):
    """One named statement: what it is called, what it is for, and its text without the final semicolon."""

    name: str
    purpose: str
    text: str


def sql_root() -> Path:
    """The folder of SQL files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "sql"
    return installed if installed.is_dir() else package.parent / "sql"


@cache
def statements(noun: str) -> dict[str, NamedStatement]:
    """Every statement of `sql/queries/<noun>.sql`, by name."""
    parts = _HEADER.split((sql_root() / "queries" / f"{noun}.sql").read_text(encoding="utf-8"))[1:]
    triples = zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
    return {name: NamedStatement(name, purpose, body.strip().removesuffix(";")) for name, purpose, body in triples}


def sql(noun: str, name: str) -> str:
    """The text of one statement, ready for a raw cursor."""
    return statements(noun)[name].text
