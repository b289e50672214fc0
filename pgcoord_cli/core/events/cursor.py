"""Cursors: where a reader of an outbox stands, as text that can be printed, stored and given back. Pure.

Nine bytes: a version, `0x02`, and the id of the last event that was passed, as a signed 64-bit number, big-endian. They
are written as 18 hexadecimal digits, so that cursors sort as text like their positions do.
"""

from __future__ import annotations

import re

from pgcoord_cli.errors import UsageError

VERSION = "02"
MAX_POSITION = 2**63 - 1

_CURSOR = re.compile(r"[0-9a-fA-F]{18}")


def to_cursor(position: int) -> str:
    """The cursor of a reader that passed the event of this id and everything before it; 0: nothing yet."""
    return f"{VERSION}{position:016x}"


def looks_like_cursor(text: str) -> bool:
    """Whether the text was meant as a cursor rather than as a time."""
    return _CURSOR.fullmatch(text.strip()) is not None


def from_cursor(text: str, option: str) -> int:
    """The position in a cursor; UsageError, which names `option` and shows a cursor, for anything else."""
    digits = text.strip()
    if not looks_like_cursor(digits):
        raise _malformed(option, f"{text!r} is not a cursor")
    if not digits.startswith(VERSION):
        raise _malformed(option, f"{text!r} is not a cursor of this kind: it begins with {digits[:2]}")
    position = int(digits[2:], 16)
    if position > MAX_POSITION:
        raise _malformed(option, f"{text!r} is not a cursor: its position is negative")
    return position


def _malformed(option: str, message: str) -> UsageError:
    return UsageError(
        f"{option}: {message}",
        hint=f"a cursor is 18 hexadecimal digits: {VERSION}, then the event id as 16 of them, like {to_cursor(42)}",
    )
