"""The paper's augmentations of images and labels: splices, Gaussian blur, occlusion, perspective.

Labels are moved as they are, never mixed; what comes from outside an image is 255 in them and black in the image.
Everything is whole numbers or fp64 on one element at a time, so that a result is the same bytes in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.options import MAX_PIXELS

Pixels = tuple[np.ndarray, np.ndarray]  # image [H, W, 3] uint8 and labels [H, W] uint8
SIDE = 512  # the shorter side at which the lengths of kernels are meant
WEIGHT_BITS, KEPT_BITS = 16, 7  # of a kernel's weights, and below a level between the two passes: 8 + 7 + 16 = 31


def splice(parts: Sequence[Pixels], grid: tuple[int, int], size: str = "same", max_pixels: int = MAX_PIXELS) -> Pixels:
    """Tile pictures into one.

    Args:
        parts: images and labels, row by row; all are scaled to one size, the first one's or its share of the result.
        grid: rows and columns.
        size: "same" gives a result of the first part's size, "full" one that is as much larger as the grid.
        max_pixels: of the result.

    Returns:
        Image and labels.

    Raises:
        DiffuMaskError: the tiles would have no pixels, or the result too many.
    """
    (rows, columns), (height, width) = grid, parts[0][1].shape
    if size == "full":
        height, width = height * rows, width * columns
    if height < rows or width < columns or height * width > max_pixels:
        raise DiffuMaskError(
            f"a splice {rows}x{columns} of {height}x{width} pixels cannot be made: each tile needs a pixel, and the "
            f"whole may have {max_pixels}; leave this grid out of `splice`, or choose another `splice_size`"
        )
    tops = [height * row // rows for row in range(rows + 1)]
    lefts = [width * column // columns for column in range(columns + 1)]
    image, labels = np.empty((height, width, 3), np.uint8), np.empty((height, width), np.uint8)
    for number, part in enumerate(parts):
        row, column = divmod(number, columns)
        cell = slice(tops[row], tops[row + 1]), slice(lefts[column], lefts[column + 1])
        image[cell], labels[cell] = scaled(part, labels[cell].shape)
    return image, labels


def scaled(pixels: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Scale a picture to a height and a width: the image smoothly, each label from the nearest pixel."""
    image, labels = pixels
    if labels.shape == shape:
        return pixels
    size = shape[1], shape[0]
    smooth = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    return np.array(smooth), np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def occlude(pixels: Pixels, other: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """Lay a patch of another picture over one, with its labels (CutMix, Yun et al., ICCV 2019).

    Args:
        pixels: image and labels.
        other: those that the patch is of, at the same place; scaled to the same size first.
        box: top, left, height and width of the patch.

    Returns:
        Image and labels.
    """
    image, labels = (part.copy() for part in pixels)
    top, left, height, width = box
    patch = slice(top, top + height), slice(left, left + width)
    other = scaled(other, labels.shape)
    image[patch], labels[patch] = other[0][patch], other[1][patch]
    return image, labels


def kernel_lengths(shape: Sequence[int], lengths: tuple[float, float]) -> range:
    """Return the odd lengths that are between two lengths, meant at a shorter side of 512; at least 3."""
    shortest, longest = (length * min(shape[:2]) / SIDE for length in lengths)
    first = max(3, 2 * int(np.ceil((shortest - 1) / 2)) + 1)
    return range(first, max(first, int(longest)) + 1, 2)


def gaussian_blur(images: Tensor, lengths: Sequence[int]) -> Tensor:
    """Blur each image by its own Gaussian, whose deviation follows from its length as in OpenCV.

    Args:
        images: [B, H, W, 3] uint8.
        lengths: of each kernel, odd; beyond an edge the edge goes on.

    Returns:
        [B, H, W, 3] uint8, in whole numbers: within 0.6 of the exact value up to a length of 21.
    """
    longest = max(lengths)
    weights = torch.stack([_kernel(length, longest) for length in lengths]).to(images.device)
    rows = _weighted(images.int(), weights, 1) >> (WEIGHT_BITS - KEPT_BITS)
    both = _weighted(rows, weights, 2) + (1 << (WEIGHT_BITS + KEPT_BITS - 1))
    return (both >> (WEIGHT_BITS + KEPT_BITS)).to(torch.uint8)


def _kernel(length: int, longest: int) -> Tensor:
    """Return a Gaussian's weights, int32 [longest], which sum to 2^WEIGHT_BITS; zeros beyond its length."""
    sigma = 0.3 * ((length - 1) * 0.5 - 1) + 0.8
    places = np.arange(longest) - longest // 2
    weights = np.where(abs(places) <= length // 2, np.exp(-(places**2) / (2 * sigma**2)), 0)
    whole = np.rint(weights / weights.sum() * (1 << WEIGHT_BITS)).astype(np.int32)
    whole[longest // 2] += (1 << WEIGHT_BITS) - whole.sum()
    return torch.from_numpy(whole)


def _weighted(values: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Sum the neighbours along an axis of values [B, H, W, 3], weighted by [B, L]; edges go on."""
    size, length = values.shape[axis], weights.shape[1]
    places = torch.arange(-(length // 2), size + length // 2, device=values.device).clamp(0, size - 1)
    padded, total = values.index_select(axis, places), torch.zeros_like(values)
    for tap in range(length):
        total += weights[:, tap].view(-1, 1, 1, 1) * padded.narrow(axis, tap, size)
    return total


def perspective(images: Tensor, labels: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """See each picture as if from another side.

    Args:
        images: [B, H, W, 3] uint8.
        labels: [B, H, W] uint8.
        corners: [B, 4, 2] fp64: which points of the picture, as (x, y) in shares of width and height, come to lie in
            the result's corners: top left, top right, bottom right, bottom left.

    Returns:
        Images, bilinear, 0 outside; and labels, each that of the pixel in which its pixel's centre falls, 255 outside.
    """
    batch, height, width = labels.shape
    x, y = _source_points(corners, height, width)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    start = torch.arange(batch, device=labels.device).view(-1, 1, 1) * (height * width)

    def place(row: Tensor, column: Tensor) -> Tensor:
        return start + row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)

    moved = torch.where(inside, labels.flatten()[place(y.floor(), x.floor())], IGNORE)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    right_share, bottom_share = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]
    pixels = images.reshape(-1, 3)
    upper, lower = (
        pixels[place(row, left)].double() * (1 - right_share) + pixels[place(row, left + 1)].double() * right_share
        for row in (top, top + 1)
    )
    seen = (upper * (1 - bottom_share) + lower * bottom_share).round()
    return torch.where(inside[..., None], seen, 0).to(torch.uint8), moved.to(torch.uint8)


def _source_points(corners: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return x and y [B, H, W] fp64 of the points that each pixel's centre shows (Heckbert 1989, square to quad)."""
    corners = corners.double() * corners.new_tensor([width, height], dtype=torch.float64)
    p0, p1, p2, p3 = (corners[:, corner, :, None, None] for corner in range(4))  # [B, 2, 1, 1]
    (ax, ay), (bx, by), (sx, sy) = ((d[:, 0], d[:, 1]) for d in (p1 - p2, p3 - p2, p0 - p1 + p2 - p3))
    det = ax * by - bx * ay
    g, h = (sx * by - bx * sy) / det, (ax * sy - sx * ay) / det
    u = ((torch.arange(width, device=corners.device).double() + 0.5) / width).view(1, 1, -1)
    v = ((torch.arange(height, device=corners.device).double() + 0.5) / height).view(1, -1, 1)
    depth = g * u + h * v + 1
    x, y = (
        ((p1 - p0)[:, axis] + g * p1[:, axis]) * u + ((p3 - p0)[:, axis] + h * p3[:, axis]) * v + p0[:, axis]
        for axis in (0, 1)
    )
    return x / depth, y / depth
