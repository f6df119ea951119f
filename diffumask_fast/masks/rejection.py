"""Which samples are rejected, judged by the image and its mask alone, without a second model."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from diffumask_fast.masks.options import MaskOptions

NOT_FINITE = "the image is not finite"
ONE_COLOUR = "the image is of one colour"
BROKEN = (NOT_FINITE, ONE_COLOUR)  # whatever the mask: the model or its settings are at fault

# Words of a reason, the option that gave it, and how that lets more images pass.
LIMITS = (
    (" has quality ", "min_quality", "lower"),
    (" of the image, less than ", "min_area", "lower"),
    (" of the image, more than ", "max_area", "raise"),
)
KINDS = {
    "min_quality": "quality below `min_quality`",
    "min_area": "smaller than `min_area`",
    "max_area": "larger than `max_area`",
}


def rejections(
    images: Tensor,
    mask: Tensor,
    class_ids: Tensor,
    names: Sequence[Sequence[str]],
    options: MaskOptions,
    quality: Tensor,
) -> list[str]:
    """Say for each sample why it is rejected.

    Args:
        images: [B, H, W, 3] uint8.
        mask: [B, H, W] uint8; 255 is ignored.
        class_ids: [B, K]; 0 marks a padded column.
        names: the classes' names, for each sample those of its ids that are not 0.
        options: `min_area`, `max_area` and `min_quality` are read.
        quality: [B, K].

    Returns:
        One sentence per sample, "" where it is accepted.
    """
    class_ids = class_ids.to(mask.device)
    area = (mask[:, None] == class_ids[..., None, None]).float().mean((2, 3))  # [B, K]
    flat = images.flatten(1).amax(1) - images.flatten(1).amin(1) < 8
    table = torch.cat([flat[:, None].to(area), area, quality.to(area)], 1).tolist()  # one transfer
    size_k = class_ids.shape[1]
    return [
        _reason(row[0] > 0, row[1 : 1 + size_k], row[1 + size_k :], ids, own, options)
        for row, ids, own in zip(table, class_ids.tolist(), names, strict=True)
    ]


def _reason(
    flat: bool, area: list[float], quality: list[float], ids: list[int], names: Sequence[str], options: MaskOptions
) -> str:
    if flat:
        return ONE_COLOUR
    there = [(share, value) for share, value, class_id in zip(area, quality, ids, strict=True) if class_id > 0]
    for name, (share, value) in zip(names, there, strict=True):
        if share == 0:
            return f"{name} has no pixel in the mask"
        if share < options.min_area:
            return f"{name} covers {share:.2%} of the image, less than {options.min_area:.2%}"
        if value < options.min_quality:
            return f"the mask of {name} has quality {value:.2f}, less than {options.min_quality:.2f}"
    total = sum(share for share, _ in there)
    if total > options.max_area:
        return f"the classes cover {total:.2%} of the image, more than {options.max_area:.2%}"
    return ""


def advice(reasons: Sequence[str], options: MaskOptions) -> str:
    """Say which of one's own limits to move for more images to be accepted.

    Args:
        reasons: of the images, as `rejections` or `kind_of` gives them.
        options: by which they were rejected.

    Returns:
        Such as "lower `min_quality`"; "" where the most common reason is no limit that differs from the default.

    Example:
        >>> advice(["the mask of dog has quality 0.41, less than 0.90"], MaskOptions(min_quality=0.9))
        'lower `min_quality`'
    """
    for (name, verb), _ in Counter(map(_limit_of, filter(None, reasons))).most_common(1):
        if name and getattr(options, name) != getattr(MaskOptions(), name):
            return f"{verb} `{name}`"
    return ""


def kind_of(reason: str) -> str:
    """Return what images that are rejected for the same reason share: a reason without its numbers.

    Example:
        >>> kind_of("the mask of dog has quality 0.41, less than 0.90")
        'quality below `min_quality`'
    """
    name, _ = _limit_of(reason)
    if name:
        return KINDS[name]
    return "no pixel in the mask" if reason.endswith(" has no pixel in the mask") else reason


def _limit_of(reason: str) -> tuple[str, str]:
    return next(((name, verb) for words, name, verb in LIMITS if words in reason or reason == KINDS[name]), ("", ""))
