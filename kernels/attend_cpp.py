"""Attention with value columns in C++, for the CPU, 16 or 32 queries at a time. There is no gradient."""

import ctypes

import torch
from torch import Tensor

from diffumask_fast.kernels.native import library

DTYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op("diffumask_fast::attend_cpp", mutates_args=(), device_types="cpu")
def attend(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor | None, heads: int, scale: float, first_conditional: int
) -> tuple[Tensor, Tensor]:
    """Attend with all sums in fp32; columns are computed for the rows that own them alone.

    Args:
        q: [B, N, H*D] queries, fp32 or bf16.
        k, v: [B, T, H*D] keys and values, of the same dtype.
        columns: [Bc, T, K] extra value columns, or None.
        heads: H.
        scale: factor of the scores.
        first_conditional: the rows first_conditional : first_conditional + Bc own the columns.

    Returns:
        out [B, N, H*D] in the dtype of q, and [Bc, K, N] fp32, the mean over heads, [0, 0, N] without columns.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.
        MemoryError: there is no memory for a head's keys and scores.
    """
    rows, queries, width = q.shape
    keys = k.shape[1]
    fit = q.dtype in DTYPES and q.dtype == k.dtype == v.dtype and k.shape == v.shape == (rows, keys, width)
    own = columns is None or columns.shape[1] == keys and 0 <= first_conditional <= rows - columns.shape[0]
    if not (fit and own and keys and heads >= 1) or width % heads:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (q, k, v, columns) if x is not None)
        raise ValueError(f"{shapes} do not fit each other and {heads} heads")
    out, maps = _results(q, k, v, columns, heads, scale, first_conditional)
    if not out.numel():
        return out, maps
    columns = None if columns is None or not maps.numel() else columns.float().contiguous()
    tensors = (q.contiguous(), k.contiguous(), v.contiguous(), columns, out, maps.zero_())
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    sizes = (rows, queries, keys, heads, width // heads, maps.shape[1], first_conditional, maps.shape[0])
    shape = (ctypes.c_int64 * len(sizes))(*sizes)
    function = library().attend_fp32 if q.dtype == torch.float32 else library().attend_bf16
    if function(*pointers, ctypes.addressof(shape), scale, torch.get_num_threads()):
        raise MemoryError("there is no memory for the scores of a head")
    return out, maps


@attend.register_fake
def _results(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor | None, heads: int, scale: float, first_conditional: int
) -> tuple[Tensor, Tensor]:
    rows, num = (0, 0) if columns is None else (columns.shape[0], columns.shape[2])
    return q.new_empty(q.shape), q.new_empty(rows, num, q.shape[1], dtype=torch.float32)
