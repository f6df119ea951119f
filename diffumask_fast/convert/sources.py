"""What an importer gives: somebody else's images one by one, first their heads, then their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.pictures import decode_picture

IMAGE_MODES = ("RGB", "L", "P", "CMYK", "YCbCr", "RGBA", "LA")  # 8 bits a channel; all become RGB


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
        DiffuMaskError: it is missing, damaged, too large, or of another kind.
    """
    if not path.is_file():
        raise DiffuMaskError(f"{path} is missing: bring it back, or take it out of the list")
    picture: Image.Image = decode_picture(path, max_pixels=max_pixels)
    if picture.mode not in IMAGE_MODES:
        raise DiffuMaskError(f"{path} has mode {picture.mode}: images have 8 bits a channel")
    return np.array(picture.convert("RGB"))
