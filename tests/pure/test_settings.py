"""How durations and schema names are parsed, and which source of a setting takes precedence."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcoord_cli.core.database import channels
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import (
    MAX_SCHEMA_BYTES,
    ColorMode,
    LogFormat,
    OutputFormat,
    Presentation,
    Settings,
    parse_duration,
    parse_schema,
    resolve_arguments,
    resolve_presentation,
    resolve_schema,
    resolve_settings,
)

LONGEST_NAME_IN_POSTGRESQL = 63
"""Bytes; PostgreSQL refuses longer channel names."""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 10),
        ("10s", 10),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("5m", 300),
        ("1h", 3_600),
        ("7d", 604_800),
        (" 2s ", 2),
        ("0", 0),
        ("0ms", 0),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text, "--ttl") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "+1s", "1 s", "1w", "1S", "1e3", ".5s", "1.", "1,5s", "ten", "1s2", "1m30s", "nan", "inf"]
)
def test_any_other_duration_is_a_usage_error_that_names_the_option(text: str) -> None:
    with pytest.raises(UsageError, match="--ttl") as refused:
        parse_duration(text, "--ttl")
    assert refused.value.exit_code == 2
    assert refused.value.hint


@given(st.text())
def test_any_text_is_a_duration_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert parse_duration(text, "--ttl") >= 0


@given(st.integers(0, 10_000), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_longer_durations_are_longer_in_every_unit(number: int, unit: str) -> None:
    assert parse_duration(f"{number}{unit}", "--ttl") < parse_duration(f"{number + 1}{unit}", "--ttl")


@pytest.mark.parametrize("name", ["pgcoord", "a", "_", "_x9", "a" * MAX_SCHEMA_BYTES])
def test_a_schema_is_a_name_that_needs_no_quotes(name: str) -> None:
    assert parse_schema(name, "--schema") == name


@pytest.mark.parametrize(
    "name",
    ["", "A", "9a", "a-b", "a.b", 'a"b', "a b", "pg_x", "pg_", "ä", "a" * (MAX_SCHEMA_BYTES + 1), "a\n", "x;drop", "²"],
)
def test_any_other_schema_is_a_usage_error_that_names_the_option(name: str) -> None:
    with pytest.raises(UsageError, match="--schema"):
        parse_schema(name, "--schema")


def test_i7_every_channel_of_the_longest_schema_fits_into_a_name() -> None:
    schema = "s" * MAX_SCHEMA_BYTES
    for channel in (channels.commits(schema), channels.leadership(schema), channels.reply(schema, "0" * 12)):
        assert len(channel.encode()) <= LONGEST_NAME_IN_POSTGRESQL


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    flags = {"schema": "from_flag", "output": None, "quiet": False, "color": "never"}
    environ = {"PGCOORD_SCHEMA": "from_env", "PGCOORD_OUTPUT": "json", "PGCOORD_LOCK_TIMEOUT": "250ms"}
    chosen = resolve_settings(flags, environ)
    assert (chosen.schema, chosen.schema_given) == ("from_flag", True)
    assert chosen.lock_timeout == 0.25
    assert chosen.statement_timeout == 30.0
    assert resolve_settings({}, {}).schema_given is False
    shown = resolve_presentation(flags, environ | {"PGCOORD_COLOR": "always"})
    assert shown == Presentation(output=OutputFormat.JSON, color=ColorMode.NEVER)


@pytest.mark.parametrize(("variable", "value"), [("PGCOORD_SCHEMA", "Bad"), ("PGCOORD_CONNECT_TIMEOUT", "soon")])
def test_an_invalid_value_names_the_variable_it_came_from(variable: str, value: str) -> None:
    with pytest.raises(UsageError, match=variable):
        resolve_settings({}, {variable: value})


def test_an_invalid_presentation_names_the_variable_it_came_from() -> None:
    with pytest.raises(UsageError, match=r"PGCOORD_OUTPUT.*'yaml'"):
        resolve_presentation({}, {"PGCOORD_OUTPUT": "yaml"})


def test_options_of_the_terminal_are_not_among_the_settings_of_the_library() -> None:
    database, terminal = ({field.name for field in fields(kind)} for kind in (Settings, Presentation))
    assert terminal >= {"output", "quiet", "verbose", "color", "log_format"}
    assert not database & terminal


# -- arguments of a program


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCOORD_DSN", "host=from_env")
    monkeypatch.setenv("PGCOORD_SCHEMA", "from_env")
    monkeypatch.setenv("PGCOORD_STATEMENT_TIMEOUT", "7s")


@pytest.mark.usefixtures("environ")
def test_an_argument_wins_over_the_environment_and_what_is_left_out_comes_from_there() -> None:
    all_given = resolve_arguments("host=given", "given")
    assert (all_given.dsn, all_given.dsn_source, all_given.schema) == ("host=given", "dsn", "given")
    assert all_given.statement_timeout == 7.0
    left_out = resolve_arguments(None, None)
    assert (left_out.dsn, left_out.dsn_source, left_out.schema) == ("host=from_env", "PGCOORD_DSN", "from_env")
    assert resolve_arguments("", None).dsn == "", "an empty string asks for what libpq finds"
    assert (resolve_schema("given"), resolve_schema(None)) == ("given", "from_env")


def test_a_program_without_arguments_gets_what_libpq_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGCOORD_DSN", "PGCOORD_SCHEMA"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_arguments(None, None) == Settings()
    assert resolve_schema(None) == "pgcoord"


@pytest.mark.parametrize("name", ["", "Upper", 'a"b', "a.b", "x; DROP TABLE kv", "pg_x", "a" * (MAX_SCHEMA_BYTES + 1)])
def test_a_schema_that_a_program_gives_is_checked_as_on_the_command_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="schema: "):
        resolve_arguments(None, name)
    with pytest.raises(UsageError, match="schema: "):
        resolve_schema(name)
    monkeypatch.setenv("PGCOORD_SCHEMA", name or "-")
    with pytest.raises(UsageError, match="PGCOORD_SCHEMA: "):
        resolve_schema(None)


def test_only_a_schema_from_the_environment_may_be_a_typing_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCOORD_SCHEMA", "typed")
    assert resolve_arguments(None, None).schema_given
    assert not resolve_arguments(None, "written").schema_given


def test_the_log_format_is_text_unless_a_flag_or_a_variable_sets_json() -> None:
    assert resolve_presentation({}, {}).log_format is LogFormat.TEXT
    environ = {"PGCOORD_LOG_FORMAT": "json"}
    assert resolve_presentation({}, environ).log_format is LogFormat.JSON
    assert resolve_presentation({"log_format": "text"}, environ).log_format is LogFormat.TEXT
    with pytest.raises(UsageError, match="--log-format: 'xml' is not one of text, json"):
        resolve_presentation({"log_format": "xml"}, {})
    with pytest.raises(UsageError, match="PGCOORD_LOG_FORMAT: 'xml'"):
        resolve_presentation({}, {"PGCOORD_LOG_FORMAT": "xml"})


def test_a_password_is_in_no_repr() -> None:
    assert "secret" not in repr(resolve_settings({"dsn": "postgresql://u:secret@h/d"}, {}))
