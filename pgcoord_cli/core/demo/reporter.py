"""Who hears what happens in the demonstration; what it looks like is for whoever tells the story."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Hears what happens."""

    def step(self, title: str) -> None:
        """A new part of the story begins."""

    def say(self, text: str) -> None:
        """A detail of the part."""

    def progress(self, done: int, total: int) -> None:
        """So many transfers of so many have been acknowledged."""
