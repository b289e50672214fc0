"""Write man/ and completions/ from the command tree, or check that they equal it.

    python docs/generate.py            writes the files; removes all others from the two directories
    python docs/generate.py --check    exits 1 and names each file that differs, is missing or is superfluous

**The tree.** The Typer commands are read once into frozen records: the help of a command, its parameters, the commands
below it. The rest of this file makes text from records; the same tree gives the same text. The global options are kept
apart from the commands, so that a page lists them once.

**The manual.** One page for the program and one for each noun, in roff with the man macros and in plain ASCII. The
help of a command consists of paragraphs. A paragraph that begins with the backspace mark is kept line by line; the
lines under "Examples:" go to the section of that name.

**The completions.** They are static: all words are in the file, so that completing a word does not start Python. Bash
and fish walk the words before the cursor to find the command; zsh has a function for each command.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import typer
from typer.core import TyperArgument, TyperOption

from pgcoord_cli import __version__
from pgcoord_cli.cli import root
from pgcoord_cli.commands.framework import ENVIRONMENT, EXIT_CODES, PgcoordCommand, PgcoordGroup
from pgcoord_cli.commands.global_options import GLOBAL_NAMES
from pgcoord_cli.commands.parameters import Declaration, option_names, remark
from pgcoord_cli.settings import ColorMode, OutputFormat

REPOSITORY = Path(__file__).resolve().parent.parent

FOLDERS = ("man", "completions")

DOTS = "...\\&"
"""Three dots, escaped: at the end of a line roff would take them for the end of a sentence."""

NOTICE = "Written by docs/generate.py from the command tree. Change the commands and run it again."

EVERYWHERE = GLOBAL_NAMES | {"help"}

GLOBAL_CHOICES = {"output": tuple(OutputFormat), "color": tuple(ColorMode)}
"""The values of global options. They are declared as text, since their values may also come from the environment."""


# The tree


@dataclass(frozen=True)
class Parameter:
    """An option, or an argument. An argument has no names."""

    names: tuple[str, ...]
    metavar: str
    help: str
    remark: str
    choices: tuple[str, ...]
    takes: Literal["nothing", "text", "file", "directory"]
    required: bool
    repeats: bool


@dataclass(frozen=True)
class Command:
    """A command or a group of commands, without the global options."""

    words: tuple[str, ...]
    blocks: tuple[str, ...]
    arguments: tuple[Parameter, ...]
    options: tuple[Parameter, ...]
    commands: tuple[Command, ...]

    @property
    def path(self) -> str:
        """The words that call the command."""
        return " ".join(self.words)

    @property
    def summary(self) -> str:
        """The first sentence of the help."""
        return sentences(self.blocks[0])[0]

    @property
    def examples(self) -> tuple[str, ...]:
        """The lines of the Examples block."""
        return tuple(line for block in self.blocks if _is_examples(block) for line in _literal(block)[1])

    def walk(self) -> Iterator[Command]:
        """Yields the command itself and all commands below it."""
        yield self
        for command in self.commands:
            yield from command.walk()


@dataclass(frozen=True)
class Program:
    """The whole tree, and the options that may follow any word of a call."""

    root: Command
    everywhere: tuple[Parameter, ...]


TyperCommand = PgcoordCommand | PgcoordGroup


def read_program() -> Program:
    """Imports the modules of all nouns and reads the tree."""
    top = root()
    everywhere = [each for each in top.get_params(_context(top, "pgcoord", None)) if each.name in EVERYWHERE]
    return Program(
        root=read_command(top, ("pgcoord",)),
        everywhere=tuple(_read_parameter(each, top.declaration(each)) for each in everywhere),
    )


def read_command(command: TyperCommand, words: tuple[str, ...], parent: typer.Context | None = None) -> Command:
    """Reads a command and all commands below it, without those that are hidden."""
    ctx = _context(command, words[-1], parent)
    own = [
        _read_parameter(each, command.declaration(each))
        for each in command.get_params(ctx)
        if each.name not in EVERYWHERE and not each.hidden
    ]
    return Command(
        words=words,
        blocks=tuple(re.split(r"\n{2,}", (command.help or "").strip())),
        arguments=tuple(each for each in own if not each.names),
        options=tuple(each for each in own if each.names),
        commands=tuple(
            read_command(child, (*words, name), ctx) for name, child in _children(command, ctx) if not child.hidden
        ),
    )


def _context(command: TyperCommand, word: str, parent: typer.Context | None) -> typer.Context:
    # command.make_context would parse an empty call, and run the callbacks of the options while doing so.
    return typer.Context(command, parent=parent, info_name=word, **command.context_settings)


def _children(command: TyperCommand, ctx: typer.Context) -> Iterator[tuple[str, TyperCommand]]:
    if isinstance(command, PgcoordGroup):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert isinstance(child, TyperCommand)
            yield name, child


def _read_parameter(param: TyperOption | TyperArgument, declaration: Declaration) -> Parameter:
    takes = _takes(param, declaration)
    # A required argument is not marked as such: the synopsis shows it without brackets.
    note = remark(param, declaration)
    return Parameter(
        names=tuple(option_names(param)) if isinstance(param, TyperOption) else (),
        metavar="" if takes == "nothing" else _metavar(param),
        help=param.help or "",
        remark="" if note == "[required]" else note,
        choices=_choices(param, declaration),
        takes=takes,
        required=param.required,
        repeats=param.nargs == -1 or param.multiple,
    )


def _choices(param: TyperOption | TyperArgument, declaration: Declaration) -> tuple[str, ...]:
    """Returns the values of an enumeration, or those, in lower case, that a placeholder like `EVENT_ID|all` names."""
    if issubclass(declaration.type, StrEnum):
        return tuple(declaration.type)
    if param.name in GLOBAL_CHOICES:
        return GLOBAL_CHOICES[param.name]
    words = (param.metavar or "").split("|")
    return tuple(word for word in words if word.islower()) if len(words) > 1 else ()


def _metavar(param: TyperOption | TyperArgument) -> str:
    """Returns the placeholder without brackets and dots, which the synopsis adds where they apply."""
    # Without an explicit one, each version of Typer makes another.
    assert param.metavar, f"the parameter {param.name!r} has no metavar"
    return param.metavar.removesuffix("...").strip("[]").removesuffix("...")


def _takes(
    param: TyperOption | TyperArgument, declaration: Declaration
) -> Literal["nothing", "text", "file", "directory"]:
    if declaration.type is bool:
        return "nothing"
    if _metavar(param) == "DIR":
        return "directory"
    return "file" if _metavar(param) == "FILE" or declaration.type is Path else "text"


# Help texts


def sentences(text: str) -> list[str]:
    """Returns the sentences of a paragraph, each on one line."""
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split()))


def _literal(block: str) -> tuple[str, tuple[str, ...]]:
    """Returns heading and lines of a paragraph that is kept line by line; no lines for any other paragraph."""
    if not block.startswith("\b\n"):
        return "", ()
    lines = block.splitlines()[1:]
    heading = lines.pop(0) if lines[0].endswith(":") else ""
    return heading, tuple(textwrap.dedent("\n".join(lines)).splitlines())


def _is_examples(block: str) -> bool:
    return _literal(block)[0] == "Examples:"


# The manual


def _escape(text: str) -> str:
    """Returns the text in roff. Hyphens and quotes are left to roff, which may print typographic ones."""
    plain = text.replace("\\", "\\e")
    return "".join(char if char.isascii() else f"\\[u{ord(char):04X}]" for char in plain)


def _exact(text: str) -> str:
    """Returns the text in roff, with hyphens and quotes in ASCII, so that it can be copied into a shell."""
    escaped = _escape(text)
    for char, roff in {"-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"}.items():
        escaped = escaped.replace(char, roff)
    return escaped


def _guard(line: str) -> str:
    """Escapes a line that starts with a dot or a quote, which roff would take for a macro."""
    return f"\\&{line}" if line.startswith((".", "'")) else line


def _bold(text: str) -> str:
    return f"\\fB{_exact(text)}\\fR"


def _italic(text: str) -> str:
    return f"\\fI{_exact(text)}\\fR"


def _macro(name: str, *words: str) -> str:
    quoted = (_exact(word).replace('"', "\\(dq") for word in words)
    return " ".join([f".{name}", *(f'"{word}"' for word in quoted)])


def _inline(text: str) -> str:
    """Returns the text in roff, with words in backquotes in bold, and with options that can be copied."""
    pieces = re.split(r"`([^`]+)`", text)
    pieces[1::2] = [_bold(code) for code in pieces[1::2]]
    pieces[::2] = [re.sub(r"(?<![\w-])-[\w-]+", lambda word: _exact(word[0]), _escape(piece)) for piece in pieces[::2]]
    return "".join(pieces)


def _prose(text: str) -> list[str]:
    """Returns the lines of a paragraph. Each sentence starts a line, so that a change of it changes few lines."""
    return [
        _guard(line)
        for sentence in sentences(text)
        for line in textwrap.wrap(_inline(sentence), 78, break_long_words=False, break_on_hyphens=False)
    ]


def _verbatim(lines: Sequence[str]) -> list[str]:
    return [".RS 4", ".nf", *(_guard(_exact(line)) for line in lines), ".fi", ".RE"] if lines else []


def _paragraphs(blocks: Iterable[str]) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        heading, literal = _literal(block)
        if not _is_examples(block):
            lines += [".PP", *_prose("" if literal else block), *_prose(heading), *_verbatim(literal)]
    return lines


def _placeholder(parameter: Parameter) -> str:
    return _italic(parameter.metavar) + (DOTS if parameter.repeats and not parameter.names else "")


def _synopsis(command: Command) -> list[str]:
    """Returns the synopsis as one hanging paragraph; the parts of an option stay on one line."""
    parts = [_bold(command.path)]
    for parameter in (*command.arguments, *command.options):
        name = next((name for name in parameter.names if name.startswith("--")), "".join(parameter.names[:1]))
        words = ([_bold(name)] if name else []) + ([_placeholder(parameter)] if parameter.metavar else [])
        part = "\\~".join(words)
        part = part if parameter.required else f"[{part}]"
        parts.append(part + (DOTS if parameter.repeats and parameter.names else ""))
    if command.commands:
        # \\: allows a line break after each bar of a long list.
        words_below = "|\\:".join(_bold(child.words[-1]) for child in command.commands)
        parts += [f"{{{words_below}}}", f"[{_italic('OPTION')}]{DOTS}"]
    return [".HP 4", *parts]


def _definitions(parameters: Iterable[Parameter]) -> list[str]:
    lines: list[str] = []
    for parameter in parameters:
        names = ", ".join(_bold(name) for name in parameter.names)
        tag = f"{names} {_placeholder(parameter)}".strip() if parameter.metavar else names
        lines += [".TP", tag, *_prose(f"{parameter.help} {parameter.remark}".strip())]
    return lines


def _glossary(entries: Iterable[tuple[str, str]]) -> list[str]:
    return [line for term, meaning in entries for line in (".TP", _bold(term), *_prose(meaning))]


def _page_name(command: Command) -> str:
    return "-".join(command.words)


def _reference(command: Command) -> str:
    return f".BR {_exact(_page_name(command))} (1)"


def _commands(program: Program, command: Command) -> list[str]:
    """Returns the list of pages for the program, and the description of each command for a group."""
    lines: list[str] = []
    if command is program.root:
        for noun in command.commands:
            lines += [".TP", _reference(noun), *_prose(noun.summary)]
        return lines
    for leaf in command.walk():
        if leaf is not command and not leaf.commands:
            lines += [_macro("SS", leaf.path), *_synopsis(leaf), *_paragraphs(leaf.blocks)]
            lines += _definitions((*leaf.arguments, *leaf.options))
    return lines


def _options(program: Program, command: Command) -> list[str]:
    lines = _definitions((*command.arguments, *command.options))
    lines += [_macro("SS", "Global options"), *_prose("They may stand after any word of the call; the last one wins.")]
    return lines + _definitions(program.everywhere)


def _examples(program: Program, command: Command) -> list[str]:
    """Returns the examples of a group, or the first one of each group for the program."""
    if command is program.root:
        firsts = (next((line for leaf in noun.walk() for line in leaf.examples), None) for noun in command.commands)
        return _verbatim([line for line in firsts if line])
    return [line for leaf in command.walk() if leaf.examples for line in (".PP", *_verbatim(leaf.examples))]


def _see_also(program: Program, command: Command) -> list[str]:
    others = [_reference(other) for other in (program.root, *program.root.commands) if other is not command]
    return [f"{other}," for other in others[:-1]] + others[-1:]


def page(program: Program, command: Command) -> str:
    """Returns the manual page of the program or of one noun."""
    name = _page_name(command)
    sections = {
        "NAME": [f"{_exact(name)} \\-", *_prose(command.summary.removesuffix("."))],
        "SYNOPSIS": _synopsis(command),
        "DESCRIPTION": _paragraphs(command.blocks),
        "COMMANDS": _commands(program, command),
        "OPTIONS": _options(program, command),
        "EXAMPLES": _examples(program, command),
        "EXIT STATUS": _glossary((str(code), meaning) for code, meaning in EXIT_CODES.items()),
        "ENVIRONMENT": _glossary(ENVIRONMENT.items()),
        "SEE ALSO": _see_also(program, command),
    }
    # The date is empty: the same tree must give the same page on any day.
    lines = [f'.\\" {NOTICE}', _macro("TH", name.upper(), "1", "", f"pgcoord {__version__}", "pgcoord manual")]
    for title, body in sections.items():
        if body:
            lines += [_macro("SH", title), *(body[1:] if body[0] == ".PP" else body)]
    return "\n".join(lines) + "\n"


# The completions


def _targets(program: Program) -> Iterator[tuple[str, str, Parameter]]:
    """Yields what a value can be completed for: the path of a command, an option or argument position, the parameter.

    The path is empty for a global option.
    """
    for parameter in program.everywhere:
        yield from (("", name, parameter) for name in parameter.names)
    for command in program.root.walk():
        for position, parameter in enumerate(command.arguments, 1):
            yield command.path, str(position), parameter
        for parameter in command.options:
            yield from ((command.path, name, parameter) for name in parameter.names)


def _quote(text: str, mark: str = "'\\''") -> str:
    """Returns `text` as one word of a POSIX shell; `mark` is a quote within quotes in that shell."""
    return "'" + text.replace("'", mark) + "'"


def _names(parameters: Iterable[Parameter], *, valued: bool = False) -> str:
    return " ".join(name for each in parameters if not valued or each.takes != "nothing" for name in each.names)


# Bash

BASH_WALK = """\
# Fills COMPREPLY with the lines of `compgen "$@"`, which may contain spaces.
_pgcoord_reply() {
    local found
    while IFS= read -r found; do
        [[ -n $found ]] && COMPREPLY+=("$found")
    done <<<"$(compgen "$@")"
    # From bash 4 on: readline then quotes the words as file names.
    [[ $1 == -W ]] || compopt -o filenames 2>/dev/null
}

