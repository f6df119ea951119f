"""masks/components.py against a flood fill."""

import numpy as np
import pytest
import torch

from diffumask_fast.masks.components import connected, fill_holes, remove_small

SPIRAL = """
#########
........#
#######.#
#.....#.#
#.###.#.#
#.#...#.#
#.#####.#
#.......#
#########
"""


def drawn(text):
    return torch.tensor([[int(c) if c.isdigit() else int(c == "#") for c in row] for row in text.split()])[None]


def flood(values):
    """Number the parts of [H, W] one pixel at a time."""
    parts = np.full(values.shape, -1)
    for start in np.ndindex(values.shape):
        waiting = [start] if parts[start] < 0 else []
        while waiting:
            y, x = waiting.pop()
            if parts[y, x] >= 0:
                continue
            parts[y, x] = start[0] * values.shape[1] + start[1]
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < values.shape[0] and 0 <= u < values.shape[1] and values[v, u] == values[y, x]:
                    waiting.append((v, u))
    return parts


@pytest.mark.parametrize("size", [(1, 1), (7, 1), (1, 8), (19, 23), (40, 31)])
def test_connected_is_a_flood_fill(size):
    values = torch.randint(0, 3, (2, *size), generator=torch.Generator().manual_seed(1))
    found = connected(values)
    for one, parts in zip(values, found, strict=True):
        assert np.array_equal(parts.numpy(), flood(one.numpy()))


def test_a_spiral_is_one_part():
    spiral = drawn(SPIRAL)
    assert np.array_equal(connected(spiral)[0].numpy(), flood(spiral[0].numpy()))
    assert len(connected(spiral)[spiral == 1].unique()) == 1


def test_small_parts_go_and_holes_stay():
    values = drawn("1110000 1010020 1110022 0000000 1000000")
    kept = remove_small(values, 3)
    assert torch.equal(kept, drawn("1110000 1010020 1110022 0000000 0000000"))
    assert torch.equal(remove_small(values, 4), drawn("1110000 1010000 1110000 0000000 0000000"))
    assert torch.equal(remove_small(values, 0), values)


def test_holes_are_filled_by_the_class_around_them():
    values = drawn("1111222 1001202 1011222 1111000 0000000 1112220 1012020 1110220")
    filled = drawn("1111222 1111222 1111222 1111000 0000000 1112220 1112020 1110220")
    out = fill_holes(values)
    assert torch.equal(out[:, :5], filled[:, :5])
    assert torch.equal(out[:, 5:, :3], filled[:, 5:, :3])


def test_a_hole_between_two_classes_stays_and_so_does_an_opening():
    values = drawn("11222 10022 11222 00000 11100 10000 11100")
    assert torch.equal(fill_holes(values), values)
