"""What a person may write for a duration or a schema, and where a setting comes from."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcoord_cli.core.database import channels
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import MAX_SCHEMA_BYTES, OutputFormat, parse_duration, parse_schema, resolve_settings

LONGEST_NAME_IN_POSTGRESQL = 63
"""Bytes; longer channel names are refused."""


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
def test_anything_else_is_a_usage_error_that_names_the_option(text: str) -> None:
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
    environ = {"PGCOORD_SCHEMA": "from_env", "PGCOORD_OUTPUT": "json", "PGCOORD_LOCK_TIMEOUT": "250ms"}
    chosen = resolve_settings({"schema": "from_flag", "output": None, "quiet": False}, environ)
    assert (chosen.schema, chosen.schema_given) == ("from_flag", True)
    assert chosen.output is OutputFormat.JSON
    assert chosen.lock_timeout == 0.25
    assert chosen.statement_timeout == 30.0
    assert resolve_settings({}, {}).schema_given is False


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PGCOORD_SCHEMA", "Bad"), ("PGCOORD_OUTPUT", "yaml"), ("PGCOORD_CONNECT_TIMEOUT", "soon")],
)
def test_a_wrong_value_is_blamed_on_the_variable_it_came_from(variable: str, value: str) -> None:
    with pytest.raises(UsageError, match=variable):
        resolve_settings({}, {variable: value})


def test_a_password_is_in_no_repr() -> None:
    assert "secret" not in repr(resolve_settings({"dsn": "postgresql://u:secret@h/d"}, {}))
