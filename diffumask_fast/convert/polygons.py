"""COCO's polygons as masks: a pixel belongs to a polygon when its centre does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffumask_fast.errors import DiffuMaskError

EDGES = 256  # that are filled at once, so that a long polygon fits the memory


def fill(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Return the pixels [H, W] bool that lie in any of some polygons, each by the even-odd rule.

    Args:
        polygons: of each x, y, x, y, ... in pixels; the first pixel's centre is (0.5, 0.5).
        height: of the mask.
        width: of the mask.

    Raises:
        DiffuMaskError: one has fewer than three points, half a point, or numbers that are none.
    """
    filled = np.zeros((height, width), bool)
    for polygon in polygons:
        filled |= _fill_one(_points(polygon), height, width)
    return filled


def _points(polygon: Sequence[float]) -> np.ndarray:
    numbers = list(polygon) if isinstance(polygon, list | tuple) else []
    if all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers):
        if len(numbers) >= 6 and len(numbers) % 2 == 0:
            return np.array(numbers, np.float64).reshape(-1, 2)
    raise DiffuMaskError("a polygon must be a list x, y, x, y, ... of at least three points: write it anew")


def _fill_one(points: np.ndarray, height: int, width: int) -> np.ndarray:
    crossings = np.zeros(
        (height, width + 1), np.int64
    )  # how many edges cross a row left of a pixel's centre, from there
    centres = np.arange(height) + 0.5
    ends = np.roll(points, -1, 0)
    for low in range(0, len(points), EDGES):
        (x0, y0), (x1, y1) = (part[low : low + EDGES].T[..., None] for part in (points, ends))
        edge, row = np.nonzero((y0 <= centres) != (y1 <= centres))
        x0, y0, x1, y1 = (value[edge, 0] for value in (x0, y0, x1, y1))
        across = x0 + (centres[row] - y0) * (x1 - x0) / (y1 - y0)
        np.add.at(crossings, (row, np.clip(np.ceil(across - 0.5), 0, width).astype(np.int64)), 1)
    return np.cumsum(crossings[:, :width], 1) % 2 == 1
