"""Judge a trained segmenter by data with masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.progress import Progress

from diffumask_fast.dataset.preview import sheet, write_png
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.class_lists import lookup, united
from diffumask_fast.learning.data import open_data
from diffumask_fast.learning.evaluation import WORST, Judged, batches, predict, worst_tile
from diffumask_fast.learning.metrics import SegmentationMetrics, merge_classes
from diffumask_fast.learning.options import EvaluateOptions
from diffumask_fast.learning.segmenters import load_segmenter
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.models.device import resolve_device
from diffumask_fast.own_files import check_place


def judge_segmenter(
    options: EvaluateOptions,
    *,
    progress: Callable[[int | None], Progress] = lambda total: Progress(disable=True),
    batch: int = 32,
) -> dict[str, Any]:
    """Judge a segmenter by the masks of data; classes are compared by name.

    A class of the segmenter that the data lack is wrong wherever it is predicted, and has no figure. Rejected rows of
    a dataset of ours are left out.

    Args:
        options: the flags; `sheet` is a PNG of the twenty images of lowest mean IoU over their own classes: image,
            right mask over it, right mask, predicted mask.
        progress: makes a progress bar of the number of images.
        batch: images that are predicted together, fewer of large ones.

    Returns:
        What `SegmentationMetrics.compute` gives.

    Raises:
        DiffuMaskError: there is no such segmenter or data, the data hold nothing to judge, or classes that the
            segmenter lacks and of which `others` does not say what they are.
    """
    for name in ("accepted", "ignored_is_background"):
        if getattr(options, name):
            raise DiffuMaskError(f"`{name}` is for mini-oracle: leave it out, 255 and rejected rows never count here.")
    if options.sheet is not None:
        check_place(options.sheet)
    segmenter = load_segmenter(options.model, resolve_device(options.device))
    data = open_data(options.data, split=options.split, max_pixels=options.reading.max_pixels)
    classes, right, said = _common(data.classes, segmenter.classes, options)
    metrics = SegmentationMetrics(classes, [name.strip() for name in options.unseen.split(",") if name.strip()])
    worst: list[Judged] = []
    with progress(len(data)) as bar:
        task = bar.add_task("judging", total=len(data))
        for part in batches((data[index] for index in range(len(data))), batch):
            for example, mask in zip(part, predict(segmenter, [one.image for one in part], multiple=1), strict=True):
                labels, predicted = right[example.labels], said[mask]
                iou = metrics.update(labels, predicted)
                if iou is not None:
                    worst.append(Judged(iou, example.name, example.image, labels, predicted))
            worst = sorted(worst, key=lambda judged: judged.iou)[:WORST]
            bar.advance(task, len(part))
    figures = metrics.compute()
    if options.sheet is not None and worst:
        write_png(options.sheet, sheet([worst_tile(judged) for judged in worst], columns=3))
    return figures


def _common(
    data: Mapping[int, str], model: Mapping[int, str], options: EvaluateOptions
) -> tuple[dict[int, str], np.ndarray, np.ndarray]:
    """Return the classes that have a figure, and what each id of the data and of the model counts as, [256] uint8.

    Classes are merged first: one that the model lacks may be merged with one that it knows.
    """
    everyone = united(data, model)
    names, merged = merge_classes(everyone, options.merge)
    right, said = (merged[lookup(classes, everyone)] for classes in (data, model))
    wanted, known = ({int(table[value]) for value in classes} for classes, table in ((data, right), (model, said)))
    unknown = sorted(wanted - known)
    if len(unknown) == len(wanted) - 1:
        raise DiffuMaskError(f"{options.model} knows none of the classes of {options.data}: judge by other data")
    if unknown and options.others == "refuse":
        listed = ", ".join(names[value] for value in unknown)
        raise DiffuMaskError(
            f"{options.model} does not know {listed}: say by `others` whether they count as background or are ignored, "
            "or merge them with others by `merge`"
        )
    right[np.isin(right, unknown)] = 0 if options.others == "background" else IGNORE
    return {value: names[value] for value in sorted(wanted & known)}, right, said
