"""What is counted of masks and predictions: IoU, pixel accuracy, boundary IoU."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import IGNORE

VALUES = 256  # of a mask's pixel


@dataclass
class SegmentationMetrics:
    """Counts over images: masks that are right, and the predicted ones. What is 255 in the right mask does not count.

    Args:
        classes: id -> name of the classes that have a figure of their own; 0 is the background.
        unseen: names of those that the model was to learn without masks (zero-shot).
    """

    classes: Mapping[int, str]
    unseen: Collection[str] = ()
    images: int = 0
    ignored: int = 0
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((VALUES, VALUES), np.int64))
    boundaries: np.ndarray = field(default_factory=lambda: np.zeros((2, VALUES, 2), np.int64))

    def __post_init__(self) -> None:
        if unknown := set(self.unseen) - set(self.classes.values()):
            raise DiffuMaskError(f"`unseen` names {min(unknown)}, which is none of {_listed(self.classes)}")

    def update(self, labels: np.ndarray, predicted: np.ndarray) -> float | None:
        """Add one image.

        Args:
            labels: [H, W] uint8, the right mask.
            predicted: [H, W] uint8; may hold ids that have no figure of their own, which are wrong then.

        Returns:
            The mean IoU of this image's classes without background; None where it shows none.
        """
        known = labels != IGNORE
        pairs = labels[known].astype(np.int64) * VALUES + predicted[known]
        counts = np.bincount(pairs, minlength=VALUES**2).reshape(VALUES, VALUES)
        self.confusion += counts
        self.images += 1
        self.ignored += labels.size - len(pairs)
        here = [value for value in self.classes if value and (counts[value].any() or counts[:, value].any())]
        filled = np.where(known, labels, predicted)  # where labels say nothing there is no boundary
        for index, width in enumerate((boundary_width(labels.shape), official_width(labels.shape))):
            for value in here:
                right, said = (boundary(part == value, width) & known for part in (filled, predicted))
                self.boundaries[index, value] += np.count_nonzero(right & said), np.count_nonzero(right | said)
        ious = class_ious(counts)[here]
        return float(ious.mean()) if here else None

    def compute(self) -> dict[str, Any]:
        """Return the figures of all images so far.

        Returns:
            `n`, images; `miou`, the mean of `per_class_iou` (without background), and `miou_with_background`;
            `background_iou`; `pixel_accuracy`, of all classes and background; `boundary_miou_3px_at_128` and
            `boundary_miou_ratio_0.02`, the mean over classes of the IoU of boundaries alone, of the widths in their
            names; `ignored_share`, of pixels that are 255; `confusion`, pixels of each class (rows) that are predicted
            as each (columns). With `unseen` classes also `seen_miou`, `unseen_miou` and `harmonic_mean`. A class that
            is in no mask and in no prediction has None, and no part in a mean.

        Raises:
            DiffuMaskError: every pixel of every image is 255, or there was none.
        """
        if not self.confusion.any():
            raise DiffuMaskError("there is no pixel to judge: every mask is all 255, or there is no image")
        ious = class_ious(self.confusion)
        edges = _ratio(self.boundaries[..., 0], self.boundaries[..., 1])
        values = [value for value in sorted(self.classes) if value]
        right = np.trace(self.confusion)
        figures = {
            "n": self.images,
            "miou": _mean(ious[values]),
            "miou_with_background": _mean(ious[[0, *values]]),
            "pixel_accuracy": float(right / self.confusion.sum()),
            "boundary_miou_3px_at_128": _mean(edges[0, values]),
            "boundary_miou_ratio_0.02": _mean(edges[1, values]),
            "background_iou": _number(ious[0]),
            "per_class_iou": {self.classes[value]: _number(ious[value]) for value in values},
            "ignored_share": self.ignored / (self.ignored + int(self.confusion.sum())),
            "confusion": self._confusion([0, *values]),
        }
        if self.unseen:
            unseen = [value for value in values if self.classes[value] in self.unseen]
            seen, new = (_mean(ious[part]) for part in (sorted(set(values) - set(unseen)), unseen))
            figures |= {"seen_miou": seen, "unseen_miou": new, "harmonic_mean": harmonic_mean(seen, new)}
        return figures

    def _confusion(self, values: list[int]) -> dict[str, Any]:
        """Return the counts by name; what has no figure of its own is one last class."""
        rest = sorted(set(range(VALUES)) - set(values))
        columns = np.concatenate([self.confusion[:, values], self.confusion[:, rest].sum(1, keepdims=True)], 1)
        names = [self.classes.get(value, "background") for value in values]
        return {"classes": names, "predicted": [*names, "other"], "counts": columns[values].tolist()}


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """Return the IoU of each class, NaN where it is neither there nor predicted, of a confusion matrix [C, C]."""
    both = np.diagonal(confusion)
    return _ratio(both, confusion.sum(0) + confusion.sum(1) - both)


def harmonic_mean(seen: float | None, unseen: float | None) -> float | None:
    """Return 2su / (s + u); None where one is None, 0 where both are 0."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def merge_classes(classes: Mapping[int, str], merge: str) -> tuple[dict[int, str], np.ndarray]:
    """Make one class of several.

    Args:
        classes: id -> name.
        merge: "human=person,rider", more of the kind after a semicolon.

    Returns:
        id -> name of the classes that are left, a merged one under the smallest id of its members; and the new id of
        each id, [256] uint8.

    Raises:
        DiffuMaskError: it is written otherwise, or names a class that is not there or that is merged already.
    """
    left, lookup = dict(classes), np.arange(VALUES, dtype=np.uint8)
    for part in filter(None, merge.split(";")):
        name, equals, members = part.partition("=")
        names = [member.strip() for member in members.split(",") if member.strip()]
        if not equals or not name.strip() or not names:
            raise DiffuMaskError(f"`merge` must be like human=person,rider;vehicle=car,bus, not {merge!r}")
        ids = {left[value]: value for value in left if value}
        if unknown := [member for member in names if member not in ids]:
            raise DiffuMaskError(f"`merge` names {unknown[0]}, which is none of {_listed(left)}")
        values = [ids[member] for member in names]
        if name.strip() in left.values() and name.strip() not in names:
            raise DiffuMaskError(f"`merge` makes a second {name.strip()}: name it otherwise, or let it take the first")
        lookup[values] = min(values)
        left = {value: kept for value, kept in left.items() if value not in values} | {min(values): name.strip()}
    return left, lookup