_pgcoord() {
    local cur=${COMP_WORDS[COMP_CWORD]} path=pgcoord position=1 awaited='' plain='' index word
    local commands options valued
    local -a how=()
    COMPREPLY=()
    _pgcoord_command "$path"
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        if [[ $word == [=:]* ]]; then
            # Bash splits words at = and :, so that the next word belongs to the last one.
            ((++index < COMP_CWORD)) && awaited=''
        elif [[ -n $awaited ]]; then
            awaited=''
        elif [[ -n $plain ]]; then
            ((position++))
        elif [[ $word == -- ]]; then
            plain=yes
        elif [[ $word == -* ]]; then
            [[ " $valued " == *" $word "* ]] && awaited=$word
        elif [[ " $commands " == *" $word "* ]]; then
            path="$path $word" position=1
            _pgcoord_command "$path"
        else
            ((position++))
        fi
    done
    if [[ -n $awaited ]]; then
        [[ $cur == '=' ]] && cur=''
        _pgcoord_value "$path" "$awaited"
    elif [[ $cur == [=:]* || ${COMP_WORDS[COMP_CWORD - 1]} == [=:]* ]]; then
        return
    elif [[ -z $plain && $cur == --*=* ]]; then
        _pgcoord_value "$path" "${cur%%=*}"
        ((${#how[@]})) && _pgcoord_reply "${how[@]}" -P "${cur%%=*}=" -- "${cur#*=}"
        return
    elif [[ -z $plain && $cur == -* ]]; then
        how=(-W "$options")
    elif [[ -n $commands ]]; then
        how=(-W "$commands")
    else
        _pgcoord_value "$path" "$position"
    fi
    ((${#how[@]})) && _pgcoord_reply "${how[@]}" -- "$cur"
}

complete -F _pgcoord pgcoord
"""


def bash(program: Program) -> str:
    """Returns the completion file of bash."""
    return "\n".join(
        [
            "# Completion of pgcoord in bash 3.2 and later.",
            f"# {NOTICE}",
            "",
            "# Sets `commands`, `options` and `valued` (the options that take a value) of the command $1.",
            "_pgcoord_command() {",
            f"    commands='' options={_quote(_names(program.everywhere))}",
            f"    valued={_quote(_names(program.everywhere, valued=True))}",
            "    case $1 in",
            *(line for command in program.root.walk() for line in _bash_command(command)),
            "    esac",
            "}",
            "",
            "# Sets `how` to the arguments of compgen for the values of option or argument $2 of command $1.",
            "_pgcoord_value() {",
            '    case "$1 $2" in',
            *(arm for path, key, parameter in _targets(program) for arm in _bash_value(path, key, parameter)),
            "    esac",
            "}",
            "",
            BASH_WALK,
        ]
    )


def _bash_command(command: Command) -> list[str]:
    settings = []
    if command.commands:
        settings.append(f"commands={_quote(' '.join(child.words[-1] for child in command.commands))}")
    if own := _names(command.options):
        settings.append(f'options="{own} $options"')
    if valued := _names(command.options, valued=True):
        settings.append(f'valued="{valued} $valued"')
    body = [f"            {setting}" for setting in settings]
    return [f"        {_quote(command.path)})", *body, "            ;;"] if body else []


def _bash_value(path: str, key: str, parameter: Parameter) -> list[str]:
    how = {"file": "-f", "directory": "-d"}.get(parameter.takes, "")
    if parameter.choices:
        how = f"-W {_quote(' '.join(parameter.choices))}"
    if not how:
        return []
    pattern = _quote(f"{path} {key}") if path else f"*{_quote(f' {key}')}"
    if parameter.repeats and not parameter.names:
        pattern = f"{_quote(f'{path} ')}[1-9]*"  # the last argument: those before it have their arms before its
    return [f"        {pattern}) how=({how}) ;;"]


# Zsh


def zsh(program: Program) -> str:
    """Returns the completion file of zsh."""
    return "\n".join(
        [
            "#compdef pgcoord",
            "# Completion of pgcoord in zsh.",
            f"# {NOTICE}",
            "",
            *(line for command in program.root.walk() for line in _zsh_function(program, command)),
            "# Loaded by compinit the file is the body of the function; sourced, it has yet to be named.",
            "if [[ $funcstack[1] == _pgcoord ]]; then",
            '    _pgcoord "$@"',
            "else",
            "    compdef _pgcoord pgcoord",
            "fi",
            "",
        ]
    )


def _zsh_name(command: Command) -> str:
    return f"_{'_'.join(command.words)}"


def _zsh_function(program: Program, command: Command) -> list[str]:
    is_root = command is program.root
    specs = [spec for parameter in command.options for spec in _zsh_options(parameter)]
    specs += [_zsh_argument(position, parameter) for position, parameter in enumerate(command.arguments, 1)]
    flags = "-C -s -S" if command.commands else "-s -S"
    specs += ["'1: :->command'", "'*:: :->rest'"] if command.commands else []
    everywhere = [spec for parameter in program.everywhere for spec in _zsh_options(parameter)] if is_root else []
    return [
        f"{_zsh_name(command)}() {{",
        *(["    local -a everywhere=(", *(f"        {spec}" for spec in everywhere), "    )"] if everywhere else []),
        *(_zsh_commands(command) if command.commands else []),
        " \\\n".join([f"    _arguments {flags} $everywhere", *(f"        {spec}" for spec in specs)]),
        *(_zsh_dispatch(command) if command.commands else []),
        "}",
        "",
    ]


def _zsh_commands(command: Command) -> list[str]:
    described = (f"{child.words[-1]}:{child.summary}" for child in command.commands)
    return [
        "    local curcontext=$curcontext context state state_descr line",
        "    local -A opt_args",
        "    local -a commands=(",
        *(f"        {_quote(each)}" for each in described),
        "    )",
    ]


def _zsh_dispatch(command: Command) -> list[str]:
    name = _zsh_name(command)
    return [
        "    case $state in",
        f"        command) _describe -t commands {_quote(f'{command.path} command')} commands ;;",
        f"        rest) (( $+functions[{name}_$line[1]] )) && {name}_$line[1] ;;",
        "    esac",
    ]


def _zsh_options(parameter: Parameter) -> Iterator[str]:
    others = f"({' '.join(parameter.names)})" if len(parameter.names) > 1 else ""
    help_text = re.sub(r"([\\\[\]:])", r"\\\1", parameter.help)
    for name in parameter.names:
        joint = "" if parameter.takes == "nothing" else "=" if name.startswith("--") else "+"
        start = "*" if parameter.repeats else others
        yield _quote(f"{start}{name}{joint}[{help_text}]{_zsh_value(parameter)}")


def _zsh_argument(position: int, parameter: Parameter) -> str:
    start = "*" if parameter.repeats else str(position) if parameter.required else f"{position}:"
    return _quote(f"{start}{_zsh_value(parameter)}")


def _zsh_value(parameter: Parameter) -> str:
    if parameter.takes == "nothing":
        return ""
    action = {"file": "_files", "directory": "_files -/", "text": " "}[parameter.takes]
    if parameter.choices:
        action = f"({' '.join(parameter.choices)})"
    placeholder = parameter.metavar.replace(":", "\\:")
    return f":{placeholder}:{action}"


# Fish

FISH_WALK = """\
# True if the words before the cursor name the command $argv[1] and the cursor is at its argument number $argv[2].
# Without a number, at any argument; with a third word, at that argument or a later one.
function __pgcoord_at
    set -l path pgcoord
    set -l position 1
    set -l awaited
    set -l plain
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        if set -q awaited[1]
            set -e awaited
        else if set -q plain[1]
            set position (math $position + 1)
        else if test "$word" = --
            set plain yes
        else if string match -q -- '-*' "$word"
            __pgcoord_takes_value $word; or __pgcoord_takes_value "$path $word"; and set awaited yes
        else if __pgcoord_is_command "$path $word"
            set path "$path $word"
            set position 1
        else
            set position (math $position + 1)
        end
    end
    test "$path" = "$argv[1]"; or return 1
    set -q argv[2]; or return 0
    test $position -eq $argv[2]; and return 0
    set -q argv[3]; and test $position -gt $argv[2]
end
"""


def fish(program: Program) -> str:
    """Returns the completion file of fish."""
    commands = [command.path for command in program.root.walk()][1:]
    valued = [
        f"{path} {key}".strip() for path, key, each in _targets(program) if each.names and each.takes != "nothing"
    ]
    return "\n".join(
        [
            "# Completion of pgcoord in fish.",
            f"# {NOTICE}",
            "",
            *_fish_test("__pgcoord_is_command", commands),
            *_fish_test("__pgcoord_takes_value", valued),
            FISH_WALK,
            "complete -c pgcoord -f",
            *(_fish_option("", parameter) for parameter in program.everywhere),
            *(line for command in program.root.walk() for line in _fish_command(command)),
            "",
        ]
    )


def _fish_quote(text: str) -> str:
    return _quote(text.replace("\\", "\\\\"), "\\'")


def _fish_test(name: str, words: Iterable[str]) -> list[str]:
    """Returns a function that is true if its arguments are one of the words."""
    body = " \\\n".join(['    contains -- "$argv"', *(f"        {_quote(each)}" for each in words)])
    return [f"function {name}", body, "end", ""]


def _fish_command(command: Command) -> Iterator[str]:
    for child in command.commands:
        yield f"{_fish_at(command.path)} -a {_fish_quote(child.words[-1])} -d {_fish_quote(child.summary)}"
    for position, parameter in enumerate(command.arguments, 1):
        if value := _fish_value(parameter):
            yield f"{_fish_at(command.path, str(position), 'more' if parameter.repeats else '')} {value}"
    for parameter in command.options:
        yield _fish_option(command.path, parameter)


def _fish_at(path: str, *more: str) -> str:
    words = [_quote(path), *filter(None, more)]
    return f'complete -c pgcoord -n "__pgcoord_at {" ".join(words)}"'


def _fish_option(path: str, parameter: Parameter) -> str:
    start = _fish_at(path) if path else "complete -c pgcoord"
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in parameter.names]
    value = "" if parameter.takes == "nothing" else "-r " + (_fish_value(parameter) or "-f")
    return " ".join(filter(None, [start, *names, value, f"-d {_fish_quote(parameter.help)}"]))


def _fish_value(parameter: Parameter) -> str:
    if parameter.choices:
        return f"-f -a {_fish_quote(' '.join(parameter.choices))}"
    return {"file": "-F", "directory": "-f -a '(__fish_complete_directories)'"}.get(parameter.takes, "")


# The files


def files() -> dict[str, str]:
    """Returns path in the repository and text of each file that this script writes."""
    program = read_program()
    pages = {f"man/{_page_name(each)}.1": page(program, each) for each in (program.root, *program.root.commands)}
    return {
        **pages,
        "completions/pgcoord.bash": bash(program),
        "completions/_pgcoord": zsh(program),
        "completions/pgcoord.fish": fish(program),
    }


def differences(expected: dict[str, str], repository: Path = REPOSITORY) -> list[str]:
    """Returns a line for each file that differs from `expected`, is missing or is superfluous."""
    present = _present(repository)
    changed = {
        path for path in present & expected.keys() if (repository / path).read_bytes() != expected[path].encode()
    }
    verdicts = {"superfluous": present - expected.keys(), "missing": expected.keys() - present, "differs": changed}
    return sorted(f"{path}: {verdict}" for verdict, paths in verdicts.items() for path in paths)


def _present(repository: Path) -> set[str]:
    found = (path for folder in FOLDERS for path in (repository / folder).rglob("*") if path.is_file())
    return {path.relative_to(repository).as_posix() for path in found}


def write(expected: dict[str, str], repository: Path = REPOSITORY) -> None:
    """Writes the files, and removes all others from the two directories."""
    for path in _present(repository) - expected.keys():
        (repository / path).unlink()
    for path, text in expected.items():
        (repository / path).parent.mkdir(exist_ok=True)
        (repository / path).write_bytes(text.encode())


def main(argv: Sequence[str]) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description="Write man/ and completions/ from the command tree.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; print each file that differs and exit 1 if there is one"
    )
    if not parser.parse_args(argv).check:
        write(files())
        return 0
    found = differences(files())
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
