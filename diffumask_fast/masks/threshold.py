"""Where a map is cut: Otsu's threshold, and the paper's adaptive one."""

import torch
from torch import Tensor

from diffumask_fast.masks.crf import PRESETS, crf

CANDIDATES = tuple(round(0.4 + 0.02 * step, 2) for step in range(16))


def otsu(maps: Tensor, bins: int = 256) -> Tensor:
    """Find the threshold that best splits each map into two groups: Otsu, IEEE Trans. SMC 1979.

    Counts are integers and the criterion is fp64, so the result is the same on every device and for every batch. Where
    a range of thresholds is equally good, its middle is taken. What is above the threshold (`>`) is the upper group.

    Args:
        maps: [B, K, H, W] in 0..1; what lies outside is counted in the first or last bin.
        bins: number of bins over 0..1.

    Returns:
        [B, K] fp32 in 0..1: an edge between two bins, or the middle of such edges, or the number next below where a
        pixel lies on it; 1 for a map of one value.

    Example:
        >>> otsu(torch.tensor([0.1, 0.1, 0.9, 0.9]).view(1, 1, 2, 2)).item()
        0.5
    """
    size_b, size_k = maps.shape[:2]
    index = (maps.flatten(2).nan_to_num() * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(size_b, size_k, bins, dtype=torch.long, device=maps.device)
    counts.scatter_add_(2, index, torch.ones_like(index))

    below = counts.cumsum(2)[..., :-1]  # split t: bins 0..t against bins t + 1...
    moment = (counts * torch.arange(bins, device=maps.device)).cumsum(2)
    pixels, total = index.shape[2], moment[..., -1:]
    moment = moment[..., :-1]
    # the between-class variance times pixels^2
    gap = (total * below - moment * pixels).double()
    between = gap * gap / (below * (pixels - below)).clamp(min=1).double()

    best = between.amax(2, keepdim=True)
    worse = (between < best).long()
    before_first = worse.cumprod(2).sum(2, keepdim=True)  # of equally good ranges, the first
    chosen = ((worse == 0) & (worse.cumsum(2) == before_first)).double()
    edges = torch.arange(1, bins, device=maps.device, dtype=torch.float64) / bins
    threshold = (chosen * edges).sum(2) / chosen.sum(2)
    threshold = torch.where(best[..., 0] > 0, threshold, torch.ones_like(threshold)).float()
    # a pixel on the edge was counted above it, so that the edge moves below the pixel
    on_edge = (maps == threshold[..., None, None]).flatten(2).any(2) & (best[..., 0] > 0)
    return torch.where(on_edge, torch.nextafter(threshold, torch.zeros_like(threshold)), threshold)


def adaptive(
    maps: Tensor, estimate: Tensor, images: Tensor, candidates: tuple[float, ...] = CANDIDATES, window: int = 11
) -> Tensor:
    """Choose for each map the threshold whose mask, after a CRF, agrees best with an estimate (paper, section 3.3).

    All candidates of a batch are tried in one pass.

    Args:
        maps: [B, K, H, W] in 0..1.
        estimate: [B, K, H, W] bool, where self-attention or AffinityNet puts the object.
        images: [B, H, W, 3] uint8.
        candidates: T thresholds in rising order; the first of equally good ones is taken.
        window: of the CRF.

    Returns:
        [B, K] fp32.

    Example:
        >>> maps = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
        >>> image = (255 * (torch.arange(16) > 5)).byte().view(1, 1, 16, 1).expand(1, 16, 16, 3)
        >>> adaptive(maps, maps > 0.37, image, (0.1, 0.35, 0.9)).item()  # doctest: +ELLIPSIS
        0.34999...
    """
    size_b, size_k, height, width = maps.shape
    levels = torch.tensor(candidates, device=maps.device)
    labels = (maps[:, :, None] >= levels[:, None, None]).flatten(1, 2)  # [B, K*T, H, W]
    masks = crf(labels, 2, images, PRESETS["threshold"], window=window)[:, :, 1] > 0.5
    masks = masks.view(size_b, size_k, len(candidates), height, width)
    both = (masks & estimate[:, :, None]).sum((3, 4)).float()
    either = (masks | estimate[:, :, None]).sum((3, 4)).float()
    return levels[(both / either.clamp(min=1)).argmax(2)]
