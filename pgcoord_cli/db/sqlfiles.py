"""Named SQL statements, read from `sql/`.

A query file holds statements, each headed by its name and one line of purpose:

    -- name: read_lease
    -- Who leads, until when, and how far the committed data has got.
    SELECT …;

Parameters are the server's own `$1`, so that psql's PREPARE and other drivers run the same text; psycopg's
raw cursors pass it through untouched.

Object names are unqualified: the session's `search_path` names the schema (`session.prepare_session` sets it). A
statement that also runs on a connection of the caller, whose `search_path` pgcoord must not change, writes its tables
as `{schema}.table`; `sql` fills the placeholder with the quoted name of the schema. It names functions, operators and
types of PostgreSQL in full, since the caller's `search_path` may hold others of the same names.

A statement that serves both outboxes writes the table as `{outbox}` and its name, as a text, as `{outbox_name}`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from psycopg.sql import SQL, Composable, Identifier, Literal

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


@cache
def sql(noun: str, name: str, *, schema: str | None = None, outbox: str | None = None) -> str:
    """Returns the text of one statement, ready for a raw cursor.

    `schema` and `outbox`, a table's name, fill the placeholders; each must be given exactly if the statement has it.
    """
    text = statements(noun)[name].text
    for given, placeholder in ((schema, "{schema}"), (outbox, "{outbox}")):
        if (given is not None) != (placeholder in text):
            raise ValueError(f"{noun}.{name}: {placeholder} must be given exactly where the statement has it")
    return fill(text, schema, outbox) if schema or outbox else text


def fill(text: str, schema: str | None, outbox: str | None) -> str:
    """Fills the placeholders of a statement with quoted names."""
    names: dict[str, Composable] = {}
    if schema:
        names |= {"schema": Identifier(schema)}
    if outbox:
        names |= {"outbox": Identifier(outbox), "outbox_name": Literal(outbox)}
    return SQL(text).format(**names).as_string(None)
