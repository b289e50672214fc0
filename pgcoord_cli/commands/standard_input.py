"""Standard input, which a caller may have closed: Python then has none at all."""

from __future__ import annotations

import sys
from typing import BinaryIO

from pgcoord_cli.errors import UsageError


def stdin_bytes() -> BinaryIO:
    """Standard input as bytes; UsageError when it is closed."""
    if sys.stdin is None:
        raise UsageError("FILE: standard input is closed")
    return sys.stdin.buffer


def is_typed() -> bool:
    """Whether a person is at the other end."""
    return sys.stdin is not None and sys.stdin.isatty()
