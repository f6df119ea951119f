"""Judge masks by their IoU with the masks that a segmenter predicts from the images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch.nn import functional as F

from diffumask_fast.dataset.preview import colour, overlay, sheet, tile, write_png
from diffumask_fast.dataset.reader import Row, read_manifest, read_rows
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.options import EvaluateOptions
from diffumask_fast.masks.make import refine_maps
from diffumask_fast.masks.options import MaskOptions

MODELS = ("mini-oracle",)
VISIBLE = 0.01  # the share of the image above which an object counts as seen
WORST = 20
THRESHOLDS = np.arange(0.02, 1, 0.02, dtype=np.float32)


class Segmenter(Protocol):
    """A model that predicts masks from images; the values of its masks are those of `class_ids`."""

    @property
    def class_ids(self) -> Mapping[str, int]:
        """Name -> value in the masks."""

    def masks(self, images: np.ndarray, batch: int = 32) -> np.ndarray:
        """Return masks uint8 [B, H, W] of images uint8 [B, H, W, 3]; H and W are multiples of 16."""


class Judged(NamedTuple):
    """An image, its mask and the predicted one (`truth`), and their IoU of any class against background."""

    iou: float
    key: str
    image: np.ndarray
    mask: np.ndarray
    truth: np.ndarray


@dataclass
class Metrics:
    """Sums over the images judged so far."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros((256, 2), np.int64))  # class -> intersection, union
    foreground: list[float] = field(default_factory=list)
    boundary: list[float] = field(default_factory=list)
    best_threshold: list[float] = field(default_factory=list)
    agreed: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    seen: list[bool] = field(default_factory=list)
    class_ids: dict[str, int] = field(default_factory=dict)
    worst: list[Judged] = field(default_factory=list)

    def update(self, row: Row, truth: np.ndarray, class_ids: Mapping[str, int], options: MaskOptions) -> None:
        """Add one row.

        Args:
            row: of a dataset; its class ids may differ from the segmenter's.
            truth: [H, W] uint8, the mask that the segmenter predicts from the row's image.
            class_ids: name -> value in truth, of all classes that the segmenter knows.
            options: how the row's mask was refined.

        Raises:
            DiffuMaskError: the segmenter does not know a class of the row.
        """
        unknown = set(row.classes) - set(class_ids)
        if unknown:
            raise DiffuMaskError(f"{row.key} holds {', '.join(sorted(unknown))}, which mini-oracle has never seen.")
        ids = [class_ids[name] for name in row.classes]
        mask = np.zeros_like(row.mask)
        for row_id, value in zip(row.class_ids, ids, strict=True):
            mask[row.mask == row_id] = value
        for value in np.union1d(mask, truth):
            intersection, union = (mask == value) & (truth == value), (mask == value) | (truth == value)
            self.counts[value] += (intersection.sum(), union.sum())
        self.class_ids |= dict(zip(row.classes, ids, strict=True))
        iou = binary_iou(mask > 0, truth > 0)
        self.foreground.append(iou)
        self.boundary.append(binary_iou(boundary(mask > 0), boundary(truth > 0)))
        self.seen.append(all((part == value).mean() > VISIBLE for value in ids for part in (mask, truth)))
        if len(ids) == 1:
            largest = np.bincount(truth[truth > 0], minlength=1).argmax()
            self.agreed[row.classes[0]].append(bool(largest == ids[0]))
            if row.maps is not None:
                self.best_threshold.append(best_threshold_iou(row, truth > 0, options))
        self.worst = sorted([*self.worst, Judged(iou, row.key, row.image, mask, truth)], key=lambda judged: judged.iou)
        del self.worst[WORST:]

    def compute(self) -> dict[str, Any]:
        """Return the figures, as `evaluate` describes them."""
        per_class = {
            name: float(self.counts[i, 0] / max(self.counts[i, 1], 1)) for name, i in sorted(self.class_ids.items())
        }
        return {
            "n": len(self.foreground),
            "miou": _mean(per_class.values()),
            "per_class_iou": per_class,
            "foreground_iou": _mean(self.foreground),
            "boundary_iou": _mean(self.boundary),
            "class_agreement": _mean(value for values in self.agreed.values() for value in values),
            "per_class_agreement": {name: _mean(values) for name, values in sorted(self.agreed.items())},
            "all_classes_seen": _mean(self.seen),
            "best_threshold_iou": _mean(self.best_threshold),
        }


