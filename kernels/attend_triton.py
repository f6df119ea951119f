"""Text attention in one Triton pass: output written, probabilities summed over heads in registers, maps added to.

A program owns a block of query pixels of one sample and walks over a group of heads. Keys are few enough (128) that a
row of scores stays in registers, so the softmax is exact and no probability is written. Keys and head channels are each
taken as two powers of two, 77 as 64 + 16 and 160 as 128 + 32, because padding to one would double the arithmetic. The
columns meet the probabilities once, after the heads: their number costs no registers.

Where a layer has too few pixels to fill a GPU, its heads are split over programs and the partial maps are summed in a
fixed order. There are no atomics, and the split depends on the layer alone: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.attend import MAX_KEYS
from diffumask_fast.kernels.record import interpreted

COLUMNS = 16  # columns that meet the probabilities at a time
MANY_BLOCKS = 64  # blocks of pixels from which on the heads stay together
PROGRAMS = 66  # programs of one sample otherwise: a guided pair then fills 132 multiprocessors
SUMMED = 1024  # values that one program of the second stage sums


@triton.jit
def attend_kernel(
    Q, K, V, E, Out, Maps,
    stride_qb, stride_qn, stride_kb, stride_kt, stride_vb, stride_vt,
    N, first, last, scale, factor,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, NUM: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KB: tl.constexpr, ADD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of BM pixels, B, H / GROUP). UP computes in fp32: the interpreter's bf16 is wrong."""
    block, b, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    m = block * BM + tl.arange(0, BM)
    t1, d1 = tl.arange(0, T1), tl.arange(0, D1)
    t2, d2 = T1 + tl.arange(0, T2), D1 + tl.arange(0, D2)
    in_m, in_t1, in_t2, in_d1, in_d2 = m < N, t1 < T, t2 < T, d1 < D, d2 < D
    sum1 = tl.zeros((BM, T1), tl.float32)
    sum2 = tl.zeros((BM, T2), tl.float32)
    for h in range(group * GROUP, (group + 1) * GROUP):
        q = Q + b * stride_qb + h * D + m[:, None] * stride_qn
        k = K + b * stride_kb + h * D
        q1 = tl.load(q + d1[None], mask=in_m[:, None] & in_d1[None], other=0.0)
        ka = tl.load(k + t1[None] * stride_kt + d1[:, None], mask=in_t1[None] & in_d1[:, None], other=0.0)
        if UP:
            q1, ka = q1.to(tl.float32), ka.to(tl.float32)
        s1 = tl.dot(q1, ka, input_precision="ieee")
        if D > D1:
            q2 = tl.load(q + d2[None], mask=in_m[:, None] & in_d2[None], other=0.0)
            kb = tl.load(k + t1[None] * stride_kt + d2[:, None], mask=in_t1[None] & in_d2[:, None], other=0.0)
            if UP:
                q2, kb = q2.to(tl.float32), kb.to(tl.float32)
            s1 = tl.dot(q2, kb, s1, input_precision="ieee")
        s1 = tl.where(in_t1[None], s1 * scale, float("-inf"))
        top = tl.max(s1, 1)
        if T > T1:
            kc = tl.load(k + t2[None] * stride_kt + d1[:, None], mask=in_t2[None] & in_d1[:, None], other=0.0)
            if UP:
                kc = kc.to(tl.float32)
            s2 = tl.dot(q1, kc, input_precision="ieee")
            if D > D1:
                kd = tl.load(k + t2[None] * stride_kt + d2[:, None], mask=in_t2[None] & in_d2[:, None], other=0.0)
                if UP:
                    kd = kd.to(tl.float32)
                s2 = tl.dot(q2, kd, s2, input_precision="ieee")
            s2 = tl.where(in_t2[None], s2 * scale, float("-inf"))
            top = tl.maximum(top, tl.max(s2, 1))
            p2 = tl.exp(s2 - top[:, None])
        p1 = tl.exp(s1 - top[:, None])
        total = tl.sum(p1, 1)
        if T > T1:
            total += tl.sum(p2, 1)
            p2 = p2 / total[:, None]
            sum2 += p2
        p1 = p1 / total[:, None]
        sum1 += p1
        v = V + b * stride_vb + h * D
        out = Out + (b * N + m[:, None]) * (H * D) + h * D
        va = tl.load(v + t1[:, None] * stride_vt + d1[None], mask=in_t1[:, None] & in_d1[None], other=0.0)
        w1 = p1 if UP else p1.to(va.dtype)
        o1 = tl.dot(w1, va.to(tl.float32) if UP else va, input_precision="ieee")
        if T > T1:
            vb = tl.load(v + t2[:, None] * stride_vt + d1[None], mask=in_t2[:, None] & in_d1[None], other=0.0)
            w2 = p2 if UP else p2.to(vb.dtype)
            o1 = tl.dot(w2, vb.to(tl.float32) if UP else vb, o1, input_precision="ieee")
        tl.store(out + d1[None], o1.to(Out.dtype.element_ty), mask=in_m[:, None] & in_d1[None])
        if D > D1:
            vc = tl.load(v + t1[:, None] * stride_vt + d2[None], mask=in_t1[:, None] & in_d2[None], other=0.0)
            o2 = tl.dot(w1, vc.to(tl.float32) if UP else vc, input_precision="ieee")
            if T > T1:
                vd = tl.load(v + t2[:, None] * stride_vt + d2[None], mask=in_t2[:, None] & in_d2[None], other=0.0)
                o2 = tl.dot(w2, vd.to(tl.float32) if UP else vd, o2, input_precision="ieee")
            tl.store(out + d2[None], o2.to(Out.dtype.element_ty), mask=in_m[:, None] & in_d2[None])
    if (b >= first) & (b < last):
        row = b - first
        maps = Maps + ((group.to(tl.int64) * (last - first) + row) * NUM) * N + m[:, None]
        for start in range(0, NUM, KB):
            c = start + tl.arange(0, KB)
            e = E + row * T * NUM + c[None]
            e1 = tl.load(e + t1[:, None] * NUM, mask=in_t1[:, None] & (c < NUM)[None], other=0.0)
            found = tl.dot(sum1, e1, input_precision="ieee")
            if T > T1:
                e2 = tl.load(e + t2[:, None] * NUM, mask=in_t2[:, None] & (c < NUM)[None], other=0.0)
                found = tl.dot(sum2, e2, found, input_precision="ieee")
            found = found * factor
            at, keep = maps + c[None] * N, in_m[:, None] & (c < NUM)[None]
            if ADD:
                found += tl.load(at, mask=keep, other=0.0)
            tl.store(at, found, mask=keep)


