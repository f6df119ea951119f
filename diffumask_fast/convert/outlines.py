"""A mask's parts as polygons: outlines through the centres of the pixels, holes joined to them by cuts.

The borders are followed as in Suzuki and Abe, "Topological structural analysis of digitized binary images by border
following" (1985). Filled with its edges, as cv2.fillPoly does, an outline gives exactly its part.
"""

from __future__ import annotations

import numpy as np


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return a closed outline for each part of a mask [H, W] bool whose pixels touch, also by a corner.

    Returns:
        Points [N, 2], x and y of pixels, int; N is 1 for a part of one pixel.
    """
    height, width = mask.shape
    chains, is_hole = _joined(np.pad(mask, 1))
    stride = width + 2
    return [
        _without_middles(np.stack([points % stride - 1, points // stride - 1], 1))
        for points, hole in zip(map(np.array, chains), is_hole, strict=True)
        if not hole
    ]


def _joined(padded: np.ndarray) -> tuple[list[list[int]], list[bool]]:
    """Return all borders as places in the padded mask, and which are those of holes; outer ones include their holes.

    A hole's border begins at its topmost row. Left of there, beyond some pixels of the part, is a border that was met
    before; a cut along these pixels joins the two.
    """
    stride = padded.shape[1]
    values = padded.ravel().astype(np.int8)
    starts = np.flatnonzero((values == 1) & ((np.roll(values, 1) == 0) | (np.roll(values, -1) == 0))).tolist()
    field = values.tolist()
    chains: list[list[int]] = []
    cuts: list[tuple[int, int] | None] = []  # of each hole: the border that it is joined to, and the place there
    owner: dict[int, int] = {}
    for start in starts:
        if field[start] == 1 and field[start - 1] == 0:
            cuts.append(None)
            chain = _follow(field, stride, start, 4)
        elif field[start] >= 1 and field[start + 1] == 0:
            place = start
            while field[place - 1]:
                place -= 1
            cuts.append((owner[place], place))
            chain = _follow(field, stride, start, 0)
        else:
            continue
        for point in chain:
            owner.setdefault(point, len(chains))
        chains.append(chain)
    for number in range(len(chains) - 1, -1, -1):
        if (cut := cuts[number]) is not None:
            border, at = chains[cut[0]], chains[cut[0]].index(cut[1])
            border[at:at] = [border[at], *chains[number], chains[number][0]]
    return chains, [cut is not None for cut in cuts]


def _follow(field: list[int], stride: int, start: int, outside: int) -> list[int]:
    """Follow a border once around; mark it, with a minus where the pixel to the right is background seen from it.

    Args:
        field: 0 background; changed.
        stride: of a row.
        start: place where the border begins.
        outside: direction of a background pixel beside it.
    """
    steps = (1, stride + 1, stride, stride - 1, -1, -stride - 1, -stride, -stride + 1)  # clockwise from the right
    for turn in range(8):
        direction = (outside + turn) % 8
        if field[start + steps[direction]]:
            break
    else:
        field[start] = -2
        return [start]
    last, place, chain = start + steps[direction], start, []
    while True:
        right_is_free = False
        for turn in range(1, 9):
            ahead = (direction - turn) % 8
            if field[place + steps[ahead]]:
                break
            right_is_free = right_is_free or ahead == 0
        if right_is_free:
            field[place] = -2
        elif field[place] == 1:
            field[place] = 2
        chain.append(place)
        following = place + steps[ahead]
        if following == start and place == last:
            return chain
        direction, place = (ahead + 4) % 8, following


def _without_middles(points: np.ndarray) -> np.ndarray:
    """Leave out points that repeat the one before, or lie between their neighbours on one line."""
    points = points[np.any(points != np.roll(points, 1, 0), 1)] if len(points) > 1 else points
    before, after = np.sign(points - np.roll(points, 1, 0)), np.sign(np.roll(points, -1, 0) - points)
    bends = np.any(before != after, 1)
    return points[bends] if bends.any() else points[:1]
