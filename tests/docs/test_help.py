"""Every command, option and argument has help, and the parser accepts every example."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest
import typer

from pgcoord_cli.cli import CATALOGUE, root
from pgcoord_cli.commands.framework import PgcoordCommand
from pgcoord_cli.commands.global_options import GLOBAL_NAMES, flags_of
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import resolve_presentation, resolve_settings
from tests.cli.command_tree import LEAVES, TREE, Command

SEPARATORS = "();|&"

BEFORE_A_COMMAND = re.compile(r"!|if|elif|while|until|then|else|do|\w+=.*", re.DOTALL)
"""Words that may stand before the command in a line of shell: reserved words and assignments."""


def first_paragraph(command: Command) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split())


def examples(command: Command) -> list[str]:
    """Returns the lines of the Examples block; lines that end in a backslash are joined with the next."""
    block = re.search(r"^\x08\nExamples:\n((?:  .*\n?)+)", command.help or "", re.MULTILINE)
    return [line.strip() for line in block[1].replace("\\\n", "").splitlines()] if block else []


def calls(line: str) -> list[list[str]]:
    """Returns the calls of pgcoord in a line of shell. Variables and substitutions are replaced by 1."""
    found: list[list[str]] = []
    while inner := re.search(r"\$\(([^()]*)\)", line):
        found += calls(inner[1])
        line = f"{line[: inner.start()]}1{line[inner.end() :]}"
    line = re.sub(r"\$\{?\w+\}?", "1", line)
    line = re.sub(r"\d?(?:>>?|<)(?:&\d|\s*\S+)", "", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=SEPARATORS)
    lexer.whitespace_split = True
    for is_separator, group in itertools.groupby(lexer, key=lambda word: set(word) <= set(SEPARATORS)):
        words = list(itertools.dropwhile(BEFORE_A_COMMAND.fullmatch, group))
        if not is_separator and words[:1] == ["pgcoord"]:
            found.append(words)
    return found


def parse(words: list[str]) -> None:
    """Parses a call and resolves its settings. The function of the command is not called."""
    with patch.object(PgcoordCommand, "invoke"):
        ctx = root().make_context(words[0], words[1:])
        ctx.command.invoke(ctx)
    resolve_settings(flags_of(ctx), {})
    resolve_presentation(flags_of(ctx), {})


@pytest.mark.parametrize("path", TREE)
def test_the_help_of_every_command_begins_with_a_sentence(path: str) -> None:
    assert first_paragraph(TREE[path]).endswith(".")


@pytest.mark.parametrize("path", LEAVES)
def test_every_command_has_an_example_of_itself(path: str) -> None:
    assert [line for line in examples(LEAVES[path]) if f"{line} ".startswith(f"{path} ")]


@pytest.mark.parametrize("path", TREE)
def test_every_option_and_argument_has_help(path: str) -> None:
    own = [param for param in TREE[path].params if param.name not in GLOBAL_NAMES]
    assert [param.name for param in own if not getattr(param, "help", None)] == []


@pytest.mark.parametrize("path", TREE)
def test_every_option_and_argument_with_a_value_has_a_metavar(path: str) -> None:
    valued = [param for param in TREE[path].params if not getattr(param, "is_flag", False)]
    assert [param.name for param in valued if not param.metavar] == []


@pytest.mark.parametrize("path", TREE)
def test_no_parameter_is_converted_by_typer(path: str) -> None:
    command = TREE[path]
    ctx = typer.Context(command, info_name=path, **command.context_settings)
    assert [param.name for param in command.get_params(ctx) if "process_value" not in vars(param)] == []


@pytest.mark.parametrize("path", LEAVES)
def test_every_example_can_be_parsed(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in examples(LEAVES[path]):
        for words in calls(line):
            try:
                parse(words)
            except (typer.TyperException, UsageError) as error:
                pytest.fail(f"{line}\n{error}")
            except typer.Exit:  # an example of --version or --help
                pass


@pytest.mark.parametrize("noun", CATALOGUE)
def test_the_catalogue_has_the_help_of_each_noun(noun: str) -> None:
    assert first_paragraph(TREE[f"pgcoord {noun}"]) == CATALOGUE[noun]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pgcoord kv get a", ["kv get a"]),
        ("pgcoord migrate status --check -q || pgcoord migrate up", ["migrate status --check -q", "migrate up"]),
        ("pgcoord migrate sql | psql -1 pgcoord", ["migrate sql"]),
        ("if ! pgcoord leader wait; then echo pgcoord; fi", ["leader wait"]),
        ('pgcoord kv set a "$(pgcoord kv get b | tr a b)"', ["kv get b", "kv set a 1"]),
        ("PGCOORD_SCHEMA=x pgcoord kv get $KEY > out 2>&1  # why", ["kv get 1"]),
        ("cat < in | pgcoord kv set 'a|b' - >> log &", ["kv set a|b -"]),
    ],
)
def test_calls_are_found_in_a_line_of_shell(line: str, expected: list[str]) -> None:
    assert [" ".join(words[1:]) for words in calls(line)] == expected


@pytest.mark.parametrize(
    "call",
    ["pgcoord migrate up --nosuch", "pgcoord migrate up 1", "pgcoord migrate up --to x", "pgcoord -o x migrate up"],
)
def test_parse_refuses_invalid_calls(call: str) -> None:
    with pytest.raises((typer.TyperException, UsageError)):
        parse(call.split())
