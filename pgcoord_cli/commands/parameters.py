"""Parameters of a command: what its signature declares, how their values are converted, how help describes them.

**Declaration.** The signature of a command's function declares each parameter: its type, its default, and the names,
placeholder and range in a `typer.Option` or `typer.Argument`. Types are `str`, `int`, `bool`, `Path` and subclasses of
`StrEnum`, and lists of them.

**Conversion.** Typer parses the call into strings, flags and lists. The conversion to the declared types is done here,
not by Typer: version 0.29 imports pydantic for it, which takes longer than all other imports of a command, and each
version of Typer words the errors in its own way.

**Help.** `help_record` writes what the help and the manual page say of a parameter, the same under each version.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

import typer
from typer.core import TyperArgument, TyperOption
from typer.models import ParameterInfo

from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import check_text

Parameter = TyperOption | TyperArgument

Convert = Callable[[Any], Any]
"""Returns the value of the declared type for a string or a default. Raises ValueError with what is wrong."""


class Declaration(NamedTuple):
    """The type of a parameter, or of the items of a list, and the range of a number."""

    type: type[Any]
    minimum: float | None = None
    maximum: float | None = None

    @property
    def range(self) -> str:
        """The range as the help shows it, like `x>=1`; empty if there is none."""
        if self.minimum is None and self.maximum is None:
            return ""
        if self.maximum is None:
            return f"x>={self.minimum}"
        return f"x<={self.maximum}" if self.minimum is None else f"{self.minimum}<=x<={self.maximum}"


FLAG = Declaration(bool)
"""What `--help` is, which Typer adds to each command without a declaration."""


def declarations(function: Callable[..., Any] | None) -> dict[str, Declaration]:
    """Returns the declarations in the signature of a command's function, by the names of the parameters."""
    if function is None:
        return {}
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {each.name: _declaration(each) for each in parameters if each.annotation is not typer.Context}


def _declaration(parameter: inspect.Parameter) -> Declaration:
    # The Option or Argument is in `Annotated`, or is the default.
    notes = (parameter.default, *get_args(parameter.annotation))
    info = next(each for each in notes if isinstance(each, ParameterInfo))
    return Declaration(_item_type(parameter.annotation), info.min, info.max)


def _item_type(annotation: Any) -> Any:
    """Returns T for `T`, `T | None`, `list[T]` and any of them in `Annotated`."""
    inner = next((each for each in get_args(annotation) if each is not NoneType), None)
    return annotation if inner is None else _item_type(inner)


# Conversion


def take_over_conversion(parameter: Parameter, declaration: Declaration) -> None:
    """Replaces Typer's conversion of a parameter. Calling it again has no effect."""
    if "process_value" not in vars(parameter):
        parameter.process_value = _processing(parameter, declaration)  # type: ignore[method-assign, assignment]


def _processing(parameter: Parameter, declaration: Declaration) -> Callable[[Any, Any], Any]:
    """Returns what Typer calls with a context and the parsed value, or the default, of the parameter.

    It raises UsageError, which names the parameter, for a value that is missing or cannot be converted.
    """

    def process_value(ctx: Any, value: Any) -> Any:
        if value is None and parameter.required:
            raise UsageError(f"Missing {parameter.param_type_name} {_label(parameter)}.", hint=help_hint(ctx))
        try:
            converted = _converted(parameter, _converter(declaration), value)
        except ValueError as error:
            raise UsageError(f"Invalid value for {_label(parameter)}: {error}", hint=help_hint(ctx)) from None
        # Arguments are checked by commands: keys have a notation for other bytes, and words that are run may be any.
        if declaration.type is str and isinstance(parameter, TyperOption):
            for text in converted if parameter.multiple else (converted,):
                check_text(text, parameter.opts[-1], help_hint(ctx))
        return converted if parameter.callback is None else parameter.callback(ctx, parameter, converted)

    return process_value


def _converted(parameter: Parameter, convert: Convert, value: Any) -> Any:
    if parameter.multiple or parameter.nargs == -1:
        return tuple(convert(each) for each in value or ())
    return None if value is None else convert(value)


def _converter(declaration: Declaration) -> Convert:
    if declaration.type is int:
        return lambda value: _integer(value, declaration)
    if declaration.type is Path:
        return _path
    if issubclass(declaration.type, StrEnum):
        return lambda value: _choice(value, declaration.type)
    if declaration.type in (str, bool):
        return lambda value: value
    raise TypeError(f"parameters of type {declaration.type.__name__} are not converted")


def _integer(value: Any, declaration: Declaration) -> int:
    try:
        number = int(value)
    except ValueError:
        raise ValueError(f"{value!r} is not an integer.") from None
    too_small = declaration.minimum is not None and number < declaration.minimum
    if too_small or (declaration.maximum is not None and number > declaration.maximum):
        raise ValueError(f"{number} is not in the range {declaration.range}.")
    return number


def _path(value: Any) -> Path:
    path = Path(value)
    if os.access(path, os.F_OK) and not os.access(path, os.R_OK):
        raise ValueError(f"Path {str(path)!r} is not readable.")
    return path


def _choice(value: Any, choices: type[StrEnum]) -> StrEnum:
    try:
        return choices(value)
    except ValueError:
        raise ValueError(f"{value!r} is not one of {', '.join(repr(each.value) for each in choices)}.") from None


def _label(parameter: Parameter) -> str:
    """How an error names the parameter: an argument by its placeholder, an option by all its names."""
    names = [parameter.metavar] if isinstance(parameter, TyperArgument) else parameter.opts
    return " / ".join(f"'{name}'" for name in names)


def help_hint(ctx: Any) -> str:
    """The hint of a usage error: where the words of the command are explained."""
    return f"see: {ctx.command_path} --help"


# Help


def usage_word(argument: TyperArgument) -> str:
    """How the usage line shows an argument: in braces if it is required, in brackets if it is not."""
    metavar = argument.metavar or ""
    if metavar.startswith("["):
        return metavar
    return f"{{{metavar}}}" if argument.required else f"[{metavar}]"


def option_names(option: TyperOption) -> list[str]:
    """The names of an option, short ones first. Typer keeps those of `--help` in a set, in no order."""
    return sorted([*option.opts, *option.secondary_opts], key=lambda name: name.startswith("--"))


def help_record(parameter: Parameter, declaration: Declaration) -> tuple[str, str] | None:
    """Returns name and description of a parameter for a line of the help, or None if it is hidden."""
    if parameter.hidden:
        return None
    metavar = "" if declaration.type is bool else parameter.metavar or ""
    names = ", ".join(option_names(parameter)) if isinstance(parameter, TyperOption) else ""
    note = remark(parameter, declaration)
    return f"{names} {metavar}".strip(), "  ".join(filter(None, (parameter.help, note)))


def remark(parameter: Parameter, declaration: Declaration) -> str:
    """Returns default, range and `required`, those that apply, like `[default: 5; x>=1]`, or an empty string."""
    default = "" if parameter.default is None or isinstance(parameter.default, bool) else str(parameter.default)
    parts = (default and f"default: {default}", declaration.range, "required" if parameter.required else "")
    applying = "; ".join(filter(None, parts))
    return f"[{applying}]" if applying else ""
