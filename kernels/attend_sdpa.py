"""Attention with value columns by torch's own fused attention, which every device and exporter has."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
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
    """Pad q and k with zeros, and v with the columns and zeros, to one width that fused attention takes; attend.

    Args:
        q: [B, N, H*D] queries.
        k: [B, T, H*D] keys.
        v: [B, T, H*D] values.
        columns: [Bc, T, K] extra value columns, or None for plain attention.
        heads: H.
        scale: factor of the scores.
        first_conditional: the rows first_conditional : first_conditional + Bc own the columns.
        mask: bias added to the scores, broadcastable to [B, H, N, T].

    Returns:
        out [B, N, H*D] in the dtype of q, and [Bc, K, N] fp32, the mean over heads, None without columns.
    """
    head_dim = q.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (heads, head_dim)) for x in (q, k, v))
    if columns is not None:
        first, rows, num = first_conditional, columns.shape[0], columns.shape[-1]
        width = -(-(head_dim + num) // 8) * 8
        pad = (0, width - head_dim)
        extra = F.pad(columns.to(v.dtype), (0, width - head_dim - num, 0, 0, first, v.shape[0] - first - rows))
        q, k = F.pad(q, pad), F.pad(k, pad)
        v = torch.cat([v, extra.unsqueeze(2).expand(-1, -1, heads, -1)], dim=-1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    if columns is None:
        return out.transpose(1, 2).flatten(2), None
    del q, k, v, extra  # the padded copies need not outlive the product
    added = out[first : first + rows, :, :, head_dim : head_dim + num].mean(1, dtype=torch.float32)
    return out[..., :head_dim].transpose(1, 2).flatten(2), added.transpose(1, 2)


def attend_maps(q: Tensor, k: Tensor, columns: Tensor, *, heads: int, scale: float) -> Tensor:
    """Attend to the columns alone, for queries and keys of the conditional rows.

    Args:
        q: [Bc, N, H*D] queries.
        k: [Bc, T, H*D] keys.
        columns: [Bc, T, K] value columns.
        heads: H.
        scale: factor of the scores.

    Returns:
        [Bc, K, N] fp32, the mean over heads.
    """
    head_dim, num = q.shape[-1] // heads, columns.shape[-1]
    width = -(-max(head_dim, num) // 8) * 8
    q, k = (F.pad(x.unflatten(-1, (heads, head_dim)), (0, width - head_dim)).transpose(1, 2) for x in (q, k))
    v = F.pad(columns.to(q.dtype), (0, width - num))[:, None].expand(-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out[..., :num].mean(1, dtype=torch.float32).transpose(1, 2)
