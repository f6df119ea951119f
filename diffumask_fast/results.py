"""What drawing gives: the output of a call, the results of a stream, and where the seconds went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

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


@contextmanager
def timed_decoding(pipe: DiffusionPipeline, seconds: Seconds) -> Iterator[None]:
    """Time the VAE's decoder, and hand the VAE its own dtype (an fp32 VAE beside an fp16 UNet)."""
    kept = {name: vars(pipe.vae).get(name) for name in ("encode", "decode")}

    def in_own_dtype(method: Any, stage: str) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(tensor.to(next(pipe.vae.parameters()).dtype), *args, **kwargs)
            finally:
                if tensor.is_cuda:
                    torch.cuda.synchronize(tensor.device)
                if stage == "decode":
                    seconds.decode += time.perf_counter() - start

        return call

    try:
        for name in kept:
            setattr(pipe.vae, name, in_own_dtype(getattr(pipe.vae, name), name))
        yield
    finally:
        for name, own in kept.items():
            vars(pipe.vae).pop(name, None)
            if own is not None:
                setattr(pipe.vae, name, own)
