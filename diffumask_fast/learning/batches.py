"""Batches to learn from: each a function of the data, the seed and the step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmenter import Augmenter
from diffumask_fast.learning.data import Example, SegmentationData
from diffumask_fast.masks.make import IGNORE

SCALES = (0.75, 1.4)  # of the random size
GREY = 114  # of pixels beyond the image, where labels are 255
GAIN, OFFSET = 0.1, 12.0  # of the colours, standard deviations


class Batches:
    """Crops of random size and place, half of them mirrored, with colours a little off, in a new order each epoch.

    Args:
        data: the examples.
        table: [256] int64, id in their labels -> label of the model, 255 ignored.
        batch_size: examples in a batch.
        size: height and width of the crops.
        seed: of all that is random.
        augmenter: of the data; None takes the examples as they are.
    """

    def __init__(
        self,
        data: SegmentationData,
        table: np.ndarray,
        batch_size: int,
        size: tuple[int, int],
        seed: tuple[int, ...],
        augmenter: Augmenter | None = None,
    ) -> None:
        self.data, self.table, self.batch_size, self.size, self.seed = data, table, batch_size, size, seed
        self.augmenter = augmenter

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return a step's images, float32 [B, 3, H, W] from 0 to 255, and labels, int64 [B, H, W].

        Raises:
            DiffuMaskError: an example cannot be read, or every pixel of the batch is 255.
        """
        crops, names = [], []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, position = divmod(place, len(self.data))
            index = int(self._order(epoch)[position])
            example = self.augmenter.examples([index], epoch)[0] if self.augmenter else self.data[index]
            names.append(example.name)
            crops.append(crop(example, self.size, np.random.default_rng([*self.seed, 1, epoch, index])))
        images, labels = (torch.stack(parts) for parts in zip(*crops, strict=True))
        if bool((labels == IGNORE).all()):
            raise DiffuMaskError(
                f"nothing can be learnt from {', '.join(names[:4])}: every pixel that was looked at is 255; make masks "
                "that say more, or a larger `batch_size`"
            )
        return images, torch.from_numpy(self.table)[labels.long()]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self.seed, 0, epoch]).permutation(len(self.data))


def crop(example: Example, size: tuple[int, int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return a random crop of an example: image float32 [3, H, W] from 0 to 255, labels uint8 [H, W].

    What lies beyond the image is grey, and 255 in the labels.
    """
    image = torch.from_numpy(np.ascontiguousarray(example.image)).permute(2, 0, 1)[None].float()
    labels = torch.from_numpy(np.ascontiguousarray(example.labels))[None, None]
    scale = float(np.exp(rng.uniform(*np.log(SCALES))))
    scaled = [max(1, round(side * scale)) for side in labels.shape[2:]]
    image = F.interpolate(image, scaled, mode="bilinear", align_corners=False, antialias=scale < 1)
    labels = F.interpolate(labels, scaled, mode="nearest-exact")
    bottom, right = (max(0, wanted - side) for wanted, side in zip(size, scaled, strict=True))
    top, left = int(rng.integers(bottom + 1)), int(rng.integers(right + 1))
    border = (left, right - left, top, bottom - top)
    image, labels = F.pad(image, border, value=GREY), F.pad(labels, border, value=IGNORE)
    y, x = (int(rng.integers(side - wanted + 1)) for side, wanted in zip(labels.shape[2:], size, strict=True))
    image, labels = (part[0, :, y : y + size[0], x : x + size[1]] for part in (image, labels))
    gain, offset = (torch.from_numpy(rng.normal(size=(3, 1, 1)).astype(np.float32)) for _ in range(2))
    image = (image * (1 + GAIN * gain) + OFFSET * offset).clamp(0, 255)
    if rng.random() < 0.5:
        image, labels = image.flip(2), labels.flip(2)
    return image.contiguous(), labels[0].contiguous()
