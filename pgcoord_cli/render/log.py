"""Log lines on stderr: what `-v`, `-q`, `--log-format` and `--color` make of the loggers `pgcoord.*`.

A daemon logs what an operator should know (INFO), any other command only that something is not right (WARNING);
`-v` adds DEBUG and `-q` leaves the warnings. Each record is one line with time, level and component:

    2026-01-31T12:00:00.123Z INFO [candidate] west-1: elected epoch 7: durable version 12

With `--log-format json` it is a JSON object with the keys `time`, `level`, `component` and `message`, and the fields of
the event, such as `epoch` and `node`. The error that ends a daemon is a line like the others.

Imported where a command begins, not before: `logging` takes as long to load as the command tree.
"""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pgcoord_cli.errors import PgcoordError, UsageError
from pgcoord_cli.render import is_colored, paint, render_error, scalar, to_json
from pgcoord_cli.settings import ColorMode, LogFormat, Presentation

NAME = "pgcoord"

_STYLES = {logging.DEBUG: "dim", logging.WARNING: "warn", logging.ERROR: "bad", logging.CRITICAL: "bad"}

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""Attributes that every record has; all others are fields of the event."""


def configure_logging(presentation: Presentation, *, is_daemon: bool) -> None:
    """Has log records written to stderr as `presentation` says, until `stop_logging`."""
    stop_logging()
    handler = StderrHandler(is_daemon=is_daemon)
    handler.setFormatter(
        JsonFormatter() if presentation.log_format == LogFormat.JSON else TextFormatter(presentation.color)
    )
    # On the root logger, so that what libraries have to say is a line of the same form.
    logging.getLogger().addHandler(handler)
    logging.getLogger(NAME).setLevel(_level(presentation, is_daemon=is_daemon))
    if is_daemon:
        threading.excepthook = _log_thread_failure


def stop_logging() -> None:
    """Undoes `configure_logging`; does nothing without one."""
    for handler in _handlers():
        logging.getLogger().removeHandler(handler)
        logging.getLogger(NAME).setLevel(logging.NOTSET)
        threading.excepthook = handler.previous_hook


def _handlers() -> list[StderrHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, StderrHandler)]


def _level(presentation: Presentation, *, is_daemon: bool) -> int:
    if presentation.quiet:
        return logging.WARNING
    if presentation.verbose:
        return logging.DEBUG
    return logging.INFO if is_daemon else logging.WARNING


def report_failure(error: PgcoordError, *, as_json: bool, color: ColorMode) -> None:
    """Says why a call failed: like `render_error`, except that what ends a daemon is logged instead of shown on stderr.

    With `as_json` a daemon does both: its stdout and its stderr are often kept in different places.
    """
    # A usage error is for the person who typed the call: the daemon has not begun.
    is_daemon = not isinstance(error, UsageError) and any(handler.is_daemon for handler in _handlers())
    if is_daemon:
        _log_failure(error)
    if not is_daemon or (as_json and not error.answered):
        render_error(error, as_json=as_json, color=color)


def _log_failure(error: PgcoordError) -> None:
    hint = {"hint": error.hint} if error.hint else {}
    logging.getLogger(NAME).error("%s", error.reason, extra={"code": error.code} | hint)


class StderrHandler(logging.Handler):
    """Writes each record as one line to what `sys.stderr` is at that moment, flushed."""

    def __init__(self, *, is_daemon: bool) -> None:
        super().__init__()
        self.is_daemon = is_daemon
        self.previous_hook = threading.excepthook

    def emit(self, record: logging.LogRecord) -> None:
        # A reader of stderr that is gone, or a full disk, must not end a daemon, and there is nowhere to report it.
        with suppress(OSError):
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


class TextFormatter(logging.Formatter):
    """`TIME LEVEL [COMPONENT] MESSAGE`; the lines of a traceback follow, each in the same form."""

    def __init__(self, color: ColorMode) -> None:
        super().__init__()
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        colored = is_colored(self._color, sys.stderr)
        level = paint(record.levelname, _STYLES.get(record.levelno, ""), colored)
        head = f"{paint(_time(record), 'dim', colored)} {level} [{scalar(_component(record))}]"
        lines = [record.getMessage(), *_traceback(record).splitlines()]
        return "\n".join(f"{head} {scalar(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object: `time`, `level`, `component`, `message`, the fields of the event, and `traceback` if any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "component": _component(record),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name not in line}
        if traceback := _traceback(record):
            line["traceback"] = traceback
        return to_json(line, stream=sys.stderr)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _component(record: logging.LogRecord) -> str:
    """The name of the logger without `pgcoord.`; that of another library's logger is left whole."""
    return record.name.removeprefix(f"{NAME}.")


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info:
        return ""
    from pgcoord_cli.db.connection import redact

    # The message of an exception that nothing has translated may quote a connection string.
    return redact(logging.Formatter().formatException(record.exc_info))


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Logs an exception that ended a thread; Python would print it over several lines without a time."""
    if failure.exc_value is None or failure.exc_type is SystemExit:
        return
    thread = failure.thread.name if failure.thread else "unknown"
    error = failure.exc_type, failure.exc_value, failure.exc_traceback
    logging.getLogger(NAME).critical("thread %s has ended with an error", thread, exc_info=error)
