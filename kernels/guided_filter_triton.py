"""The guided filter in four Triton launches, fp32, whatever the number of images and maps.

Box means are taken along rows, then along columns, each pixel adding its own window: no running sums, so no error grows
along the image, and the windows of neighbours meet in the cache. The second and the fourth launch use their sums at
once: the statistics of the guide and the 3x3 systems never leave the registers, and one program of the second serves
all maps of its pixels, so that the guide's share is done once.

The guide is shifted by the mean of a coarse grid of its own pixels, which leaves the result alone and takes most of the
rounding out of its variances.
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
def _window(at, size, radius):
    """Return one over the number of pixels that a window at `at` has within an image of `size`."""
    count = tl.minimum(at + radius, size - 1) - tl.maximum(at - radius, 0) + 1
    return 1.0 / tl.maximum(count, 1).to(tl.float32)  # beyond the image nothing is left


@triton.jit
def _shift(plane, height, width):
    """Return the mean of a grid of 16 x 16 pixels of a plane."""
    at = tl.arange(0, 256)
    rows, columns = (at // 16) * height // 16, (at % 16) * width // 16
    return tl.sum(tl.load(plane + rows * width + columns), 0) / 256


@triton.jit
def products_kernel(
    Guide, Maps, Sums, height, width, radius, NUM: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr
):  # fmt: skip
    """Means along rows of the guide and its products (program 0 of axis 2), of a map and its products (the others).

    Grid: (tiles, B, NUM + 1). Sums [B, 9 + 4 NUM, H, W].
    """
    tiles = tl.cdiv(width, BX)
    b, part, size = tl.program_id(1).to(tl.int64), tl.program_id(2), height * width
    y = (tl.program_id(0) // tiles) * BY + tl.arange(0, BY)[:, None]
    x = (tl.program_id(0) % tiles) * BX + tl.arange(0, BX)[None]
    guide = Guide + b * 3 * size
    shift1, shift2 = _shift(guide, height, width), _shift(guide + size, height, width)
    shift3 = _shift(guide + 2 * size, height, width)
    keep = (y < height) & (x < width)
    scale = _window(x, width, radius)
    zero = tl.zeros((BY, BX), tl.float32)
    if part == 0:
        s1, s2, s3, s11, s12, s13, s22, s23, s33 = zero, zero, zero, zero, zero, zero, zero, zero, zero
        for step in range(-radius, radius + 1):
            inside = keep & (x + step >= 0) & (x + step < width)
            at = guide + y * width + x + step
            i1 = tl.where(inside, tl.load(at, mask=inside, other=0.0) - shift1, 0.0)
            i2 = tl.where(inside, tl.load(at + size, mask=inside, other=0.0) - shift2, 0.0)
            i3 = tl.where(inside, tl.load(at + 2 * size, mask=inside, other=0.0) - shift3, 0.0)
            s1, s2, s3 = s1 + i1, s2 + i2, s3 + i3
            s11, s12, s13 = s11 + i1 * i1, s12 + i1 * i2, s13 + i1 * i3
            s22, s23, s33 = s22 + i2 * i2, s23 + i2 * i3, s33 + i3 * i3
        out = Sums + b * (9 + 4 * NUM) * size + y * width + x
        tl.store(out, s1 * scale, mask=keep)
        tl.store(out + size, s2 * scale, mask=keep)
        tl.store(out + 2 * size, s3 * scale, mask=keep)
        tl.store(out + 3 * size, s11 * scale, mask=keep)
        tl.store(out + 4 * size, s12 * scale, mask=keep)
        tl.store(out + 5 * size, s13 * scale, mask=keep)
        tl.store(out + 6 * size, s22 * scale, mask=keep)
        tl.store(out + 7 * size, s23 * scale, mask=keep)
        tl.store(out + 8 * size, s33 * scale, mask=keep)
    else:
        p, p1, p2, p3 = zero, zero, zero, zero
        maps = Maps + (b * NUM + part - 1) * size
        for step in range(-radius, radius + 1):
            inside = keep & (x + step >= 0) & (x + step < width)
            offset = y * width + x + step
            value = tl.load(maps + offset, mask=inside, other=0.0)
            at = guide + offset
            p += value
            p1 += value * (tl.load(at, mask=inside, other=0.0) - shift1)
            p2 += value * (tl.load(at + size, mask=inside, other=0.0) - shift2)
            p3 += value * (tl.load(at + 2 * size, mask=inside, other=0.0) - shift3)
        out = Sums + (b * (9 + 4 * NUM) + 9 + 4 * (part - 1)) * size + y * width + x
        tl.store(out, p * scale, mask=keep)
        tl.store(out + size, p1 * scale, mask=keep)
        tl.store(out + 2 * size, p2 * scale, mask=keep)
        tl.store(out + 3 * size, p3 * scale, mask=keep)


@triton.jit
def lines_kernel(
    Sums, Lines, height, width, radius, eps, NUM: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr
):  # fmt: skip
    """Means along columns, and each window's line: offset and slope of a map over the guide. Grid: (tiles, B).

    The 3x3 covariance is factored as L D L^T, as in `guided_filter.py`. Lines [B, NUM, 4, H, W].
    """
    tiles = tl.cdiv(width, BX)
    b, size = tl.program_id(1).to(tl.int64), height * width
    y = (tl.program_id(0) // tiles) * BY + tl.arange(0, BY)[:, None]
    x = (tl.program_id(0) % tiles) * BX + tl.arange(0, BX)[None]
    keep = (y < height) & (x < width)
    scale = _window(y, height, radius)
    zero = tl.zeros((BY, BX), tl.float32)
    m1, m2, m3, s11, s12, s13, s22, s23, s33 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    sums = Sums + b * (9 + 4 * NUM) * size + y * width + x
    for step in range(-radius, radius + 1):
        inside = keep & (y + step >= 0) & (y + step < height)
        at = sums + step * width
        m1 += tl.load(at, mask=inside, other=0.0)
        m2 += tl.load(at + size, mask=inside, other=0.0)
        m3 += tl.load(at + 2 * size, mask=inside, other=0.0)
        s11 += tl.load(at + 3 * size, mask=inside, other=0.0)
        s12 += tl.load(at + 4 * size, mask=inside, other=0.0)
        s13 += tl.load(at + 5 * size, mask=inside, other=0.0)
        s22 += tl.load(at + 6 * size, mask=inside, other=0.0)
        s23 += tl.load(at + 7 * size, mask=inside, other=0.0)
        s33 += tl.load(at + 8 * size, mask=inside, other=0.0)
    m1, m2, m3 = m1 * scale, m2 * scale, m3 * scale
    s12, s13, s23 = s12 * scale - m1 * m2, s13 * scale - m1 * m3, s23 * scale - m2 * m3
    d1 = tl.maximum(s11 * scale - m1 * m1, 0.0) + eps
    l21, l31 = s12 / d1, s13 / d1
    d2 = tl.maximum(s22 * scale - m2 * m2 - l21 * s12, 0.0) + eps
    rest = s23 - l31 * s12
    l32 = rest / d2
    d3 = tl.maximum(s33 * scale - m3 * m3 - l31 * s13 - l32 * rest, 0.0) + eps
    for num in range(NUM):
        mine = sums + (9 + 4 * num) * size
        p, p1, p2, p3 = zero, zero, zero, zero
        for step in range(-radius, radius + 1):
            inside = keep & (y + step >= 0) & (y + step < height)
            at = mine + step * width
            p += tl.load(at, mask=inside, other=0.0)
            p1 += tl.load(at + size, mask=inside, other=0.0)
            p2 += tl.load(at + 2 * size, mask=inside, other=0.0)
            p3 += tl.load(at + 3 * size, mask=inside, other=0.0)
        p = p * scale
        y1 = p1 * scale - m1 * p
        y2 = p2 * scale - m2 * p - l21 * y1
        a3 = (p3 * scale - m3 * p - l31 * y1 - l32 * y2) / d3
        a2 = y2 / d2 - l32 * a3
        a1 = y1 / d1 - l21 * a2 - l31 * a3
        out = Lines + (b * NUM + num) * 4 * size + y * width + x
        tl.store(out, p - a1 * m1 - a2 * m2 - a3 * m3, mask=keep)
        tl.store(out + size, a1, mask=keep)
        tl.store(out + 2 * size, a2, mask=keep)
        tl.store(out + 3 * size, a3, mask=keep)


@triton.jit
def rows_kernel(Lines, Means, height, width, radius, BY: tl.constexpr, BX: tl.constexpr):
    """Means of the lines along rows. Grid: (tiles, B * NUM * 4 planes)."""
    tiles = tl.cdiv(width, BX)
    plane = tl.program_id(1).to(tl.int64) * height * width
    y = (tl.program_id(0) // tiles) * BY + tl.arange(0, BY)[:, None]
    x = (tl.program_id(0) % tiles) * BX + tl.arange(0, BX)[None]
    keep = (y < height) & (x < width)
    total = tl.zeros((BY, BX), tl.float32)
    for step in range(-radius, radius + 1):
        inside = keep & (x + step >= 0) & (x + step < width)
        total += tl.load(Lines + plane + y * width + x + step, mask=inside, other=0.0)
    tl.store(Means + plane + y * width + x, total * _window(x, width, radius), mask=keep)


@triton.jit
def values_kernel(
    Guide, Means, Out, height, width, radius, NUM: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr
):  # fmt: skip
    """Means of the lines along columns, and the mean line's value at the guide's pixel. Grid: (tiles, B, NUM)."""
    tiles = tl.cdiv(width, BX)
    b, size = tl.program_id(1).to(tl.int64), height * width
    row = b * NUM + tl.program_id(2)
    y = (tl.program_id(0) // tiles) * BY + tl.arange(0, BY)[:, None]
    x = (tl.program_id(0) % tiles) * BX + tl.arange(0, BX)[None]
    keep = (y < height) & (x < width)
    guide = Guide + b * 3 * size
    shift1, shift2 = _shift(guide, height, width), _shift(guide + size, height, width)
    shift3 = _shift(guide + 2 * size, height, width)
    zero = tl.zeros((BY, BX), tl.float32)
    c, a1, a2, a3 = zero, zero, zero, zero
    for step in range(-radius, radius + 1):
        inside = keep & (y + step >= 0) & (y + step < height)
        at = Means + row * 4 * size + (y + step) * width + x
        c += tl.load(at, mask=inside, other=0.0)
        a1 += tl.load(at + size, mask=inside, other=0.0)
        a2 += tl.load(at + 2 * size, mask=inside, other=0.0)
        a3 += tl.load(at + 3 * size, mask=inside, other=0.0)
    pixel = guide + y * width + x
    c += a1 * (tl.load(pixel, mask=keep, other=0.0) - shift1)
    c += a2 * (tl.load(pixel + size, mask=keep, other=0.0) - shift2)
    c += a3 * (tl.load(pixel + 2 * size, mask=keep, other=0.0) - shift3)
    tl.store(Out + row * size + y * width + x, c * _window(y, height, radius), mask=keep)


KERNELS = (products_kernel, lines_kernel, rows_kernel, values_kernel)


def types(kernel: triton.JITFunction) -> dict[str, str]:
    """Return the Triton types of the run-time arguments of one of the four kernels."""
    kinds = {"height": "i32", "width": "i32", "radius": "i32", "eps": "fp32"}
    names = (name for name in kernel.arg_names if name not in ("NUM", "BY", "BX"))
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
    tile = {"BY": config.pop("rows"), "BX": config.pop("columns"), **config}
    tiles = triton.cdiv(height, tile["BY"]) * triton.cdiv(width, tile["BX"])
    across, down = min(radius, width - 1), min(radius, height - 1)
    sums = torch.empty(size_b, GUIDE + 4 * num, height, width, device=maps.device)
    lines = torch.empty(size_b, num, 4, height, width, device=maps.device)
    means, out = torch.empty_like(lines), torch.empty(maps.shape, device=maps.device)
    with torch.cuda.device_of(maps):
        kernel = wrap_triton(products_kernel) if traced(maps) else products_kernel
        kernel[(tiles, size_b, num + 1)](guide, maps, sums, height, width, across, NUM=num, **tile)
        kernel = wrap_triton(lines_kernel) if traced(maps) else lines_kernel
        kernel[(tiles, size_b)](sums, lines, height, width, down, eps, NUM=num, **tile)
        kernel = wrap_triton(rows_kernel) if traced(maps) else rows_kernel
        kernel[(tiles, size_b * num * 4)](lines, means, height, width, across, **tile)
        kernel = wrap_triton(values_kernel) if traced(maps) else values_kernel
        kernel[(tiles, size_b, num)](guide, means, out, height, width, down, NUM=num, **tile)
    return out
