"""One step of the windowed CRF in one Triton launch, fp32; the guide's norm in another, once for all steps.

A program owns a run of pixels of one image and several candidates with all their labels: the weight of a pair of
pixels is computed once for all of them, and the softmax over labels follows in registers. The Gaussian term has no
window: it is two small matrix products along the sides, torch's own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.mean_field import Bilateral, Gaussian, gaussian_weights
from diffumask_fast.kernels.record import traced


@triton.jit
def _weight(guide_ptr, i1, i2, i3, offs, inside, size, dy, dx, space, colour):
    """Return exp(-|dp|^2 space - |dI|^2 colour) between a pixel of colours i1, i2, i3 and that at `offs`; 0 outside."""
    e1 = i1 - tl.load(guide_ptr + offs, mask=inside, other=0.0)
    e2 = i2 - tl.load(guide_ptr + size + offs, mask=inside, other=0.0)
    e3 = i3 - tl.load(guide_ptr + 2 * size + offs, mask=inside, other=0.0)
    power = (dy * dy + dx * dx).to(tl.float32) * space + (e1 * e1 + e2 * e2 + e3 * e3) * colour
    return tl.where(inside, tl.exp(-power), 0.0)


@triton.jit
def norm_kernel(
    guide_ptr, norm_ptr, height, width, dilation, space, colour, HALF: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One over the root of the sum of a pixel's weights. Grid: (blocks, B)."""
    space, colour = tl.cast(space, tl.float32), tl.cast(colour, tl.float32)  # torch compiles numbers as fp64
    size = height * width
    b, offs_n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, offs_y, offs_x = offs_n < size, offs_n // width, offs_n % width
    guide_ptr += b * 3 * size
    i1 = tl.load(guide_ptr + offs_n, mask=mask_n, other=0.0)
    i2 = tl.load(guide_ptr + size + offs_n, mask=mask_n, other=0.0)
    i3 = tl.load(guide_ptr + 2 * size + offs_n, mask=mask_n, other=0.0)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for offset in range((2 * HALF + 1) * (2 * HALF + 1)):
        dy, dx = (offset // (2 * HALF + 1) - HALF) * dilation, (offset % (2 * HALF + 1) - HALF) * dilation
        inside = mask_n & (offs_y + dy >= 0) & (offs_y + dy < height) & (offs_x + dx >= 0) & (offs_x + dx < width)
        acc += _weight(guide_ptr, i1, i2, i3, offs_n + dy * width + dx, inside, size, dy, dx, space, colour)
    tl.store(norm_ptr + b * size + offs_n, 1.0 / tl.sqrt_rn(tl.where(mask_n, acc, 1.0)), mask=mask_n)


@triton.jit
def step_kernel(
    q_ptr, unary_ptr, smooth_ptr, guide_ptr, norm_ptr, out_ptr, height, width, dilation, space, colour, compat,
    CANDIDATES: tl.constexpr, LABELS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax over labels of -unary + smooth + compat * norm * sum of weight * norm * q.

    Grid: (blocks of BLOCK_N pixels, B, blocks of BLOCK_M candidates).
    """
    space, colour, compat = (tl.cast(space, tl.float32), tl.cast(colour, tl.float32), tl.cast(compat, tl.float32))
    size = height * width
    b, offs_n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    offs_l = tl.arange(0, BLOCK_L)[None, :, None]
    mask_n, offs_y, offs_x = offs_n < size, offs_n // width, offs_n % width
    guide_ptr += b * 3 * size
    norm_ptr += b * size
    i1 = tl.load(guide_ptr + offs_n, mask=mask_n, other=0.0)
    i2 = tl.load(guide_ptr + size + offs_n, mask=mask_n, other=0.0)
    i3 = tl.load(guide_ptr + 2 * size + offs_n, mask=mask_n, other=0.0)
    planes = ((b * CANDIDATES + offs_m) * LABELS + offs_l) * size
    mask_ml = (offs_m < CANDIDATES) & (offs_l < LABELS)
    acc = tl.zeros((BLOCK_M, BLOCK_L, BLOCK_N), tl.float32)
    for offset in range((2 * HALF + 1) * (2 * HALF + 1)):
        dy, dx = (offset // (2 * HALF + 1) - HALF) * dilation, (offset % (2 * HALF + 1) - HALF) * dilation
        inside = mask_n & (offs_y + dy >= 0) & (offs_y + dy < height) & (offs_x + dx >= 0) & (offs_x + dx < width)
        neighbour = offs_n + dy * width + dx
        weight = _weight(guide_ptr, i1, i2, i3, neighbour, inside, size, dy, dx, space, colour)
        weight = weight * tl.load(norm_ptr + neighbour, mask=inside, other=0.0)
        q = tl.load(q_ptr + planes + neighbour[None, None], mask=mask_ml & inside[None, None], other=0.0)
        acc += q * weight[None, None]
    mask = mask_ml & mask_n[None, None]
    offs = planes + offs_n[None, None]
    norm = tl.load(norm_ptr + offs_n, mask=mask_n, other=0.0) * compat
    score = acc * norm[None, None] + tl.load(smooth_ptr + offs, mask=mask, other=0.0)
    score = score - tl.load(unary_ptr + offs, mask=mask, other=0.0)
    score = tl.where(offs_l < LABELS, score, float("-inf"))
    score = tl.exp(score - tl.max(score, 1)[:, None])
    tl.store(out_ptr + offs, score / tl.sum(score, 1)[:, None], mask=mask)


KERNELS = (norm_kernel, step_kernel)


def constants(kernel: triton.JITFunction, candidates: int, labels: int, window: int, config: dict) -> dict[str, int]:
    """Return the compile-time arguments of one of the two kernels."""
    wanted = {
        "CANDIDATES": candidates, "LABELS": labels, "HALF": window // 2, "BLOCK_N": config["block"],
        "BLOCK_M": min(triton.next_power_of_2(candidates), config["candidates"]),
        "BLOCK_L": triton.next_power_of_2(labels),
    }  # fmt: skip
    return {name: value for name, value in wanted.items() if name in kernel.arg_names}


def types(kernel: triton.JITFunction) -> dict[str, str]:
    """Return the Triton types of the run-time arguments of one of the two kernels."""
    kinds = dict.fromkeys(("height", "width", "dilation"), "i32") | dict.fromkeys(("space", "colour", "compat"), "fp32")
    names = (name for name in kernel.arg_names if not name.isupper())
    return {name: kinds.get(name, "*fp32") for name in names}


def bilateral_norm(guide: Tensor, *, window: int, dilation: int, bilateral: Bilateral) -> Tensor:
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
    bilateral: Bilateral,
    gaussian: Gaussian,
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
    rows, columns = (gaussian_weights(length, gaussian[1], q.device) for length in (height, width))
    smooth = (gaussian[0] * rows) @ q @ columns
    out = torch.empty_like(q)
    config = config or _config(q.device, window)
    fixed = constants(step_kernel, candidates, labels, window, config)
    grid = triton.cdiv(height * width, config["block"]), size_b, triton.cdiv(candidates, fixed["BLOCK_M"])
    kernel = wrap_triton(step_kernel) if traced(q) else step_kernel
    with torch.cuda.device_of(q):
        kernel[grid](
            q, unary, smooth, guide, norm, out, height, width, dilation, *_powers(bilateral), bilateral[0],
            **fixed, num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return out


def _config(device: torch.device, window: int) -> dict[str, int]:
    return tuned.launch("mean_field", device, window=window)


def _powers(bilateral: Bilateral) -> tuple[float, float]:
    return 0.5 / bilateral[1] ** 2, 0.5 / bilateral[2] ** 2
