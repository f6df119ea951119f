"""The kernels in fp32 with every intermediate written out: the truth that the fast ones are compared with."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    first_conditional: int = 0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend with explicit fp32 probabilities.

    Args:
        q: [B, N, H*D] queries.
        k: [B, T, H*D] keys.
        v: [B, T, H*D] values.
        columns: [Bc, T, K] extra value columns.
        heads: H.
        scale: factor of the scores; None is D ** -0.5.
        first_conditional: the rows first_conditional : first_conditional + Bc own the columns.
        mask: bias added to the scores, broadcastable to [B, H, N, T].

    Returns:
        out [B, N, H*D] in the dtype of q, and [Bc, K, N] fp32, the mean over heads of probabilities @ columns, or None.
    """
    split = [x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    scale = split[0].shape[-1] ** -0.5 if scale is None else scale
    scores = split[0] @ split[1].transpose(-1, -2) * scale
    probs = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    out = (probs @ split[2]).transpose(1, 2).flatten(2).to(q.dtype)
    if columns is None:
        return out, None
    rows = slice(first_conditional, first_conditional + columns.shape[0])
    return out, (probs[rows].mean(1) @ columns.float()).transpose(1, 2)


def attend_maps(q: Tensor, k: Tensor, columns: Tensor, *, heads: int, scale: float | None = None) -> Tensor:
    """Return the maps of `attend` alone, for q [Bc, N, H*D] and k [Bc, T, H*D] of the conditional rows: [Bc, K, N]."""
    maps = attend(q, k, k, columns, heads=heads, scale=scale)[1]
    assert maps is not None
    return maps


def guided_filter(guide: Tensor, maps: Tensor, radius: int, eps: float) -> Tensor:
    """Filter maps [B, K, H, W] with a colour guide [B, 3, H, W]: He, Sun and Tang, TPAMI 2013, equations 19 to 21.

    Args:
        guide: [B, 3, H, W] in 0..1.
        maps: [B, K, H, W].
        radius: half width of the window.
        eps: added to the variance of each channel.

    Returns:
        [B, K, H, W] fp32.
    """

    def mean(planes: Tensor) -> Tensor:
        size = 2 * radius + 1
        return avg_pool2d(planes.flatten(0, -3), size, 1, radius, count_include_pad=False).view(planes.shape)

    guide, maps = guide.float(), maps.float()
    mean_guide, mean_maps = mean(guide), mean(maps)
    outer = guide[:, :, None] * guide[:, None]  # [B, 3, 3, H, W]
    sigma = mean(outer) - mean_guide[:, :, None] * mean_guide[:, None]
    cross = guide[:, None] * maps[:, :, None]  # [B, K, 3, H, W]
    covariance = mean(cross) - mean_guide[:, None] * mean_maps[:, :, None]
    sigma = sigma.permute(0, 3, 4, 1, 2) + eps * torch.eye(3, device=guide.device)
    a = torch.linalg.solve(sigma, covariance.permute(0, 3, 4, 2, 1)).permute(0, 4, 3, 1, 2)  # [B, K, 3, H, W]
    b = mean_maps - (a * mean_guide[:, None]).sum(2)
    return (mean(a) * guide[:, None]).sum(2) + mean(b)


def mean_field(
    q: Tensor,
    unary: Tensor,
    guide: Tensor,
    *,
    window: int,
    dilation: int = 1,
    bilateral: tuple[float, float, float] = (10.0, 80.0, 13.0),
    gaussian: tuple[float, float] = (3.0, 3.0),
) -> Tensor:
    """Update q [B, M, L, H, W] with both kernels written out as matrices [HW, HW]: for small images.

    Args:
        q: [B, M, L, H, W] probabilities.
        unary: [B, M, L, H, W] energies.
        guide: [B, 3, H, W] in 0..255.
        window: odd number of offsets along each side.
        dilation: pixels between two offsets.
        bilateral: compatibility, sxy, srgb.
        gaussian: compatibility, sxy.

    Returns:
        [B, M, L, H, W] fp32.
    """
    height, width = q.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([ys, xs], -1).view(-1, 2).to(guide.device)
    step = place[:, None] - place  # [HW, HW, 2]
    near = ((step % dilation == 0) & (step.abs() <= window // 2 * dilation)).all(-1)
    distance = step.square().sum(-1).float()
    colour = guide.float().flatten(2).mT  # [B, HW, 3]
    difference = (colour[:, :, None] - colour[:, None]).square().sum(-1)
    message = torch.zeros_like(q.flatten(3), dtype=torch.float32)
    for compat, weight in (
        (bilateral[0], near * torch.exp(-distance / (2 * bilateral[1] ** 2) - difference / (2 * bilateral[2] ** 2))),
        (gaussian[0], torch.exp(-distance / (2 * gaussian[1] ** 2)).expand_as(difference)),
    ):
        norm = weight.sum(-1).rsqrt()
        weight = norm[:, :, None] * weight * norm[:, None]  # [B, HW, HW]
        message = message + compat * (q.float().flatten(3) @ weight[:, None])
    return torch.softmax(message.view(q.shape) - unary.float(), dim=2)
