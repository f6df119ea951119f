"""Options of maps and masks, tried on images whose right masks a judge knows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.learning.calibration_samples import CalibrationSample
from diffumask_fast.learning.metrics import binary_iou, boundary
from diffumask_fast.masks.make import IGNORE, make_masks
from diffumask_fast.masks.options import MaskOptions

BATCH = 8
FIGURES = ("class_iou", "foreground_iou", "boundary_iou")
CALIBRATED = ("aggregation", "propagate", "threshold", "refine", "radius", "eps", "colour_steps")


@dataclass(frozen=True)
class Choice:
    """Options of maps and of masks, to be tried together."""

    maps: MapOptions
    mask: MaskOptions

    @property
    def options(self) -> dict[str, Any]:
        """The options that are calibrated, by name."""
        every = {**vars(self.maps), **vars(self.mask)}
        return {name: every[name] for name in CALIBRATED}

    @property
    def is_slow(self) -> bool:
        """Whether a CRF is run, which takes a hundred times as long as all else."""
        return self.mask.threshold == "adaptive" or self.mask.refine == "crf"

    def having(self, **changes: Any) -> Choice:
        """Return the choice with some options changed."""
        maps = {name: value for name, value in changes.items() if name in vars(self.maps)}
        rest = {name: value for name, value in changes.items() if name not in maps}
        return Choice(replace(self.maps, **maps), replace(self.mask, **rest))


class Trials:
    """Make the masks of images by options, and compare them with the right ones.

    Args:
        samples: the images; all have maps by the same options.
        labels: the right mask of each, [H, W] uint8 of its own class ids, 0 for all else, 255 for what nobody knows.
        device: where masks are made.
    """

    def __init__(
        self, samples: Sequence[CalibrationSample], labels: Sequence[np.ndarray], device: torch.device
    ) -> None:
        self.samples = samples
        self.device = device
        self.count = 0
        self._right = [_Right(sample.class_ids, mask) for sample, mask in zip(samples, labels, strict=True)]
        self._known: dict[tuple[Choice, tuple[int, ...]], np.ndarray] = {}
        self.maps = _different(samples)

    def figures(self, choice: Choice, indices: tuple[int, ...]) -> np.ndarray:
        """Return how well the masks of some images agree with the right ones.

        Pixels that `ignore_band` would leave out are judged too.

        Args:
            choice: how masks are made.
            indices: of the images.

        Returns:
            [n, 3] in 0..1: for each image the IoU, mean over its classes; the IoU of any class against background; and
            that of boundaries alone (3 px at 128).
        """
        if (choice, indices) not in self._known:
            self._known[choice, indices] = self._tried(choice, indices)
            self.count += 1
        return self._known[choice, indices]

    def scores(self, choice: Choice, indices: tuple[int, ...]) -> np.ndarray:
        """Return the mean of each image's three figures, [n]."""
        return self.figures(choice, indices).mean(1)

    @torch.inference_mode()
    def _tried(self, choice: Choice, indices: tuple[int, ...]) -> np.ndarray:
        options, figures = replace(choice.mask, ignore_band=0), []

        def shape(index: int) -> tuple[int, ...]:
            sample = self.samples[index]
            return (*sample.image.shape, *sample.maps[choice.maps].shape)

        for _, group in groupby(indices, shape):
            same = list(group)
            for start in range(0, len(same), BATCH):
                part = same[start : start + BATCH]
                samples = [self.samples[index] for index in part]
                maps, images = (
                    torch.from_numpy(np.stack(arrays)).to(self.device)
                    for arrays in ([one.maps[choice.maps] for one in samples], [one.image for one in samples])
                )
                ids = torch.tensor([one.class_ids for one in samples])
                masks = make_masks(maps, images, options, ids)[0].cpu().numpy()
                figures += [self._right[index].figures(mask) for index, mask in zip(part, masks, strict=True)]
        return np.array(figures)


class _Right:
    """The right mask of an image, and what is known of it for every trial."""

    def __init__(self, class_ids: Sequence[int], labels: np.ndarray) -> None:
        self._ids, self._labels, self._known = class_ids, labels, labels != IGNORE
        self._inside = (labels > 0) & self._known

    def figures(self, mask: np.ndarray) -> tuple[float, float, float]:
        """Return the three figures of a mask."""
        labels, known = self._labels, self._known
        mask = np.where(known, mask, labels)  # what nobody knows is neither right nor wrong, nor a boundary
        ious = [binary_iou((mask == value) & known, (labels == value) & known) for value in self._ids]
        edges = (boundary(part > 0) & known for part in (mask, labels))
        return float(np.mean(ious)), binary_iou((mask > 0) & known, self._inside), binary_iou(*edges)


def _different(samples: Sequence[CalibrationSample]) -> list[MapOptions]:
    """Return the options of maps whose maps are not those of earlier ones."""
    there: dict[bytes, MapOptions] = {}
    for options in samples[0].maps:
        digest = hashlib.sha256()
        for sample in samples:
            digest.update(str(sample.maps[options].shape).encode() + sample.maps[options].tobytes())
        there.setdefault(digest.digest(), options)
    return list(there.values())
