"""The guided filter in four Triton launches, fp32, whatever the number of images and maps.

Box means are taken along rows, then along columns. Each pixel adds up its own window: without running sums no error
grows along the image, and neighbours read the same cached values. The second and the fourth launch use their sums at
once, so the statistics of the guide and the 3x3 systems stay in registers. One program of the second launch serves all
maps of its pixels: the guide's part is computed once.

The guide is shifted by the mean of a coarse grid of its pixels. The result is the same, and its variances lose less to
rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.record import traced

GUIDE = 9  # planes of the guide's sums: three means, six products; each map has four


@triton.jit
def _window(offs, size, radius):
    """Return one over the number of pixels that a window around `offs` has within an image of `size`."""
    count = tl.minimum(offs + radius, size - 1) - tl.maximum(offs - radius, 0) + 1
    return 1.0 / tl.maximum(count, 1).to(tl.float32)  # beyond the image the count is 0


@triton.jit
def _shift(plane_ptr, height, width):
    """Return the mean of a grid of 16 x 16 pixels of a plane."""
    index = tl.arange(0, 256)
    offs_y, offs_x = (index // 16) * height // 16, (index % 16) * width // 16
    return tl.sum(tl.load(plane_ptr + offs_y * width + offs_x), 0) / 256


@triton.jit
def _shifts(guide_ptr, height, width):
    """Return the shift of each of a guide's three channels."""
    size = height * width
    return (
        _shift(guide_ptr, height, width),
        _shift(guide_ptr + size, height, width),
        _shift(guide_ptr + 2 * size, height, width),
    )


