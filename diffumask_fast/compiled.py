"""The compiled engine: LeanUNet and the VAE's decoder through torch.compile, on CUDA one graph per UNet call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from diffumask_fast.attention.forwards import PIECE_BYTES, TransformedWeights, cheaper_forwards, swapped
from diffumask_fast.attention.lean import KeysValues, LeanUNet
from diffumask_fast.attention.tap import Levels
from diffumask_fast.kernels import native
from diffumask_fast.loading import cache_folder

VARIANTS = 128


def compile_pipe(pipe: DiffusionPipeline) -> None:
    """Let a pipeline draw with compiled code wherever maps are collected.

    Nothing is compiled yet: that happens at the first call of each set of shapes, twice where maps are propagated, and
    takes a minute or more; the code is kept in `~/.cache/diffumask-fast` (or TORCHINDUCTOR_CACHE_DIR) for later runs.

    Args:
        pipe: with a UNet2DConditionModel; its UNet and VAE become channels_last.

    Raises:
        DiffuMaskError: on the CPU without a C++ compiler that works.
    """
    if pipe.unet.device.type == "cpu":
        native.library()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    pipe.unet.denoiser = CompiledDenoiser(pipe.unet)
    if isinstance(getattr(pipe.vae, "decoder", None), torch.nn.Module):
        _compile_decoder(pipe.vae.decoder, pipe.vae_scale_factor)


def _compile_decoder(decoder: torch.nn.Module, scale: int) -> None:
    """Let a decoder run compiled, on the CPU in pieces that its caches take; what fills no piece is padded.

    Args:
        decoder: of a VAE.
        scale: pixels for a latent.
    """
    forward, most, weights = decoder.forward, 0, TransformedWeights(decoder)
    channels = [module for module in decoder.modules() if isinstance(module, torch.nn.Conv2d)][-1].in_channels

    def lean(transformed: dict[str, Tensor], latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with swapped("forward", cheaper_forwards(decoder, transformed) if latents.device.type == "cpu" else {}):
            return forward(latents, *args, **kwargs)

    compiled = torch.compile(lean, dynamic=False)

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        if any(isinstance(other, Tensor) for other in (*args, *kwargs.values())):  # an image or mask beside each row
            return forward(latents, *args, **kwargs)
        rows = latents.shape[0]
        piece = most = max(most, rows)
        if latents.device.type == "cpu":
            image = latents[0, 0].numel() * scale**2 * channels * latents.element_size()
            piece = min(most, max(1, PIECE_BYTES // image))
        padded = F.pad(latents, [0, 0] * (latents.ndim - 1) + [0, -rows % piece])
        parts = padded.contiguous(memory_format=torch.channels_last).split(piece)
        transformed = weights.now()
        return torch.cat([compiled(transformed, part, *args, **kwargs) for part in parts])[:rows]

    decoder.forward = decode


class CompiledDenoiser:
    """A compiled LeanUNet with the signature of UNetWithMaps; images are those of the eager one up to rounding.

    Calls of fewer rows than the first are padded with zeros, so that a run's last batch compiles nothing. What is kept
    between steps, keys and values of the prompts and the transformed weights of convolutions, is made when a tensor of
    encoder_hidden_states is first seen, and kept until the next one.

    Args:
        unet: a UNet2DConditionModel.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        self.model = LeanUNet(unet)
        self.model.compile(fullgraph=True, dynamic=False)
        # each set of shapes is code of its own, and past the limit a call would fail
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        self.rows = 0
        self._seen: tuple[Any, ...] = ()
        self._text: KeysValues | None = None
        self._transformed = TransformedWeights(unet)
        self._weights: dict[str, Tensor] = {}
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
        halves = 2 if first == num and rows == 2 * num else 1  # an unconditional row for each conditional one
        self.rows = max(self.rows, rows)
        self.rows += self.rows % halves
        # without halves all rows are conditional ones, so that shapes do not depend on which
        begin, before = (self.rows // 2, 0) if halves == 2 else (0, first)

        def padded(tensor: Any) -> Any:
            """Pad each half, so that shapes stay what they are."""
            if not isinstance(tensor, Tensor) or tensor.ndim == 0 or tensor.shape[0] != rows:
                return tensor
            pad = [0, 0] * (tensor.ndim - 1) + [0, (self.rows - rows) // halves]
            return F.pad(tensor.unflatten(0, (halves, -1)), pad).flatten(0, 1)

        def conditional(tensor: Tensor) -> Tensor:
            return F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [before, self.rows - begin - before - num])

        inputs = {
            "latents": padded(latents).contiguous(memory_format=torch.channels_last),
            "timestep": torch.as_tensor(timestep, device=latents.device).flatten()[0],
            "encoder_hidden_states": padded(encoder_hidden_states),
            "select": conditional(select),
            "prior": tree_map(conditional, dict(prior or {})),
            "added": tree_map(padded, dict(added)) if added is not None else None,
            "first_conditional": begin,
            **tree_map(padded, unet_kwargs),
        }
        self._look_at(encoder_hidden_states, inputs["encoder_hidden_states"])
        inputs["weights"] = self._weights
        if not unet_kwargs:
            inputs["text"] = self._text
            inputs["twins"] = halves == 2 and added is None and self._are_twins(latents)
        noise_pred, maps, propagated = self._run(inputs)
        noise_pred = noise_pred.unflatten(0, (halves, -1))[:, : rows // halves].flatten(0, 1)
        own = slice(before, before + num)
        return noise_pred, tree_map(lambda x: x[own], maps), tree_map(lambda x: x[own], propagated)

    def _are_twins(self, latents: Tensor) -> bool:
        """Tell whether both halves are the same, and their embeddings too; what is not a number counts as equal."""
        one, other = latents.nan_to_num().chunk(2)
        return self.model.unet.config.addition_embed_type is None and torch.equal(one, other)

    def _look_at(self, states: Tensor, padded: Tensor) -> None:
        """Make anew what is kept between steps, for other states or another number of rows."""
        version = None if states.is_inference() else states._version
        seen = (padded.shape[0], version, self._transformed.version())
        if not self._seen or self._seen[0] is not states or self._seen[1:] != seen:
            self._text, self._weights = self.model.text(padded), self._transformed.now()
            self._seen = (states, *seen[:2], self._transformed.version())

    def _run(self, inputs: dict[str, Any]) -> tuple[Tensor, Levels, Levels]:
        if not inputs["latents"].is_cuda:
            return self.model(**inputs)
        leaves, structure = tree_flatten(inputs)
        kinds = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (str(structure), *kinds)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.model, inputs)
        return self._graphs[key](inputs)


def _same(leaf: Any) -> Any:
    """Leave a leaf as it is: mapped over a tree, its lists are new ones, for a UNet pops what it takes from them."""
    return leaf


class _Graph:
    """What the model does with tensors of these shapes, as a CUDA graph on tensors of its own. No GPU has run it."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        self.inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries allocate what a capture cannot
                model(**tree_map(_same, self.inputs))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # a capture must not trip over what another thread does on a stream of its own
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = model(**tree_map(_same, self.inputs))

    def __call__(self, inputs: dict[str, Any]) -> tuple[Tensor, Levels, Levels]:
        for own, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)
