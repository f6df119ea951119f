"""Where a map becomes a mask: Otsu's threshold, for all maps of a batch in one histogram."""

import torch
from torch import Tensor


def otsu(maps: Tensor, bins: int = 256) -> Tensor:
    """Find the threshold that best splits each map into two groups: Otsu, IEEE Trans. SMC 1979.

    Counts are integers and the criterion is fp64, so the result is the same on every device and for every batch. Where
    a range of thresholds is equally good, its middle is taken.

    Args:
        maps: [B, K, H, W] in 0..1; what lies outside is counted in the first or last bin.
        bins: number of bins over 0..1.

    Returns:
        [B, K] fp32 in 0..1, an edge between two bins or the middle of such edges; 1 for a map of one value.

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
    chosen = (between == best).double()
    edges = torch.arange(1, bins, device=maps.device, dtype=torch.float64) / bins
    threshold = (chosen * edges).sum(2) / chosen.sum(2)
    return torch.where(best[..., 0] > 0, threshold, torch.ones_like(threshold)).float()
