"""Renders the changes of keys, one line each, each flushed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pgcoord_cli.render import Output, paint, plain_scalar, scalar
from pgcoord_cli.render.events import csv_line, markdown_line
from pgcoord_cli.settings import OutputFormat

COLUMNS = ("key", "value", "version", "encoding")


class ChangeStream:
    """Writes changes to stdout in the format of `out`."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def begin(self) -> None:
        """Writes the header, in formats that have one."""
        if self._out.format == OutputFormat.CSV:
            self._write(csv_line(COLUMNS))
        elif self._out.format == OutputFormat.MARKDOWN:
            self._write(markdown_line(COLUMNS) + markdown_line(["---"] * len(COLUMNS)))

    def write(self, change: Mapping[str, Any]) -> None:
        """Writes one change; a value of None means that the key was removed."""
        if self._out.is_json:
            self._out.record(change, "")
        else:
            self._write(self._line(change))

    def _line(self, change: Mapping[str, Any]) -> str:
        if self._out.format == OutputFormat.CSV:
            return csv_line([plain_scalar(change[column]) for column in COLUMNS])
        if self._out.format == OutputFormat.MARKDOWN:
            return markdown_line([scalar(change[column]) for column in COLUMNS])
        if self._out.format == OutputFormat.PLAIN:
            return "\t".join(scalar(change[column]) for column in COLUMNS) + "\n"
        colored = self._out.colored(sys.stdout)
        version = paint(scalar(change["version"]), "dim", colored)
        if change["value"] is None:
            return f"{version}  {scalar(change['key'])} {paint('is absent', 'warn', colored)}\n"
        return f"{version}  {scalar(change['key'])} = {scalar(change['value'])}\n"

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
