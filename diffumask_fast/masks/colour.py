"""Sharpen maps by the colours on either side of their threshold: GrabCut's idea, batched and without a graph cut."""

import torch
from torch import Tensor

from diffumask_fast.kernels.guided_filter import GuidedFilter, box_mean

BINS = 16  # per channel
BLUR = 1.2  # bins
ONE = 1 << 24  # the weight 1, among the whole numbers that are added
FLOOR = 1e-4  # added to the share of each bin, so that an empty one decides nothing
SLOPE = 16.0  # of the logit at the threshold
STEEPEN = 8.0
FLAT = 1e-5  # mean squared step between neighbours; one level of 255, squared, is 1.5e-5
SMOOTHINGS = 2  # of the mask by the guided filter alone, after the last step


def sharpen_by_colour(maps: Tensor, threshold: Tensor, guide: Tensor, *, steps: int, radius: int, eps: float) -> Tensor:
    """Move the outline of maps to where the colours inside and outside differ.

    Each step histograms the image's colours inside and outside of each map, adds the log of their ratio at each pixel
    to the logit of the map, and smooths the answer with the guided filter. The map's own logit is kept in every step,
    so colours that occur on both sides change nothing, and distant places of the same colour are not added. At the end
    the filter runs twice more, weaker where the image has little texture, because there it would only round corners.

    Args:
        maps: [B, K, H, W] in 0..1.
        threshold: [B, K], where each map is cut.
        guide: [B, 3, H, W] colours in 0..1.
        steps: how often.
        radius: of the guided filter.
        eps: of the guided filter.

    Returns:
        [B, K, H, W] fp32 in 0..1, to be cut at 0.5; 0 for maps without a positive value.

    Example:
        >>> maps = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
        >>> guide = (torch.arange(32) >= 20).float().expand(1, 3, 32, 32)
        >>> sharp = sharpen_by_colour(maps, torch.tensor([[0.55]]), guide, steps=3, radius=2, eps=1e-3)
        >>> torch.equal(sharp[0, 0] > 0.5, guide[0, 0] > 0.5)
        True
    """
    prior = (maps - threshold[..., None, None]) * SLOPE
    bins = (guide * BINS).long().clamp(0, BINS - 1)
    index = ((bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]).flatten(1)  # [B, H*W]
    index = index[:, None]
    pixels = index.new_zeros(len(index), 1, BINS**3).scatter_add_(2, index, torch.ones_like(index))
    index = index.expand(-1, maps.shape[1], -1)
    place = torch.arange(BINS, device=maps.device, dtype=torch.float32)
    blur = torch.exp(-(place[:, None] - place).square() / (2 * BLUR**2))
    blur = blur / blur[BINS // 2].sum()
    smooth, inside, texture = GuidedFilter(guide, radius, eps), prior.sigmoid(), _texture(guide, radius)
    for step in range(steps + SMOOTHINGS):
        if step:
            inside = ((inside - 0.5) * STEEPEN).sigmoid()
        if step < steps:
            inside = (prior + _log_ratio(inside.flatten(2), index, pixels, blur).view_as(prior)).sigmoid()
        smoothed = smooth(inside).clamp(0, 1)
        inside = smoothed if step < steps else inside.lerp(smoothed, texture)
    return inside * (maps.amax((2, 3), keepdim=True) > 0)


def _texture(guide: Tensor, radius: int) -> Tensor:
    """Return how textured a guide is, [B, 1, H, W] from 0, where it has one colour, to 1."""
    steps = torch.zeros_like(guide[:, :1])
    for dim in (2, 3):
        step = guide.diff(dim=dim).square().sum(1, keepdim=True) / 2
        length = step.shape[dim]
        steps.narrow(dim, 0, length).add_(step)  # half to each neighbour, so that a mirrored image gives the same
        steps.narrow(dim, 1, length).add_(step)
    energy = box_mean(steps, radius)
    return box_mean(energy / (energy + FLAT), radius)


def _log_ratio(inside: Tensor, index: Tensor, pixels: Tensor, blur: Tensor) -> Tensor:
    """Return the log ratio [B, K, H*W] of each pixel's colour's share inside and outside; `pixels` counts all."""
    # CUDA adds the values of a bin in any order; sums of whole numbers are the same in all of them.
    counts = index.new_zeros(*inside.shape[:2], BINS**3).scatter_add_(2, index, (inside * ONE).long())
    shares = []
    for found in (counts, pixels * ONE - counts):
        share = found.float() / found.sum(2, keepdim=True).clamp(min=1)
        share = share.unflatten(2, (BINS, BINS, BINS))
        for _ in range(3):
            share = (share @ blur).movedim(-1, 2)
        shares.append(share.flatten(2) + FLOOR)
    return (shares[0] / shares[1]).log().gather(2, index)
