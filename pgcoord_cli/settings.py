"""Where a setting comes from: a flag, else a `PGCOORD_*` variable, else the default.

The connection string alone goes one step further: where neither `--dsn` nor `PGCOORD_DSN` is given it stays
empty, and libpq reads its own environment (`PGHOST`, `PGSERVICE`, …), service file and password file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from pgcoord_cli.errors import UsageError

MAX_SCHEMA_BYTES = 40
"""Leaves room, within PostgreSQL's 63-byte names, for the channel suffixes that follow the schema."""

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]*")
LONGEST_WAIT = 24 * 86_400.0
"""Seconds. PostgreSQL's timeouts and poll(2) count milliseconds in 31 bits."""

LONGEST_DURATION = 36_500 * 86_400.0
"""Seconds. A century, in any direction, is a time that PostgreSQL knows."""

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)?")
_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class OutputFormat(StrEnum):
    """How records are written to stdout."""

    TABLE = "table"
    PLAIN = "plain"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    MARKDOWN = "markdown"


class ColorMode(StrEnum):
    """Whether stdout and stderr are coloured; `auto` asks whether they are terminals."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def parse_duration(text: str, option: str, longest: float = LONGEST_DURATION) -> float:
    """Seconds in `10`, `10s`, `250ms`, `5m`, `1h` or `7d`, up to `longest`; UsageError naming `option` otherwise."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{option}: {text!r} is not a duration", hint="write a number and a unit: 250ms, 10s, 5m, 1h, 7d"
        )
    seconds = float(match[1]) * _SECONDS_PER_UNIT[match[2] or "s"]
    if seconds > longest:
        raise UsageError(f"{option}: {text!r} is too long; the most is {longest / 86_400:g}d")
    return seconds


def check_text(text: str | None, option: str) -> None:
    """UsageError naming `option` unless the text is UTF-8, as PostgreSQL takes no other."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{option}: not UTF-8 text") from None


def parse_schema(name: str, option: str) -> str:
    """`name` if it can be written unquoted in SQL and leaves room for channel names; UsageError otherwise."""
    if not _SCHEMA_NAME.fullmatch(name) or len(name) > MAX_SCHEMA_BYTES or name.startswith("pg_"):
        raise UsageError(
            f"{option}: {name!r} cannot be a pgcoord schema",
            hint=f"use up to {MAX_SCHEMA_BYTES} lower-case letters, digits and underscores, not starting with pg_",
        )
    return name


@dataclass(frozen=True)
class Settings:
    """Everything a command may ask for. Timeouts are in seconds; `dsn` is kept out of every repr.

    A `connect_timeout` of None leaves it to libpq's environment, and to ten seconds where that says nothing.
    """

    dsn: str = field(default="", repr=False)
    dsn_source: str = "libpq's environment"
    schema: str = "pgcoord"
    schema_given: bool = False
    output: OutputFormat = OutputFormat.TABLE
    quiet: bool = False
    verbose: bool = False
    color: ColorMode = ColorMode.AUTO
    connect_timeout: float | None = None
    statement_timeout: float = 30.0
    lock_timeout: float = 10.0


_DERIVED = ("dsn_source", "schema_given")


def resolve_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """The one frozen Settings of this process. A flag that is None or False was not given."""
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name in (f.name for f in fields(Settings) if f.name not in _DERIVED):
        variable = f"PGCOORD_{name.upper()}"
        if flags.get(name) not in (None, False):
            given[name], sources[name] = flags[name], f"--{name}"
        elif environ.get(variable):
            given[name], sources[name] = environ[variable], variable
    return Settings(**{name: _parse(name, value, sources[name]) for name, value in given.items()}, **_origin(sources))


def _origin(sources: Mapping[str, str]) -> dict[str, Any]:
    origin: dict[str, Any] = {"schema_given": "schema" in sources}
    if "dsn" in sources:
        origin["dsn_source"] = sources["dsn"]
    return origin


def _parse(name: str, value: Any, source: str) -> Any:
    if name == "schema":
        return parse_schema(str(value), source)
    if name == "output":
        return _parse_choice(OutputFormat, value, source)
    if name == "color":
        return _parse_choice(ColorMode, value, source)
    if name.endswith("_timeout"):
        return parse_duration(str(value), source, LONGEST_WAIT)
    if name in ("quiet", "verbose"):
        return str(value).lower() not in ("0", "false", "no")
    check_text(value, source)
    return value


def _parse_choice(choices: type[StrEnum], value: Any, source: str) -> StrEnum:
    try:
        return choices(str(value))
    except ValueError:
        raise UsageError(f"{source}: {value!r} is not one of {', '.join(choices)}", hint=None) from None
