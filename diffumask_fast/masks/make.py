"""Class maps to masks: normalise, resize, refine, threshold, argmax; batched, without waiting for the device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels.guided_filter import guided_filter
from diffumask_fast.masks.colour import sharpen_by_colour
from diffumask_fast.masks.components import fill_holes, remove_small
from diffumask_fast.masks.crf import PRESETS, crf
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import adaptive, otsu

IGNORE = 255
_SHIFT = 0.2  # by how much the threshold is moved to measure a mask's stability


def quantise_maps(class_maps: Tensor) -> Tensor:
    """Write each map in 255 steps of its own maximum: what masks are made of and what a dataset keeps.

    Quantising twice changes nothing. NaN, infinity and negative values (bicubic overshoot) become 0.

    Args:
        class_maps: [B, K, h, w], float in any range or uint8.

    Returns:
        [B, K, h, w] uint8 with maximum 255, or 0 everywhere for a map without a positive value.
    """
    if class_maps.dtype == torch.uint8:
        return class_maps
    maps = class_maps.float().nan_to_num(0, 0, 0).clamp(min=0)
    return (maps / _maximum(maps) * 255).round().to(torch.uint8)


def make_masks(
    class_maps: Tensor, images: Tensor, options: MaskOptions, class_ids: Tensor, estimate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Make masks of class maps and the images they belong to: each pixel belongs to the class of the best score.

    Maps pass through `quantise_maps` first, so that masks made again from stored maps are the same.

    Args:
        class_maps: [B, K, h, w], one map per class; float or uint8.
        images: [B, H, W, 3] uint8.
        options: how.
        class_ids: [B, K] whole numbers 1..254, the values in the mask; 0 marks a padded column, which never wins.
        estimate: [B, K, H, W] bool, where objects are thought to be, for an adaptive threshold; None takes the maps
            themselves, cut by Otsu.

    Returns:
        mask [B, H, W] uint8: 0 background, class ids, 255 in the ignore band;
        quality [B, K] fp32 in 0..1: see `mask_quality`; 0 for an empty mask.

    Raises:
        DiffuMaskError: the shapes do not fit.

    Example:
        >>> images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        >>> mask, quality = make_masks(torch.rand(1, 1, 4, 4), images, MaskOptions(), torch.tensor([[12]]))
        >>> mask.shape, quality.shape
        (torch.Size([1, 32, 32]), torch.Size([1, 1]))
    """
    _check(class_maps, images, class_ids)
    class_ids = class_ids.to(class_maps.device)
    images = images.to(class_maps.device)
    coarse = quantise_maps(class_maps).float() * (class_ids > 0)[..., None, None]
    maps = refine_maps(coarse, images, options)
    threshold = _threshold(maps, images, options, estimate)
    scores = score_classes(maps, threshold, coarse, images, options)
    best, winner = scores[:, 1:].max(1)
    winner = torch.where(best > scores[:, 0], winner + 1, 0)  # [B, H, W], 0 the background, also in a tie
    if options.min_component:
        winner = remove_small(winner, max(1, round(options.min_component * winner[0].numel())))
    if options.fill_holes:
        winner = fill_holes(winner)

    inside = winner[:, None] == torch.arange(1, maps.shape[1] + 1, device=maps.device)[:, None, None]
    quality = mask_quality(maps, threshold, inside)
    ids = F.pad(class_ids, (1, 0)).long()
    mask = ids.gather(1, winner.flatten(1)).view(winner.shape)
    return _with_band(mask, options.ignore_band).to(torch.uint8), quality


def refine_maps(maps: Tensor, images: Tensor, options: MaskOptions) -> Tensor:
    """Bring maps [B, K, h, w] to the size of images [B, H, W, 3], each over its own maximum: [B, K, H, W] in 0..1."""
    size = images.shape[1:3]
    refined = F.interpolate(maps, size, mode="bicubic", align_corners=False).clamp(min=0)
    refined = refined / _maximum(refined)
    if options.refine == "guided":
        refined = guided_filter(_guide(images), refined, _radius(maps, images, options), options.eps)
    return refined.clamp(0, 1)


def _threshold(maps: Tensor, images: Tensor, options: MaskOptions, estimate: Tensor | None) -> Tensor:
    if options.threshold == "otsu":
        return otsu(maps)
    if options.threshold == "adaptive":
        return adaptive(maps, maps > otsu(maps)[..., None, None] if estimate is None else estimate, images)
    return torch.full(maps.shape[:2], options.threshold, device=maps.device)


def score_classes(maps: Tensor, threshold: Tensor, coarse: Tensor, images: Tensor, options: MaskOptions) -> Tensor:
    """Score the background and each class at each pixel: first where any class is, then which.

    A class's own score is 0.5 at its threshold and linear on both sides. The best of them is the foreground's, which
    refinement sharpens; a pixel is foreground where that is above 0.5, and belongs to the class that leads around it.
    The leading class has the foreground's score, the others at most half of it, the background what is left to 1.

    Args:
        maps: [B, K, H, W] in 0..1, refined.
        threshold: [B, K].
        coarse: [B, K, h, w], the maps before they were refined.
        images: [B, H, W, 3] uint8.
        options: how.

    Returns:
        [B, K+1, H, W] fp32 in 0..1, background first.
    """
    cell = _radius(coarse, images, options)
    own = _class_scores(maps, threshold)
    foreground = own.amax(1, keepdim=True)
    if options.refine == "guided" and options.colour_steps:
        half, radius = torch.full_like(threshold[:, :1], 0.5), max(1, round(0.75 * cell))
        foreground = sharpen_by_colour(
            foreground, half, _guide(images), steps=options.colour_steps, radius=radius, eps=options.eps
        )
    favourite = _favourite(maps, foreground, 2 * cell)
    if options.refine == "crf":
        labels = torch.where(foreground > 0.5, favourite + 1, 0)
        return crf(labels, maps.shape[1] + 1, images, PRESETS["threshold"])[:, 0]
    first = favourite == torch.arange(maps.shape[1], device=maps.device)[:, None, None]
    scores = torch.where(first, foreground, torch.minimum(own, foreground) / 2)
    return torch.cat([1 - foreground, scores], 1)


