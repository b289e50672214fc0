"""Renders the events of an outbox, one line each. Built for millions of events; flushes after every batch.

Each write consists of whole lines and is at most PIPE_BUF bytes long, unless a single line is longer. Such a write to a
pipe is atomic, so that the reader never receives part of a line, even if this process is killed.
"""

from __future__ import annotations

import csv
import io
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

from pgcoord_cli.render import Output, paint, plain_scalar, scalar
from pgcoord_cli.settings import OutputFormat

COLUMNS = {
    "lease": (
        "event_id", "cursor", "event_type", "execution_id", "lease_id", "occurred_at_ms", "committed_at_ms",
        "partition_key", "namespace", "instance_tag",
    ),
    "completion": (
        "event_id", "cursor", "outcome", "execution_id", "flow_id", "occurred_at_ms", "committed_at_ms",
        "partition_key", "namespace", "instance_tag",
    ),
}  # fmt: skip

_KIND_STYLES = {
    "acquired": "good", "success": "good", "expired": "warn", "reclaimed": "warn", "skipped": "warn",
    "revoked": "bad", "failed": "bad", "cancelled": "bad", "renewed": "dim",
}  # fmt: skip


MANY_TEXTS = 1_000
"""Entries at which the cache of quoted texts is cleared: they do not repeat then."""


class EventStream:
    """Writes events of one outbox, `lease` or `completion`, to stdout in the format of `out`."""

    def __init__(self, out: Output, noun: str) -> None:
        self._out = out
        self._columns = COLUMNS[noun]
        self._line = self._line_maker()

    def begin(self) -> None:
        """Writes the header, in formats that have one."""
        if self._out.format == OutputFormat.CSV:
            _write_whole_lines([csv_line(self._columns)])
        elif self._out.format == OutputFormat.MARKDOWN:
            _write_whole_lines([markdown_line(self._columns), markdown_line(["---"] * len(self._columns))])

    def write(self, events: Iterable[Any]) -> None:
        """Writes the events, one line each, and returns when all of them have been written to stdout."""
        _write_whole_lines(map(self._line, events))

    def _line_maker(self) -> Callable[[Any], str]:
        if self._out.is_json:
            is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
            return _json_maker(self._columns, encode_basestring if is_unicode else encode_basestring_ascii)
        if self._out.format == OutputFormat.CSV:
            return lambda event: csv_line([plain_scalar(value) for value in self._values(event)])
        if self._out.format == OutputFormat.MARKDOWN:
            return lambda event: markdown_line([scalar(value) for value in self._values(event)])
        if self._out.format == OutputFormat.PLAIN:
            return lambda event: "\t".join(map(scalar, self._values(event))) + "\n"
        return self._line_for_people

    def _values(self, event: Any) -> Iterator[Any]:
        return (getattr(event, column) for column in self._columns)

    def _line_for_people(self, event: Any) -> str:
        colored = self._out.colored(sys.stdout)
        kind = scalar(event.kind)
        labels = [f"{name}={scalar(value)}" for name, value in self._labels(event) if value is not None]
        words = (
            paint(_clock_time(event.occurred_at_ms), "dim", colored),
            event.cursor,
            paint(f"{kind:<9}", _KIND_STYLES.get(kind, "bold"), colored),
            scalar(event.execution_id),
            *labels,
        )
        return "  ".join(words) + "\n"

    def _labels(self, event: Any) -> Iterator[tuple[str, Any]]:
        yield "partition", event.partition_key
        yield "namespace", event.namespace
        yield "tag", event.instance_tag
        link = self._columns[4]
        yield link.removesuffix("_id"), getattr(event, link)


def json_line_maker(noun: str) -> Callable[[Any], str]:
    """Returns the function from an event of an outbox to the line that `-o jsonl` prints of it."""
    return _json_maker(COLUMNS[noun], encode_basestring)


def watch_reader(gone: Callable[[], None]) -> None:
    """Blocks until the reader of stdout has closed its end of the pipe, then calls `gone`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # no event mask: poll reports errors and hang-ups only
    poll.poll()
    gone()


class Quoted(dict[str | None, str]):
    """Cache of the JSON of repeated texts; cleared when it holds MANY_TEXTS entries."""

    def __init__(self, quote: Callable[[str], str]) -> None:
        self._quote = quote

    def __missing__(self, text: str | None) -> str:
        if len(self) >= MANY_TEXTS:
            self.clear()
        found = self[text] = "null" if text is None else self._quote(text)
        return found


def _json_maker(columns: Sequence[str], quote: Callable[[str], str]) -> Callable[[Any], str]:
    """Returns a function from event to JSON line: four times as fast as json.dumps, which would dominate a catch-up."""
    quoted, null = Quoted(quote), "null"
    kind_column, link_column = f'"{columns[2]}": ', f'"{columns[4]}": '

    def line(event: Any) -> str:
        event_id, execution, link, kind, occurred, partition, namespace, tag, committed = event
        return (
            f'{{"type": "event", "event_id": {event_id}, "cursor": "02{event_id:016x}", {kind_column}{quoted[kind]}, '
            f'"execution_id": {quote(execution)}, {link_column}{null if link is None else quote(link)}, '
            f'"occurred_at_ms": {occurred}, "committed_at_ms": {committed}, "partition_key": {partition}, '
            f'"namespace": {quoted[namespace]}, "instance_tag": {quoted[tag]}}}\n'
        )

    return line


def _clock_time(milliseconds: int) -> str:
    """Formats milliseconds since 1970 in UTC; a number that is no valid time as `N ms`."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds} ms"


def csv_line(cells: Sequence[str]) -> str:
    """Returns a line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def markdown_line(cells: Sequence[str]) -> str:
    """Returns a line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _write_whole_lines(lines: Iterable[str]) -> None:
    """Writes all lines, in writes that end at a line end and do not exceed PIPE_BUF where lines allow."""
    data = "".join(lines).encode(sys.stdout.encoding, sys.stdout.errors or "strict")
    sys.stdout.flush()
    stream = sys.stdout.buffer
    start = 0
    while start < len(data):
        last_line_end = data.rfind(b"\n", start, start + select.PIPE_BUF)
        end = (last_line_end if last_line_end >= 0 else data.index(b"\n", start)) + 1
        stream.write(data[start:end])
        stream.flush()
        start = end
