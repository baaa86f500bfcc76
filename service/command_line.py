"""Values of options from flags and environment variables, for a model of pydantic whose fields are the options.

pydantic checks the values. pydantic-settings can do the same, but its import takes a tenth of the start of the server.
"""

import argparse
import inspect
import os
import types
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_Given = TypeVar("_Given", str, str | bool)
NONE = "none"
"""The text that stands for None."""


class UsageError(Exception):
    """The flags cannot be read: one is unknown, or lacks its value."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def from_flags(model: type[BaseModel], program: str, arguments: list[str]) -> dict[str, str | bool | None]:
    """The values that flags give, by field; a field without a flag is missing. Flags of bool fields take no value.

    Args:
        model: Its fields, with their descriptions and defaults, are the options; its docstring begins the help page.
        program: Name of the command for the help page.
        arguments: The flags.

    Raises:
        UsageError: The flags cannot be read.
        SystemExit: 0, after --help.
    """
    parser = _Parser(
        program,
        description=inspect.cleandoc(model.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in model.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        meaning = f"{field.description} (default: {_default(field)})".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=meaning, dest=name
            )
        else:
            parser.add_argument(flag, metavar=_metavar(field.annotation), help=meaning, dest=name)
    return {name: _value(value) for name, value in vars(parser.parse_args(arguments)).items()}


def from_environment(model: type[BaseModel], prefix: str) -> dict[str, str | None]:
    """The values that environment variables give, by field. The names of the variables may be in small letters."""
    start = prefix.lower()
    variables = {name.lower(): value for name, value in os.environ.items()}
    return {name: _value(variables[start + name]) for name in model.model_fields if start + name in variables}


def _value(value: _Given) -> _Given | None:
    return None if value == NONE else value


def _default(field: FieldInfo) -> object:
    return NONE if field.default in (None, PydanticUndefined) else field.default


def _metavar(annotation: Any) -> str:  # noqa: ANN401 -- any type of a field
    kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    if get_origin(annotation) is Literal:
        return f"{{{','.join(kinds)}}}"
    if get_origin(annotation) in (Union, types.UnionType):
        return _metavar(kinds[0])
    if get_origin(annotation) is not None:  # Annotated
        return _metavar(kinds[0])
    return str(annotation.__name__)
