"""convert/outlines.py: an outline, filled with its edges as cv2.fillPoly does, is its part of the mask."""

import numpy as np
import pytest
from foreign import fill

from diffumask_fast.convert.outlines import outlines


def check(mask):
    filled = np.zeros(mask.shape, int)
    for points in outlines(mask):
        filled += fill(points, *mask.shape)
    assert (filled == mask).all()


@pytest.mark.parametrize("share", [0, 0.1, 0.4, 0.6, 0.9, 1])
def test_outlines_filled_are_the_mask(share):
    rng = np.random.default_rng(int(share * 10))
    for _ in range(25):
        check(rng.random(rng.integers(1, 15, 2)) < share)


def test_rings_in_rings():
    y, x = np.mgrid[:41, :53]
    for width in (1, 2, 4):
        check((np.hypot(y - 20, x - 26) // width) % 2 == 0)
    check((y + x) % 2 == 0)


def test_a_part_has_one_outline_of_few_points():
    mask = np.zeros((20, 30), bool)
    mask[2:9, 3:12] = mask[15, 20] = True
    mask[4:6, 5:7] = False
    square, pixel = outlines(mask)
    assert pixel.tolist() == [[20, 15]]
    assert {(3, 2), (11, 2), (3, 8), (11, 8)} <= set(map(tuple, square.tolist())) and len(square) < 16
