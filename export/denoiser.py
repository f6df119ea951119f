"""The UNet call with maps in an engine outside torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.attention.call import Results, UNetCall
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

    def __call__(self, call: UNetCall) -> Results:
        """Predict the noise with maps, as UNetWithMaps.

        Raises:
            DiffuMaskError: shapes or a level outside the limits, a keyword that the graph does not have.
        """
        select = call.select
        if select is None:
            select = call.latents.new_zeros(call.num_conditional, call.encoder_hidden_states.shape[1], 0)
        call = replace(call, select=select)
        self._check(call, select.shape[2])
        pixels = self.limits.level_pixels(call.latents.shape[-2:])
        rows = max(call.latents.shape[0], self.limits.rows[0])
        columns = self.limits.max_phrases
        levels = {key: select.new_zeros(call.num_conditional, 0, pixels[key]) for key in self.limits.propagated}
        padded = replace(call, prior=levels | dict(call.prior)).padded(rows, columns)
        shapes = {"noise_pred": (rows, self.limits.channels, *call.latents.shape[-2:])}
        shapes |= {f"maps.{key}": (rows, columns, num) for key, num in pixels.items()}
        shapes |= {f"propagated.{key}": (rows, columns, pixels[key]) for key in self.limits.propagated}
        out = self.session.run(self._inputs(padded), shapes)
        maps, propagated = (
            {key: out[f"{kind}.{key}"] for key in keys} for kind, keys in (("maps", pixels), ("propagated", call.prior))
        )
        return call.cut((out["noise_pred"].to(call.latents.dtype), maps, propagated))

    def _inputs(self, call: UNetCall) -> dict[str, Tensor]:
        """Return a padded call's tensors by the names that the graph has for them."""
        step = torch.as_tensor(call.timestep, dtype=torch.float32, device=call.latents.device).flatten()[:1]
        states = call.encoder_hidden_states
        named: dict[str, Any] = {
            "latents": call.latents, "timestep": step, "encoder_hidden_states": states, "select": call.select
        }  # fmt: skip
        named |= {f"prior.{key}": value for key, value in call.prior.items()}
        named |= call.added or {}
        return {name: named[name] for name in self.session.inputs if name in named}

    def _check(self, call: UNetCall, phrases: int) -> None:
        if call.unet_kwargs:
            raise DiffuMaskError(f"The exported UNet has no {', '.join(call.unet_kwargs)}: use `engine=torch`.")
        limits, (h, w) = self.limits, (size * self.limits.vae_factor for size in call.latents.shape[-2:])
        limits.check(-(-call.latents.shape[0] // 2), h, w, phrases, "none")
        if call.encoder_hidden_states.shape[1] != limits.tokens:
            raise DiffuMaskError(
                f"The engine takes prompts of {limits.tokens} tokens, not {call.encoder_hidden_states.shape[1]}: "
                "use `engine=torch`."
            )
        if missing := [key for key in call.prior if key not in limits.propagated]:
            raise DiffuMaskError(f"The engine does not propagate maps at level {missing[0]}: use `propagate=none`.")
        most = max((value.shape[1] for value in call.prior.values()), default=0)
        if most > limits.max_phrases:
            raise DiffuMaskError(
                f"The engine propagates at most {limits.max_phrases} maps, not {most}: export again with "
                f"`max_phrases={most}`."
            )
