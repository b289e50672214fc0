"""Standard input. If the caller closed it, `sys.stdin` is None."""

from __future__ import annotations

import sys
from typing import BinaryIO

from pgcoord_cli.errors import UsageError


def stdin_bytes() -> BinaryIO:
    """Returns standard input as bytes. Raises UsageError if it is closed."""
    if sys.stdin is None:
        raise UsageError("FILE: standard input is closed")
    return sys.stdin.buffer


def is_typed() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()
