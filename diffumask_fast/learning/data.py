"""Images with labels to learn from or to judge by: our datasets, or a folder in the layout of VOC or Cityscapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffumask_fast.dataset.lookup import RowLookup, class_names
from diffumask_fast.dataset.schema import MANIFEST
from diffumask_fast.dataset.shard_check import BOUND
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.options import MAX_PIXELS


@dataclass(frozen=True)
class Example:
    """An image and the class of each of its pixels.

    Args:
        name: of the example, unique in its data.
        image: [H, W, 3] uint8.
        labels: [H, W] uint8, class ids of the data, 0 background, 255 ignored.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray


class SegmentationData(Protocol):
    """Examples by their number; each is decoded when it is asked for, and not kept."""

    @property
    def classes(self) -> Mapping[int, str]:
        """Class id -> name, in the order of the ids, 0 (background) included; labels hold these ids and 255 alone."""

    @property
    def names(self) -> Sequence[str]:
        """The examples' names, in their order; nothing is decoded for them."""

    @property
    def origin(self) -> Any:
        """What tells the data from others of the same names and classes, as a value that JSON can hold."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Return an example.

        Raises:
            DiffuMaskError: its picture or mask is missing or damaged, they differ in size, or an id is no class.
        """


def open_data(
    path: str | Place, *, split: str | None = None, accepted_only: bool = True, max_pixels: int = MAX_PIXELS
) -> SegmentationData:
    """Open data by what is in the folder.

    Three kinds are known. A dataset of ours (`dataset.json`). VOC's layout: `JPEGImages`, `SegmentationClass` (PNG with
    a palette, or grey) and `ImageSets/Segmentation/<split>.txt`, with VOC's classes or those of a `labelmap.txt`.
    Cityscapes' layout: `leftImg8bit/<split>/<city>` and `gtFine/<split>/<city>` with `_labelTrainIds.png` or
    `_labelIds.png`; its class ids here are the train ids plus 1, for 0 is background everywhere; no pixel has it.

    An image whose labels are all 255 is an example as any other: nothing can be learnt or judged by it.

    Args:
        path: the folder, or the address of a dataset of ours. It may be a link; links in it are not followed.
        split: of a VOC or Cityscapes layout; None where there is only one.
        accepted_only: leave out rejected rows of a dataset of ours.
        max_pixels: of a picture, when it is decoded.

    Returns:
        The examples: at least one.

    Raises:
        DiffuMaskError: there are none, files are missing, or the split must be named.

    Example:
        data = open_data("demo")
        print(len(data), data.classes, data[0].image.shape)
    """
    from diffumask_fast.learning.layouts import Cityscapes, Voc

    path = place(path)
    if (path / MANIFEST).exists():
        if split is not None:
            raise DiffuMaskError(f"{path} is a dataset without splits: leave out `split`")
        return Dataset(path, accepted_only, max_pixels)
    for layout in (Voc, Cityscapes):
        if isinstance(path, Path) and layout.fits(path):
            return layout(path, split, max_pixels)
    raise DiffuMaskError(
        f"{path} holds no data: name a dataset that generate wrote, or a folder with JPEGImages and SegmentationClass "
        "(VOC's layout) or leftImg8bit and gtFine (Cityscapes'); of COCO's layout import makes a dataset"
    )


class Dataset:
    """A dataset of ours; see `open_data`."""

    def __init__(self, path: Place, accepted_only: bool = True, max_pixels: int = MAX_PIXELS) -> None:
        self.rows = RowLookup(path, accepted_only=accepted_only, max_pixels=max_pixels)
        if not self.rows:
            raise DiffuMaskError(f"{path} holds no accepted row: draw more, or loosen what rejects them by remask")
        self.classes = class_names(self.rows)
        self.names = [entry.key for entry in self.rows.entries]
        self.origin = {name: self.rows.manifest[name] for name in (*BOUND, "options")}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        return checked_example(Example(row.key, row.image, row.mask), self.classes)


def checked_example(example: Example, classes: Mapping[int, str]) -> Example:
    """Return an example whose image and labels fit together.

    Raises:
        DiffuMaskError: they differ in size, or an id in the labels is no class.
    """
    if example.image.shape[:2] != example.labels.shape:
        image, mask = ("x".join(map(str, part.shape[:2])) for part in (example.image, example.labels))
        raise DiffuMaskError(
            f"the image of {example.name} has {image} pixels and its mask {mask}: bring both to one size"
        )
    there = np.flatnonzero(np.bincount(example.labels.ravel(), minlength=256))
    if unknown := set(there.tolist()) - set(classes) - {IGNORE}:
        ids = ", ".join(map(str, sorted(unknown)))
        raise DiffuMaskError(
            f"the mask of {example.name} holds {ids}, which {'is' if len(unknown) == 1 else 'are'} no class of the "
            f"data (0 to {max(classes)}, and {IGNORE}): write masks of class ids"
        )
    return example
