"""Which events a tail delivers. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from pgcoord_cli.core.events.outbox import Event
from pgcoord_cli.errors import UsageError


@dataclass(frozen=True)
class Filters:
    """Which events a tail delivers. An empty set passes every event; any other passes events whose value is in it.

    `kinds` are event types or outcomes. Any collection is taken, and kept as a frozenset. Raises UsageError for text
    in place of a collection of texts.
    """

    partitions: Collection[int] = frozenset()
    namespaces: Collection[str] = frozenset()
    instance_tags: Collection[str] = frozenset()
    kinds: Collection[str] = frozenset()

    def __post_init__(self) -> None:
        for each in fields(self):
            values = getattr(self, each.name)
            if isinstance(values, str):
                raise UsageError(f"filters: {each.name}={values!r} is not a set", hint=f"write {{{values!r}}}")
            object.__setattr__(self, each.name, frozenset(values))

    def document(self) -> dict[str, list[Any]]:
        """Returns the filters that are set, as JSON holds them."""
        return {each.name: sorted(values) for each in fields(self) if (values := getattr(self, each.name))}

    def passes(self, event: Event) -> bool:
        """Returns whether the event passes every filter."""
        return (
            (not self.partitions or event.partition_key in self.partitions)
            and (not self.namespaces or event.namespace in self.namespaces)
            and (not self.instance_tags or event.instance_tag in self.instance_tags)
            and (not self.kinds or event.kind in self.kinds)
        )


EVERYTHING = Filters()
