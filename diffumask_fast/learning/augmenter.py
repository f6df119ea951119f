"""Augmentations on the fly: what is drawn for an example depends on seed, epoch and its number alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from random import Random
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmentations import (
    Pixels,
    gaussian_blur,
    kernel_lengths,
    occlude,
    perspective,
    splice,
)
from diffumask_fast.learning.data import Example, SegmentationData
from diffumask_fast.learning.options import AugmentationOptions, span, splice_shares

Corners = tuple[tuple[float, float], ...]
Drawn = TypeVar("Drawn")


class Augmenter:
    """Give examples of data augmented: spliced, then occluded, seen from another side and blurred, each by chance.

    Args:
        data: the examples; splices and patches are of others of them, with replacement.
        options: how often and how strongly.
        seed: of all that is drawn.

    Raises:
        DiffuMaskError: shares are no probabilities, or patches are wanted and there is one image alone.

    Example:
        augmenter = Augmenter(open_data("demo"), AugmentationOptions(blur=0.5))
        batch = augmenter.examples([3, 1, 4], epoch=2)
    """

    def __init__(self, data: SegmentationData, options: AugmentationOptions | None = None, seed: int = 0) -> None:
        self._data, self._options, self._seed = data, options or AugmentationOptions(), seed
        self._splices = splice_shares(self._options.splice)
        shares = {name: getattr(self._options, name) for name in ("blur", "occlude", "perspective")}
        for name, share in (shares | {"splice": float(sum(self._splices.values()))}).items():
            if share > 1:
                raise DiffuMaskError(f"`{name}` comes to {share:g}: in training it is a probability, so give at most 1")
        check_others(len(data), self._options.occlude)

    def examples(self, indices: Sequence[int], epoch: int = 0) -> list[Example]:
        """Return examples, each the same whatever others are asked for with it.

        Args:
            indices: numbers of the examples in the data.
            epoch: another one draws anew.
        """
        indices = [range(len(self._data))[index] for index in indices]
        pictures = [self._assembled(index, epoch) for index in indices]
        shift, lengths = self._options.perspective_shift, span(self._options.blur_lengths)
        corners, kernels = {}, {}
        for number, index in enumerate(indices):
            if rng := self._lot("perspective", self._options.perspective, index, epoch):
                corners[number] = draw_corners(rng, shift)
            if rng := self._lot("blur", self._options.blur, index, epoch):
                kernels[number] = draw_length(rng, pictures[number][1].shape, lengths)
        pictures = blurred(seen_from(pictures, corners), kernels)
        return [Example(self._data.names[index], *pixels) for index, pixels in zip(indices, pictures, strict=True)]

    def _lot(self, kind: str, share: float, index: int, epoch: int) -> Random | None:
        """Draw whether something is done to an example; return the generator for how it is done."""
        rng = Random(draw_seed(self._seed, epoch, index, kind))
        return rng if rng.random() < share else None

    def _assembled(self, index: int, epoch: int) -> Pixels:
        """Return an example, spliced and occluded by others."""
        pixels = self._pixels(index)
        if rng := self._lot("splice", float(sum(self._splices.values())), index, epoch):
            grid = draw_grid(rng, self._splices)
            numbers = draw_parts(rng, math.prod(grid), len(self._data))
            numbers[draw_number(rng, len(numbers))] = index
            pixels = splice([self._pixels(number) for number in numbers], grid, self._options.splice_size)
        if rng := self._lot("occlude", self._options.occlude, index, epoch):
            other = self._pixels(draw_other(rng, index, len(self._data)))
            pixels = occlude(pixels, other, draw_box(rng, pixels[1].shape, span(self._options.occlude_area)))
        return pixels

    def _pixels(self, index: int) -> Pixels:
        example = self._data[index]
        return example.image, example.labels


def seen_from(pictures: Sequence[Pixels], corners: Mapping[int, Corners]) -> list[Pixels]:
    """Apply `perspective` to some pictures of any sizes: number -> corners."""

    def together(images: Tensor, labels: Tensor, drawn: Sequence[Corners]) -> tuple[Tensor, Tensor]:
        return perspective(images, labels, torch.tensor(drawn, dtype=torch.float64))

    return _by_shape(pictures, corners, together)


def blurred(pictures: Sequence[Pixels], lengths: Mapping[int, int]) -> list[Pixels]:
    """Apply `gaussian_blur` to some pictures of any sizes: number -> length of the kernel."""
    return _by_shape(pictures, lengths, lambda images, labels, drawn: (gaussian_blur(images, drawn), labels))


def _by_shape(
    pictures: Sequence[Pixels],
    drawn: Mapping[int, Drawn],
    together: Callable[[Tensor, Tensor, Sequence[Drawn]], tuple[Tensor, Tensor]],
) -> list[Pixels]:
    """Apply an operation to the pictures for which something is drawn, those of one size together."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in drawn:
        shapes[pictures[number][1].shape].append(number)
    result = list(pictures)
    for numbers in shapes.values():
        images, labels = (torch.from_numpy(np.stack([pictures[number][part] for number in numbers])) for part in (0, 1))
        made = together(images, labels, [drawn[number] for number in numbers])
        for place, number in enumerate(numbers):
            result[number] = made[0][place].numpy(), made[1][place].numpy()
    return result


def check_others(count: int, share: float) -> None:
    """Raise where patches of other images are wanted, and there is no other."""
    if share > 0 and count < 2:
        raise DiffuMaskError(
            "patches come from other images, and there is one alone: add images, or do without occlusion"
        )


def draw_seed(*parts: object) -> int:
    """Return 53 bits that depend on the parts alone, the same in every process and on every machine."""
    return Random("\0".join(map(str, parts))).getrandbits(53)


def draw_number(rng: Random, count: int) -> int:
    """Draw a whole number below `count`."""
    return int(rng.random() * count)


def draw_parts(rng: Random, parts: int, count: int) -> list[int]:
    """Draw which of `count` images are the parts of a splice, with replacement."""
    return [draw_number(rng, count) for _ in range(parts)]


def draw_other(rng: Random, index: int, count: int) -> int:
    """Draw another one of `count` images."""
    other = draw_number(rng, count - 1)
    return other + (other >= index)


def draw_grid(rng: Random, shares: Mapping[tuple[int, int], Fraction]) -> tuple[int, int]:
    """Draw a grid by the grids' shares."""
    left = rng.random() * float(sum(shares.values()))
    for grid, share in shares.items():
        left -= float(share)
        if left < 0:
            return grid
    return max(shares, key=lambda grid: shares[grid])  # what rounding leaves


def draw_box(rng: Random, shape: Sequence[int], area: tuple[float, float]) -> tuple[int, int, int, int]:
    """Draw a patch of the image's own proportions: top, left, height, width, at least one pixel each."""
    side = math.sqrt(area[0] + rng.random() * (area[1] - area[0]))
    height, width = (max(1, round(length * side)) for length in shape[:2])
    return draw_number(rng, shape[0] - height + 1), draw_number(rng, shape[1] - width + 1), height, width


def draw_corners(rng: Random, shift: float) -> Corners:
    """Draw the corners that `perspective` takes, each moved by up to `shift` of the sides."""
    square = ((0, 0), (1, 0), (1, 1), (0, 1))
    return tuple((x + shift * (2 * rng.random() - 1), y + shift * (2 * rng.random() - 1)) for x, y in square)


def draw_length(rng: Random, shape: Sequence[int], lengths: tuple[float, float]) -> int:
    """Draw the length of a kernel, odd, in proportion to the image."""
    odd = kernel_lengths(shape, lengths)
    return odd[draw_number(rng, len(odd))]
