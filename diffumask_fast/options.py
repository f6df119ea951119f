"""What one option is: its type, default, help and allowed values, written once, in the field of a frozen dataclass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import is_address

MAX_PIXELS = 4096 * 4096  # of a picture that is decoded
MOST_PIXELS = 2 * 89_478_485  # Pillow itself refuses more
Reader = Callable[[Any], Any]  # returns the value as it is kept; raises ValueError with what is allowed


@dataclass(frozen=True)
class Options:
    """The base of all sets of options: each value is checked, and may be given as the command line has it ("0.45")."""

    def __post_init__(self) -> None:
        for one in fields(self):
            read, value = one.metadata.get("read"), getattr(self, one.name)
            if isinstance(value, Path) and read is None and is_address(value):
                raise DiffuMaskError(f"`{one.name}` must be a local path, not an address as {value}")
            if read is not None and not (value is None and one.default is None):
                object.__setattr__(self, one.name, checked(one.name, value, read))


def option(default: Any, help: str, read: Reader | None = None, *, also: str | None = None) -> Any:
    """Return the field of an option, which is also a flag of the commands that take its dataclass.

    Args:
        default: the value when nothing is given.
        help: what the command line says of it.
        read: `one_of`, `whole` or `number`: the values that are allowed; None takes any.
        also: a second name of the flag, such as "--out".
    """
    return field(default=default, metadata={"help": help, "read": read, "also": also})


def required(help: str, read: Reader | None = None, *, also: str | None = None) -> Any:
    """Return the field of an option that must be given."""
    return field(metadata={"help": help, "read": read, "also": also})


def argument(help: str, metavar: str | None = None, read: Reader | None = None) -> Any:
    """Return the field of an option that has no default: on the command line it stands without a flag."""
    return field(metadata={"help": help, "metavar": metavar, "read": read})


def left_open(kind: type[Options], otherwise: str) -> Any:
    """Return options of a kind of which each is None until it is given; see `closed`.

    Args:
        kind: the options, each of which has a default.
        otherwise: whose value stands where none is given; the help says so.
    """
    hints = get_type_hints(kind)

    def opened(one: Any) -> Any:
        note = f"{one.metadata['help'].rstrip('.')}; {otherwise} when left out, else {one.default}."
        return field(default=None, metadata={**one.metadata, "help": note})

    names = [(one.name, hints[one.name] | None, opened(one)) for one in fields(kind)]
    return make_dataclass(f"Open{kind.__name__}", names, bases=(kind,), frozen=True)()


def closed(options: Any, own: Any) -> Any:
    """Return the options in which what `left_open` left open is as in `own`."""
    return replace(own, **{name: value for name, value in vars(options).items() if value is not None})


def checked(name: str, value: Any, read: Reader) -> Any:
    """Return a parameter's value as it is kept.

    Raises:
        DiffuMaskError: it is not allowed.
    """
    try:
        return read(value)
    except ValueError as allowed:
        raise DiffuMaskError(f"`{name}` must be {allowed}, not {value!r}") from allowed


def one_of(*words: str) -> Reader:
    """Allow some words."""

    def read(value: Any) -> Any:
        if value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return value

    return read


def whole(low: int, high: int | None = None, *words: str) -> Reader:
    """Allow the whole numbers from low to high (None: without end), and some words."""
    span = f"from {low} on" if high is None else f"from {low} to {high}"

    def convert(value: Any) -> int | None:
        given = int(value)
        is_whole = not isinstance(value, bool) and (isinstance(value, str) or given == value)
        return given if is_whole and given >= low and (high is None or given <= high) else None

    return _number_reader(convert, f"a whole number {span}", words)


def number(low: float | None = None, high: float | None = None, *words: str, ends: bool = True) -> Reader:
    """Allow finite numbers in a range, with or without its ends, and some words."""
    span = (
        ""
        if low is None or high is None
        else f" {'from' if ends else 'between'} {low} {'to' if ends else 'and'} {high}"
    )

    def convert(value: Any) -> float | None:
        given = float(value)
        inside = (low is None or low <= given) and (high is None or given <= high)
        return given if math.isfinite(given) and inside and (ends or given not in (low, high)) else None

    return _number_reader(convert, f"a number{span}", words)


def _number_reader(convert: Callable[[Any], float | None], numbers: str, words: tuple[str, ...]) -> Reader:
    """Allow some words and what `convert` takes; it returns None or raises for what it does not."""
    allowed = " or ".join((*words, numbers))

    def read(value: Any) -> Any:
        if value in words:
            return value
        try:
            given = convert(value)
        except (TypeError, ValueError, OverflowError):
            given = None
        if given is None:
            raise ValueError(allowed)
        return given

    return read


def pixel_size() -> Reader:
    """Allow a height and a width in pixels, as "HxW" or as two numbers."""

    def read(value: Any) -> Any:
        sides = value.lower().split("x") if isinstance(value, str) else value
        if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(str(side).isdecimal() for side in sides):
            raise ValueError("HxW, height and width in pixels, such as 512x512")
        return int(sides[0]), int(sides[1])

    return read


@dataclass(frozen=True)
class ReadOptions(Options):
    """What is read of a dataset; it makes no difference to what is made of it."""

    max_pixels: int = option(MAX_PIXELS, "Refuse pictures with more pixels.", whole(1, MOST_PIXELS))
