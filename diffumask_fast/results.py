"""What drawing gives: the output of a call, the results of a stream, and where the seconds went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffumask_fast.attention.tap import Levels
from diffumask_fast.prompts.request import Request


@dataclass
class Output:
    """What a call gives.

    Attributes:
        images: as `output_type` asks, PIL by default.
        masks: uint8 [B, H, W], 0 background, class ids, 255 ignored.
        quality: one list per image, a number in 0..1 per class.
        maps: level -> [B, K, N] fp32, mean over heads, layers and UNet calls.
        class_maps: uint8 [B, K, h, w], what the masks were made of.
        class_ids: one tuple per image.
        provenance: model, options and versions that made this.
    """

    images: Any
    masks: np.ndarray
    quality: list[list[float]]
    maps: Levels
    class_maps: np.ndarray
    class_ids: list[tuple[int, ...]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One drawn sample: image uint8 [H, W, 3], mask uint8 [H, W], class maps uint8 [K, h, w], quality per class."""

    request: Request
    image: np.ndarray
    mask: np.ndarray
    quality: tuple[float, ...]
    maps: np.ndarray
    accepted: bool
    reason: str


@dataclass
class Seconds:
    """Seconds by stage since the pipeline was made."""

    denoise: float = 0.0
    decode: float = 0.0
    masks: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the stages by name."""
        return dict(vars(self))
