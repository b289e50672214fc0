"""Granting rights to three kinds of role. Each kind has the rights of the ones before it.

reader    reads leases, requests and their outcomes; neither data nor payloads
client    also reads the data and submits requests; cannot settle them
operator  also leads, repairs and collects garbage; cannot change the schema or its ledger
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.errors import Diagnostic
from psycopg.sql import Identifier

from pgcoord_cli.db.sqlfiles import sql
from pgcoord_cli.errors import PermissionDenied, UsageError

_NOT_GRANTED = ("01006", "01007")
"""SQLSTATEs of the warnings that a GRANT without effect gives: privilege_not_revoked and privilege_not_granted."""

KINDS = ("reader", "client", "operator")


class Grant(NamedTuple):
    """One GRANT statement, with the kind and name of the role that it is for."""

    kind: str
    role: str
    statement: str


def grant(conn: Connection[Any], wanted: Mapping[str, Sequence[str]], *, dry_run: bool) -> list[Grant]:
    """Grants the rights in `wanted`, a map of kinds to roles, in one transaction; returns the statements.

    With `dry_run` only returns them. Raises UsageError if a role does not exist, and PermissionDenied.
    """
    for kind, roles in wanted.items():
        for role in roles:
            _require_role(conn, kind, role)
    grants = [item for kind, roles in wanted.items() for role in roles for item in _statements(conn, kind, role)]
    if not dry_run:
        _run(conn, grants)
    return grants


def _run(conn: Connection[Any], grants: Sequence[Grant]) -> None:
    """Executes the statements in one transaction. Raises PermissionDenied if one of them has no effect."""
    warnings: list[str] = []

    # A role that grants rights on what it does not own gets a warning instead of an error.
    def on_notice(notice: Diagnostic) -> None:
        if notice.sqlstate in _NOT_GRANTED:
            warnings.append(notice.message_primary or "")

    conn.add_notice_handler(on_notice)
    with conn.transaction():
        for item in grants:
            conn.execute(item.statement.encode())
        if warnings:
            raise PermissionDenied(warnings[0], hint="grant as the role that owns the schema")


def _require_role(conn: Connection[Any], kind: str, role: str) -> None:
    row = conn.execute(sql("grants", "role_exists"), [role]).fetchone()
    if not (row and row[0]):
        statement = f"CREATE ROLE {Identifier(role).as_string()} LOGIN"
        raise UsageError(f"--{kind}: there is no role {role!r}", hint=f"create it first: {statement}")


def _statements(conn: Connection[Any], kind: str, role: str) -> list[Grant]:
    kinds = KINDS[: KINDS.index(kind) + 1]
    rows = [row for each in kinds for row in conn.execute(sql("grants", f"{each}_grants"), [role])]
    return [Grant(kind, role, row[0]) for row in rows]
