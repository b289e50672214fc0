"""Makes characters visible that a terminal would act on, or that would make text look like other text.

All output but JSON passes through here, whether to a terminal or not: names, reasons, host names and messages come from
other users of the database, and what is piped today may be shown on a terminal tomorrow.

Escaped are the control characters of ASCII (C0, DEL) and of Latin-1 (C1), the marks, embeddings, overrides and isolates
that change the direction of writing, the separators of lines and paragraphs, and surrogates. They become escapes of
Python: `\\x1b`, `\\u202e`. A backslash stays as it is; where the exact text matters, JSON has it.
"""

from __future__ import annotations

import re

_DIRECTION = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_SEPARATORS_AND_SURROGATES = r"\u2028\u2029\ud800-\udfff"

_UNSAFE = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{_DIRECTION}{_SEPARATORS_AND_SURROGATES}]")
"""Everything but line feed and tab, which the formats handle: they do no more than move the cursor forward."""

_OWN_STYLE = re.compile("(\x1b\\[[0-9;]{1,4}m)")
"""The sequences that `paint` writes."""


def visible(text: str, *, styled: bool = False) -> str:
    """Escapes unsafe characters, except for line feed and tab; with `styled`, except for sequences that set a style.

    Values in a styled text must have been escaped before.
    """
    if text.isascii() and text.isprintable():
        return text
    if styled:
        pieces = _OWN_STYLE.split(text)
        return "".join(piece if number % 2 else visible(piece) for number, piece in enumerate(pieces))
    return _UNSAFE.sub(lambda found: escaped(found[0]), text)


def on_one_line(text: str) -> str:
    """Escapes every character that is not printable, line feed, tab and unusual spaces too."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else escaped(char) for char in text)


def visible_message(text: str) -> str:
    """Escapes a message. Further lines are indented, so that none of them passes for a message of its own."""
    return visible(text).replace("\n", "\n  ")


def visible_json(text: str) -> str:
    """Escapes JSON in the manner of JSON, so that it can still be parsed."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def escaped(char: str) -> str:
    """Returns the escape of one character, in ASCII."""
    return char.encode("unicode_escape").decode("ascii")
