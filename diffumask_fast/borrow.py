"""Put something in the place of another object's attribute, and always put the own one back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(name: str, values: Mapping[Any, Any]) -> Iterator[None]:
    """Let an attribute of objects be other values inside the context; afterwards, also after an exception, their own.

    Works on `__dict__`, which shadows a method of the class and a registered module alike.

    Args:
        name: of the attribute.
        values: object -> what stands in the attribute's place.
    """
    kept = [(owner, name in vars(owner), vars(owner).get(name)) for owner in values]
    try:
        for owner, value in values.items():
            vars(owner)[name] = value
        yield
    finally:
        for owner, had, value in kept:
            if had:
                vars(owner)[name] = value
            else:
                vars(owner).pop(name, None)
