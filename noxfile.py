"""One command for each task: `nox -l` lists them, `nox -s NAME` runs one. They run in the current environment.

Words after `--` go to the program that a session runs: `nox -s test -- -n auto`, `nox -s room -- pure cli`,
`nox -s benchmark -- commits --history`.
"""

from __future__ import annotations

from itertools import takewhile

import nox

nox.options.sessions = ["test", "lint"]
nox.options.default_venv_backend = "none"


@nox.session
def test(session: nox.Session) -> None:
    """Run all tests except the slow ones."""
    session.run("pytest", *session.posargs)


@nox.session
def room(session: nox.Session) -> None:
    """Run the tests of directories of tests/ (pure, postgres, faults, cli, docs), with options of pytest after them."""
    names = list(takewhile(lambda word: not word.startswith("-"), session.posargs))
    if not names:
        session.error("name a directory of tests/: nox -s room -- pure")
    session.run("pytest", *(f"tests/{name}" for name in names), *session.posargs[len(names) :])


@nox.session
def slow(session: nox.Session) -> None:
    """Run the slow tests: long fault and load runs."""
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run all tests except the slow ones, and print which lines and branches they leave out."""
    session.run("pytest", "--cov=pgcoord_cli", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, imports, and that all generated files are up to date."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")
    for script in ("docs/generate.py", "docs/rules.py", ".ci/dump_schema.py"):
        session.run("python", script, "--check")


@nox.session
def generate(session: nox.Session) -> None:
    """Write the manual pages, the completions, and the lists of docs/invariants.md."""
    session.run("python", "docs/generate.py")
    session.run("python", "docs/rules.py")


@nox.session
def schema(session: nox.Session) -> None:
    """Write sql/schema.sql from the migrations."""
    session.run("python", ".ci/dump_schema.py")


@nox.session
def benchmark(session: nox.Session) -> None:
    """Run a benchmark: commits, failover, tail or cascade, with its options."""
    if not session.posargs:
        session.error("name a benchmark: nox -s benchmark -- commits")
    name, *options = session.posargs
    session.run("python", "-m", f"benchmarks.{name}", *options)