@triton.jit
def add_parts_kernel(Parts, Maps, size, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of the heads' groups to the maps, one after the other."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    total = tl.load(Maps + at, mask=keep, other=0.0)
    for group in range(GROUPS):
        total += tl.load(Parts + at + group * size, mask=keep, other=0.0)
    tl.store(Maps + at, total, mask=keep)


def constants(
    pixels: int, keys: int, heads: int, head_dim: int, num: int, block: int, widest: int = MAX_KEYS
) -> dict[str, int | bool]:
    """Return the kernel's compile-time arguments, but for UP: a function of the layer alone, never of the batch.

    `widest` bounds the first part of the keys: in fp32, whose products unroll, two of 64 keep in registers what one of
    128 spills.
    """
    groups, blocks = 1, triton.cdiv(pixels, block)
    if blocks < MANY_BLOCKS:
        splits = [split for split in range(1, heads + 1) if heads % split == 0]
        groups = next((split for split in splits if blocks * split >= PROGRAMS), heads)
    (t1, t2), (d1, d2) = two_powers(keys, widest), two_powers(head_dim)
    return {
        "T": keys, "H": heads, "D": head_dim, "NUM": num, "GROUP": heads // groups, "BM": block,
        "T1": t1, "T2": t2, "D1": d1, "D2": d2, "KB": COLUMNS, "ADD": groups == 1,
    }  # fmt: skip


def two_powers(size: int, widest: int | None = None) -> tuple[int, int]:
    """Cover a size with two powers of two, each at least 16, the first at most `widest`: 77 with 64 and 16."""
    first = max(16, 1 << (size.bit_length() - 1))
    first = min(first, widest or first)
    return first, max(16, triton.next_power_of_2(max(size - first, 1)))


def types(dtype: str) -> dict[str, str]:
    """Return the Triton types of the kernel's run-time arguments for tensors of "fp16", "bf16" or "fp32"."""
    names = attend_kernel.arg_names
    kinds = {name: "i32" for name in names[: names.index("T")]}
    kinds |= {name: f"*{dtype}" for name in ("Q", "K", "V", "Out")} | {"E": "*fp32", "Maps": "*fp32"}
    return kinds | {"scale": "fp32", "factor": "fp32"}


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
    keys, num, head_dim = k.shape[1], columns.shape[2], width // heads
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    config = dict(config) if config else tuned.launch(
        "attend", q.device, dtype=tuned.DTYPES[q.dtype], heads=heads, head_dim=head_dim, pixels=pixels, keys=keys
    )  # fmt: skip
    block = config.pop("block")
    fixed = constants(pixels, keys, heads, head_dim, num, block, config.pop("widest", MAX_KEYS))
    groups = heads // fixed["GROUP"]
    out = torch.empty(rows, pixels, width, dtype=q.dtype, device=q.device)
    parts = maps if groups == 1 else torch.empty(groups, *maps.shape, device=q.device)
    traced = (lambda kernel: kernel) if interpreted() else wrap_triton
    traced(attend_kernel)[(triton.cdiv(pixels, block), rows, groups)](
        q, k, v, columns.float().contiguous(), out, parts,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        pixels, first_conditional, first_conditional + columns.shape[0], scale, weight / heads,
        **fixed, UP=interpreted() and q.dtype == torch.bfloat16, **config,
    )  # fmt: skip
    if groups > 1:
        traced(add_parts_kernel)[(triton.cdiv(maps.numel(), SUMMED),)](
            parts, maps, maps.numel(), GROUPS=groups, BLOCK=SUMMED
        )  # fmt: skip
    return out
