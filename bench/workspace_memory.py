"""The memory that one attention layer needs for a moment beside its q, k, v and the maps, by arithmetic."""

import torch

from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.attend import MAX_KEYS
from diffumask_fast.kernels.attend_triton import constants

IMPLS = ("reference", "sdpa", "triton", "sdpa+maps")
ITEM = {"fp32": 4, "fp16": 2, "bf16": 2}


def workspace(
    impl: str, *, rows: int, pixels: int, keys: int, heads: int, head_dim: int, num: int = 0, dtype: str = "fp32"
) -> int:
    """Return the most bytes that live at once in one call of `attend`, its output among them.

    What a fused kernel of torch allocates and frees within itself is not counted, as in
    `bench.harness.live_tensor_bytes`, which measures the same.

    Args:
        impl: "reference" (fp32), "sdpa", "triton" or "sdpa+maps". The last two are "sdpa" without columns, or with more
            keys than the Triton kernels take: that is what `impl="auto"` then runs.
        rows: B.
        pixels: N.
        keys: T.
        heads: H.
        head_dim: D, a multiple of 8.
        num: K columns of the second half of the rows; 0 is plain attention.
        dtype: of q, k and v; columns are fp32.

    Example:
        >>> layer = dict(rows=2, pixels=4096, keys=77, heads=8, head_dim=40, num=1)
        >>> [round(workspace(impl, **layer) / 1e6, 1) for impl in IMPLS]
        [61.3, 25.9, 10.5, 10.7]
    """
    item, width, conditional = 4 if impl == "reference" else ITEM[dtype], heads * head_dim, rows // 2
    queries, values = rows * pixels * width * item, rows * keys * width * item
    if impl == "reference":  # scores, probabilities, output; and v or the output by heads, or the heads' mean
        means = 4 * conditional * pixels * (keys + num) if num and conditional else 0
        return 8 * rows * heads * pixels * keys + queries + max(queries, values, means)
    log_sums = 4 * rows * heads * pixels
    if impl in ("triton", "sdpa+maps") and num and keys <= MAX_KEYS:
        kernel, plain = ("attend", 0) if impl == "triton" else ("attend_maps", log_sums)
        shape = {"pixels": pixels, "keys": keys, "heads": heads, "head_dim": head_dim}
        block = tuned.launch(kernel, torch.device("cpu"), dtype=dtype, **shape)["block"]
        groups = heads // constants(kernel, **shape, num=num, block=block)["GROUP"]
        return queries + max(plain, 4 * groups * conditional * num * pixels if groups > 1 else 0)
    if not num:
        return queries + log_sums
    wide = -(-(head_dim + num) // 8) * 8  # q, k, v and the output at this width, and the columns' part of v
    return 2 * (queries + values) // head_dim * wide + rows * keys * (wide - head_dim) * item + log_sums
