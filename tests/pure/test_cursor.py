"""Cursors: a printed cursor is parsed back to its position; any other text is a UsageError that shows a valid one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcoord_cli.core.events.cursor import MAX_POSITION, from_cursor, looks_like_cursor, to_cursor
from pgcoord_cli.errors import UsageError

positions = st.integers(0, MAX_POSITION)


@given(positions)
def test_i10_a_printed_cursor_is_parsed_back_to_the_same_position(position: int) -> None:
    assert from_cursor(to_cursor(position), "--from") == position


@given(positions)
def test_a_cursor_is_nine_bytes_a_version_and_a_signed_big_endian_number(position: int) -> None:
    assert bytes.fromhex(to_cursor(position)) == b"\x02" + position.to_bytes(8, "big", signed=True)


@given(positions, positions)
def test_cursors_sort_as_text_in_the_order_of_their_positions(one: int, other: int) -> None:
    assert (to_cursor(one) < to_cursor(other)) == (one < other)


@given(positions)
def test_upper_case_and_surrounding_spaces_are_accepted(position: int) -> None:
    assert from_cursor(f" {to_cursor(position).upper()}\n", "--from") == position


def refusal(text: str) -> str:
    """Returns the message for a text that is not a cursor, and checks that the hint holds a valid one."""
    with pytest.raises(UsageError) as caught:
        from_cursor(text, "--from")
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith("--from: ")
    shown = re.findall(r"\b[0-9a-f]{18}\b", caught.value.hint or "")
    assert [from_cursor(example, "--from") for example in shown] == [42]
    return caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("42", id="a bare number"),
        pytest.param("02000000000000002", id="a digit short"),
        pytest.param("0200000000000000", id="a byte short"),
        pytest.param("02000000000000002a0", id="a digit long"),
        pytest.param("02000000000000002g", id="not a hexadecimal digit"),
        pytest.param("0x0000000000000042", id="a number in another notation"),
        pytest.param("02 0000000000002a ", id="a space within"),
        pytest.param("+2000000000000002a", id="a sign"),
        pytest.param("02_00000000000002a", id="an underscore, which int() would take"),
        pytest.param("02000000000000００2a", id="full-width digits"),
        pytest.param("02000000000000002a\n02000000000000002b", id="two cursors"),
        pytest.param("10m", id="a duration"),
        pytest.param("7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f", id="a UUID"),
        pytest.param("\x02\0\0\0\0\0\0\0*", id="the bytes themselves"),
    ],
)
def test_a_malformed_or_truncated_cursor_is_refused(text: str) -> None:
    assert refusal(text) == f"--from: {text!r} is not a cursor"
    assert not looks_like_cursor(text)


@pytest.mark.parametrize("version", ["00", "01", "03", "20", "ff"])
def test_a_cursor_of_another_version_is_refused_and_the_message_names_that_version(version: str) -> None:
    text = version + to_cursor(42)[2:]
    assert looks_like_cursor(text)
    assert refusal(text).endswith(f"is a cursor of version {version}; this pgcoord reads version 02")


@pytest.mark.parametrize("digits", ["8000000000000000", "ffffffffffffffff"])
def test_a_negative_position_is_refused(digits: str) -> None:
    assert refusal(f"02{digits}").endswith("its position is negative")


@given(st.text(max_size=20) | st.text("0123456789abcdefABCDEF ", min_size=16, max_size=20))
def test_a_text_is_parsed_as_a_cursor_or_raises_a_usage_error(text: str) -> None:
    try:
        position = from_cursor(text, "--from")
    except UsageError:
        refusal(text)
    else:
        assert to_cursor(position) == text.strip().lower()
