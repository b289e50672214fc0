"""Lists, in docs/invariants.md, the tests of each rule: those whose names carry its number (`test_i9_…`).

    python docs/rules.py            write the lists
    python docs/rules.py --check    change nothing; exit 1 and name each rule whose list differs

Everything else in that document is written by hand. `tests/docs/test_invariants.py` compares both with the code.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENT = REPOSITORY / "docs" / "invariants.md"

_NUMBER = re.compile(r"_i(\d+)_")
_LIST = re.compile(r"(?<=<!-- tests of I)(\d+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def ids_in(path: Path, repository: Path = REPOSITORY) -> list[str]:
    """The ids, as pytest writes them, of the test functions and methods in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [f"{path.relative_to(repository).as_posix()}::{name}" for name in _names_in(tree.body)]


def _names_in(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (f"{node.name}::{name}" for name in _names_in(node.body))


def all_ids(repository: Path = REPOSITORY) -> list[str]:
    """The ids of all tests, sorted."""
    return sorted(each for path in (repository / "tests").rglob("*.py") for each in ids_in(path, repository))


def by_rule(tests: Sequence[str]) -> dict[int, list[str]]:
    """The tests that carry the number of each rule, in the order in which they are given."""
    found: dict[int, list[str]] = {}
    for test in tests:
        for number in _NUMBER.findall(test):
            found.setdefault(int(number), []).append(test)
    return found


def with_lists(text: str, tests: Mapping[int, Sequence[str]]) -> str:
    """The document with the list of each rule written anew."""
    return _LIST.sub(lambda match: f"{match[1]}{match[2]}{_lines(tests.get(int(match[1]), []))}", text)


def _lines(tests: Sequence[str]) -> str:
    return "".join(f"- `{test}`\n" for test in tests)


def stale_rules(text: str, tests: Mapping[int, Sequence[str]]) -> list[int]:
    """The rules whose lists are not as the names of the tests have them."""
    written = {int(match[1]): match[0] for match in _LIST.finditer(text)}
    due = {int(match[1]): match[0] for match in _LIST.finditer(with_lists(text, tests))}
    return [number for number in sorted(tests.keys() | due.keys()) if written.get(number, "") != due.get(number)]


def main(argv: Sequence[str]) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description="Write the lists of tests in docs/invariants.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 and name each list that differs")
    is_check = parser.parse_args(argv).check
    text, tests = DOCUMENT.read_text(encoding="utf-8"), by_rule(all_ids())
    if not is_check:
        DOCUMENT.write_text(with_lists(text, tests), encoding="utf-8")
    stale = stale_rules(text, tests) if is_check else []
    for number in stale:
        print(f"docs/invariants.md: the tests of I{number} differ")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
