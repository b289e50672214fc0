"""Programs that a developer may do without: what they are needed for is skipped where they are missing."""

from __future__ import annotations

import shutil

import pytest


def needs(program: str, purpose: str) -> pytest.MarkDecorator:
    """Skips a test that runs this program, and says what installing it would be good for."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"install {program} to {purpose}")