def _favourite(maps: Tensor, foreground: Tensor, radius: int) -> Tensor:
    """Return the class [B, 1, H, W] that leads around each pixel, within the foreground [B, 1, H, W].

    A class leads where its map stands out most from its own mean, in its own standard deviations.
    """
    if maps.shape[1] == 1:
        return torch.zeros_like(foreground, dtype=torch.long)
    centred = maps - maps.mean((2, 3), keepdim=True)
    spread = centred.square().mean((2, 3), keepdim=True).sqrt()
    standing = centred / spread.clamp(min=1e-6)
    standing = torch.where(maps.amax((2, 3), keepdim=True) > 0, standing, -1e3)  # a padded column never leads
    size = 2 * radius + 1
    votes = F.avg_pool2d(standing * foreground, (size, 1), 1, (radius, 0))
    return F.avg_pool2d(votes, (1, size), 1, (0, radius)).argmax(1, keepdim=True)


def _guide(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def _radius(coarse: Tensor, images: Tensor, options: MaskOptions) -> int:
    height, width = images.shape[1:3]
    if options.radius == "cell":
        return max(1, round(min(height / coarse.shape[2], width / coarse.shape[3])))
    return max(1, round(options.radius * min(height, width) / 128))


def mask_quality(maps: Tensor, threshold: Tensor, inside: Tensor) -> Tensor:
    """Say how clearly each map stands for its mask.

    The product of two numbers. Stability is the IoU of what lies above the threshold when that is moved a fifth of the
    way to 0 and to 1. Clarity is the root of two shares: how much of the map's variance the split in and out of the
    mask explains (Otsu's separability), and by how much the mean inside exceeds the mean outside, relative to the mean
    inside. Quality is 1 for a map that is its mask, near 0 for one that is spread over the image, and needs no truth;
    it ranks masks and is no IoU.

    Args:
        maps: [B, K, H, W] in 0..1.
        threshold: [B, K].
        inside: [B, K, H, W] bool.

    Returns:
        [B, K] fp32 in 0..1; 0 for a mask that is empty or covers everything.
    """
    threshold = threshold[..., None, None]
    wide = (maps > (1 - _SHIFT) * threshold).sum((2, 3))
    narrow = (maps > threshold + _SHIFT * (1 - threshold)).sum((2, 3))
    stability = narrow / wide.clamp(min=1)
    maps, inside = maps.flatten(2), inside.flatten(2).float()
    share = inside.mean(2)
    mean = maps.mean(2)
    mean_in = (maps * inside).mean(2) / share.clamp(min=1e-12)
    mean_out = (maps * (1 - inside)).mean(2) / (1 - share).clamp(min=1e-12)
    variance = (maps - mean[..., None]).square().mean(2)
    separability = share * (1 - share) * (mean_in - mean_out).square() / variance.clamp(min=1e-12)
    contrast = (mean_in - mean_out) / mean_in.clamp(min=1e-12)
    quality = stability * (separability * contrast).clamp(0, 1).sqrt()
    return torch.where((share > 0) & (share < 1), quality, torch.zeros_like(quality))


def _check(class_maps: Tensor, images: Tensor, class_ids: Tensor) -> None:
    if class_maps.ndim != 4 or 0 in class_maps.shape:
        raise DiffuMaskError(f"make_masks takes class maps [B, K, h, w], not {list(class_maps.shape)}")
    if images.ndim != 4 or images.shape[0] != class_maps.shape[0] or images.shape[3] != 3:
        raise DiffuMaskError(f"make_masks takes images [B, H, W, 3], not {list(images.shape)}")
    if images.dtype != torch.uint8:
        raise DiffuMaskError(f"make_masks takes uint8 images, not {images.dtype}")
    if class_ids.shape != class_maps.shape[:2]:
        raise DiffuMaskError(f"class ids {list(class_ids.shape)} do not fit class maps {list(class_maps.shape)}")


def _maximum(maps: Tensor) -> Tensor:
    """Return each map's maximum [B, K, 1, 1], at least the smallest normal fp32 number."""
    return maps.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _class_scores(maps: Tensor, threshold: Tensor) -> Tensor:
    """Map [B, K, H, W] so that 0, the threshold and 1 become 0, 0.5 and 1, linear between."""
    threshold = threshold[..., None, None]
    low = 0.5 * maps / threshold.clamp(min=1e-6)
    high = 0.5 + 0.5 * (maps - threshold) / (1 - threshold).clamp(min=1e-6)
    return torch.where(maps > threshold, high, low).clamp(0, 1)


def _with_band(mask: Tensor, band: int) -> Tensor:
    """Set pixels to 255 that are less than band + 1 rows and columns away from another class."""
    if band == 0:
        return mask
    values = mask[:, None].float()
    size = 2 * band + 1
    highest = F.max_pool2d(values, size, 1, band)
    lowest = -F.max_pool2d(-values, size, 1, band)
    return torch.where((highest != lowest)[:, 0], torch.full_like(mask, IGNORE), mask)
