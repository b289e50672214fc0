"""docs/invariants.md has every rule with its tests, and what the pages of docs/ refer to exists."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from docs.rules import DOCUMENT, REPOSITORY, all_ids, by_rule, stale_rules, with_lists

RULES = range(1, 22)

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (*(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md")
)

REFERENCE = re.compile(r"`([\w./-]+\.(?:py|sql|md|toml|yaml|1))(?:(::|: )([\w.:]+))?`")
"""A file in backquotes, alone, with `: name` of what it defines, or with `::name` of a test."""

LINK = re.compile(r"\[[^]]*\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def sections() -> dict[int, str]:
    """The text of each rule's section."""
    parts = re.split(r"^## I(\d+)\n", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


# What a page may name


@cache
def defined_in(path: Path) -> frozenset[str]:
    """The names that a file defines: of Python also `Class.member`, of a migration also `table.column`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return frozenset(_python_names(ast.parse(text).body))
    if path.parent.name == "queries":
        return frozenset(re.findall(r"^-- name: (\w+)$", text, re.MULTILINE))
    return frozenset(_schema_names(text))


def _python_names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _python_names(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            yield from (prefix + name.id for name in names if isinstance(name, ast.Name))


def _schema_names(text: str) -> Iterator[str]:
    yield from re.findall(r"^CREATE (?:\w+ )*?(?:TABLE|FUNCTION|SEQUENCE|INDEX|TRIGGER) (\w+)", text, re.MULTILINE)
    for table, columns in re.findall(r"^CREATE TABLE (\w+) \((.*?)^\)", text, re.MULTILINE | re.DOTALL):
        yield from (f"{table}.{column}" for column in re.findall(r"^ {4}(\w+) ", columns, re.MULTILINE))


def missing_in(text: str, tests: set[str]) -> list[str]:
    """The files, names and tests that a text refers to and that do not exist."""
    missing = []
    for path, joint, name in REFERENCE.findall(text):
        file = REPOSITORY / path
        if joint == "::":
            exists = f"{path}::{name}" in tests
        else:
            exists = file.is_file() and (not name or name in defined_in(file))
        if not exists:
            missing.append(f"{path}{joint}{name}")
    return missing


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them, and those that it sets by hand."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


def broken_links_of(page: Path) -> list[str]:
    """The links of a page, to files of the repository and to their headings, that lead nowhere."""
    broken = []
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


# The rules


def test_every_rule_has_one_section_in_order() -> None:
    headings = re.findall(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [f"I{number}" for number in RULES]


def test_every_test_of_a_rule_is_listed_under_it_and_every_listed_test_exists() -> None:
    stale = stale_rules(DOCUMENT.read_text(encoding="utf-8"), by_rule(all_ids()))
    assert stale == [], "run: python docs/rules.py"
    for number, text in sections().items():
        assert f"<!-- tests of I{number} -->\n" in text


def test_every_rule_names_what_enforces_it_and_a_test() -> None:
    for number, text in sections().items():
        assert REFERENCE.search(text.split("Tests:")[0]), f"I{number} names no code"
        assert "::test_" in text, f"I{number} has no test that carries its number"


def test_what_is_missing_of_a_rule_is_said_in_one_paragraph() -> None:
    for number, text in sections().items():
        assert text.count("**Not yet:**") <= 1, f"I{number}"


# Pages and code


@pytest.mark.parametrize("page", PAGES)
def test_every_file_name_and_test_that_a_page_refers_to_exists(page: str) -> None:
    assert missing_in((REPOSITORY / page).read_text(encoding="utf-8"), set(all_ids())) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    assert broken_links_of(REPOSITORY / page) == []


def test_a_migration_refers_to_pages_that_exist_and_to_no_python_file() -> None:
    for migration in (REPOSITORY / "sql" / "migrations").glob("*.sql"):
        text = migration.read_text(encoding="utf-8")
        assert ".py" not in text, f"{migration.name}: once released, it cannot follow when the file moves"
        for page, anchor in re.findall(r"(docs/[\w.-]+\.md)(?:#([\w-]+))?", text):
            assert (REPOSITORY / page).is_file(), f"{migration.name}: {page}"
            assert not anchor or anchor in anchors_of(REPOSITORY / page), f"{migration.name}: {page}#{anchor}"


def test_the_map_of_the_packages_has_the_layers_that_are_checked() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (each["layers"] for each in contracts["contracts"] if each.get("containers") == ["pgcoord_cli.core"])
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").replace("\\|", "|")
    rows = re.findall(
        r"^\| (?:`([^`]+)` )?\| ((?:`\w+`(?:, )?)+) \|", text.split("## The map of the code")[1], re.MULTILINE
    )
    assert [layer for layer, _ in rows if layer] == layers
    packages = {name for _, names in rows for name in re.findall(r"\w+", names)}
    assert packages == {name for layer in layers for name in layer.split(" | ")}


@pytest.mark.parametrize("page", PAGES)
def test_no_diagram_has_a_semicolon_which_mermaid_takes_for_the_end_of_a_line(page: str) -> None:
    diagrams = re.findall(r"```mermaid\n(.*?)```", (REPOSITORY / page).read_text(encoding="utf-8"), re.DOTALL)
    assert not any(";" in diagram for diagram in diagrams)


# That these tests can fail


@pytest.mark.parametrize(
    "reference",
    [
        "docs/nowhere.md", "pgcoord_cli/core/kv/client.py: Nothing", "pgcoord_cli/core/kv/client.py: Database.nothing",
        "sql/queries/commits.sql: nothing", "sql/migrations/0002_commits.sql: nothing",
        "sql/migrations/0002_commits.sql: commit_requests.nothing", "tests/docs/test_invariants.py::test_nothing",
    ],
)  # fmt: skip
def test_a_reference_to_what_does_not_exist_is_found(reference: str) -> None:
    assert missing_in(f"see `{reference}` there", set(all_ids())) == [reference]


def test_references_to_what_exists_are_found() -> None:
    text = """`docs/invariants.md` `pgcoord_cli/core/kv/client.py: Database.run` `sql/queries/commits.sql: claim`
    `pgcoord_cli/core/commits/recent_commits.py: CONFLICT_WINDOW` `sql/migrations/0005_flows.sql: edges.outcome`
    `sql/migrations/0003_outboxes.sql: announce_events`
    `tests/docs/test_invariants.py::test_references_to_what_exists_are_found`"""
    assert len(REFERENCE.findall(text)) == 7
    assert missing_in(text, set(all_ids())) == []


def test_a_list_that_names_too_few_or_too_many_tests_is_stale() -> None:
    text = "".join(f"## I{number}\n<!-- tests of I{number} -->\n<!-- end -->\n" for number in (1, 2, 3))
    tests = by_rule(["tests/a.py::test_i1_x", "tests/b.py::test_y_i1_and_i3_z", "tests/b.py::test_i4_x"])
    assert tests[1] == ["tests/a.py::test_i1_x", "tests/b.py::test_y_i1_and_i3_z"]
    assert stale_rules(text, tests) == [1, 3, 4]
    written = with_lists(text, tests)
    assert stale_rules(written, tests) == [4], "a rule without a list"
    assert stale_rules(written, {1: tests[1], 2: ["tests/a.py::test_i2_x"], 3: []}) == [2, 3]
    assert with_lists(written, tests) == written
