"""Flags of the command line out of option dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer


def with_flags(command: Callable[..., None], dash: str = "-") -> Callable[..., None]:
    """Give a command a flag for every field of the option dataclasses among its parameters.

    A field's type, default and help are those of its flag. A bool is a flag without a value, with a `--no-` form where
    its default is not False; an `argument` stands without a flag; the fields of a dataclass in a dataclass are flags
    too. The command is called with the dataclasses, made of the flags' values.

    Args:
        command: a function whose parameters are annotated.
        dash: what joins the words of a flag.
    """
    parameters: list[inspect.Parameter] = []
    kinds: dict[str, type] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            kinds[parameter.name] = kind
            parameters += _flags_of(kind, dash)
        else:
            parameters.append(parameter)

    def called(**values: Any) -> None:
        options = {name: _made(kind, values) for name, kind in kinds.items()}
        command(**options, **values)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    vars(called)["__signature__"] = inspect.Signature(keywords)
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _flags_of(kind: type, dash: str) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind)
    for one in fields(kind):
        if inner := _inner(one, hints[one.name]):
            yield from _flags_of(inner, dash)
        else:
            yield _flag(one, hints[one.name], dash)


def _inner(one: Field[Any], hint: Any) -> type | None:
    """Return the dataclass whose fields are flags in place of a field: that of its default, which may be left open."""
    default = type(one.default)
    return default if is_dataclass(default) else hint if isinstance(hint, type) and is_dataclass(hint) else None


def _flag(one: Field[Any], hint: Any, dash: str) -> inspect.Parameter:
    words, name = one.metadata["help"], one.name.replace("_", dash)
    kind, shown = _kind(hint, read=one.metadata.get("read") is not None)
    if "metavar" in one.metadata:
        info = typer.Argument(metavar=one.metadata["metavar"], help=words)
    else:
        both = one.default is True or (one.default is None and kind is bool)
        flag = f"--{name}/--no{dash}{name}" if both else f"--{name}"
        info = typer.Option(flag, *filter(None, [one.metadata.get("also")]), help=words, metavar=shown)
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    optional = Annotated[kind | None, info] if one.default is None else Annotated[kind, info]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=optional)


def _kind(hint: Any, read: bool) -> tuple[Any, str | None]:
    """Return what the command line reads, and what its help calls that where it is not the same.

    What an option's own reader checks is read as text, so that a bad value is refused in one way everywhere.
    """
    if get_args(hint)[1:] == (...,):  # a flag that may be repeated
        return list[str], "TEXT"
    kinds = set(get_args(hint) if isinstance(hint, UnionType) else (hint,)) - {type(None)}
    kind = kinds.pop()
    if kinds or get_origin(kind):
        return str, None
    return (str, "NUMBER" if kind in (int, float) else None) if read else (kind, None)


def _made(kind: type, values: dict[str, Any]) -> Any:
    """Make a dataclass of the values of its flags, which are removed from `values`."""
    hints = get_type_hints(kind)
    return kind(
        **{
            one.name: _made(inner, values) if (inner := _inner(one, hints[one.name])) else values.pop(one.name)
            for one in fields(kind)
        }
    )
