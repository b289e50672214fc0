"""docs/from-foundationdb.md: the methods, errors, options and limits that it names exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import pgcoord_cli
from pgcoord_cli import TransactionOptions, sync
from pgcoord_cli.core.commits import codec

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-foundationdb.md").read_text()
TRANSACTIONS = (pgcoord_cli.Transaction, sync.Transaction)


def rows(heading: str) -> list[list[str]]:
    """Returns the cells of the table below a heading, without its head."""
    table = [line for line in PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def methods(cell: str) -> list[str]:
    """Returns the names of the methods of a transaction in a cell."""
    return re.findall(r"`(?:tr\.)?([a-z_]{3,})(?:\([^`]*\))?`", cell)


@pytest.mark.parametrize("heading", ["Reads", "Writes", "Commits"])
def test_a_method_that_is_the_same_exists(heading: str) -> None:
    same = [name for theirs, here, *_ in rows(heading) if here.startswith("the same") for name in methods(theirs)]
    assert len(same) >= 3
    for name in same:
        assert all(hasattr(transaction, name) for transaction in TRANSACTIONS), name


def test_every_mutation_is_on_the_page() -> None:
    named = {name for theirs, _ in rows("Writes") for name in methods(theirs)}
    assert {op.name.lower() for op in codec.Op} <= named


def test_every_error_exists() -> None:
    errors = {name for _, here in rows("Errors") for name in re.findall(r"`([A-Z]\w+)`", here)}
    assert "Conflict" in errors
    assert errors - {"CancelledError", "TypeError"} <= set(pgcoord_cli.__all__)


def test_every_option_is_on_the_page() -> None:
    section = PAGE.split("\n## Options\n")[1].split("\n## ")[0]
    for option in dataclasses.fields(TransactionOptions):
        assert f"`{option.name}`" in section


def test_the_limits_are_those_of_the_code() -> None:
    limits = {name: (theirs, here) for name, theirs, here in rows("Limits")}
    assert limits["key"][1].startswith(f"{codec.MAX_KEY_BYTES:,} bytes")
    for name, number in (("value", codec.MAX_VALUE_BYTES), ("transaction", codec.MAX_TRANSACTION_BYTES)):
        assert limits[name][0].startswith(f"{number:,} bytes")
        assert limits[name][1].startswith("the same")
    options = TransactionOptions()
    assert limits["time"][1].startswith(f"{options.time_limit_seconds:g} s")
    assert limits["retries"][1].startswith(f"{options.retry_limit},")
