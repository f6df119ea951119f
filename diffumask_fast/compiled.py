"""The compiled engine: UNetWithMaps and the VAE's decoder through torch.compile, on CUDA one graph per UNet call."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from diffumask_fast.attention.tap import Levels
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.loading import cache_folder


def compile_pipe(pipe: DiffusionPipeline) -> None:
    """Let a pipeline draw with compiled code wherever maps are collected.

    Nothing is compiled yet: that happens at the first call of each set of shapes, twice where maps are propagated, and
    takes a minute or more; the code is kept in `~/.cache/diffumask-fast` (or TORCHINDUCTOR_CACHE_DIR) for later runs.

    Args:
        pipe: with a UNet2DConditionModel; its UNet and VAE become channels_last.

    Raises:
        DiffuMaskError: on the CPU without a C++ compiler.
    """
    if pipe.unet.device.type == "cpu":
        need_compiler()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    pipe.unet.denoiser = CompiledDenoiser(pipe.unet)
    _compile_decoder(pipe.vae.decoder)


def _compile_decoder(decoder: torch.nn.Module) -> None:
    """Let a decoder run compiled, with calls of fewer rows than the most so far padded as those of the denoiser."""
    compiled, most = torch.compile(decoder.forward, dynamic=False), 0

    def forward(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        rows = latents.shape[0]
        most = max(most, rows)
        padded = F.pad(latents, [0, 0] * (latents.ndim - 1) + [0, most - rows])
        return compiled(padded.contiguous(memory_format=torch.channels_last), *args, **kwargs)[:rows]

    decoder.forward = forward


def need_compiler() -> None:
    """Raise DiffuMaskError where there is no C++ compiler, which torch.compile needs on the CPU."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise DiffuMaskError("--engine compile needs a C++ compiler on the CPU: install g++, or use --engine torch.")


class CompiledDenoiser:
    """A compiled UNetWithMaps, with its signature; images are those of the eager one up to rounding.

    Calls of fewer rows than the first are padded with zeros, so that a run's last batch compiles nothing.

    Args:
        unet: a UNet2DConditionModel.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        self.model = UNetWithMaps(unet)
        self.model.compile(fullgraph=True, dynamic=False)
        self.rows = 0
        self._graphs: dict[Any, _Graph] = {}

    def __call__(
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
        """Predict the noise with maps, as UNetWithMaps.forward."""
        rows, num = latents.shape[0], select.shape[0]
        first = rows - num if first_conditional is None else first_conditional
        self.rows = max(self.rows, rows)

        def padded(tensor: Any, before: int = 0) -> Any:
            """Pad to self.rows rows, so that all of them are conditional and shapes stay what they are."""
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                return tensor
            after = self.rows - before - tensor.shape[0]
            return F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [before, after])

        inputs = {
            "latents": padded(latents).contiguous(memory_format=torch.channels_last),
            "timestep": torch.as_tensor(timestep, device=latents.device).flatten()[0],
            "encoder_hidden_states": padded(encoder_hidden_states),
            "select": padded(select, first),
            "prior": {key: padded(value, first) for key, value in (prior or {}).items()},
            "added": tree_map(padded, dict(added)) if added is not None else None,
            **tree_map(padded, unet_kwargs),
        }
        noise_pred, maps, propagated = self._run(inputs)
        own = slice(first, first + num)
        return noise_pred[:rows], tree_map(lambda x: x[own], maps), tree_map(lambda x: x[own], propagated)

    def _run(self, inputs: dict[str, Any]) -> tuple[Tensor, Levels, Levels]:
        if not inputs["latents"].is_cuda:
            return self.model(**inputs, first_conditional=0)
        leaves, structure = tree_flatten(inputs)
        kinds = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (str(structure), *kinds)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.model, inputs)
        return self._graphs[key](inputs)


class _Graph:
    """What the model does with tensors of these shapes, as a CUDA graph on tensors of its own. No GPU has run it."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        self.inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries allocate what a capture cannot
                model(**self.inputs, first_conditional=0)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # a capture must not trip over what another thread does on a stream of its own
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = model(**self.inputs, first_conditional=0)

    def __call__(self, inputs: dict[str, Any]) -> tuple[Tensor, Levels, Levels]:
        for own, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)
