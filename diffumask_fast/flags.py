"""Flags of the command line out of option dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every field of the option dataclasses among its parameters.

    A field's type, default and help are the flag's; a bool is a flag without a value, a field without a default is an
    argument, and a dataclass in a dataclass gives its fields too. The command gets the dataclasses, made of the flags.
    """
    parameters: list[inspect.Parameter] = []
    kinds: dict[str, type] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(kind := parameter.annotation):
            kinds[parameter.name] = kind
            parameters += _flags_of(kind)
        else:
            parameters.append(parameter)

    def called(**values: Any) -> None:
        command(**{name: _made(kind, values) for name, kind in kinds.items()}, **values)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _flags_of(kind: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind)
    for one in fields(kind):
        if is_dataclass(hints[one.name]):
            yield from _flags_of(hints[one.name])
        else:
            yield _flag(one, hints[one.name])


def _flag(one: Field, hint: Any) -> inspect.Parameter:
    kind, told = _kind(hint), {"help": one.metadata["help"]}
    if one.default is MISSING:
        info = typer.Argument(metavar=one.metadata["metavar"], **told)
    elif kind is bool or one.metadata["also"]:
        info = typer.Option(f"--{one.name.replace('_', '-')}", *filter(None, [one.metadata["also"]]), **told)
    else:
        info = typer.Option(**told)
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    optional = Annotated[kind | None, info] if one.default is None else Annotated[kind, info]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=optional)


def _kind(hint: Any) -> type:
    """Return what the command line reads: a number, a path, a bool; text where words are allowed beside a number."""
    kinds = set(get_args(hint) if isinstance(hint, UnionType) else (hint,)) - {type(None)}
    kind = kinds.pop()
    return str if kinds or get_origin(kind) else kind


def _made(kind: type, values: dict[str, Any]) -> Any:
    """Make a dataclass of the values of its flags, which are taken out."""
    hints = get_type_hints(kind)
    return kind(
        **{
            one.name: _made(hints[one.name], values) if is_dataclass(hints[one.name]) else values.pop(one.name)
            for one in fields(kind)
        }
    )
