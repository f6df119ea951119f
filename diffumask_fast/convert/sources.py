"""What an importer gives: somebody else's images one by one, first their heads, then their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning import layouts


@dataclass(frozen=True)
class Head:
    """What is known of an image before its row is written.

    Args:
        name: of its file, without folder and ending.
        class_ids: of the classes in it; without any, the image is left out.
        prompt: "" where none is known.
        seed: None where none is known.
    """

    name: str
    class_ids: tuple[int, ...]
    prompt: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class Pixels:
    """An image, its mask and what else its row holds.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] uint8, class ids.
        quality: one number per class; None is 1 each, for masks that people drew.
        maps: [K, h, w] uint8, what the mask was made of.
        reason: why it is rejected; "" where it is not.
        drawn: whether a model drew the image, which is then marked so.
    """

    image: np.ndarray
    mask: np.ndarray
    quality: Sequence[float] | None = None
    maps: np.ndarray | None = None
    reason: str = ""
    drawn: bool = False


class Source(Protocol):
    """Images by their number."""

    @property
    def classes(self) -> Mapping[int, str]:
        """Class id -> name, background included."""

    def __len__(self) -> int:
        """Return the number of images."""

    def head(self, index: int) -> Head:
        """Return what is known of an image.

        Raises:
            DiffuMaskError: its files are missing, damaged or not what they should be.
        """

    def pixels(self, index: int) -> Pixels:
        """Return its image and mask; raises as `head`."""


def decode_image(path: Path, max_pixels: int) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 of an image with 8 bits a channel.

    Raises:
        DiffuMaskError: it is missing, or as `layouts.decode_image`.
    """
    if not path.is_file():
        raise DiffuMaskError(f"{path} is missing: bring it back, or take it out of the list")
    return layouts.decode_image(path, max_pixels)
