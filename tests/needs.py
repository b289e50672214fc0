"""Optional programs: a test that runs one is skipped on a machine that lacks it."""

from __future__ import annotations

import shutil

import pytest


def needs(program: str, purpose: str) -> pytest.MarkDecorator:
    """Skips a test unless `program` is on PATH; the reason says what to install, and for what purpose."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"install {program} to {purpose}")
