"""Two lists of classes, whose ids differ: what one calls a pixel in the words of the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import IGNORE


def united(first: Mapping[int, str], second: Mapping[int, str]) -> dict[int, str]:
    """Return the classes of both lists by name; the first keeps its ids, what it lacks takes ids that are free.

    Raises:
        DiffuMaskError: they are more than a mask has numbers for.
    """
    classes = dict(first)
    for value, name in sorted(second.items()):
        if name not in classes.values():
            classes[_free(value, classes)] = name
    return dict(sorted(classes.items()))


def _free(wanted: int, classes: Mapping[int, str]) -> int:
    free = [value for value in (wanted, *range(1, IGNORE)) if value not in classes]
    if not free:
        raise DiffuMaskError(f"there are more than {IGNORE - 1} classes together: leave some out")
    return free[0]


def lookup(source: Mapping[int, str], target: Mapping[int, str], missing: int = IGNORE) -> np.ndarray:
    """Return the id in the target of each id of the source, found by name, [256] uint8; 255 stays 255.

    Args:
        source: id -> name.
        target: id -> name.
        missing: the value of ids whose name the target lacks.
    """
    ids = {name: value for value, name in target.items()}
    table = np.full(IGNORE + 1, IGNORE, np.uint8)
    for value, name in source.items():
        table[value] = ids.get(name, missing)
    return table


def channels(classes: Mapping[int, str]) -> np.ndarray:
    """Return the place of each id in the order of the ids, [256] int64; 255 stays 255."""
    table = np.full(IGNORE + 1, IGNORE, np.int64)
    table[sorted(classes)] = range(len(classes))
    return table
