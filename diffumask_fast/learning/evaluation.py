"""How good masks are: IoU against what a segmenter sees in the images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch.nn import functional as F

from diffumask_fast.dataset.preview import colour, overlay, sheet, tile, write_png
from diffumask_fast.dataset.reader import read_manifest, read_rows
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import refine_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.mini.world import VOC

MODELS = ("mini-oracle",)
VISIBLE = 0.01  # share of the image from which on an object counts as there
WORST = 20
_THRESHOLDS = np.arange(0.02, 1, 0.02, dtype=np.float32)


@dataclass
class Tally:
    """Sums over the images judged so far."""

    inside: np.ndarray = field(default_factory=lambda: np.zeros((256, 2), np.int64))  # class -> intersection, union
    foreground: list[float] = field(default_factory=list)
    boundary: list[float] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)
    agreed: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    confirmed: list[bool] = field(default_factory=list)
    wanted: dict[str, int] = field(default_factory=dict)
    worst: list[tuple[float, SimpleNamespace]] = field(default_factory=list)


def evaluate(
    model: str,
    data: str | Path,
    *,
    accepted_only: bool = False,
    sheet_file: Path | None = None,
    progress: Callable[[int | None], Progress] = lambda total: Progress(disable=True),
    batch: int = 32,
) -> dict[str, Any]:
    """Judge the masks of a dataset by what a segmenter sees in its images.

    255 in a mask counts as background. Images whose sides are no multiples of 16 are padded by their edge pixels while
    the segmenter looks at them.

    Args:
        model: "mini-oracle", the judge of the embedded model's world.
        data: the dataset.
        accepted_only: leave out rejected rows; every drawn row counts otherwise.
        sheet_file: a PNG of the twenty images of lowest foreground IoU: image, mask and what the segmenter sees.
        progress: makes a progress bar of the number of rows, or of None where the run does not say it.
        batch: images looked at together.

    Returns:
        `n`, images; `miou`, mean of `per_class_iou` (intersection over union over all images, of every class wanted);
        `foreground_iou` and `boundary_iou` (`boundary` below), any class against background, mean over images;
        `class_agreement`, share of one-class images in which the segmenter's largest class is the wanted one, and
        `per_class_agreement`; `all_classes_seen`, share of images in which every wanted class covers more than 1 % of
        the image in the mask and in the segmenter's; `best_threshold_iou`, foreground IoU if each image's stored map
        were cut at its own best threshold: the ceiling of the mask stage, over one-class images. A figure that no
        image has is None.

    Raises:
        DiffuMaskError: there is no such segmenter or dataset, or it knows none of the classes.
    """
    if model not in MODELS:
        raise DiffuMaskError(f"There is no segmenter {model} in this version: use {', '.join(MODELS)}.")
    from diffumask_fast.mini.oracle import load_oracle

    oracle, options = load_oracle(), _mask_options(data)
    rows = read_rows(data, accepted_only=accepted_only)
    tally = Tally()
    total = read_manifest(data)["options"].get("num")  # None shows a bar without an end
    with progress(total) as bar:
        task = bar.add_task("judging", total=total)
        while part := list(islice(rows, batch)):
            for row, truth in zip(part, look(oracle, [row.image for row in part]), strict=True):
                judge(tally, row, truth, oracle.classes, options)
            bar.advance(task, len(part))
    if not tally.foreground:
        raise DiffuMaskError(f"{data} holds no row to judge: let rejected rows count too, or draw more.")
    if sheet_file is not None:
        write_png(sheet_file, sheet([_worst_tile(iou, found) for iou, found in tally.worst], columns=3))
    return _figures(tally)


def look(oracle, images: list[np.ndarray]) -> list[np.ndarray]:
    """Return what the segmenter sees, class ids uint8 [H, W], in images uint8 [H, W, 3] of any sizes."""
    found: list[np.ndarray | None] = [None] * len(images)
    for shape in {image.shape for image in images}:
        places = [place for place, image in enumerate(images) if image.shape == shape]
        height, width = shape[:2]
        edges = ((0, 0), (0, -height % 16), (0, -width % 16), (0, 0))
        masks = oracle.masks(np.pad(np.stack([images[place] for place in places]), edges, "edge"))
        for place, mask in zip(places, masks, strict=True):
            found[place] = mask[:height, :width]
    return found


def judge(tally: Tally, row, truth: np.ndarray, classes: Iterable[str], options: MaskOptions) -> None:
    """Add one row, judged by truth [H, W], to the sums."""
    unknown = set(row.classes) - set(classes)
    if unknown:
        raise DiffuMaskError(f"{row.key} holds {', '.join(sorted(unknown))}, which mini-oracle has never seen.")
    ids = [VOC.index(name) for name in row.classes]  # those of the truth; the dataset may have others
    mask = np.zeros_like(row.mask)
    for own, value in zip(row.class_ids, ids, strict=True):
        mask[row.mask == own] = value
    for value in np.union1d(mask, truth):
        same, either = (mask == value) & (truth == value), (mask == value) | (truth == value)
        tally.inside[value] += (same.sum(), either.sum())
    tally.wanted |= dict(zip(row.classes, ids, strict=True))
    iou = overlap(mask > 0, truth > 0)
    tally.foreground.append(iou)
    tally.boundary.append(overlap(*(boundary(part > 0) for part in (mask, truth))))
    tally.confirmed.append(all((part == value).mean() > VISIBLE for value in ids for part in (mask, truth)))
    if len(ids) == 1:
        counts = np.bincount(truth[truth > 0], minlength=1)
        tally.agreed[row.classes[0]].append(bool(counts.argmax() == ids[0]))
        if row.maps is not None:
            tally.ceiling.append(best_threshold_iou(row, truth > 0, options))
    tally.worst.append((iou, SimpleNamespace(key=row.key, image=row.image, mask=mask, truth=truth)))
    tally.worst = sorted(tally.worst, key=lambda pair: pair[0])[:WORST]


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the IoU of two bool arrays; 1 where both are empty."""
    either = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / either if either else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a bool mask [H, W] at most d from its outside (Boundary IoU, Cheng et al., CVPR 2021).

    d is 3 pixels at 128, in proportion to the shorter side; beyond the image is outside.
    """
    distance = max(1, round(3 * min(mask.shape) / 128))
    outside = F.pad(torch.from_numpy(~mask)[None, None].float(), (distance,) * 4, value=1.0)
    near = F.max_pool2d(outside, 2 * distance + 1, 1)[0, 0] > 0
    return mask & near.numpy()


def best_threshold_iou(row, truth: np.ndarray, options: MaskOptions) -> float:
    """Return the highest IoU with truth [H, W] that any threshold on the row's refined map has."""
    maps, image = torch.from_numpy(row.maps)[None].float(), torch.from_numpy(row.image)[None]
    refined = refine_maps(maps, image, options)[0, 0].numpy()
    # Number of pixels above each threshold, in all and within truth: one sort instead of one mask per threshold.
    within, everywhere = np.sort(refined[truth]), np.sort(refined.ravel())
    hits = len(within) - np.searchsorted(within, _THRESHOLDS, "right")
    above = len(everywhere) - np.searchsorted(everywhere, _THRESHOLDS, "right")
    return float((hits / np.maximum(len(within) + above - hits, 1)).max())


