"""Who says what the right masks are: mini's oracle, a segmenter, or masks made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.options import PromptOptions
from diffumask_fast.learning.calibration_samples import CalibrationSample
from diffumask_fast.learning.class_lists import lookup
from diffumask_fast.learning.data import SegmentationData, open_data
from diffumask_fast.learning.evaluation import ORACLE, VISIBLE, Segmenter, predict
from diffumask_fast.learning.options import CalibrateOptions
from diffumask_fast.learning.segmenters import RECORD, load_pretrained, load_segmenter

CONFIG = "config.json"  # in a folder of transformers
OF_NEW_IMAGES = (
    "classes", "classes_per_image", "num", "seed", "batch_size", "steps", "guidance_scale", "scheduler", "size",
    "dtype",
)  # fmt: skip


class SegmenterJudge:
    """A segmenter that predicts the right masks from the images.

    Args:
        name: `mini-oracle`, a folder that `train` wrote, or one of transformers.
        device: where it predicts.

    Raises:
        DiffuMaskError: there is no such segmenter.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._multiple = 16 if name == ORACLE else 1
        self._name = name
        self._segmenter = _load(name, device)

    def check(self, names: Sequence[str]) -> None:
        """Raise a DiffuMaskError unless it knows all of these classes."""
        if unknown := [name for name in names if name not in self._segmenter.class_ids]:
            raise DiffuMaskError(
                f"{self._name} does not know {', '.join(unknown[:5])}: name other `classes`, or another judge"
            )

    def labels(self, samples: Sequence[CalibrationSample]) -> list[np.ndarray]:
        """Return the right mask of each, [H, W] uint8 of its own class ids, 0 for all else, 255 for what is unknown."""
        predicted = predict(self._segmenter, [sample.image for sample in samples], self._multiple)
        theirs = {0: "background", **{value: name for name, value in self._segmenter.class_ids.items()}}
        return [_own(mask, theirs, sample) for mask, sample in zip(predicted, samples, strict=True)]


class DataJudge:
    """Right masks of images of a run, found by key.

    Args:
        options: where they are.

    Raises:
        DiffuMaskError: there are none.
    """

    def __init__(self, options: CalibrateOptions) -> None:
        self._data: SegmentationData = open_data(
            options.judge, split=options.split, accepted_only=False, max_pixels=options.reading.max_pixels
        )
        self._name = options.judge
        self.keys: Mapping[str, int] = {name: index for index, name in enumerate(self._data.names)}

    def check(self, names: Sequence[str]) -> None:
        """Raise a DiffuMaskError unless it knows one of these classes."""
        if not set(names) & set(self._data.classes.values()):
            raise DiffuMaskError(f"{self._name} knows none of the run's classes: name them as the run does")

    def labels(self, samples: Sequence[CalibrationSample]) -> list[np.ndarray]:
        """As of `SegmenterJudge`."""
        labels = []
        for sample in samples:
            example = self._data[self.keys[sample.key]]
            if example.labels.shape != sample.image.shape[:2]:
                height, width = sample.image.shape[:2]
                raise DiffuMaskError(f"the mask of {sample.key} is not {height}x{width} as its image: bring it to that")
            labels.append(_own(example.labels, self._data.classes, sample))
        return labels


def seen(samples: Sequence[CalibrationSample], labels: Sequence[np.ndarray]) -> list[int]:
    """Return the indices of the images in which the judge sees all classes that are wanted."""
    return [
        index
        for index, (sample, mask) in enumerate(zip(samples, labels, strict=True))
        if all((mask == value).mean() > VISIBLE for value in sample.class_ids)
    ]


def open_judge(options: CalibrateOptions, device: torch.device) -> SegmenterJudge | DataJudge:
    """Return the judge that options name.

    Raises:
        DiffuMaskError: there is none of that name, or an option is for the other kind.
    """
    folder = Path(options.judge).expanduser()
    is_segmenter = options.judge == ORACLE or any((folder / name).exists() for name in (RECORD, CONFIG))
    if is_segmenter and (options.run is not None or options.split is not None or not options.redraw):
        raise DiffuMaskError(
            f"{options.judge} judges new images of the model: leave out `run`, `split` and `redraw`, which are for data"
        )
    if is_segmenter:
        return SegmenterJudge(options.judge, device)
    names = (*OF_NEW_IMAGES, *(() if options.redraw else ("work",)))
    given = [name for name in names if getattr(options, name) != getattr(CalibrateOptions, name)]
    given += [name for name, value in vars(options.prompts).items() if value != getattr(PromptOptions, name)]
    if given:
        raise DiffuMaskError(f"{options.judge} has masks of images that are there already: leave out `{given[0]}`")
    return DataJudge(options)


def _load(name: str, device: torch.device) -> Segmenter:
    if name != ORACLE:
        folder = Path(name).expanduser()
        return (load_segmenter if (folder / RECORD).exists() else load_pretrained)(folder, device)
    from diffumask_fast.mini.oracle import load_oracle

    return load_oracle().to(device)


def _own(mask: np.ndarray, names: Mapping[int, str], sample: CalibrationSample) -> np.ndarray:
    """Return a mask in the ids of a sample's classes; all others are background."""
    own = dict(zip(sample.class_ids, sample.classes, strict=True))
    return lookup(names, own, missing=0)[mask]
