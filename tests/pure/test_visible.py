"""Which characters are escaped, and that nothing but render/ writes to a terminal."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgcoord_cli
from pgcoord_cli.render import Output, plain_scalar, scalar
from pgcoord_cli.render.log import TextFormatter
from pgcoord_cli.render.visible import on_one_line, visible, visible_json, visible_message
from pgcoord_cli.settings import ColorMode, OutputFormat, Presentation

PACKAGE = Path(pgcoord_cli.__file__).parent

UNSAFE = [
    *map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u061c", "\u200e", "\u200f", "\u2028", "\u2029",
    *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\ud800", "\udfff",
]  # fmt: skip


def test_every_unsafe_character_is_escaped() -> None:
    for char in UNSAFE:
        shown = char.encode("unicode_escape").decode()
        assert on_one_line(f"a{char}b") == scalar(f"a{char}b") == f"a{shown}b"
        assert visible(f"a{char}b") == plain_scalar(f"a{char}b") == (f"a{char}b" if char in "\n\t" else f"a{shown}b")


@given(st.text())
def test_other_text_is_unchanged(text: str) -> None:
    text = "".join(char for char in text if char not in UNSAFE)
    assert visible(text) == visible(text, styled=True) == visible_json(text) == text


@given(st.text(st.characters() | st.sampled_from(UNSAFE)))
def test_json_stays_the_same_json(text: str) -> None:
    shown = visible_json(json.dumps([text], ensure_ascii=False))
    assert json.loads(shown) == [text]
    assert not set(shown) & set(UNSAFE)


def test_a_nested_value_is_escaped() -> None:
    for show in (scalar, plain_scalar):
        assert json.loads(show([{"role": "\u202e\x9b\x1b"}])) == [{"role": "\u202e\x9b\x1b"}]
        assert show([{"role": "\u202e\x9b"}]).isprintable()


def test_only_our_own_styles_pass_in_a_styled_text() -> None:
    assert visible("\x1b[31mred\x1b[0m \x1b[2J\x1b]0;title\x07", styled=True) == (
        "\x1b[31mred\x1b[0m \\x1b[2J\\x1b]0;title\\x07"
    )
    assert visible("\x1b[31mred") == "\\x1b[31mred"


def test_a_further_line_of_a_message_is_indented() -> None:
    assert visible_message("one\nhint: two\r\x9b") == "one\n  hint: two\\r\\x9b"


WRITERS = {
    "cli.py:print": "the operating system's reason, when stderr can hardly be written",
    "cli.py:echo": "the help",
    "commands/demo.py:write": "the progress bar, which has numbers only",
    "commands/global_options.py:echo": "the version",
    "commands/leader.py:write": "the sequence that clears the screen",
    "commands/migrate.py:echo": "the migrations, which are a script for psql",
    "commands/standard_input.py:print": "a question, which is escaped there",
}
"""Where something other than render/ writes to a standard stream, and what."""


def writes(path: Path) -> Iterator[str]:
    """Yields the calls of a module that write to a standard stream."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "print" or called.endswith(".echo") or called.startswith(("sys.stdout.w", "sys.stderr.w")):
                yield called.rsplit(".", maxsplit=1)[-1]


def test_nothing_but_render_writes_to_a_standard_stream() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{call}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "render"
        for call in writes(path)
    }
    assert found == set(WRITERS), "what is written has to pass through Output, which escapes it"


HOSTILE = "a\x1b[2J\u202eb\x9b"
SHOWN = r"a\x1b[2J\u202eb\x9b"


def test_output_escapes_what_its_callers_have_not_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for color in ColorMode:
        out = Output(Presentation(output=OutputFormat.PLAIN, verbose=True, color=color))
        out.lines([HOSTILE])
        out.value({"name": HOSTILE}, HOSTILE)
        out.record({"name": HOSTILE}, HOSTILE)
        written = capsys.readouterr()
        assert (written.out, written.err) == (f"{SHOWN}\n" * 3, "")
        out.note(HOSTILE)
        out.detail(HOSTILE)
        out.warn(HOSTILE)
        assert capsys.readouterr().err.count(SHOWN) == 3


def test_a_log_line_is_escaped() -> None:
    record = logging.makeLogRecord({"name": f"pgcoord.{HOSTILE}", "msg": HOSTILE, "levelname": "INFO"})
    assert TextFormatter(ColorMode.NEVER).format(record).endswith(f"INFO [{SHOWN}] {SHOWN}")
