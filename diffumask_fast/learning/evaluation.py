"""Judge masks by the masks that mini's oracle predicts from the images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from diffumask_fast.dataset.preview import sheet, tile, write_png
from diffumask_fast.dataset.reader import Row, read_manifest, read_shard
from diffumask_fast.dataset.shard_check import finished_shards
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.data import Example
from diffumask_fast.learning.metrics import binary_iou, boundary, boundary_width, official_width
from diffumask_fast.learning.options import EvaluateOptions
from diffumask_fast.masks.make import IGNORE, refine_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.own_files import check_place
from diffumask_fast.show import colour, overlay

ORACLE = "mini-oracle"
VISIBLE = 0.01  # the share of the image above which an object counts as seen
WORST = 20
BATCH_PIXELS = 3 * 8 * 1024 * 1024  # and channels; larger images come fewer at a time
THRESHOLDS = np.arange(0.02, 1, 0.02, dtype=np.float32)


class Segmenter(Protocol):
    """A model that predicts masks from images; the values of its masks are those of `class_ids`."""

    @property
    def class_ids(self) -> Mapping[str, int]:
        """Name -> value in the masks."""

    def masks(self, images: np.ndarray, batch: int = 32) -> np.ndarray:
        """Return masks uint8 [B, H, W] of images uint8 [B, H, W, 3]; mini's oracle takes multiples of 16."""


Item = TypeVar("Item", Row, Example)


class Judged(NamedTuple):
    """An image, its mask and the predicted one (`truth`), and their IoU of any class against background."""

    iou: float
    key: str
    image: np.ndarray
    mask: np.ndarray
    truth: np.ndarray


@dataclass
class Metrics:
    """Sums over the images judged so far.

    Args:
        ignored_is_background: whether 255 in a mask counts as background; else such pixels are left out.
    """

    ignored_is_background: bool = False
    counts: np.ndarray = field(default_factory=lambda: np.zeros((256, 2), np.int64))  # class -> intersection, union
    foreground: list[float] = field(default_factory=list)
    boundary: list[float] = field(default_factory=list)
    official_boundary: list[float] = field(default_factory=list)
    best_threshold: list[float] = field(default_factory=list)
    agreed: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    seen: list[bool] = field(default_factory=list)
    ignored: list[float] = field(default_factory=list)
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
            DiffuMaskError: the segmenter does not know a class of the row, or the row's parts do not fit together.
        """
        unknown = set(row.classes) - set(class_ids)
        if unknown:
            raise DiffuMaskError(f"{row.key} holds {', '.join(sorted(unknown))}, which mini-oracle has never seen.")
        if row.mask.shape != truth.shape or len(row.classes) != len(row.class_ids):
            raise DiffuMaskError(f"mask and image of {row.key}, or its classes and ids, do not fit together.")
        ids = [class_ids[name] for name in row.classes]
        known = row.mask != IGNORE
        self.ignored.append(float(1 - known.mean()))
        known |= self.ignored_is_background
        mask = np.where(known, 0, truth)  # what is left out is neither right nor wrong, nor a boundary
        for own, value in zip(row.class_ids, ids, strict=True):
            mask[row.mask == own] = value
        for value in np.union1d(mask, truth):
            same, either = (mask == value) & (truth == value), (mask == value) | (truth == value)
            self.counts[value] += ((same & known).sum(), (either & known).sum())
        self.class_ids |= dict(zip(row.classes, ids, strict=True))
        iou = binary_iou((mask > 0) & known, (truth > 0) & known)
        self.foreground.append(iou)
        for values, width in ((self.boundary, boundary_width), (self.official_boundary, official_width)):
            edges = (boundary(part > 0, width(part.shape)) & known for part in (mask, truth))
            values.append(binary_iou(*edges))
        self.seen.append(all((part == value).mean() > VISIBLE for value in ids for part in (mask, truth)))
        if len(ids) == 1:
            largest = np.bincount(truth[truth > 0], minlength=1).argmax()
            self.agreed[row.classes[0]].append(bool(largest == ids[0]))
            if row.maps is not None:
                self.best_threshold.append(best_threshold_iou(row, truth > 0, options, known))
        self.worst = sorted([*self.worst, Judged(iou, row.key, row.image, mask, truth)], key=lambda one: one.iou)
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
            "boundary_iou_3px_at_128": _mean(self.boundary),
            "boundary_iou_ratio_0.02": _mean(self.official_boundary),
            "class_agreement": _mean(value for values in self.agreed.values() for value in values),
            "per_class_agreement": {name: _mean(values) for name, values in sorted(self.agreed.items())},
            "all_classes_seen": _mean(self.seen),
            "best_threshold_iou": _mean(self.best_threshold),
            "ignored_share": _mean(self.ignored),
        }


def evaluate(
    options: EvaluateOptions,
    *,
    progress: Callable[[int | None], Progress] = lambda total: Progress(disable=True),
    batch: int = 32,
) -> dict[str, Any]:
    """Judge a dataset's masks by mini's oracle (`judge_masks`), or a segmenter by data (`judge_segmenter`).

    Raises:
        DiffuMaskError: there is no such segmenter or data, or they do not fit together.
    """
    if options.model == ORACLE:
        return judge_masks(options, progress=progress, batch=batch)
    from diffumask_fast.learning.segmenter_evaluation import judge_segmenter

    return judge_segmenter(options, progress=progress, batch=batch)


def judge_masks(
    options: EvaluateOptions,
    *,
    progress: Callable[[int | None], Progress] = lambda total: Progress(disable=True),
    batch: int = 32,
) -> dict[str, Any]:
    """Judge the masks of a finished dataset by the masks that the oracle predicts of its images.

    Pixels that are 255 in a mask are left out of every figure, or count as background if that is asked for. Images
    whose sides are no multiples of 16 are padded by their edge pixels for the segmenter.

    Args:
        options: the flags; `sheet` is a PNG of the twenty images of lowest foreground IoU: image, mask and prediction.
        progress: makes a progress bar of the number of rows.
        batch: images that are predicted together, fewer of large ones.

    Returns:
        `n`, images; `miou`, mean of `per_class_iou` (intersection over union over all images, of every class wanted);
        `foreground_iou`, any class against background, mean over images; `boundary_iou_3px_at_128`, also under the name
        `boundary_iou`, and `boundary_iou_ratio_0.02`: the same of boundaries alone, of the width that their names say
        (`boundary_width`, `official_width`); `class_agreement`, share of one-class images in which the segmenter's
        largest class is the wanted one, and `per_class_agreement`; `all_classes_seen`, share of images in which every
        wanted class covers more than 1 % of the image in the mask and in the segmenter's; `best_threshold_iou`,
        foreground IoU if each image's refined map were cut at its own best threshold, over one-class images: what a
        threshold alone could reach, not a bound on masks, whose edges are also moved by colour; `ignored_share`, of
        pixels that are 255. A figure that no image has is None.

    Raises:
        DiffuMaskError: there is no finished dataset, the oracle does not know a class, or an option is for others.
    """
    for name, value in (("split", None), ("merge", ""), ("unseen", ""), ("others", "refuse")):
        if getattr(options, name) != value:
            raise DiffuMaskError(f"`{name}` is for a segmenter that is judged: {ORACLE} judges masks, leave it out.")
    if options.sheet is not None:
        check_place(options.sheet)
    from diffumask_fast.mini.oracle import load_oracle

    manifest = read_manifest(options.data)
    paths = finished_shards(options.data, manifest)
    segmenter, refinement = load_oracle(), _mask_options(manifest["options"])
    rows = (row for path in paths for row in read_shard(path, max_pixels=options.reading.max_pixels))
    metrics = Metrics(options.ignored_is_background)
    total = manifest["plan"]["rows"]
    with progress(total) as bar:
        task = bar.add_task("judging", total=total)
        for part in batches((row for row in rows if row.accepted or not options.accepted), batch):
            for row, truth in zip(part, predict(segmenter, [row.image for row in part]), strict=True):
                metrics.update(row, truth, segmenter.class_ids, refinement)
            bar.advance(task, len(part))
    if not metrics.foreground:
        raise DiffuMaskError(f"{options.data} holds no row to judge: let rejected rows count too, or draw more.")
    if options.sheet is not None:
        write_png(options.sheet, sheet([worst_tile(judged) for judged in metrics.worst], columns=3))
    return metrics.compute()


def batches(rows: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Put rows or examples together, so many at most, and so many pixels unless it is one."""
    part: list[Item] = []
    pixels = 0
    for row in rows:
        if part and (len(part) == most or pixels + row.image.size > BATCH_PIXELS):
            yield part
            part, pixels = [], 0
        part.append(row)
        pixels += row.image.size
    if part:
        yield part