@triton.jit
def _tile(width, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Return the rows [BLOCK_Y, 1] and the columns [1, BLOCK_X] of this program's tile."""
    tiles = tl.cdiv(width, BLOCK_X)
    offs_y = (tl.program_id(0) // tiles) * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
    offs_x = (tl.program_id(0) % tiles) * BLOCK_X + tl.arange(0, BLOCK_X)[None]
    return offs_y, offs_x


@triton.jit
def products_kernel(
    guide_ptr, maps_ptr, sums_ptr, height, width, radius,
    NUM_MAPS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Means along rows of the guide and its products (program 0 of axis 2), of a map and its products (the others).

    Grid: (tiles, B, NUM_MAPS + 1). sums_ptr is [B, 9 + 4 NUM_MAPS, H, W].
    """
    b, part, size = tl.program_id(1).to(tl.int64), tl.program_id(2), height * width
    offs_y, offs_x = _tile(width, BLOCK_Y, BLOCK_X)
    guide_ptr += b * 3 * size
    shift1, shift2, shift3 = _shifts(guide_ptr, height, width)
    mask = (offs_y < height) & (offs_x < width)
    scale = _window(offs_x, width, radius)
    zero = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    if part == 0:
        s1, s2, s3, s11, s12, s13, s22, s23, s33 = zero, zero, zero, zero, zero, zero, zero, zero, zero
        for step in range(-radius, radius + 1):
            inside = mask & (offs_x + step >= 0) & (offs_x + step < width)
            pixel_ptr = guide_ptr + offs_y * width + offs_x + step
            i1 = tl.where(inside, tl.load(pixel_ptr, mask=inside, other=0.0) - shift1, 0.0)
            i2 = tl.where(inside, tl.load(pixel_ptr + size, mask=inside, other=0.0) - shift2, 0.0)
            i3 = tl.where(inside, tl.load(pixel_ptr + 2 * size, mask=inside, other=0.0) - shift3, 0.0)
            s1, s2, s3 = s1 + i1, s2 + i2, s3 + i3
            s11, s12, s13 = s11 + i1 * i1, s12 + i1 * i2, s13 + i1 * i3
            s22, s23, s33 = s22 + i2 * i2, s23 + i2 * i3, s33 + i3 * i3
        out_ptr = sums_ptr + b * (9 + 4 * NUM_MAPS) * size + offs_y * width + offs_x
        tl.store(out_ptr, s1 * scale, mask=mask)
        tl.store(out_ptr + size, s2 * scale, mask=mask)
        tl.store(out_ptr + 2 * size, s3 * scale, mask=mask)
        tl.store(out_ptr + 3 * size, s11 * scale, mask=mask)
        tl.store(out_ptr + 4 * size, s12 * scale, mask=mask)
        tl.store(out_ptr + 5 * size, s13 * scale, mask=mask)
        tl.store(out_ptr + 6 * size, s22 * scale, mask=mask)
        tl.store(out_ptr + 7 * size, s23 * scale, mask=mask)
        tl.store(out_ptr + 8 * size, s33 * scale, mask=mask)
    else:
        p, p1, p2, p3 = zero, zero, zero, zero
        map_ptr = maps_ptr + (b * NUM_MAPS + part - 1) * size
        for step in range(-radius, radius + 1):
            inside = mask & (offs_x + step >= 0) & (offs_x + step < width)
            offs = offs_y * width + offs_x + step
            value = tl.load(map_ptr + offs, mask=inside, other=0.0)
            pixel_ptr = guide_ptr + offs
            p += value
            p1 += value * (tl.load(pixel_ptr, mask=inside, other=0.0) - shift1)
            p2 += value * (tl.load(pixel_ptr + size, mask=inside, other=0.0) - shift2)
            p3 += value * (tl.load(pixel_ptr + 2 * size, mask=inside, other=0.0) - shift3)
        out_ptr = sums_ptr + (b * (9 + 4 * NUM_MAPS) + 9 + 4 * (part - 1)) * size + offs_y * width + offs_x
        tl.store(out_ptr, p * scale, mask=mask)
        tl.store(out_ptr + size, p1 * scale, mask=mask)
        tl.store(out_ptr + 2 * size, p2 * scale, mask=mask)
        tl.store(out_ptr + 3 * size, p3 * scale, mask=mask)


@triton.jit
def lines_kernel(
    sums_ptr, lines_ptr, height, width, radius, eps,
    NUM_MAPS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Means along columns, and each window's line: offset and slope of a map over the guide. Grid: (tiles, B).

    The 3x3 covariance is factored as L D L^T, as in `guided_filter.py`. lines_ptr is [B, NUM_MAPS, 4, H, W].
    """
    eps = tl.cast(eps, tl.float32)  # torch compiles numbers as fp64
    b, size = tl.program_id(1).to(tl.int64), height * width
    offs_y, offs_x = _tile(width, BLOCK_Y, BLOCK_X)
    mask = (offs_y < height) & (offs_x < width)
    scale = _window(offs_y, height, radius)
    zero = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    m1, m2, m3, s11, s12, s13, s22, s23, s33 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    sums_ptr += b * (9 + 4 * NUM_MAPS) * size + offs_y * width + offs_x
    for step in range(-radius, radius + 1):
        inside = mask & (offs_y + step >= 0) & (offs_y + step < height)
        row_ptr = sums_ptr + step * width
        m1 += tl.load(row_ptr, mask=inside, other=0.0)
        m2 += tl.load(row_ptr + size, mask=inside, other=0.0)
        m3 += tl.load(row_ptr + 2 * size, mask=inside, other=0.0)
        s11 += tl.load(row_ptr + 3 * size, mask=inside, other=0.0)
        s12 += tl.load(row_ptr + 4 * size, mask=inside, other=0.0)
        s13 += tl.load(row_ptr + 5 * size, mask=inside, other=0.0)
        s22 += tl.load(row_ptr + 6 * size, mask=inside, other=0.0)
        s23 += tl.load(row_ptr + 7 * size, mask=inside, other=0.0)
        s33 += tl.load(row_ptr + 8 * size, mask=inside, other=0.0)
    m1, m2, m3 = m1 * scale, m2 * scale, m3 * scale
    s12, s13, s23 = s12 * scale - m1 * m2, s13 * scale - m1 * m3, s23 * scale - m2 * m3
    d1 = tl.maximum(s11 * scale - m1 * m1, 0.0) + eps
    l21, l31 = s12 / d1, s13 / d1
    d2 = tl.maximum(s22 * scale - m2 * m2 - l21 * s12, 0.0) + eps
    rest = s23 - l31 * s12
    l32 = rest / d2
    d3 = tl.maximum(s33 * scale - m3 * m3 - l31 * s13 - l32 * rest, 0.0) + eps
    for num in range(NUM_MAPS):
        p, p1, p2, p3 = zero, zero, zero, zero
        for step in range(-radius, radius + 1):
            inside = mask & (offs_y + step >= 0) & (offs_y + step < height)
            row_ptr = sums_ptr + (9 + 4 * num) * size + step * width
            p += tl.load(row_ptr, mask=inside, other=0.0)
            p1 += tl.load(row_ptr + size, mask=inside, other=0.0)
            p2 += tl.load(row_ptr + 2 * size, mask=inside, other=0.0)
            p3 += tl.load(row_ptr + 3 * size, mask=inside, other=0.0)
        p = p * scale
        y1 = p1 * scale - m1 * p
        y2 = p2 * scale - m2 * p - l21 * y1
        a3 = (p3 * scale - m3 * p - l31 * y1 - l32 * y2) / d3
        a2 = y2 / d2 - l32 * a3
        a1 = y1 / d1 - l21 * a2 - l31 * a3
        out_ptr = lines_ptr + (b * NUM_MAPS + num) * 4 * size + offs_y * width + offs_x
        tl.store(out_ptr, p - a1 * m1 - a2 * m2 - a3 * m3, mask=mask)
        tl.store(out_ptr + size, a1, mask=mask)
        tl.store(out_ptr + 2 * size, a2, mask=mask)
        tl.store(out_ptr + 3 * size, a3, mask=mask)


@triton.jit
def rows_kernel(lines_ptr, means_ptr, height, width, radius, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Means of the lines along rows. Grid: (tiles, B * NUM_MAPS * 4 planes)."""
    plane = tl.program_id(1).to(tl.int64) * height * width
    offs_y, offs_x = _tile(width, BLOCK_Y, BLOCK_X)
    mask = (offs_y < height) & (offs_x < width)
    acc = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    for step in range(-radius, radius + 1):
        inside = mask & (offs_x + step >= 0) & (offs_x + step < width)
        acc += tl.load(lines_ptr + plane + offs_y * width + offs_x + step, mask=inside, other=0.0)
    tl.store(means_ptr + plane + offs_y * width + offs_x, acc * _window(offs_x, width, radius), mask=mask)


@triton.jit
def values_kernel(
    guide_ptr, means_ptr, out_ptr, height, width, radius,
    NUM_MAPS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Means of the lines along columns, and the mean line's value at the guide's pixel. Grid: (tiles, B, NUM_MAPS)."""
    b, size = tl.program_id(1).to(tl.int64), height * width
    offs_y, offs_x = _tile(width, BLOCK_Y, BLOCK_X)
    plane = b * NUM_MAPS + tl.program_id(2)
    mask = (offs_y < height) & (offs_x < width)
    guide_ptr += b * 3 * size
    shift1, shift2, shift3 = _shifts(guide_ptr, height, width)
    zero = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    acc, a1, a2, a3 = zero, zero, zero, zero
    for step in range(-radius, radius + 1):
        inside = mask & (offs_y + step >= 0) & (offs_y + step < height)
        row_ptr = means_ptr + plane * 4 * size + (offs_y + step) * width + offs_x
        acc += tl.load(row_ptr, mask=inside, other=0.0)
        a1 += tl.load(row_ptr + size, mask=inside, other=0.0)
        a2 += tl.load(row_ptr + 2 * size, mask=inside, other=0.0)
        a3 += tl.load(row_ptr + 3 * size, mask=inside, other=0.0)
    pixel_ptr = guide_ptr + offs_y * width + offs_x
    acc += a1 * (tl.load(pixel_ptr, mask=mask, other=0.0) - shift1)
    acc += a2 * (tl.load(pixel_ptr + size, mask=mask, other=0.0) - shift2)
    acc += a3 * (tl.load(pixel_ptr + 2 * size, mask=mask, other=0.0) - shift3)
    tl.store(out_ptr + plane * size + offs_y * width + offs_x, acc * _window(offs_y, height, radius), mask=mask)


KERNELS = (products_kernel, lines_kernel, rows_kernel, values_kernel)


def types(kernel: triton.JITFunction) -> dict[str, str]:
    """Return the Triton types of the run-time arguments of one of the four kernels."""
    kinds = {"height": "i32", "width": "i32", "radius": "i32", "eps": "fp32"}
    names = (name for name in kernel.arg_names if not name.isupper())
    return {name: kinds.get(name, "*fp32") for name in names}


def guided_filter(
    guide: Tensor, maps: Tensor, radius: int, eps: float, *, config: dict[str, int] | None = None
) -> Tensor:
    """Smooth maps [B, K, H, W] inside regions of a guide [B, 3, H, W] in 0..1.

    Args:
        guide: [B, 3, H, W] in 0..1.
        maps: [B, K, H, W].
        radius: half width of the window; it may exceed the image.
        eps: added to the variance of each channel.
        config: of the launches; None is what `tuned.json` has.

    Returns:
        [B, K, H, W] fp32.
    """
    guide, maps = guide.float().contiguous(), maps.float().contiguous()
    size_b, num, height, width = maps.shape
    facts = {"height": height, "width": width, "radius": radius}
    config = dict(config) if config else tuned.launch("guided_filter", maps.device, **facts)
    tile = {"BLOCK_Y": config.pop("rows"), "BLOCK_X": config.pop("columns"), **config}
    tiles = triton.cdiv(height, tile["BLOCK_Y"]) * triton.cdiv(width, tile["BLOCK_X"])
    across, down = min(radius, width - 1), min(radius, height - 1)
    sums = torch.empty(size_b, GUIDE + 4 * num, height, width, device=maps.device)
    lines = torch.empty(size_b, num, 4, height, width, device=maps.device)
    means, out = torch.empty_like(lines), torch.empty(maps.shape, device=maps.device)
    with torch.cuda.device_of(maps):
        kernel = wrap_triton(products_kernel) if traced(maps) else products_kernel
        kernel[(tiles, size_b, num + 1)](guide, maps, sums, height, width, across, NUM_MAPS=num, **tile)
        kernel = wrap_triton(lines_kernel) if traced(maps) else lines_kernel
        kernel[(tiles, size_b)](sums, lines, height, width, down, eps, NUM_MAPS=num, **tile)
        kernel = wrap_triton(rows_kernel) if traced(maps) else rows_kernel
        kernel[(tiles, size_b * num * 4)](lines, means, height, width, across, **tile)
        kernel = wrap_triton(values_kernel) if traced(maps) else values_kernel
        kernel[(tiles, size_b, num)](guide, means, out, height, width, down, NUM_MAPS=num, **tile)
    return out
