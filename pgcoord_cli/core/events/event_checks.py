"""Checks of the events that a tail delivers: any service may insert them, and a newer one may know more kinds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pgcoord_cli.core.events.outbox import Event, Outbox

_log = logging.getLogger("pgcoord.tail")

DIGIT = b"\0"
"""Replaces every hexadecimal digit before comparison; a text in PostgreSQL never contains it."""

DIGITS_MARKED = bytes.maketrans(b"0123456789abcdefABCDEF", DIGIT * 22)
SHAPE_OF_UUID = b"-".join(DIGIT * length for length in (8, 4, 4, 4, 12)) + b"\n"


class EventChecks:
    """Warns of events with unknown kinds or malformed execution ids, which are printed all the same; once each."""

    def __init__(self, outbox: Outbox) -> None:
        self._known = set(outbox.kinds)
        self._warned_of_ids = False

    def warn_of(self, events: list[Event]) -> None:
        """Warns once per unknown kind, and once of an execution id that is no UUID."""
        if not {event.kind for event in events} <= self._known:
            self._warn_of_kinds(events)
        if not self._warned_of_ids:
            self._warn_of_ids(events)

    def _warn_of_kinds(self, events: list[Event]) -> None:
        for event in events:
            if event.kind not in self._known:
                self._known.add(event.kind)
                _log.warning("event %d: %r is not a known kind of event", event.event_id, event.kind)

    def _warn_of_ids(self, events: list[Event]) -> None:
        if not are_uuids([event.execution_id for event in events]):
            first = next(event for event in events if not are_uuids([event.execution_id]))
            self._warned_of_ids = True
            _log.warning(
                "event %d: execution id %r is not a UUID; others are not reported", first.event_id, first.execution_id
            )


def are_uuids(ids: Sequence[str]) -> bool:
    """Whether all texts are UUIDs. Checks a whole batch in two passes over bytes, since a catch-up has millions."""
    lines = "".join(f"{text}\n" for text in ids).encode()
    return lines.translate(DIGITS_MARKED) == SHAPE_OF_UUID * len(ids)