def predict(segmenter: Segmenter, images: list[np.ndarray], multiple: int = 16) -> list[np.ndarray]:
    """Return the segmenter's masks, uint8 [H, W], of images uint8 [H, W, 3] of any sizes.

    Args:
        segmenter: predicts.
        images: of any sizes.
        multiple: sides become multiples of it by edge pixels.
    """
    masks: dict[int, np.ndarray] = {}
    for shape in {image.shape for image in images}:
        indices = [index for index, image in enumerate(images) if image.shape == shape]
        height, width = shape[:2]
        edges = ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0))
        predicted = segmenter.masks(np.pad(np.stack([images[index] for index in indices]), edges, "edge"))
        masks |= {index: mask[:height, :width] for index, mask in zip(indices, predicted, strict=True)}
    return [masks[index] for index in range(len(images))]


def best_threshold_iou(row: Row, truth: np.ndarray, options: MaskOptions, known: np.ndarray | None = None) -> float:
    """Return the highest IoU with truth [H, W] that any threshold on the row's refined map has, where it is known."""
    maps, image = torch.from_numpy(row.maps)[None].float(), torch.from_numpy(row.image)[None]
    refined = refine_maps(maps, image, options)[0, 0].numpy()
    known = np.ones_like(truth, bool) if known is None else known
    # Number of pixels above each threshold, in all and within truth: one sort instead of one mask per threshold.
    within, everywhere = np.sort(refined[known & (truth > 0)]), np.sort(refined[known])
    hits = len(within) - np.searchsorted(within, THRESHOLDS, "right")
    above = len(everywhere) - np.searchsorted(everywhere, THRESHOLDS, "right")
    return float((hits / np.maximum(len(within) + above - hits, 1)).max())


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _mask_options(options: Mapping[str, Any]) -> MaskOptions:
    """Return the refinement that the dataset's masks had; the defaults where it had none, as composed scenes."""
    return MaskOptions(**{name: options[name] for name in ("refine", "radius", "eps") if name in options})


def worst_tile(judged: Judged) -> Image.Image:
    pictures = (judged.image, overlay(judged.image, judged.mask), colour(judged.mask), colour(judged.truth))
    return tile(pictures, f"{judged.key}  IoU {judged.iou:.2f}")
