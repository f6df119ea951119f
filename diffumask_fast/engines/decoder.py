"""The decoder of a VAE, compiled."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffumask_fast.borrow import many_shapes, patched, without_traces
from diffumask_fast.engines.cpu_forwards import PIECE_BYTES, TransformedWeights, cheaper_forwards
from diffumask_fast.engines.inductor import inductor


class CompiledDecoder:
    """Decode with compiled code; on the CPU in pieces that fit into its caches, the last one padded.

    Args:
        decoder: of a VAE.
        scale: pixels per latent along each side.
    """

    def __init__(self, decoder: nn.Module, scale: int) -> None:
        self.decoder, self.scale = decoder, scale
        self._forward = decoder.forward
        self._weights = TransformedWeights(decoder)
        self._channels = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)][-1].in_channels
        self._most = 0
        self._compiled = torch.compile(self._optimized, dynamic=False, backend=inductor)

    def in_place(self) -> AbstractContextManager[None]:
        """Replace the decoder's forward by this one inside the context."""
        return patched("forward", {self.decoder: self})

    def __call__(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Decode latents [B, C, h, w], as the decoder's forward."""
        if any(isinstance(other, Tensor) for other in (*args, *kwargs.values())):  # with a row for each image
            return self._forward(latents, *args, **kwargs)
        rows = latents.shape[0]
        piece = self._most = max(self._most, rows)
        if latents.device.type == "cpu":
            image = latents[0, 0].numel() * self.scale**2 * self._channels * latents.element_size()
            piece = min(self._most, max(1, PIECE_BYTES // image))
        padded = F.pad(latents, [0, 0] * (latents.ndim - 1) + [0, -rows % piece])
        parts = padded.contiguous(memory_format=torch.channels_last).split(piece)
        transformed = self._weights.current()
        with many_shapes(), without_traces("forward", self.decoder.modules()):
            return torch.cat([self._compiled(transformed, part, *args, **kwargs) for part in parts])[:rows]

    def _optimized(self, transformed: dict[str, Tensor], latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with patched("forward", cheaper_forwards(self.decoder, transformed) if latents.device.type == "cpu" else {}):
            return self._forward(latents, *args, **kwargs)
