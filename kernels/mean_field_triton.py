"""One step of the windowed CRF in one Triton launch, fp32; the guide's norm in another, once for all steps.

A program owns a run of pixels of one image and several candidates with all their labels: the weight of a pair of
pixels is made once and meets them all, and the softmax over labels follows in registers. The Gaussian term has no
window: it is two small matrix products along the sides, torch's own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.mean_field import _gaussian
from diffumask_fast.kernels.record import traced


@triton.jit
def _weight(guide, i1, i2, i3, at, inside, size, dy, dx, space, colour):
    """Return exp(-|dp|^2 space - |dI|^2 colour) between a pixel of colours i1, i2, i3 and that at `at`; 0 outside."""
    e1 = i1 - tl.load(guide + at, mask=inside, other=0.0)
    e2 = i2 - tl.load(guide + size + at, mask=inside, other=0.0)
    e3 = i3 - tl.load(guide + 2 * size + at, mask=inside, other=0.0)
    power = (dy * dy + dx * dx).to(tl.float32) * space + (e1 * e1 + e2 * e2 + e3 * e3) * colour
    return tl.where(inside, tl.exp(-power), 0.0)


@triton.jit
def norm_kernel(Guide, Norm, height, width, dilation, space, colour, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """One over the root of the sum of a pixel's weights. Grid: (blocks, B)."""
    size = height * width
    b, pixel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep, y, x = pixel < size, pixel // width, pixel % width
    guide = Guide + b * 3 * size
    i1 = tl.load(guide + pixel, mask=keep, other=0.0)
    i2 = tl.load(guide + size + pixel, mask=keep, other=0.0)
    i3 = tl.load(guide + 2 * size + pixel, mask=keep, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range((2 * HALF + 1) * (2 * HALF + 1)):
        dy, dx = (offset // (2 * HALF + 1) - HALF) * dilation, (offset % (2 * HALF + 1) - HALF) * dilation
        inside = keep & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        total += _weight(guide, i1, i2, i3, pixel + dy * width + dx, inside, size, dy, dx, space, colour)
    tl.store(Norm + b * size + pixel, 1.0 / tl.sqrt_rn(tl.where(keep, total, 1.0)), mask=keep)


@triton.jit
def step_kernel(
    Q, Unary, Smooth, Guide, Norm, Out, height, width, dilation, space, colour, compat,
    M: tl.constexpr, L: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax over labels of -unary + smooth + compat * norm * sum of weight * norm * q. Grid: (blocks, B, M / BM)."""
    size = height * width
    b, pixel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m, label = tl.program_id(2) * BM + tl.arange(0, BM)[:, None, None], tl.arange(0, BL)[None, :, None]
    keep, y, x = pixel < size, pixel // width, pixel % width
    guide, norm = Guide + b * 3 * size, Norm + b * size
    i1 = tl.load(guide + pixel, mask=keep, other=0.0)
    i2 = tl.load(guide + size + pixel, mask=keep, other=0.0)
    i3 = tl.load(guide + 2 * size + pixel, mask=keep, other=0.0)
    planes = ((b * M + m) * L + label) * size
    known = (m < M) & (label < L)
    message = tl.zeros((BM, BL, BLOCK), tl.float32)
    for offset in range((2 * HALF + 1) * (2 * HALF + 1)):
        dy, dx = (offset // (2 * HALF + 1) - HALF) * dilation, (offset % (2 * HALF + 1) - HALF) * dilation
        inside = keep & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        at = pixel + dy * width + dx
        weight = _weight(guide, i1, i2, i3, at, inside, size, dy, dx, space, colour)
        weight = weight * tl.load(norm + at, mask=inside, other=0.0)
        found = tl.load(Q + planes + at[None, None], mask=known & inside[None, None], other=0.0)
        message += found * weight[None, None]
    whole = known & keep[None, None]
    at = planes + pixel[None, None]
    mine = tl.load(norm + pixel, mask=keep, other=0.0) * compat
    score = message * mine[None, None] + tl.load(Smooth + at, mask=whole, other=0.0)
    score = score - tl.load(Unary + at, mask=whole, other=0.0)
    score = tl.where(label < L, score, float("-inf"))
    score = tl.exp(score - tl.max(score, 1)[:, None])
    tl.store(Out + at, score / tl.sum(score, 1)[:, None], mask=whole)


KERNELS = (norm_kernel, step_kernel)


def constants(kernel: triton.JITFunction, candidates: int, labels: int, window: int, config: dict) -> dict[str, int]:
    """Return the compile-time arguments of one of the two kernels."""
    wanted = {
        "M": candidates, "L": labels, "HALF": window // 2, "BLOCK": config["block"],
        "BM": min(triton.next_power_of_2(candidates), config["candidates"]), "BL": triton.next_power_of_2(labels),
    }  # fmt: skip
    return {name: value for name, value in wanted.items() if name in kernel.arg_names}


def types(kernel: triton.JITFunction) -> dict[str, str]:
    """Return the Triton types of the run-time arguments of one of the two kernels."""
    kinds = dict.fromkeys(("height", "width", "dilation"), "i32") | dict.fromkeys(("space", "colour", "compat"), "fp32")
    names = (name for name in kernel.arg_names if name not in ("M", "L", "HALF", "BM", "BL", "BLOCK"))
    return {name: kinds.get(name, "*fp32") for name in names}


def bilateral_norm(guide: Tensor, *, window: int, dilation: int, bilateral: tuple[float, float, float]) -> Tensor:
    """Return the norm [B, 1, H, W] fp32 of the bilateral weights of a guide [B, 3, H, W] in 0..255."""
    guide = guide.float().contiguous()
    size_b, _, height, width = guide.shape
    norm = torch.empty(size_b, 1, height, width, device=guide.device)
    config = _config(guide.device, window)
    fixed = constants(norm_kernel, 1, 1, window, config)
    kernel = wrap_triton(norm_kernel) if traced(guide) else norm_kernel
    with torch.cuda.device_of(guide):
        kernel[(triton.cdiv(height * width, config["block"]), size_b)](
            guide, norm, height, width, dilation, *_powers(bilateral),
            **fixed, num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return norm


def mean_field(
    q: Tensor,
    unary: Tensor,
    guide: Tensor,
    *,
    window: int,
    dilation: int,
    bilateral: tuple[float, float, float],
    gaussian: tuple[float, float],
    norm: Tensor,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Update label probabilities once: `mean_field` with every argument given.

    Args:
        q: [B, M, L, H, W] probabilities.
        unary: [B, M, L, H, W] energies.
        guide: [B, 3, H, W] in 0..255.
        window: odd number of offsets along each side.
        dilation: pixels between two offsets.
        bilateral: c1, sxy, srgb.
        gaussian: c2, sxy.
        norm: [B, 1, H, W] from `bilateral_norm`.
        config: of the launch; None is what `tuned.json` has.

    Returns:
        [B, M, L, H, W] fp32.
    """
    q, unary, guide, norm = (x.float().contiguous() for x in (q, unary, guide, norm))
    size_b, candidates, labels, height, width = q.shape
    rows, columns = (_gaussian(length, gaussian[1], q.device) for length in (height, width))
    smooth = (gaussian[0] * rows) @ q @ columns
    out = torch.empty_like(q)
    config = config or _config(q.device, window)
    fixed = constants(step_kernel, candidates, labels, window, config)
    grid = triton.cdiv(height * width, config["block"]), size_b, triton.cdiv(candidates, fixed["BM"])
    kernel = wrap_triton(step_kernel) if traced(q) else step_kernel
    with torch.cuda.device_of(q):
        kernel[grid](
            q, unary, smooth, guide, norm, out, height, width, dilation, *_powers(bilateral), bilateral[0],
            **fixed, num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return out


def _config(device: torch.device, window: int) -> dict[str, int]:
    return tuned.launch("mean_field", device, window=window)


def _powers(bilateral: tuple[float, float, float]) -> tuple[float, float]:
    return 0.5 / bilateral[1] ** 2, 0.5 / bilateral[2] ** 2
