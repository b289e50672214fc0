"""The CI description tests what the project says that it supports."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEST_JOB: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]


def test_ci_runs_every_python_of_the_classifiers() -> None:
    classified = [
        found[1] for line in PROJECT["classifiers"] if (found := re.fullmatch(r".*:: Python :: (3\.\d+)", line))
    ]
    assert TEST_JOB["strategy"]["matrix"]["python"] == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"


def test_ci_runs_every_postgresql_that_the_tests_know() -> None:
    (known,) = re.findall(r'"--server-version".*choices=\(([\d, ]+)\)', (ROOT / "tests/conftest.py").read_text())
    assert TEST_JOB["strategy"]["matrix"]["postgres"] == known.split(", ")


def test_ci_runs_the_lowest_typer_that_is_allowed() -> None:
    (lowest,) = (word.removeprefix("typer>=") for word in PROJECT["dependencies"] if word.startswith("typer"))
    assert f"pip install 'typer=={lowest}.*'" in [step.get("run") for step in TEST_JOB["steps"]]


def test_no_dependency_has_an_upper_bound() -> None:
    extras = PROJECT["optional-dependencies"].values()
    assert [word for words in (PROJECT["dependencies"], *extras) for word in words if re.search(r"<|~=|==", word)] == []
