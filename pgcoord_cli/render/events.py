"""Events of an outbox, a line each: made for millions of them, and flushed with every batch.

Lines go out in writes of whole lines, none longer than what a pipe takes at once unless a single line is. So a reader
at the other end of a pipe never sees half a line, even when this process is killed in the middle.
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


class EventStream:
    """Writes events of one outbox, `lease` or `completion`, to stdout in the wanted format."""

    def __init__(self, out: Output, noun: str) -> None:
        self._out = out
        self._columns = COLUMNS[noun]
        self._line = self._line_maker()

    def begin(self) -> None:
        """What stands above the first line."""
        if self._out.format == OutputFormat.CSV:
            _write_whole_lines([_csv_line(self._columns)])
        elif self._out.format == OutputFormat.MARKDOWN:
            _write_whole_lines([_markdown_line(self._columns), _markdown_line(["---"] * len(self._columns))])

    def write(self, events: Iterable[Any]) -> None:
        """The events, a line each; they have been handed to whoever reads stdout when this returns."""
        _write_whole_lines(map(self._line, events))

    def _line_maker(self) -> Callable[[Any], str]:
        if self._out.is_json:
            speaks_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
            return _json_maker(self._columns, encode_basestring if speaks_unicode else encode_basestring_ascii)
        if self._out.format == OutputFormat.CSV:
            return lambda event: _csv_line([plain_scalar(value) for value in self._values(event)])
        if self._out.format == OutputFormat.MARKDOWN:
            return lambda event: _markdown_line([scalar(value) for value in self._values(event)])
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


def watch_reader(gone: Callable[[], None]) -> None:
    """Blocks until whoever reads stdout through a pipe has gone away, and then calls `gone`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors alone are reported
    poll.poll()
    gone()


class Quoted(dict[str | None, str]):
    """JSON of texts that come again and again; forgets all of them when they turn out to be many."""

    def __init__(self, quote: Callable[[str], str]) -> None:
        self._quote = quote

    def __missing__(self, text: str | None) -> str:
        if len(self) >= MANY_TEXTS:
            self.clear()
        found = self[text] = "null" if text is None else self._quote(text)
        return found


def _json_maker(columns: Sequence[str], quote: Callable[[str], str]) -> Callable[[Any], str]:
    """Four times as fast as json.dumps of a dict, which would take most of the time of a catch-up."""
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
    """A time of today as it is read at a terminal, in UTC; of what is no time, the number."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds} ms"


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _write_whole_lines(lines: Iterable[str]) -> None:
    """All of the lines, in writes that end where a line ends and that a pipe takes whole."""
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