def evaluate(
    options: EvaluateOptions,
    *,
    progress: Callable[[int | None], Progress] = lambda total: Progress(disable=True),
    batch: int = 32,
) -> dict[str, Any]:
    """Judge the masks of a dataset by the masks that a segmenter predicts from its images.

    255 in a mask counts as background. For the segmenter, images are padded with their edge pixels to sides that are
    multiples of 16.

    Args:
        options: `sheet` becomes a PNG of the twenty images with the lowest foreground IoU: image, mask and prediction.
        progress: makes a progress bar for a number of rows; None where the dataset does not record it.
        batch: images per call of the segmenter.

    Returns:
        `n`, images; `miou`, mean of `per_class_iou` (intersection over union of each class, summed over all images);
        `foreground_iou` and `boundary_iou` (`boundary` below), any class against background, mean over images;
        `class_agreement`, share of one-class images in which the largest predicted class is the image's class, and
        `per_class_agreement`; `all_classes_seen`, share of images in which each of the image's classes covers more than
        1 % of the mask and of the predicted one; `best_threshold_iou`, foreground IoU of one-class images if each
        stored map were cut at its best threshold, an upper bound for any choice of thresholds. A figure that no image
        contributes to is None.

    Raises:
        DiffuMaskError: there is no such segmenter or dataset, or it knows none of the classes.
    """
    if options.model not in MODELS:
        raise DiffuMaskError(f"There is no segmenter {options.model} in this version: use {', '.join(MODELS)}.")
    from diffumask_fast.mini.oracle import load_oracle

    segmenter, refinement = load_oracle(), _mask_options(options.data)
    rows = read_rows(options.data, accepted_only=options.accepted)
    metrics = Metrics()
    total = read_manifest(options.data)["options"].get("num")
    with progress(total) as bar:
        task = bar.add_task("judging", total=total)
        while part := list(islice(rows, batch)):
            for row, truth in zip(part, predict(segmenter, [row.image for row in part]), strict=True):
                metrics.update(row, truth, segmenter.class_ids, refinement)
            bar.advance(task, len(part))
    if not metrics.foreground:
        raise DiffuMaskError(f"{options.data} holds no row to judge: let rejected rows count too, or draw more.")
    if options.sheet is not None:
        write_png(options.sheet, sheet([_worst_tile(judged) for judged in metrics.worst], columns=3))
    return metrics.compute()


def predict(segmenter: Segmenter, images: list[np.ndarray]) -> list[np.ndarray]:
    """Return the segmenter's masks, uint8 [H, W], of images uint8 [H, W, 3] of any sizes."""
    masks: dict[int, np.ndarray] = {}
    for shape in {image.shape for image in images}:
        indices = [index for index, image in enumerate(images) if image.shape == shape]
        height, width = shape[:2]
        edges = ((0, 0), (0, -height % 16), (0, -width % 16), (0, 0))
        predicted = segmenter.masks(np.pad(np.stack([images[index] for index in indices]), edges, "edge"))
        masks |= {index: mask[:height, :width] for index, mask in zip(indices, predicted, strict=True)}
    return [masks[index] for index in range(len(images))]


def binary_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the IoU of two bool arrays; 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a bool mask [H, W] at most d from its outside (Boundary IoU, Cheng et al., CVPR 2021).

    d is 3 for a shorter side of 128, and proportional to it. What lies beyond the image counts as outside the mask.
    """
    distance = max(1, round(3 * min(mask.shape) / 128))
    outside = F.pad(torch.from_numpy(~mask)[None, None].float(), (distance,) * 4, value=1.0)
    near = F.max_pool2d(outside, 2 * distance + 1, 1)[0, 0] > 0
    return mask & near.numpy()


def best_threshold_iou(row: Row, truth: np.ndarray, options: MaskOptions) -> float:
    """Return the IoU with truth [H, W] of the row's refined map, cut at its best threshold."""
    maps, image = torch.from_numpy(row.maps)[None].float(), torch.from_numpy(row.image)[None]
    refined = refine_maps(maps, image, options)[0, 0].numpy()
    # pixels above each threshold, in truth and in all: one sort instead of one mask per threshold
    within, everywhere = np.sort(refined[truth]), np.sort(refined.ravel())
    hits = len(within) - np.searchsorted(within, THRESHOLDS, "right")
    above = len(everywhere) - np.searchsorted(everywhere, THRESHOLDS, "right")
    return float((hits / np.maximum(len(within) + above - hits, 1)).max())


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _mask_options(data: str | Path) -> MaskOptions:
    """Return the refinement of the dataset's masks; the defaults where none is recorded, as for composed scenes."""
    options = read_manifest(data)["options"]
    return MaskOptions(**{name: options[name] for name in ("refine", "radius", "eps") if name in options})


def _worst_tile(judged: Judged) -> Image.Image:
    pictures = (judged.image, overlay(judged.image, judged.mask), colour(judged.mask), colour(judged.truth))
    return tile(pictures, f"{judged.key}  IoU {judged.iou:.2f}")