def _figures(tally: Tally) -> dict[str, Any]:
    per_class = {name: tally.inside[i, 0] / max(tally.inside[i, 1], 1) for name, i in sorted(tally.wanted.items())}
    agreed = [value for values in tally.agreed.values() for value in values]
    return {
        "n": len(tally.foreground),
        "miou": _mean(per_class.values()),
        "per_class_iou": {name: float(value) for name, value in per_class.items()},
        "foreground_iou": _mean(tally.foreground),
        "boundary_iou": _mean(tally.boundary),
        "class_agreement": _mean(agreed),
        "per_class_agreement": {name: _mean(values) for name, values in sorted(tally.agreed.items())},
        "all_classes_seen": _mean(tally.confirmed),
        "best_threshold_iou": _mean(tally.ceiling),
    }


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _mask_options(data: str | Path) -> MaskOptions:
    """Return the refinement that the dataset's masks had; the defaults where it had none, as composed scenes."""
    options = read_manifest(data)["options"]
    return MaskOptions(**{name: options[name] for name in ("refine", "radius", "eps") if name in options})


def _worst_tile(iou: float, found: SimpleNamespace):
    pictures = (found.image, overlay(found.image, found.mask), colour(found.mask), colour(found.truth))
    return tile(pictures, f"{found.key}  IoU {iou:.2f}")