def binary_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the IoU of two bool arrays; 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_width(shape: Sequence[int]) -> int:
    """Return 3 pixels at 128, in proportion to the shorter side: the width that this project's figures have."""
    return max(1, round(3 * min(shape) / 128))


def official_width(shape: Sequence[int]) -> int:
    """Return 0.02 of the diagonal: the width of Boundary IoU's authors."""
    return max(1, round(0.02 * math.hypot(*shape)))


def boundary(mask: np.ndarray, width: int | None = None) -> np.ndarray:
    """Return the pixels of a mask that are near its outside (Boundary IoU, Cheng et al., CVPR 2021).

    Args:
        mask: [H, W] bool.
        width: how many rows or columns from the outside; beyond the image is outside. `boundary_width` when None.
    """
    width = width or boundary_width(mask.shape)
    near = np.pad(~mask, width, constant_values=True)
    for _ in range(2):  # along one axis, then along the other
        outside = np.cumsum(np.pad(near, ((1, 0), (0, 0))), axis=0, dtype=np.int32)
        near = (outside[2 * width + 1 :] > outside[: -2 * width - 1]).T
    return mask & near


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, with NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the values that are numbers; None if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _listed(classes: Mapping[int, str]) -> str:
    return ", ".join(name for value, name in sorted(classes.items()) if value)
