"""Settings: what a caller gives, else a `PGCOORD_*` variable, else the default.

`Settings` says where the database is and how long a session waits for it; the library knows nothing else.
`Presentation` is what the command line adds: how records and messages are shown on the terminal.

The command line gives flags (`resolve_settings`, `resolve_presentation`), a program gives arguments
(`resolve_arguments`); both leave the rest to the environment.

The connection string alone goes one step further: without an argument, `--dsn` and `PGCOORD_DSN` it stays empty, and
libpq reads its own environment (`PGHOST`, `PGSERVICE`, …), service file and password file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from pgcoord_cli.errors import UsageError

MAX_SCHEMA_BYTES = 40
"""Leaves room, within PostgreSQL's 63-byte names, for the channel suffixes that follow the schema."""

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]*")
LONGEST_WAIT = 24 * 86_400.0
"""Seconds. PostgreSQL's timeouts and poll(2) count milliseconds in 31 bits."""

LONGEST_DURATION = 36_500 * 86_400.0
"""Seconds. PostgreSQL's timestamps reach a century in either direction."""

DSN_ARGUMENT = "dsn"
"""The `dsn_source` of Settings whose connection string a program gave."""

_Given = tuple[Any, str]
"""A value, and the option, argument or variable that it comes from."""

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
    """Whether stdout and stderr are coloured; `auto`: each of them if it is a terminal."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class LogFormat(StrEnum):
    """How log lines are written to stderr."""

    TEXT = "text"
    JSON = "json"


def parse_duration(text: str, option: str, longest: float = LONGEST_DURATION) -> float:
    """Returns the seconds in `10`, `10s`, `250ms`, `5m`, `1h` or `7d`.

    Raises UsageError, which names `option`, for any other text and for more than `longest` seconds.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{option}: {text!r} is not a duration", hint="write a number and a unit: 250ms, 10s, 5m, 1h, 7d"
        )
    seconds = float(match[1]) * _SECONDS_PER_UNIT[match[2] or "s"]
    if seconds > longest:
        raise UsageError(f"{option}: {text!r} is too long; the most is {longest / 86_400:g}d")
    return seconds


def check_text(text: str | None, option: str, hint: str | None = None) -> None:
    """Raises UsageError, which names `option`, unless the text can be encoded as UTF-8; PostgreSQL takes no other."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{option}: not UTF-8 text", hint=hint) from None


def parse_schema(name: str, option: str) -> str:
    """Returns `name` if it is an unquoted SQL name that leaves room for channel names.

    Raises UsageError, which names `option`, otherwise.
    """
    if not _SCHEMA_NAME.fullmatch(name) or len(name) > MAX_SCHEMA_BYTES or name.startswith("pg_"):
        raise UsageError(
            f"{option}: {name!r} cannot be a pgcoord schema",
            hint=f"use up to {MAX_SCHEMA_BYTES} lower-case letters, digits and underscores, not starting with pg_",
        )
    return name


@dataclass(frozen=True)
class Settings:
    """Where the database is, and how long a session waits for it. `dsn` is kept out of every repr.

    Timeouts are in seconds. A `connect_timeout` of None leaves it to libpq's environment, and to ten seconds if that
    has none. `dsn_source` names the argument or variable for messages. `schema_given` is true if the schema was
    chosen by an operator (`--schema`, PGCOORD_SCHEMA), who may have mistyped it.
    """

    dsn: str = field(default="", repr=False)
    dsn_source: str = "libpq's environment"
    schema: str = "pgcoord"
    schema_given: bool = False
    connect_timeout: float | None = None
    statement_timeout: float = 30.0
    lock_timeout: float = 10.0


@dataclass(frozen=True)
class Presentation:
    """How the command line shows records and messages."""

    output: OutputFormat = OutputFormat.TABLE
    quiet: bool = False
    verbose: bool = False
    color: ColorMode = ColorMode.AUTO
    log_format: LogFormat = LogFormat.TEXT


_DERIVED = ("dsn_source", "schema_given")
_CHOICES: Mapping[str, type[StrEnum]] = {"output": OutputFormat, "color": ColorMode, "log_format": LogFormat}


def resolve_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Returns the Settings of a command. A flag that is None or False was not given.

    Raises UsageError, which names the flag or the variable, for a value that cannot be used.
    """
    return _settings({name: (value, f"--{name.replace('_', '-')}") for name, value in flags.items()}, environ)


def resolve_arguments(dsn: str | None, schema: str | None) -> Settings:
    """Returns the Settings of a program that gives its database by arguments; None was not given.

    The rest comes from the environment, as on the command line. Raises UsageError like `resolve_settings`.
    """
    chosen = _settings({"dsn": (dsn, DSN_ARGUMENT), "schema": (schema, "schema")}, os.environ)
    # A schema that a program names is no typing error of an operator: if it is absent, it has not been migrated.
    return chosen if schema is None else replace(chosen, schema_given=False)


def resolve_schema(schema: str | None) -> str:
    """Returns the schema that a program gives, else that of PGCOORD_SCHEMA, else `pgcoord`. Raises UsageError.

    For functions that work on a connection of the caller, so that nothing else is taken from the environment.
    """
    source = "PGCOORD_SCHEMA" if schema is None else "schema"
    return parse_schema(schema if schema is not None else os.environ.get(source) or Settings.schema, source)


def resolve_presentation(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Presentation:
    """Returns the Presentation of a command, by the same order as `resolve_settings`. Raises UsageError."""
    given = {name: (value, f"--{name.replace('_', '-')}") for name, value in flags.items()}
    names = [each.name for each in fields(Presentation)]
    return Presentation(**{name: _parse(name, *found) for name, found in _chosen(names, given, environ).items()})


def _settings(given: Mapping[str, _Given], environ: Mapping[str, str]) -> Settings:
    names = [each.name for each in fields(Settings) if each.name not in _DERIVED]
    chosen = _chosen(names, given, environ)
    values: dict[str, Any] = {name: _parse(name, *found) for name, found in chosen.items()}
    if "dsn" in chosen:
        values["dsn_source"] = chosen["dsn"][1]
    return Settings(**values, schema_given="schema" in chosen)


def _chosen(names: Iterable[str], given: Mapping[str, _Given], environ: Mapping[str, str]) -> dict[str, _Given]:
    """Returns the value and its source for each name that the caller or the environment gives."""
    chosen: dict[str, _Given] = {}
    for name in names:
        variable = f"PGCOORD_{name.upper()}"
        value, source = given.get(name, (None, ""))
        if value not in (None, False):
            chosen[name] = value, source
        elif environ.get(variable):
            chosen[name] = environ[variable], variable
    return chosen


def _parse(name: str, value: Any, source: str) -> Any:
    if name == "schema":
        return parse_schema(str(value), source)
    if name in _CHOICES:
        return _parse_choice(_CHOICES[name], value, source)
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
