"""What drawing gives, half done and done, and where the seconds went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffumask_fast import __version__
from diffumask_fast.attention.families import denoising_model
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.attention.store import MapStore
from diffumask_fast.attention.tap import Levels
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import NOT_FINITE, rejections
from diffumask_fast.prompts.request import Request
from diffumask_fast.show import caption_of, sample_html

LIBRARIES = ("torch", "diffusers", "transformers")
MOST_SHOWN = 8  # samples of an output, in a notebook


@dataclass
class Denoised:
    """A batch half done: its denoising is over, its maps are complete.

    Args:
        output: what the diffusers pipeline gave: pixels [B, 3, H, W] in 0..1, or latents [B, C, h, w].
        is_latent: whether it is latents.
        store: the maps.
        maps: how they become class maps.
        ids: [B, K], 0 where there is no class.
    """

    output: Tensor
    is_latent: bool
    store: MapStore
    maps: MapOptions
    ids: Tensor


@dataclass
class Drawn:
    """A finished batch.

    Args:
        pixels: [B, 3, H, W] in 0..1, as diffusers gives it.
        images: [B, H, W, 3] uint8.
        finite: for each image, whether all of its pixels are numbers.
        mask: [B, H, W] uint8.
        class_maps: [B, K, h, w] uint8.
        quality: [B, K].
        ids: [B, K], 0 where there is no class.
    """

    pixels: Tensor
    images: Tensor
    finite: list[bool]
    mask: Tensor
    class_maps: Tensor
    quality: Tensor
    ids: Tensor

    def qualities(self) -> list[list[float]]:
        """Return the quality of each image's own classes."""
        counts = (self.ids > 0).sum(1).tolist()
        return [row[:count] for row, count in zip(self.quality.tolist(), counts, strict=True)]

    def results(self, requests: Sequence[Request], options: MaskOptions) -> list[Result]:
        """Return the sample of each request, accepted or with the reason why not.

        Args:
            requests: that were drawn.
            options: by which their masks were made.
        """
        phrases = [request.phrases for request in requests]
        reasons = rejections(self.images, self.mask, self.ids, phrases, options, self.quality)
        reasons = [reason if finite else NOT_FINITE for reason, finite in zip(reasons, self.finite, strict=True)]
        images, masks, class_maps = to_host(self.images, self.mask, self.class_maps)
        quality = self.qualities()
        return [
            Result(
                request, images[row], masks[row], tuple(quality[row]), class_maps[row, : len(request.phrases)],
                not reasons[row], reasons[row],
            )
            for row, request in enumerate(requests)
        ]  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """What made an output: the model's name, who knows the hash of its weights, and all else that is known."""

    model: str
    weights_of: Any
    facts: dict[str, Any]

    @classmethod
    def of(cls, pipe: Any, maps: MapOptions, mask: MaskOptions, **call: Any) -> Provenance:
        """Note what a call of a DiffuMaskPipeline depends on."""
        facts = {
            "scheduler": type(pipe.pipe.scheduler).__name__,
            "maps": dict(vars(maps)),
            "mask": dict(vars(mask)),
            "dtype": str(denoising_model(pipe.pipe).dtype).removeprefix("torch."),
            "device": pipe.device.type,
            "engine": {"name": pipe.engine_name, **({"sha256": pipe.engine.sha256} if pipe.engine else {})},
            **pipe.info.lora_record,
            "versions": {"diffumask_fast": __version__, **{name: version(name) for name in LIBRARIES}},
        }
        return cls(pipe.info.name, pipe.engine or pipe.info, facts | call)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON types; the first time this reads and hashes the model's files."""
        return {"model": self.model, "weights": self.weights_of.weights, **self.facts}


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
        made_by: model, options and versions that made this; `provenance` has them as JSON types.
    """

    images: Any
    masks: np.ndarray
    quality: list[list[float]]
    maps: Levels
    class_maps: np.ndarray
    class_ids: list[tuple[int, ...]]
    made_by: Provenance

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, options and versions that made this, as JSON types."""
        return self.made_by.as_dict()

    def _repr_html_(self) -> str:
        """Show the first samples in a notebook."""
        shown = []
        for index, (mask, ids) in enumerate(zip(self.masks[:MOST_SHOWN], self.class_ids, strict=False)):
            rated = zip(ids, self.quality[index], strict=True)
            words = "; ".join(f"id {number}: quality {quality:.2f}" for number, quality in rated)
            shown.append(sample_html(_pixels(self.images, index), mask, words))
        if rest := len(self.masks) - len(shown):
            shown.append(f"<p>and {rest} more</p>")
        return "".join(shown)


@dataclass(frozen=True)
class Result:
    """One drawn sample: image uint8 [H, W, 3], mask uint8 [H, W], class maps uint8 [K, h, w], quality per class."""

    drawn: ClassVar[bool] = True
    request: Request
    image: np.ndarray
    mask: np.ndarray
    quality: tuple[float, ...]
    maps: np.ndarray
    accepted: bool
    reason: str

    def _repr_html_(self) -> str:
        """Show the sample in a notebook."""
        asked = self.request
        words = caption_of(asked.key, asked.prompt, asked.classes, self.quality, self.reason)
        return sample_html(self.image, self.mask, words)


@dataclass
class Seconds:
    """Seconds by stage since the pipeline was made; on CUDA a stream decodes and masks beside the next denoising.

    `encode` is for how long the encoding of images held up the drawing.
    """

    denoise: float = 0.0
    decode: float = 0.0
    masks: float = 0.0
    encode: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the stages by name."""
        return dict(vars(self))


def _pixels(images: Any, index: int) -> np.ndarray:
    """Return an image of an output, whatever its type, as [H, W, 3] uint8."""
    image = images[index]
    if isinstance(image, Tensor):
        image = image.detach().float().cpu().movedim(0, -1).numpy()
    pixels = np.asarray(image)
    return pixels if pixels.dtype == np.uint8 else (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Copy tensors of one device to the CPU, on CUDA through pinned memory with one wait for all of them."""
    if not tensors[0].is_cuda:
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy().copy() for copy in copies]  # frees the pinned memory, which is scarce
