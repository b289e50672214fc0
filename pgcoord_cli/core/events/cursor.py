"""Cursors: the position of a reader in an outbox, as text that can be printed, stored and passed back. Pure.

A cursor is nine bytes: the version `0x02`, then the id of the last event that the reader has passed, as a signed 64-bit
big-endian integer. It is written as 18 hexadecimal digits, so cursors sort as text in the order of their positions.
"""

from __future__ import annotations

import re

from pgcoord_cli.errors import UsageError

VERSION = "02"
MAX_POSITION = 2**63 - 1
"""The largest `bigint`, the type of `event_id`."""

_LONGEST_SHOWN = 80
"""Characters of a text that is not a cursor which a message shows."""

_CURSOR = re.compile(r"[0-9a-fA-F]{18}")


def to_cursor(position: int) -> str:
    """Returns the cursor of a reader that has passed every event up to the id `position`; 0 is the beginning."""
    return f"{VERSION}{position:016x}"


MALFORMED_HINT = f"a cursor is 18 hexadecimal digits: {VERSION}, then the event id in 16 digits, like {to_cursor(42)}"


def looks_like_cursor(text: str) -> bool:
    """Returns whether the text has the shape of a cursor, of any version, rather than of a time."""
    return _CURSOR.fullmatch(text.strip()) is not None


def from_cursor(text: str, option: str) -> int:
    """Returns the position in a cursor. Raises UsageError for any other text; the message names `option`."""
    digits = text.strip()
    if not looks_like_cursor(digits):
        shown = f"{text[:_LONGEST_SHOWN]!r}{'…' if len(text) > _LONGEST_SHOWN else ''}"
        raise _malformed(option, f"{shown} is not a cursor")
    if not digits.startswith(VERSION):
        raise _malformed(option, f"{text!r} is a cursor of version {digits[:2]}; this pgcoord reads version {VERSION}")
    position = int(digits[2:], 16)
    # The 64 bits are signed: anything above MAX_POSITION is a negative id, and no event has one.
    if position > MAX_POSITION:
        raise _malformed(option, f"{text!r} is not a cursor: its position is negative")
    return position


def _malformed(option: str, message: str) -> UsageError:
    return UsageError(f"{option}: {message}", hint=MALFORMED_HINT)
