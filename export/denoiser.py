"""The UNet call with maps in an engine outside torch: the signature of UNetWithMaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffumask_fast.attention.tap import Levels
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.session import GraphSession


class ExportedDenoiser:
    """Call an exported UNetWithMaps.

    The graph has a fixed number of phrases and, without dynamic rows, of rows: inputs are padded with zeros, and the
    padding is cut off the outputs.

    Args:
        session: of the graph, in ONNX Runtime or TensorRT.
        limits: of the engine.
    """

    def __init__(self, session: GraphSession, limits: Limits) -> None:
        self.session = session
        self.limits = limits

    @property
    def dtype(self) -> torch.dtype:
        """Of the graph's latents."""
        return self.session.inputs["latents"]

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        select: Tensor,
        prior: Levels | None = None,
        added: Mapping[str, Any] | None = None,
        *,
        first_conditional: int | None = None,
        **unet_kwargs: Any,
    ) -> tuple[Tensor, Levels, Levels]:
        """Predict the noise with maps, as UNetWithMaps.forward.

        Args:
            latents: [B, C, h, w].
            timestep: of the step, the same for all rows.
            encoder_hidden_states: [B, T, E].
            select: [Bc, T, K] fp32.
            prior: level -> [Bc, M, N] fp32.
            added: the UNet's added_cond_kwargs (SDXL).
            first_conditional: the first of the Bc conditional rows; None: they are the last ones.
            unet_kwargs: what else the UNet is to get, refused.

        Returns:
            noise_pred [B, C, h, w]; maps, level -> [Bc, K, N] fp32; propagated, level -> [Bc, M, N] fp32.

        Raises:
            DiffuMaskError: shapes or a level outside the limits, a keyword that the graph does not have.
        """
        prior = prior or {}
        if unet_kwargs:
            raise DiffuMaskError(f"The exported UNet has no {', '.join(unet_kwargs)}: use `engine=torch`.")
        self._check(latents, encoder_hidden_states, select, prior)
        rows, padded = latents.shape[0], max(latents.shape[0], self.limits.rows[0])
        num, columns = select.shape[0], self.limits.max_phrases
        first = rows - num if first_conditional is None else first_conditional
        pixels = self.limits.level_pixels(tuple(latents.shape[-2:]))

        def in_rows(tensor: Tensor) -> Tensor:
            return F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, padded - rows])

        def in_columns(tensor: Tensor, axis: int) -> Tensor:
            sides = [0, 0, 0, 0, first, padded - first - num]
            sides[2 * (2 - axis) + 1] = columns - tensor.shape[axis]
            return F.pad(tensor.float(), sides)

        step = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device).flatten()[:1]
        inputs = {"latents": latents, "encoder_hidden_states": encoder_hidden_states, **(added or {})}
        inputs = {name: in_rows(inputs[name]) for name in self.session.inputs if name in inputs}
        inputs |= {"timestep": step, "select": in_columns(select, 2)}
        for key in self.limits.propagated:
            earlier = prior[key] if key in prior else select.new_zeros(num, 0, pixels[key])
            inputs[f"prior.{key}"] = in_columns(earlier, 1)
        shapes = {"noise_pred": (padded, self.limits.channels, *latents.shape[-2:])}
        shapes |= {f"maps.{key}": (padded, columns, n) for key, n in pixels.items()}
        shapes |= {f"propagated.{key}": (padded, columns, pixels[key]) for key in self.limits.propagated}
        out = self.session.run(inputs, shapes)
        maps = {key: out[f"maps.{key}"][first : first + num, : select.shape[2]] for key in pixels}
        propagated = {key: out[f"propagated.{key}"][first : first + num, : prior[key].shape[1]] for key in prior}
        return out["noise_pred"][:rows].to(latents.dtype), maps, propagated

    __call__ = forward

    def _check(self, latents: Tensor, states: Tensor, select: Tensor, prior: Levels) -> None:
        limits, (h, w) = self.limits, (size * self.limits.vae_factor for size in latents.shape[-2:])
        limits.check(-(-latents.shape[0] // 2), h, w, select.shape[2], "none")
        if states.shape[1] != limits.tokens:
            raise DiffuMaskError(
                f"The engine takes prompts of {limits.tokens} tokens, not {states.shape[1]}: use `engine=torch`."
            )
        if missing := [key for key in prior if key not in limits.propagated]:
            raise DiffuMaskError(f"The engine does not propagate maps at level {missing[0]}: use `propagate=none`.")
        most = max((value.shape[1] for value in prior.values()), default=0)
        if most > limits.max_phrases:
            raise DiffuMaskError(
                f"The engine propagates at most {limits.max_phrases} maps, not {most}: export again with "
                f"`max_phrases={most}`."
            )
