"""Attention whose value matrix carries extra columns: output and maps from one product.

Attention is linear in its values, softmax(q k^T) [v | E] = [softmax(q k^T) v | softmax(q k^T) E]. With token weights as
E (cross-attention) the extra columns are a phrase's map; with earlier maps as E (self-attention) they are propagated
maps.
"""

from typing import Any

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend_cpp, attend_sdpa, reference, tuned
from diffumask_fast.kernels.record import interpreted, note, traced

IMPLS = ("auto", "sdpa", "triton", "sdpa+maps", "cpp", "reference")
MAX_KEYS = 128  # of the Triton kernels, which keep a row of scores in registers


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    first_conditional: int = 0,
    maps: Tensor | None = None,
    weight: float = 1.0,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend, and add the head mean of softmax(q k^T) @ columns to the maps.

    Args:
        q: [B, N, H*D] queries as the projection leaves them.
        k: [B, T, H*D] keys.
        v: [B, T, H*D] values.
        columns: [Bc, T, K] extra value columns, or None for plain attention.
        heads: H.
        scale: factor of the scores; None is D ** -0.5.
        first_conditional: the rows first_conditional : first_conditional + Bc own the columns.
        maps: [Bc, K, N] fp32, added to in place; None makes a new one.
        weight: factor of what is added.
        mask: bias added to the scores, broadcastable to [B, H, N, T].
        impl: "sdpa": torch's attention; columns have the precision of q, their sum over heads is fp32. "triton": one
            kernel with fp32 maps, for at most 128 keys, on CUDA or in Triton's interpreter. "sdpa+maps": torch's
            attention without columns, then such a kernel for the maps alone. "cpp": fp32 inside, for fp32 and bf16 on
            the CPU; needs a compiler. "reference": fp32 with explicit probabilities. "auto": on CUDA the one that
            `tuned.json` has as the fastest for the layer; elsewhere, and in exports, "sdpa". `kernels.ran` says which.

    Returns:
        out [B, N, H*D] in the dtype of q, bit-equal to attention without columns by "sdpa+maps", and by "sdpa" on CPU
        for head sizes of 16 and more that are multiples of 8; and maps, None without columns.

    Example:
        >>> q, k = torch.zeros(2, 4, 32), torch.zeros(2, 5, 32)
        >>> out, maps = attend(q, k, k, torch.eye(5)[None, :, :2], heads=2, first_conditional=1)
        >>> maps.shape, round(maps.max().item(), 3)
        (torch.Size([1, 2, 4]), 0.2)

    Raises:
        DiffuMaskError: the shapes do not fit each other, or impl is unknown or cannot run here.
    """
    if impl not in IMPLS:
        raise DiffuMaskError(f"impl is {impl!r}, here there are: {', '.join(IMPLS)}")
    if heads < 1 or q.shape[-1] % heads:
        raise DiffuMaskError(f"{q.shape[-1]} channels cannot be split into {heads} heads")
    if not torch.compiler.is_compiling():  # there a comparison of sizes would become a guard
        _check(q, k, v, columns, first_conditional, maps)
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    if impl == "auto":
        impl = _fastest(q, k, columns, heads, mask)
    note("attend", impl)
    if impl in ("triton", "sdpa+maps"):
        return _triton(q, k, v, columns, heads, scale, first_conditional, maps, weight, mask, impl)
    function = {"reference": reference.attend, "cpp": _cpp}.get(impl, attend_sdpa.attend)
    out, added = function(q, k, v, columns, heads=heads, scale=scale, first_conditional=first_conditional, mask=mask)
    if added is None:
        return out, maps
    if maps is None:
        return out, added.mul(weight).contiguous()
    return out, maps.add_(added, alpha=weight)


def cross_attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    maps: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    first_conditional: int = 0,
    weight: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Cross-attend, and add weight * mean over heads(softmax(q k^T * scale)) @ select to maps in place.

    Args:
        q: [B, N, H*D] queries as the projection leaves them.
        k: [B, T, H*D] keys.
        v: [B, T, H*D] values.
        select: [Bc, T, K] fp32, the weight of each token in each phrase.
        maps: [Bc, K, N] fp32, added to in place.
        heads: H.
        scale: factor of the scores; None is D ** -0.5.
        first_conditional: the rows first_conditional : first_conditional + Bc are the conditional ones.
        weight: factor of what is added.
        impl: as for `attend`.

    Returns:
        out [B, N, H*D] in the dtype of q.
    """
    out, _ = attend(
        q,
        k,
        v,
        select,
        heads=heads,
        scale=scale,
        first_conditional=first_conditional,
        maps=maps,
        weight=weight,
        impl=impl,
    )
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, columns: Tensor | None, first: int, maps: Tensor | None) -> None:
    """Refuse shapes with which a kernel would leave a tensor, or torch would broadcast."""
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape == (q.shape[0], k.shape[1], q.shape[2])
    if not fits or not k.shape[1] or not q.shape[2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise DiffuMaskError(f"attend takes q [B, N, H*D], k and v [B, T, H*D], not {shapes}")
    if columns is None:
        return
    if columns.ndim != 3 or columns.shape[1] != k.shape[1]:
        raise DiffuMaskError(f"columns {list(columns.shape)} are not [Bc, T, K] for {k.shape[1]} keys")
    rows = columns.shape[0]
    if not 0 <= first <= q.shape[0] - rows:
        raise DiffuMaskError(f"rows {first} to {first + rows} own the columns, there are {q.shape[0]} rows")
    if not columns.is_floating_point() or (maps is not None and maps.dtype != torch.float32):
        raise DiffuMaskError("columns are of a floating type and add to fp32 maps")
    if maps is not None and maps.shape != (rows, columns.shape[2], q.shape[1]):
        wanted = [rows, columns.shape[2], q.shape[1]]
        raise DiffuMaskError(f"the maps to add to are {list(maps.shape)}, these columns give {wanted}")


def _fastest(q: Tensor, k: Tensor, columns: Tensor | None, heads: int, mask: Tensor | None) -> str:
    """Return "triton" or "sdpa+maps" if it can run and was measured to be the fastest, else "sdpa"."""
    if columns is None or mask is not None or not q.is_cuda or torch.compiler.is_exporting():
        return "sdpa"
    dtype, keys = tuned.DTYPES.get(q.dtype), k.shape[1]
    if dtype is None or keys > MAX_KEYS:
        return "sdpa"
    layer = {"heads": heads, "head_dim": q.shape[-1] // heads, "pixels": q.shape[1], "keys": keys}
    fastest = tuned.impl("attend", q.device, dtype=dtype, **layer)
    return fastest if fastest in ("triton", "sdpa+maps") else "sdpa"


def cpp_takes(q: Tensor, mask: Tensor | None) -> bool:
    """Return whether impl "cpp" can attend."""
    return mask is None and q.device.type == "cpu" and q.dtype in attend_cpp.DTYPES


def _cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor | None,
    *,
    heads: int,
    scale: float,
    first_conditional: int = 0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    if not (cpp_takes(q, mask) and q.dtype == k.dtype == v.dtype):
        raise DiffuMaskError(
            f"impl 'cpp' takes q, k, v of one dtype, fp32 or bf16, on the CPU and no mask, not {q.dtype}, {k.dtype}, "
            f"{v.dtype} on {q.device}: use 'sdpa'"
        )
    out, added = attend_cpp.attend(q, k, v, columns, heads, scale, first_conditional)
    return out, None if columns is None else added


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor | None,
    heads: int,
    scale: float,
    first: int,
    maps: Tensor | None,
    weight: float,
    mask: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    from diffumask_fast.kernels import attend_triton, operators  # noqa: F401 - importing operators registers them

    _check_triton(q, k, v, columns, mask, impl)
    assert columns is not None
    if maps is None:
        maps = torch.zeros(columns.shape[0], columns.shape[2], q.shape[1], device=q.device)
    if maps.dtype != torch.float32 or not maps.is_contiguous():
        raise DiffuMaskError(f"impl {impl!r} adds to contiguous fp32 maps")
    settings: dict[str, Any] = {"heads": heads, "scale": scale, "weight": weight}
    direct = _direct(q, k, v, columns)
    if impl == "triton":
        attend_all = attend_triton.attend if direct else torch.ops.diffumask_fast.cross_attention_maps
        return attend_all(q, k, v, columns, maps, first_conditional=first, **settings), maps
    out, _ = attend_sdpa.attend(q, k, v, None, heads=heads, scale=scale)
    rows = slice(first, first + columns.shape[0])
    add_maps = attend_triton.attend_maps if direct else torch.ops.diffumask_fast.attend_maps
    add_maps(q[rows], k[rows], columns, maps, **settings)
    return out, maps


def _direct(*tensors: Tensor) -> bool:
    """Return whether a kernel can be launched without an operator around it, which would double the host's time."""
    if torch.compiler.is_compiling() or any(map(traced, tensors)):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _check_triton(q: Tensor, k: Tensor, v: Tensor, columns: Tensor | None, mask: Tensor | None, impl: str) -> None:
    if columns is None or mask is not None:
        raise DiffuMaskError(f"impl {impl!r} takes columns and no mask: use 'sdpa'")
    if q.dtype not in tuned.DTYPES or not q.dtype == k.dtype == v.dtype:
        raise DiffuMaskError(
            f"impl {impl!r} takes q, k, v of one dtype, {', '.join(tuned.DTYPES.values())}, not {q.dtype}, {k.dtype}, "
            f"{v.dtype}: use 'sdpa'"
        )
    if k.shape[1] > MAX_KEYS:
        raise DiffuMaskError(f"impl {impl!r} takes {MAX_KEYS} keys at most, not {k.shape[1]}: use 'sdpa'")
    if not (q.is_cuda or interpreted()):
        raise DiffuMaskError(f"impl {impl!r} runs on CUDA, not on {q.device}: use 'sdpa'")
