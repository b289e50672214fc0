"""Every benchmark is called as the documents say, and explains its options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if 'if __name__ == "__main__":' in path.read_text()
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--server-version" in done.stdout
    assert f"python -m benchmarks.{name}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_documented(name: str) -> None:
    assert f"python -m benchmarks.{name}" in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


def test_there_are_benchmarks() -> None:
    assert len(BENCHMARKS) > 1
