"""The paper's adaptive threshold: of several, the one whose mask after a CRF agrees best with an estimate."""

import torch
from torch import Tensor

from diffumask_fast.masks.crf import PRESETS, crf

CANDIDATES = tuple(round(0.4 + 0.02 * step, 2) for step in range(16))


def adaptive(
    maps: Tensor, estimate: Tensor, images: Tensor, candidates: tuple[float, ...] = CANDIDATES, window: int = 11
) -> Tensor:
    """Choose a threshold for each map, all candidates of a batch in one pass.

    Args:
        maps: [B, K, H, W] in 0..1.
        estimate: [B, K, H, W] bool, where self-attention puts the object.
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
