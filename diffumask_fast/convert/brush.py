"""Label Studio's run-length code of a brush: runs of the four channels of each pixel, packed bit by bit.

It is that of the JavaScript library rle-pack: a head with the number of values, the bits of a value and four sizes of
lengths, then for each run a 1, which of the sizes, the length minus one, and the value.
"""

from __future__ import annotations

import numpy as np

from diffumask_fast.convert.rle import run_lengths

CHANNELS, VALUE_BITS = 4, 8
SIZES = (3, 4, 8, 16)  # bits of a length
LONGEST = 2 ** SIZES[-1]
RUN_BITS = 3 + SIZES[-1] + VALUE_BITS  # of the longest form of a run


def encode(mask: np.ndarray) -> list[int]:
    """Return the code of a mask [H, W] bool, as numbers from 0 to 255."""
    head = f"{mask.size * CHANNELS:032b}{VALUE_BITS - 1:05b}" + "".join(f"{size - 1:04b}" for size in SIZES)
    bits = np.concatenate([np.array([bit == "1" for bit in head]), _runs(mask.ravel())])
    return list(np.packbits(bits).tobytes())


def _runs(flat: np.ndarray) -> np.ndarray:
    """Return the bits [N] bool of the runs of a mask [H * W]."""
    lengths = run_lengths(flat) * CHANNELS
    parts = -(-lengths // LONGEST)  # of each run; those that are no longer than 0 have none
    values = np.repeat(np.arange(len(lengths)) % 2 * 255, parts)
    part_lengths = np.full(len(values), LONGEST)
    ends = np.cumsum(parts)[parts > 0] - 1
    part_lengths[ends] = lengths[parts > 0] - (parts[parts > 0] - 1) * LONGEST
    kinds = np.searchsorted(2 ** np.array(SIZES), part_lengths)
    size = np.array(SIZES)[kinds]
    codes = ((0b100 | kinds) << size | (part_lengths - 1)) << VALUE_BITS | values
    places = (3 + size + VALUE_BITS)[:, None] - 1 - np.arange(RUN_BITS)  # of the bits, the first of a run first
    return ((codes[:, None] >> np.maximum(places, 0)) & 1).astype(bool)[places >= 0]
