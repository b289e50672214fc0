"""The manual pages and completions in the repository equal the command tree, and the pages are valid roff."""

from __future__ import annotations

import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest
import typer

from docs.generate import (
    REPOSITORY,
    Command,
    Parameter,
    Program,
    differences,
    files,
    page,
    read_command,
    read_program,
    write,
)
from pgcoord_cli.cli import CATALOGUE
from pgcoord_cli.commands.framework import PgcoordGroup, command, noun
from tests.needs import needs

PAGES = sorted((REPOSITORY / "man").glob("*.1"))


def trial(*blocks: str, arguments: tuple[Parameter, ...] = ()) -> Command:
    return Command(words=("pgcoord", "try"), blocks=blocks, arguments=arguments, options=(), commands=())


def page_of(single: Command) -> list[str]:
    program = Program(root=Command(("pgcoord",), ("Coordination.",), (), (), (single,)), everywhere=())
    return page(program, single).splitlines()


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


def test_parameters_are_read_as_the_parser_takes_them() -> None:
    app = noun("Trial.")

    @command(app, "load")
    def load(
        kind: Annotated[Color, typer.Argument(metavar="KIND", help="What kind.")],
        files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="What.")] = None,
        into: Annotated[Path, typer.Option("--into", "-d", metavar="DIR", help="Where.")] = Path("x"),
        mode: Annotated[str, typer.Option("--mode", metavar="fast|slow", help="How.")] = "fast",
        limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="How many.")] = 5,
        force: Annotated[bool, typer.Option("--force/--no-force", help="Really.")] = False,
        secret: Annotated[bool, typer.Option("--secret", hidden=True)] = False,
    ) -> None:
        """Load it."""

    group = typer.main.get_command(app)
    assert isinstance(group, PgcoordGroup)
    read = read_command(group, ("pgcoord", "trial")).commands[0]
    assert (read.path, read.summary) == ("pgcoord trial load", "Load it.")
    assert read.arguments == (
        Parameter((), "KIND", "What kind.", "", ("red", "blue"), "text", required=True, repeats=False),
        Parameter((), "FILE", "What.", "", (), "file", required=False, repeats=True),
    )
    assert [(option.names, option.metavar, option.choices, option.takes) for option in read.options] == [
        (("-d", "--into"), "DIR", (), "directory"),
        (("--mode",), "fast|slow", ("fast", "slow"), "text"),
        (("--limit",), "N", (), "text"),
        (("--force", "--no-force"), "", (), "nothing"),
    ]
    assert read.options[2].remark == "[default: 5; x>=1]"


def test_a_parameter_without_a_metavar_is_refused() -> None:
    app = noun("Trial.")

    @command(app, "load")
    def load(limit: Annotated[int, typer.Option("--limit", help="How many.")] = 5) -> None:
        """Load it."""

    group = typer.main.get_command(app)
    assert isinstance(group, PgcoordGroup)
    with pytest.raises(AssertionError, match="'limit' has no metavar"):
        read_command(group, ("pgcoord", "trial"))


def test_the_files_in_the_repository_equal_the_command_tree() -> None:
    assert differences(files()) == [], "run: python docs/generate.py"


def test_the_program_and_each_noun_have_a_page() -> None:
    expected = {"man/pgcoord.1", *(f"man/pgcoord-{noun}.1" for noun in CATALOGUE)}
    assert {path for path in files() if path.startswith("man/")} == expected


def test_files_are_the_same_each_time() -> None:
    assert files() == files()


def test_differences_are_files_that_differ_are_missing_or_superfluous(tmp_path: Path) -> None:
    write({"man/same.1": "a\n", "man/changed.1": "a\n", "completions/old.fish": "a\n"}, tmp_path)
    expected = {"man/same.1": "a\n", "man/changed.1": "b\n", "man/new.1": "a\n"}
    assert differences(expected, tmp_path) == [
        "completions/old.fish: superfluous",
        "man/changed.1: differs",
        "man/new.1: missing",
    ]
    write(expected, tmp_path)
    assert differences(expected, tmp_path) == []


def test_every_command_and_option_is_on_the_page_of_its_noun() -> None:
    program = read_program()
    for topic in program.root.commands:
        text = page(program, topic).replace("\\-", "-")
        for each in topic.walk():
            options = (*each.options, *program.everywhere)
            assert each.path in text
            assert [name for option in options for name in option.names if f"\\fB{name}\\fR" not in text] == []


def test_text_cannot_become_a_macro_or_an_escape() -> None:
    lines = page_of(trial("Try it.", ".TH is not a macro here.", "'Neither' is this, nor \\fB that."))
    assert "\\&.TH is not a macro here." in lines
    assert "\\&'Neither' is this, nor \\efB that." in lines


def test_options_and_examples_can_be_copied() -> None:
    lines = page_of(trial("Try it with --dry-run, read-only.", "\b\nExamples:\n  pgcoord try --key 'a`~^'"))
    assert "Try it with \\-\\-dry\\-run, read-only." in lines
    assert "pgcoord try \\-\\-key \\(aqa\\(ga\\(ti\\(ha\\(aq" in lines


def test_words_in_backquotes_are_bold() -> None:
    assert "Like \\fBpgcoord try \\-\\-key x\\fR, but not." in page_of(
        trial("Try it.", "Like `pgcoord try --key x`, but not.")
    )


def test_pages_are_plain_ascii() -> None:
    assert "and so on \\[u2026]" in page_of(trial("Try it.", "and so on …"))
    assert all(text.isascii() for path, text in files().items() if path.startswith("man/"))


def test_paragraphs_with_a_backspace_mark_keep_their_lines() -> None:
    lines = page_of(trial("Try it.", "\b\nStart here:\n  one    first\n    two  second"))
    start = lines.index("Start here:")
    assert lines[start + 1 : start + 6] == [".RS 4", ".nf", "one    first", "  two  second", ".fi"]


def test_dots_after_a_repeated_argument_do_not_end_a_sentence() -> None:
    files_argument = Parameter((), "FILE", "What to read.", "", (), "file", required=True, repeats=True)
    assert "\\fIFILE\\fR...\\&" in page_of(trial("Try it.", arguments=(files_argument,)))


@needs("groff", "check the manual pages with it")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_groff_has_no_warnings(path: Path) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs("mandoc", "check the manual pages with it")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_mandoc_has_no_warnings_except_for_the_date(path: Path) -> None:
    done = subprocess.run(["mandoc", "-T", "lint", str(path)], capture_output=True, text=True, check=False, timeout=60)
    # A date would change each page with each release.
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []
