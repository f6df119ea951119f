"""Attention to text in one Triton pass: write the output, sum probabilities over heads in registers, add to the maps.

A program owns a block of query pixels of one sample and loops over a group of heads. There are few enough keys (128)
for a row of scores to stay in registers, so the softmax is exact and no probability is written. Keys and head channels
are each padded to two powers of two, 77 to 64 + 16 and 160 to 128 + 32: padding to one would double the arithmetic.
After the heads, the summed probabilities are multiplied by the columns, one column at a time.

If a layer has too few pixels to fill a GPU, or heads too wide for sums in registers beside them, its heads are split
over programs and the partial maps are added in a fixed order. There are no atomics, and the split depends on the layer
alone: the same input gives the same bits.

`attend_maps` makes the maps of the conditional rows alone; the output comes from elsewhere.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.attend import MAX_KEYS
from diffumask_fast.kernels.record import interpreted, traced

UNROLLED = 8  # up to so many columns are multiplied in one unrolled loop; more go four at a time
TOGETHER = 96  # heads of up to so many channels leave registers for sums over several heads
MANY_BLOCKS = 64  # with so many blocks of pixels the heads are not split
PROGRAMS = 66  # else one sample gets so many programs: a guided pair then fills 132 multiprocessors
LOG2_E = 1.4426950408889634  # the kernels compute 2^x
SUMMED = 1024  # values that one program of add_parts_kernel sums
NARROWEST = 16  # channels of a matrix product
WGMMA = 64  # from so many pixels on, Hopper multiplies tiles that it reads from shared memory by itself


@triton.jit
def _tile(ptr, offs_row, offs_column, stride, rows, columns, UPCAST: tl.constexpr):
    """Load rows that are `stride` apart, and zeros beyond the last row and column."""
    mask = (offs_row < rows)[:, None] & (offs_column < columns)[None]
    tile = tl.load(ptr + offs_row[:, None] * stride + offs_column[None], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _scores(
    q1, q2, k_ptr, stride_kt, offs_t, offs_d1, offs_d2,
    KEYS: tl.constexpr, END: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D1: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return q k^T for one part of the keys, which ends at END."""
    k1 = _tile(k_ptr, offs_t, offs_d1, stride_kt, KEYS, HEAD_DIM, UPCAST)
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if HEAD_DIM > BLOCK_D1:
        k2 = _tile(k_ptr, offs_t, offs_d2, stride_kt, KEYS, HEAD_DIM, UPCAST)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
    if KEYS < END:
        scores = tl.where((offs_t < KEYS)[None], scores, float("-inf"))
    return scores


@triton.jit
def _exponentials(
    q_ptr, k_ptr, stride_qn, stride_kt, offs_n, offs_t1, offs_t2, offs_d1, offs_d2, N, scale,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    BLOCK_D1: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return one head's 2^(scale q k^T), each row over its largest, for both parts of the keys, and 1 / their sum."""
    q1 = _tile(q_ptr, offs_n, offs_d1, stride_qn, N, HEAD_DIM, UPCAST)
    q2 = q1
    if HEAD_DIM > BLOCK_D1:
        q2 = _tile(q_ptr, offs_n, offs_d2, stride_qn, N, HEAD_DIM, UPCAST)
    p1 = _scores(q1, q2, k_ptr, stride_kt, offs_t1, offs_d1, offs_d2, KEYS, BLOCK_T1, HEAD_DIM, BLOCK_D1, UPCAST)
    p2 = p1
    m_i = tl.max(p1, 1)
    if KEYS > BLOCK_T1:
        END: tl.constexpr = BLOCK_T1 + BLOCK_T2
        p2 = _scores(q1, q2, k_ptr, stride_kt, offs_t2, offs_d1, offs_d2, KEYS, END, HEAD_DIM, BLOCK_D1, UPCAST)
        m_i = tl.maximum(m_i, tl.max(p2, 1))
    m_i *= scale
    p1 = tl.exp2(p1 * scale - m_i[:, None])
    l_i = tl.sum(p1, 1)
    if KEYS > BLOCK_T1:
        p2 = tl.exp2(p2 * scale - m_i[:, None])
        l_i += tl.sum(p2, 1)
    return p1, p2, 1.0 / l_i


@triton.jit
def _add_maps(
    sum1, sum2, columns_ptr, maps_ptr, offs_n, offs_t1, offs_t2, N, factor,
    KEYS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Multiply the summed probabilities by the columns [T, K] and write the maps [K, N], or ADD to them."""
    for start in range(0, COLUMNS, BLOCK_K):
        for step in tl.static_range(BLOCK_K):
            column = start + step
            known = column < COLUMNS
            e1 = tl.load(columns_ptr + offs_t1 * COLUMNS + column, mask=(offs_t1 < KEYS) & known, other=0.0)
            acc = tl.sum(sum1 * e1[None], 1)
            if KEYS > BLOCK_T1:
                e2 = tl.load(columns_ptr + offs_t2 * COLUMNS + column, mask=(offs_t2 < KEYS) & known, other=0.0)
                acc += tl.sum(sum2 * e2[None], 1)
            acc *= factor
            mask_n = (offs_n < N) & known
            if ADD:
                acc += tl.load(maps_ptr + column * N + offs_n, mask=mask_n, other=0.0)
            tl.store(maps_ptr + column * N + offs_n, acc, mask=mask_n)


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, columns_ptr, out_ptr, maps_ptr,
    N, first, last, scale, factor,
    stride_qb, stride_qn, stride_kb, stride_kt, stride_vb, stride_vt,
    KEYS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    BLOCK_D1: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the output of a group of heads, add their maps. Grid: (blocks of BLOCK_N pixels, B, HEADS / GROUP)."""
    scale, factor = tl.cast(scale, tl.float32), tl.cast(factor, tl.float32)  # torch compiles numbers as fp64
    b, group = tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t1, offs_t2 = tl.arange(0, BLOCK_T1), BLOCK_T1 + tl.arange(0, BLOCK_T2)
    offs_d1, offs_d2 = tl.arange(0, BLOCK_D1), BLOCK_D1 + tl.arange(0, BLOCK_D2)
    mask_n = (offs_n < N)[:, None]
    conditional = (b >= first) & (b < last)
    counted = conditional if GROUP > 1 else True  # the sums of a single head cost nothing until they are used
    sum1 = tl.zeros((BLOCK_N, BLOCK_T1), tl.float32)
    sum2 = tl.zeros((BLOCK_N, BLOCK_T2), tl.float32)
    for turn in range(GROUP):
        head = group * GROUP + turn
        p1, p2, inverse = _exponentials(
            q_ptr + b * stride_qb + head * HEAD_DIM, k_ptr + b * stride_kb + head * HEAD_DIM, stride_qn, stride_kt,
            offs_n, offs_t1, offs_t2, offs_d1, offs_d2, N, scale,
            KEYS, HEAD_DIM, BLOCK_T1, BLOCK_T2, BLOCK_D1, UPCAST,
        )  # fmt: skip
        if counted:
            sum1 += p1 * inverse[:, None]
            if KEYS > BLOCK_T1:
                sum2 += p2 * inverse[:, None]
        v = v_ptr + b * stride_vb + head * HEAD_DIM
        out = out_ptr + (b * N + offs_n[:, None]) * (HEADS * HEAD_DIM) + head * HEAD_DIM
        v1 = _tile(v, offs_t1, offs_d1, stride_vt, KEYS, HEAD_DIM, UPCAST)
        p1 = p1.to(v1.dtype)
        acc = tl.dot(p1, v1, input_precision="ieee")
        if KEYS > BLOCK_T1:
            v1 = _tile(v, offs_t2, offs_d1, stride_vt, KEYS, HEAD_DIM, UPCAST)
            p2 = p2.to(v1.dtype)
            acc = tl.dot(p2, v1, acc, input_precision="ieee")
        acc = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out + offs_d1[None], acc, mask=mask_n & (offs_d1 < HEAD_DIM)[None])
        if HEAD_DIM > BLOCK_D1:
            v2 = _tile(v, offs_t1, offs_d2, stride_vt, KEYS, HEAD_DIM, UPCAST)
            acc2 = tl.dot(p1, v2, input_precision="ieee")
            if KEYS > BLOCK_T1:
                v2 = _tile(v, offs_t2, offs_d2, stride_vt, KEYS, HEAD_DIM, UPCAST)
                acc2 = tl.dot(p2, v2, acc2, input_precision="ieee")
            acc2 = (acc2 * inverse[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out + offs_d2[None], acc2, mask=mask_n & (offs_d2 < HEAD_DIM)[None])
    if conditional:
        part = group.to(tl.int64) * (last - first) + b - first
        _add_maps(
            sum1, sum2, columns_ptr + (b - first) * KEYS * COLUMNS, maps_ptr + part * COLUMNS * N,
            offs_n, offs_t1, offs_t2, N, factor, KEYS, COLUMNS, BLOCK_T1, BLOCK_K, ADD,
        )  # fmt: skip


@triton.jit
def attend_maps_kernel(
    q_ptr, k_ptr, columns_ptr, maps_ptr,
    N, scale, factor,
    stride_qb, stride_qn, stride_kb, stride_kt,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    BLOCK_D1: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the maps of a group of heads. Grid: (blocks of BLOCK_N pixels, Bc, HEADS / GROUP)."""
    scale, factor = tl.cast(scale, tl.float32), tl.cast(factor, tl.float32)  # torch compiles numbers as fp64
    b, group = tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t1, offs_t2 = tl.arange(0, BLOCK_T1), BLOCK_T1 + tl.arange(0, BLOCK_T2)
    offs_d1, offs_d2 = tl.arange(0, BLOCK_D1), BLOCK_D1 + tl.arange(0, BLOCK_D2)
    sum1 = tl.zeros((BLOCK_N, BLOCK_T1), tl.float32)
    sum2 = tl.zeros((BLOCK_N, BLOCK_T2), tl.float32)
    for turn in range(GROUP):
        head = group * GROUP + turn
        p1, p2, inverse = _exponentials(
            q_ptr + b * stride_qb + head * HEAD_DIM, k_ptr + b * stride_kb + head * HEAD_DIM, stride_qn, stride_kt,
            offs_n, offs_t1, offs_t2, offs_d1, offs_d2, N, scale,
            KEYS, HEAD_DIM, BLOCK_T1, BLOCK_T2, BLOCK_D1, UPCAST,
        )  # fmt: skip
        sum1 += p1 * inverse[:, None]
        if KEYS > BLOCK_T1:
            sum2 += p2 * inverse[:, None]
    part = group.to(tl.int64) * tl.num_programs(1) + b
    _add_maps(
        sum1, sum2, columns_ptr + b * KEYS * COLUMNS, maps_ptr + part * COLUMNS * N,
        offs_n, offs_t1, offs_t2, N, factor, KEYS, COLUMNS, BLOCK_T1, BLOCK_K, ADD,
    )  # fmt: skip


@triton.jit
def add_parts_kernel(parts_ptr, maps_ptr, size, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of the heads' groups to the maps, one after the other."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.load(maps_ptr + offs, mask=mask, other=0.0)
    for group in range(GROUPS):
        acc += tl.load(parts_ptr + offs + group * size, mask=mask, other=0.0)
    tl.store(maps_ptr + offs, acc, mask=mask)


KERNELS = {"attend": attend_kernel, "attend_maps": attend_maps_kernel}


@functools.cache
def constants(
    kernel: str,
    pixels: int,
    keys: int,
    heads: int,
    head_dim: int,
    num: int,
    block: int,
    widest: int = MAX_KEYS,
    narrowest: int = NARROWEST,
) -> dict[str, int | bool]:
    """Return a kernel's compile-time arguments without UPCAST: a function of the layer alone, never of the batch.

    `widest` bounds the first part of the keys: fp32 products are unrolled, and 64 + 64 keys stay in registers where 128
    spill. `narrowest` is what `narrowest` returns.
    """
    groups = _groups(pixels, heads, head_dim, block)
    (t1, t2), (d1, d2) = two_powers(keys, widest), two_powers(head_dim, narrowest=narrowest)
    known = {
        "KEYS": keys, "HEADS": heads, "HEAD_DIM": head_dim, "COLUMNS": num, "GROUP": heads // groups, "BLOCK_N": block,
        "BLOCK_T1": t1, "BLOCK_T2": t2, "BLOCK_D1": d1, "BLOCK_D2": d2,
        "BLOCK_K": max(1, num) if num <= UNROLLED else 4, "ADD": groups == 1,
    }  # fmt: skip
    return {name: value for name, value in known.items() if name in KERNELS[kernel].arg_names}


def _groups(pixels: int, heads: int, head_dim: int, block: int) -> int:
    """Return the number of programs that share the heads of a block."""
    blocks = triton.cdiv(pixels, block)
    if head_dim > TOGETHER:
        return heads
    if blocks >= MANY_BLOCKS:
        return 1
    splits = (split for split in range(1, heads + 1) if heads % split == 0)
    return next((split for split in splits if blocks * split >= PROGRAMS), heads)


def narrowest(block: int, architecture: str) -> int:
    """Return the fewest channels of a part of a head.

    On Hopper the tiles of a part of 64 channels or more are all laid out alike in shared memory, 128 bytes a row. With
    two layouts at one address, the assembler that Triton 3.6 and 3.7 bring (ptxas 12.8) multiplies by a register that
    nothing has set: maps are wrong, or the GPU reports an illegal access.
    """
    return WGMMA if architecture == "sm_90" and block >= WGMMA else NARROWEST


def two_powers(size: int, widest: int | None = None, narrowest: int = NARROWEST) -> tuple[int, int]:
    """Cover a size with two powers of two, the first at most `widest`: 77 with 64 and 16.

    The second is at least `narrowest`; a size up to that is covered by the first alone.
    """
    if size <= narrowest:
        return max(NARROWEST, triton.next_power_of_2(size)), narrowest
    first = 1 << (size.bit_length() - 1)
    first = min(first, widest or first)
    return first, max(narrowest, triton.next_power_of_2(max(size - first, 1)))


def types(kernel: str, dtype: str) -> dict[str, str]:
    """Return the Triton types of a kernel's run-time arguments for tensors of "fp16", "bf16" or "fp32"."""
    kinds = {"columns_ptr": "*fp32", "maps_ptr": "*fp32", "scale": "fp32", "factor": "fp32"}
    names = KERNELS[kernel].arg_names
    names = names[: names.index("KEYS")]
    return {name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    maps: Tensor,
    *,
    heads: int,
    scale: float,
    first_conditional: int = 0,
    weight: float = 1.0,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Attend to at most 128 keys, and add the columns' maps in place.

    Args:
        q: [B, N, H*D] queries, k and v [B, T, H*D]; fp16, bf16 or fp32, any strides.
        k: keys.
        v: values.
        columns: [Bc, T, K].
        maps: [Bc, K, N] fp32, contiguous, added to in place.
        heads: H.
        scale: factor of the scores.
        first_conditional: the rows first_conditional : first_conditional + Bc own the columns.
        weight: factor of what is added.
        config: of the launch; None is what `tuned.json` has.

    Returns:
        out [B, N, H*D] in the dtype of q.
    """
    rows, pixels, width = q.shape
    (q, k, v), scale = _readable((q, k, v), scale)
    fixed, groups = _configured("attend", q, k, columns, heads, config)
    out = torch.empty(rows, pixels, width, dtype=q.dtype, device=q.device)
    parts = maps if groups == 1 else torch.empty(groups, *maps.shape, device=q.device)
    kernel = wrap_triton(attend_kernel) if traced(q) else attend_kernel
    with torch.cuda.device_of(q):
        kernel[(triton.cdiv(pixels, fixed["BLOCK_N"]), rows, groups)](
            q, k, v, columns.float().contiguous(), out, parts,
            pixels, first_conditional, first_conditional + columns.shape[0], scale, weight / heads,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), **fixed,
        )  # fmt: skip
        if groups > 1:
            _add_parts(parts, maps, groups)
    return out


def attend_maps(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    maps: Tensor,
    *,
    heads: int,
    scale: float,
    weight: float = 1.0,
    config: dict[str, int] | None = None,
) -> None:
    """Add the columns' maps of attention to at most 128 keys in place, without an output.

    Args:
        q: [Bc, N, H*D] queries and k [Bc, T, H*D] of the conditional rows; fp16, bf16 or fp32, any strides.
        k: keys.
        columns: [Bc, T, K].
        maps: [Bc, K, N] fp32, contiguous, added to in place.
        heads: H.
        scale: factor of the scores.
        weight: factor of what is added.
        config: of the launch; None is what `tuned.json` has.
    """
    rows, pixels, _ = q.shape
    (q, k), scale = _readable((q, k), scale)
    fixed, groups = _configured("attend_maps", q, k, columns, heads, config)
    parts = maps if groups == 1 else torch.empty(groups, *maps.shape, device=q.device)
    kernel = wrap_triton(attend_maps_kernel) if traced(q) else attend_maps_kernel
    with torch.cuda.device_of(q):
        kernel[(triton.cdiv(pixels, fixed["BLOCK_N"]), rows, groups)](
            q, k, columns.float().contiguous(), parts, pixels, scale, weight / heads,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), **fixed,
        )  # fmt: skip
        if groups > 1:
            _add_parts(parts, maps, groups)


def _readable(tensors: Sequence[Tensor], scale: float) -> tuple[Sequence[Tensor], float]:
    """Return tensors with dense rows, and the factor of the scores in 2^x, positive: the maximum is taken before it."""
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    if scale <= 0:
        return [tensors[0] * scale, *tensors[1:]], LOG2_E
    return tensors, scale * LOG2_E


def _configured(
    kernel: str, q: Tensor, k: Tensor, columns: Tensor, heads: int, config: dict[str, int] | None
) -> tuple[dict[str, int | bool], int]:
    """Return a kernel's compile-time arguments and launch options, and the number of groups of heads."""
    layer = {"pixels": q.shape[1], "keys": k.shape[1], "heads": heads, "head_dim": q.shape[2] // heads}
    config = dict(config) if config else tuned.launch(kernel, q.device, dtype=tuned.DTYPES[q.dtype], **layer)
    block, widest = config.pop("block"), config.pop("widest", MAX_KEYS)
    channels = narrowest(block, tuned.names(q.device)[-1])
    fixed = constants(kernel, **layer, num=columns.shape[2], block=block, widest=widest, narrowest=channels)
    upcast = interpreted() and q.dtype == torch.bfloat16  # the interpreter's bf16 is wrong
    return {**fixed, "UPCAST": upcast, **config}, heads // fixed["GROUP"]


def _add_parts(parts: Tensor, maps: Tensor, groups: int) -> None:
    kernel = wrap_triton(add_parts_kernel) if traced(maps) else add_parts_kernel
    kernel[(triton.cdiv(maps.numel(), SUMMED),)](parts, maps, maps.numel(), GROUPS=groups, BLOCK=SUMMED)
