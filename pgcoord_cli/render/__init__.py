"""Renders records as table, plain, json, jsonl, csv or markdown. stdout has the data, stderr the messages.

Three shapes cover every command: a *document* (one nested mapping, like a status), *rows* (a list of records), and
a *stream* (records that follow each other, each flushed). Keys are a contract; `-o json` prints all of them.

Output that is not a terminal is never coloured and never truncated. rich is imported only for a table on a terminal;
documents, which scripts and prompts request most often, are formatted here without it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, repeat
from typing import Any, TextIO

from pgcoord_cli.errors import PgcoordError
from pgcoord_cli.render.visible import on_one_line, visible, visible_json, visible_message
from pgcoord_cli.settings import ColorMode, OutputFormat, Presentation

Record = Mapping[str, Any]

_STYLES = {"good": "32", "bad": "31", "dim": "2", "bold": "1", "warn": "33"}


class Output:
    """Writes to stdout and stderr in the format and colours of a Presentation."""

    def __init__(self, presentation: Presentation) -> None:
        self.format = presentation.output
        self.quiet = presentation.quiet
        self.verbose = presentation.verbose
        self.color = presentation.color

    @property
    def is_json(self) -> bool:
        """Whether stdout is JSON, for a program to parse."""
        return self.format in (OutputFormat.JSON, OutputFormat.JSONL)

    def document(self, document: Record) -> None:
        """Writes one nested record. Scalars of the top level come first, then a section for each mapping."""
        if self.is_json:
            _write(to_json(document, indent=2 if self.format == OutputFormat.JSON else None))
        elif self.format in (OutputFormat.TABLE, OutputFormat.PLAIN):
            self._write_text("\n".join(self._sections(document)))
        else:
            self.rows(["field", "value"], [{"field": k, "value": v} for k, v in flatten(document)])

    def next_document(self, document: Record) -> None:
        """Writes and flushes one document of a sequence; in JSON, on one line."""
        if self.is_json:
            _write(to_json(document))
        else:
            self.document(document)
        sys.stdout.flush()

    def _sections(self, document: Record) -> Iterable[str]:
        if self.format == OutputFormat.PLAIN:
            return (f"{scalar(name)} {scalar(value)}" for name, value in flatten(document))
        return self._titled_sections(document)

    def _titled_sections(self, document: Record) -> Iterable[str]:
        scalars = {name: value for name, value in document.items() if not isinstance(value, Mapping)}
        sections: dict[str, Record] = {"": scalars} if scalars else {}
        sections |= {name: value for name, value in document.items() if isinstance(value, Mapping)}
        width = max((len(scalar(name)) for section in sections.values() for name, _ in flatten(section)), default=0)
        for title, section in sections.items():
            if title:
                yield paint(scalar(title), "bold", self.colored(sys.stdout))
            for name, value in flatten(section):
                yield f"  {scalar(name):<{width}}  {self._painted(value)}"

    def _painted(self, value: Any) -> str:
        style = {True: "good", False: "bad"}.get(value) if isinstance(value, bool) else None
        text = scalar(value)
        return paint(text, style or ("dim" if text == "-" else ""), self.colored(sys.stdout))

    def rows(self, columns: Sequence[str], rows: Iterable[Record], *, empty: str = "") -> None:
        """Writes a list of records. If there are none, `empty` goes to stderr, except in JSON."""
        records = list(rows)
        if self.format == OutputFormat.JSON:
            _write(to_json(records, indent=2))
        elif self.format == OutputFormat.JSONL:
            for record in records:
                _write(to_json(record))
        elif records or self.format == OutputFormat.CSV:
            self._listing(columns, records)
        if not records and not self.is_json and empty:
            self.note(empty)

    def _listing(self, columns: Sequence[str], records: Sequence[Record]) -> None:
        cells = [[scalar(record.get(column)) for column in columns] for record in records]
        if self.format == OutputFormat.CSV:
            _write_csv(columns, [[plain_scalar(record.get(column)) for column in columns] for record in records])
        elif self.format == OutputFormat.PLAIN:
            for row in cells:
                self._write_text("\t".join(row))
        elif self.format == OutputFormat.MARKDOWN:
            self._write_text(_tabulated(columns, [[cell.replace("|", "\\|") for cell in row] for row in cells], "pipe"))
        elif sys.stdout.isatty() and _fits(columns, cells):
            _write_rich_table(columns, cells, colored=self.colored(sys.stdout))
        elif sys.stdout.isatty():
            self._blocks(columns, cells)
        else:
            titles = [paint(column, "bold", self.colored(sys.stdout)) for column in columns]
            self._write_text(_tabulated(titles, cells, "simple"))

    def _blocks(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Writes one line per field, for records that are wider than the terminal."""
        width = max(len(column) for column in columns)
        for number, row in enumerate(rows, start=1):
            self._write_text(paint(f"record {number}", "bold", self.colored(sys.stdout)))
            for column, cell in zip(columns, row, strict=True):
                for title, part in zip(chain([column], repeat("")), _folded(cell, width + 4), strict=False):
                    self._write_text(f"  {title:<{width}}  {part}")

    def record(self, record: Record, line: str) -> None:
        """Writes and flushes one record of a stream: as a JSON line, or as `line` in other formats."""
        if self.is_json:
            _write(to_json(record))
        else:
            self._write_text(line)
        sys.stdout.flush()

    def json_line(self, record: Record) -> None:
        """Writes one record of an export as a JSON line in every format, without a flush."""
        _write(to_json(record))

    def value(self, record: Record, bare: str) -> None:
        """Writes a single record; with `-o plain`, only `bare`, for `$(…)` in scripts."""
        if self.format == OutputFormat.PLAIN:
            self._write_text(bare)
        elif self.format in (OutputFormat.CSV, OutputFormat.MARKDOWN):
            self.rows(list(record), [record])
        else:
            self.document(record)

    def raw(self, data: bytes) -> None:
        """Writes bytes as they are, in every format, and nothing else."""
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def lines(self, lines: Iterable[str]) -> None:
        """Writes text that is the same in every format, like a drawing."""
        for line in lines:
            self._write_text(line)

    def _write_text(self, text: str) -> None:
        """Writes text that is not JSON. All of it is escaped here, even what its maker has forgotten to escape."""
        _write(visible(text, styled=self.colored(sys.stdout)))

    def note(self, text: str) -> None:
        """Writes a message to stderr, unless --quiet is set."""
        if not self.quiet:
            print(visible(text), file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Writes a message to stderr if --verbose is set."""
        if self.verbose:
            print(visible(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Writes a warning to stderr, with --quiet too."""
        print(paint(visible_message(text), "warn", self.colored(sys.stderr)), file=sys.stderr, flush=True)

    def colored(self, stream: TextIO) -> bool:
        """Whether output to `stream` is coloured."""
        return is_colored(self.color, stream)


def is_colored(mode: ColorMode, stream: TextIO) -> bool:
    """Whether output to `stream` is coloured; under `auto`, on a terminal without NO_COLOR and TERM=dumb."""
    if mode == ColorMode.AUTO:
        return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return mode == ColorMode.ALWAYS


def paint(text: str, style: str, colored: bool) -> str:
    """Returns `text` in one of the styles, or unchanged if `colored` is false."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colored and style in _STYLES else text


def flatten(record: Record, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields the leaves of a nested record with dotted names."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def scalar(value: Any) -> str:
    """Formats one value for people, on one line. Control characters are escaped, so that no terminal acts on them."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
    if isinstance(value, (list, tuple, Mapping)):
        return _parts(value)
    return on_one_line(str(value))


def _parts(value: Any) -> str:
    """Formats a list of plain values with commas, and nested values as JSON."""
    is_plain = not isinstance(value, Mapping) and not any(isinstance(item, Mapping) for item in value)
    return ", ".join(map(scalar, value)) if is_plain else visible_json(to_json(value))


def plain_scalar(value: Any) -> str:
    """Formats one value for CSV: empty for None, ISO 8601 for a time, JSON for lists and mappings.

    A field keeps its line feeds, which the quotes of CSV enclose, and its tabs; other control characters are escaped.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple, Mapping)):
        return visible_json(to_json(value))
    return visible(_for_json(value))


def to_json(value: Any, indent: int | None = None, stream: TextIO | None = None) -> str:
    """Returns JSON with times in ISO 8601 UTC and other types as text.

    It is in ASCII unless the stream that it is written to (None: stdout) is encoded in Unicode.
    """
    is_unicode = ((stream or sys.stdout).encoding or "").lower().startswith("utf")
    return json.dumps(value, indent=indent, ensure_ascii=not is_unicode, default=_for_json)


def _for_json(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return str(value)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def _write_csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)


def _tabulated(columns: Sequence[str], rows: Sequence[Sequence[str]], layout: str) -> str:
    from tabulate import tabulate

    return tabulate(rows, headers=columns, tablefmt=layout, disable_numparse=True)


FOLDABLE = 40
"""Characters. A wider column may be folded; a narrower one holds ids, times and words, which must stay whole."""


def _fits(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether a table in which only wide columns are folded fits the terminal."""
    widths = [min(max(map(len, cells)), FOLDABLE) for cells in zip(columns, *rows, strict=True)]
    return sum(widths) + 3 * len(widths) <= shutil.get_terminal_size().columns


def _folded(cell: str, indent: int) -> list[str]:
    """Splits a cell into pieces that fit the terminal beside an indentation."""
    room = max(20, shutil.get_terminal_size().columns - indent)
    return [cell[start : start + room] for start in range(0, len(cell), room)] or [""]


def _write_rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, colored: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, header_style="bold" if colored else "", pad_edge=False)
    for column, *cells in zip(columns, *rows, strict=True):
        table.add_column(column, overflow="fold", no_wrap=max(map(len, [column, *cells])) <= FOLDABLE)
    for row in rows:
        table.add_row(*row)
    Console(
        file=sys.stdout, force_terminal=colored, no_color=not colored, highlight=False, markup=False, emoji=False
    ).print(table)


def render_error(error: PgcoordError, *, as_json: bool, color: ColorMode) -> None:
    """Writes an error: one JSON document to stdout, or a line and a hint to stderr.

    If the result is on stdout already (`error.answered`), no second document follows there.
    """
    if as_json and not error.answered:
        _write(to_json({"error": {"code": error.code, "message": error.message, "hint": error.hint}}))
        return
    colored = is_colored(color, sys.stderr)
    print(f"{paint('error:', 'bad', colored)} {visible_message(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"{paint('hint:', 'dim', colored)} {visible_message(error.hint)}", file=sys.stderr)
