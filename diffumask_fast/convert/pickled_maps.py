"""The maps of the paper's program: a pickled dictionary of arrays, read without unpickling anything but those arrays.

A pickle is a program. Of its steps only those that put data together are run, and the only names that it may call are
NumPy's for an array and its type, for which inert stand-ins are put.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from diffumask_fast.errors import DiffuMaskError, in_one_line

STEPS = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS".split()
)
MOST_STEPS = 10_000  # a dictionary of twenty arrays takes a few hundred
MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
TYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64}


class _Type:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, *flags: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands in for numpy.ndarray."""

    def __init__(self, *of: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def objects(self) -> list[Any]:
        """Return the values of an array of objects."""
        _, _, kind, _, values = self.state
        if kind.code not in ("O", "O8") or not isinstance(values, list):
            raise ValueError("no array of objects")
        return values

    def numbers(self) -> np.ndarray:
        """Return an array of numbers, two axes, fp32."""
        _, shape, kind, in_columns, data = self.state
        values = np.frombuffer(data, np.dtype(TYPES[kind.code]).newbyteorder(kind.order))
        if len(shape) != 2 or math.prod(shape) != values.size or min(shape) < 1:
            raise ValueError("no map")
        return values.reshape(shape, order="F" if in_columns else "C").astype(np.float32)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        names = {"dtype": _Type, "ndarray": _Array, "_reconstruct": _Array}
        if module not in MODULES or name not in names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return names[name]


def read_maps(path: Path, most_bytes: int = 2**28) -> dict[int, np.ndarray]:
    """Read a .npy file of the paper's program.

    Args:
        path: of the file.
        most_bytes: of the file; twenty maps of 512x512 are 21 MB.

    Returns:
        number of a class, from 0 on -> [h, w] fp32, all of one size.

    Raises:
        DiffuMaskError: it is missing, too large, damaged, or holds anything else.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise ValueError(f"it has more than {most_bytes} bytes")
        return _maps(path.read_bytes())
    except Exception as error:  # what a damaged pickle fails with is of many kinds
        cause = in_one_line(error, 100)
        raise DiffuMaskError(
            f"{path} is no dictionary of maps and nothing else ({cause}): import what the paper's program wrote"
        ) from error


def _maps(data: bytes) -> dict[int, np.ndarray]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = header(stream)
    if shape != () or kind != np.dtype(object):
        raise ValueError("no pickled dictionary")
    start = stream.tell()
    for number, (step, argument, _) in enumerate(pickletools.genops(data[start:])):
        if step.name not in STEPS or number > MOST_STEPS:
            raise ValueError(f"a step {step.name} of a pickle")
        if "PUT" in step.name and int(argument or 0) > MOST_STEPS:  # such a place alone would fill the memory
            raise ValueError("a place that none needs")
    stream.seek(start)
    (found,) = _Reader(stream, encoding="latin1").load().objects()
    maps = {number: array.numbers() for number, array in found.items()}
    if not maps or not all(type(number) is int and 0 <= number < 254 for number in maps):
        raise ValueError("no numbers of classes")
    if len({array.shape for array in maps.values()}) > 1:
        raise ValueError("maps of several sizes")
    return maps
