"""Near-duplicates: a small perceptual hash, and which images have nearly the same one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

MOST_BITS = 11  # that may differ; of different scenes of the embedded model at least 22 do
_BANDS = 8  # only hashes with an equal band are compared: pairs of up to 7 bits are all found, nearly all of the others
_BLOCK = 1024  # hashes that are compared at once
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)


def perceptual_hash(image: np.ndarray) -> bytes:
    """Return 128 bits that nearly equal images share: where it becomes brighter, to the right and downwards.

    Args:
        image: [H, W, 3] uint8.
    """
    grey = Image.fromarray(image).convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    return np.packbits([across[:, 1:] > across[:, :-1], down[1:] > down[:-1]]).tobytes()


def groups_of_twins(hashes: np.ndarray) -> list[list[int]]:
    """Return the places of images that are nearly equal to another one, in groups, the largest first.

    Args:
        hashes: [N, 16] uint8, of the images in their order.
    """
    if len(hashes) == 0:
        return []
    distinct, which = np.unique(hashes, axis=0, return_inverse=True)
    leaders = list(range(len(distinct)))
    for one, other in _near_pairs(distinct):
        first, second = sorted((_leader(leaders, one), _leader(leaders, other)))
        leaders[second] = first
    groups: dict[int, list[int]] = {}
    for place, number in enumerate(which.reshape(-1).tolist()):
        groups.setdefault(_leader(leaders, number), []).append(place)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


def _near_pairs(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs of distinct hashes that differ in few bits, some of them more than once."""
    bands = hashes.view(np.uint16).reshape(len(hashes), _BANDS)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        ends = np.flatnonzero(np.diff(bands[order, band])) + 1
        for bucket in np.split(order, ends):
            for start in range(0, len(bucket) - 1, _BLOCK):
                ours, rest = bucket[start : start + _BLOCK], bucket[start:]
                for first in range(0, len(rest), _BLOCK):
                    theirs = rest[first : first + _BLOCK]
                    differing = _ONES[hashes[ours, None] ^ hashes[None, theirs]].sum(2, dtype=np.uint8)
                    one, other = np.nonzero(differing <= MOST_BITS)
                    one, other = ours[one], theirs[other]
                    yield from zip(one[one < other].tolist(), other[one < other].tolist(), strict=True)


def _leader(leaders: list[int], number: int) -> int:
    """Return the first of the group that a number is in, and make the way to it shorter."""
    while leaders[number] != number:
        leaders[number] = leaders[leaders[number]]
        number = leaders[number]
    return number
