"""The completions, run in the shells: bash always, zsh and fish if they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from docs.generate import REPOSITORY, Command, Parameter, Program, bash, fish, read_program
from pgcoord_cli.settings import ColorMode, OutputFormat
from tests.needs import needs

COMPLETIONS = REPOSITORY / "completions"

PROGRAM = read_program()
GLOBAL_NAMES = [name for option in PROGRAM.everywhere for name in option.names]
COMMANDS = list(PROGRAM.root.walk())
GROUPS = [command for command in COMMANDS if command.commands]
needs_fish = needs("fish", "check the fish completion")

BASH_CALL = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_pgcoord
((${#COMPREPLY[@]})) && printf '%s\\n' "${COMPREPLY[@]}"
exit 0
"""


def run(*words: str, cwd: Path | None = None) -> str:
    # With an empty PATH, a completion that starts another program fails.
    program = shutil.which(words[0])
    assert program
    done = subprocess.run(
        [program, *words[1:]], capture_output=True, text=True, check=True, timeout=60, cwd=cwd, env={"PATH": ""}
    )
    assert done.stderr == ""
    return done.stdout


def in_bash(*words: str, script: Path = COMPLETIONS / "pgcoord.bash", cwd: Path | None = None) -> list[str]:
    """Returns the words that bash offers for the last word. The words are split as bash splits them, at = and :."""
    call = run("bash", "--norc", "--noprofile", "-c", BASH_CALL, "bash", str(script), "pgcoord", *words, cwd=cwd)
    return call.splitlines()


def in_fish(line: str, script: Path = COMPLETIONS / "pgcoord.fish", cwd: Path | None = None) -> list[str]:
    """Returns the words that fish offers at the end of the line, without their descriptions."""
    call = ["fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", str(script), f"pgcoord {line}"]
    return [offer.split("\t")[0] for offer in run(*call, cwd=cwd).splitlines()]


def trial_program() -> Program:
    """Returns a tree with every kind of parameter, independent of the real commands."""

    def parameter(*names: str, takes: str = "text", choices: tuple[str, ...] = (), repeats: bool = False) -> Parameter:
        return Parameter(names, "X", "It's a [thing]: $x.", "", choices, takes, required=False, repeats=repeats)  # type: ignore[arg-type]

    load = Command(
        words=("pgcoord", "load"),
        blocks=("Load.",),
        arguments=(parameter(choices=("add", "set")), parameter(takes="file", repeats=True)),
        options=(parameter("-d", "--into", takes="directory"), parameter("--kind", choices=("red", "blue"))),
        commands=(),
    )
    return Program(Command(("pgcoord",), ("Trial.",), (), (), (load,)), (parameter("--dsn"),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a file.json").touch()
    (tmp_path / "sub").mkdir()
    return tmp_path


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.path)
def test_bash_offers_the_commands_of_every_group(group: Command) -> None:
    assert in_bash(*group.words[1:], "") == [child.words[-1] for child in group.commands]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.path)
def test_bash_offers_the_options_of_every_command_and_the_global_ones(command: Command) -> None:
    own = [name for option in command.options for name in option.names]
    assert in_bash(*command.words[1:], "-") == [*own, *GLOBAL_NAMES]


def test_bash_completes_a_part_of_a_word() -> None:
    assert in_bash("mig") == ["migrate"]
    assert in_bash("migrate", "st") == ["status"]
    assert in_bash("migrate", "up", "--dr") == ["--dry-run"]
    assert in_bash("nosuch", "-", "x") == []


@pytest.mark.parametrize("before", [(), ("migrate",), ("migrate", "up", "--dry-run")])
def test_bash_offers_the_values_of_global_options_everywhere(before: tuple[str, ...]) -> None:
    for option in ("-o", "--output"):
        assert in_bash(*before, option, "") == list(OutputFormat)
    assert in_bash(*before, "--color", "a") == [mode for mode in ColorMode if mode.startswith("a")]


def test_bash_offers_values_after_an_equals_sign_however_bash_splits_it() -> None:
    assert in_bash("--output", "=") == list(OutputFormat)
    assert in_bash("--output", "=", "js") == ["json", "jsonl"]
    assert in_bash("--output=js") == ["--output=json", "--output=jsonl"]


def test_bash_offers_the_choices_of_every_option() -> None:
    for command in COMMANDS:
        for name, choices in ((name, option.choices) for option in command.options for name in option.names):
            if choices:
                assert in_bash(*command.words[1:], name, "") == list(choices)


@pytest.mark.parametrize(
    "before",
    [
        ("-o", "json"),
        ("-q", "--output", "=", "json"),
        ("--output=json",),
        ("--schema", "migrate"),
        ("--dsn", "host=x dbname=y"),
        ("--dsn", "postgresql", ":", "//localhost", ":", "5432/x"),
        ("--dsn", "=", "postgresql", ":", "//localhost/x"),
    ],
)
def test_bash_takes_no_value_of_an_option_for_a_command(before: tuple[str, ...]) -> None:
    assert in_bash(*before, "migrate", "u") == ["up"]


def test_bash_offers_nothing_for_free_text() -> None:
    assert in_bash("--dsn", "") == []
    assert in_bash("--dsn", "postgresql", ":", "") == []
    assert in_bash("migrate", "up", "--to", "") == []
    assert in_bash("migrate", "up", "") == []


def test_bash_offers_values_and_files_for_arguments_and_options(folder: Path) -> None:
    script = folder / "sub" / "trial.bash"
    script.write_text(bash(trial_program()))

    def offer(*words: str) -> list[str]:
        return sorted(in_bash("load", *words, script=script, cwd=folder))

    assert offer("") == ["add", "set"]
    assert offer("--kind", "b") == ["blue"]
    assert offer("--dsn", "x", "add", "") == ["a file.json", "sub"]
    assert offer("add", "one", "--kind", "red", "a") == ["a file.json"]
    assert offer("add", "--", "a") == ["a file.json"]
    assert offer("-d", "") == ["sub"]
    assert offer("--into", "=", "s") == ["sub"]


@needs("zsh", "check the zsh completion")
def test_zsh_parses_its_completion() -> None:
    assert run("zsh", "-f", "-n", str(COMPLETIONS / "_pgcoord")) == ""


@needs_fish
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.path)
def test_fish_offers_the_commands_of_every_group(group: Command) -> None:
    line = " ".join([*group.words[1:], ""])
    assert in_fish(line) == sorted(child.words[-1] for child in group.commands)


@needs_fish
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.path)
def test_fish_offers_the_options_of_every_command_and_the_global_ones(command: Command) -> None:
    own = [name for option in command.options for name in option.names]
    expected = {name for name in [*own, *GLOBAL_NAMES] if name.startswith("--")}
    assert set(in_fish(" ".join([*command.words[1:], "--"]))) == expected


@needs_fish
def test_fish_offers_values_and_files_for_arguments_and_options(folder: Path) -> None:
    script = folder / "sub" / "trial.fish"
    script.write_text(fish(trial_program()))

    def offer(line: str) -> list[str]:
        return in_fish(f"load {line}", script, folder)

    assert offer("") == ["add", "set"]
    assert offer("--kind b") == ["blue"]
    assert offer("--dsn x add ") == ["a file.json", "sub/"]
    assert offer("add one --kind red a") == ["a file.json"]
    assert offer("-d ") == ["sub/"]
    assert offer("--dsn ") == []


@needs_fish
def test_fish_takes_no_value_of_an_option_for_a_command() -> None:
    assert in_fish("--schema migrate --output=json migrate u") == ["up"]
    assert in_fish("-o js") == ["json", "jsonl"]
