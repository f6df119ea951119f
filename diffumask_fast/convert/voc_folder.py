"""VOC's layout on its way in, as `learning.layouts.Voc` reads it; class ids stay what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffumask_fast.convert.item import IGNORE
from diffumask_fast.convert.sources import Head, Pixels
from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.layouts import Voc


class VocFolder:
    """See `sources.Source`; of several lists, `split` names one.

    Raises:
        DiffuMaskError: the folder has another layout, or as `learning.data.open_data`.
    """

    def __init__(self, root: Path, split: str | None, max_pixels: int) -> None:
        if not Voc.fits(root):
            raise DiffuMaskError(f"{root} holds no JPEGImages and SegmentationClass: name a folder in VOC's layout")
        self._data = Voc(root, split, max_pixels)
        self.classes = self._data.classes

    def __len__(self) -> int:
        return len(self._data)

    def head(self, index: int) -> Head:
        """Return name and classes of an image."""
        example = self._data[index]
        present = np.flatnonzero(np.bincount(example.labels.ravel(), minlength=256)).tolist()
        return Head(example.name, tuple(number for number in present if number not in (0, IGNORE)))

    def pixels(self, index: int) -> Pixels:
        """Return image and mask."""
        example = self._data[index]
        path = self._data.image_path(index)
        return Pixels(example.image, example.labels, drawn=is_drawn(path.read_bytes()))
