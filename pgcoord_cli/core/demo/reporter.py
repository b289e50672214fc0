"""The interface through which the demonstration reports its steps; the caller decides how they are shown."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the steps of the demonstration, in order."""

    def step(self, title: str) -> None:
        """Called at the beginning of a step."""

    def detail(self, text: str) -> None:
        """Called with a detail of the current step."""

    def progress(self, done: int, total: int) -> None:
        """Called when `done` of `total` transfers have been acknowledged."""
