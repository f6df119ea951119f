"""COCO's run-length code of a mask: the lengths of runs of 0 and 1, column after column, as numbers or as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffumask_fast.errors import DiffuMaskError

BITS, CONTINUED, SIGN, BASE = 5, 0x20, 0x10, 48


def encode(mask: np.ndarray) -> str:
    """Return the text of a mask [H, W] bool; holes stay holes."""
    return _to_text(run_lengths(mask.ravel(order="F")).tolist())


def run_lengths(flat: np.ndarray) -> np.ndarray:
    """Return the lengths of runs in bool values [N], the first of them of False, perhaps 0."""
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return np.concatenate([[0], lengths]) if flat.size and flat[0] else lengths


def decode(counts: str | Sequence[int], height: int, width: int) -> np.ndarray:
    """Return the mask [H, W] bool of a code, whose runs must fill it exactly.

    Args:
        counts: text, or the lengths themselves.
        height: of the mask.
        width: of the mask.

    Raises:
        DiffuMaskError: it is no such code, or longer or shorter than the mask.
    """
    size = height * width
    lengths = _from_text(counts, size) if isinstance(counts, str) else list(counts)
    if not all(type(length) is int and 0 <= length <= size for length in lengths) or sum(lengths) != size:
        raise DiffuMaskError(f"a run-length code does not fill its mask of {height}x{width} exactly: write it anew")
    runs = np.arange(len(lengths)) % 2 == 1
    return np.repeat(runs, lengths).reshape(width, height).T


def _to_text(lengths: Sequence[int]) -> str:
    """From the fourth on, a length is written as its difference to the one two before, in groups of five bits."""
    letters = bytearray()
    for place, length in enumerate(lengths):
        value = length - lengths[place - 2] if place > 2 else length
        more = True
        while more:
            group, value = value & 0x1F, value >> BITS
            more = value != (-1 if group & SIGN else 0)
            letters.append((group | CONTINUED if more else group) + BASE)
    return letters.decode("ascii")


def _from_text(text: str, size: int) -> list[int]:
    """Return the lengths that a text stands for; no number in it is longer than one that fits the mask."""
    lengths: list[int] = []
    value = shift = 0
    for letter in text:
        group = ord(letter) - BASE
        if not 0 <= group < 2 * CONTINUED or shift > size.bit_length() + BITS:
            raise DiffuMaskError("a run-length code is none that COCO has: write it anew")
        value |= (group & 0x1F) << shift
        shift += BITS
        if group & CONTINUED:
            continue
        if group & SIGN:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    if shift:
        raise DiffuMaskError("a run-length code ends in the midst of a number: write it anew")
    return lengths
