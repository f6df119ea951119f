"""The compiled engine: OptimizedUNet and the VAE's decoder through torch.compile, on CUDA one graph per UNet call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.attention.call import Results, UNetCall
from diffumask_fast.borrow import many_shapes
from diffumask_fast.engines.cpu_forwards import TransformedWeights
from diffumask_fast.engines.cuda_graphs import Answer, Graphs, captured_state, runs_as_graph
from diffumask_fast.engines.decoder import CompiledDecoder
from diffumask_fast.engines.inductor import inductor
from diffumask_fast.engines.optimized_unet import KeysValues, OptimizedUNet
from diffumask_fast.kernels import native
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of numbers of so many bytes


@dataclass(frozen=True)
class CompiledEngine:
    """What draws in the place of a pipeline's UNet and of its VAE's decoder (None: that stays as it is)."""

    denoiser: CompiledDenoiser
    decoder: CompiledDecoder | None

    def decoding(self) -> AbstractContextManager[None]:
        """Let the pipeline's VAE decode by the compiled decoder inside the context."""
        return nullcontext() if self.decoder is None else self.decoder.in_place()


def compile_pipe(pipe: DiffusersPipeline) -> CompiledEngine:
    """Make what draws with compiled code in the place of a pipeline's UNet and decoder.

    Nothing is compiled yet: that happens at the first call of each set of shapes, twice where maps are propagated, and
    takes a minute or more. The code is kept for later runs, see engines/inductor.py.

    Args:
        pipe: with a UNet2DConditionModel; its UNet and VAE become channels_last.

    Raises:
        DiffuMaskError: on the CPU without a C++ compiler that works.
    """
    if pipe.unet.device.type == "cpu":
        native.library()
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    decoder = getattr(pipe.vae, "decoder", None)
    has_own = isinstance(decoder, torch.nn.Module)
    return CompiledEngine(
        CompiledDenoiser(pipe.unet), CompiledDecoder(decoder, pipe.vae_scale_factor) if has_own else None
    )


class CompiledDenoiser:
    """A compiled OptimizedUNet as a Denoiser; images are those of the eager one up to rounding.

    Calls of fewer rows than the first are padded with zeros, so that a run's last batch compiles nothing. What is kept
    between steps, keys and values of the prompts and the transformed weights of convolutions, is made when a tensor of
    encoder_hidden_states is first seen, and kept until the next one.

    On CUDA a call without gradients or autocast is the replay of a graph. A UNet that has changed since, by LoRA, FreeU
    or a move, is captured anew. Whether both halves of the latents are the same is not waited for before the replay: it
    goes by the last call's answer, and where that was wrong, the results are thrown away.

    Args:
        unet: a UNet2DConditionModel.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        self.model = OptimizedUNet(unet)
        self.model.compile(fullgraph=True, dynamic=False, backend=inductor)
        self.rows = 0
        self._seen: tuple[Any, ...] = ()
        self._text: KeysValues | None = None
        self._transformed = TransformedWeights(unet)
        self._weights: dict[str, Tensor] = {}
        self._twins: bool | None = None
        self._graphs: Graphs | None = None
        self._captured: list[Any] = []

    def __call__(self, call: UNetCall) -> Results:
        """Predict the noise with maps, as UNetWithMaps."""
        latents, by_halves = call.latents, call.is_guided
        self.rows = max(self.rows, latents.shape[0])
        self.rows += by_halves * self.rows % 2
        inputs = call.padded(self.rows, by_halves=by_halves)
        inputs = replace(
            inputs,
            latents=inputs.latents.contiguous(memory_format=torch.channels_last),
            timestep=_scalar(call.timestep, latents.device),
        )
        as_graph = runs_as_graph(latents)
        if as_graph:
            self._see_to_graphs(latents.device)
        self._look_at(call.encoder_hidden_states, inputs.encoder_hidden_states, as_graph)
        kept = {"weights": self._weights, "text": None if call.unet_kwargs else self._text}
        no_more = call.added is None and not call.unet_kwargs and self.model.unet.config.addition_embed_type is None
        same = _same_halves(latents) if by_halves and no_more else None
        results = (self._replay if as_graph else self._call)(inputs, kept, same)
        return call.cut(results, by_halves=by_halves)

    def _see_to_graphs(self, device: torch.device) -> None:
        """Begin anew where the UNet is no longer what graphs have captured, or no call has as few rows any more."""
        captured = [device, self.rows, *captured_state(self.model.unet)]
        if captured != self._captured:
            torch.cuda.synchronize(device)  # they may still run
            self._graphs, self._captured, self._seen = Graphs(self._run, device), captured, ()

    def _look_at(self, states: Tensor, padded: Tensor, as_graph: bool) -> None:
        """Make anew what is kept between steps, for other states or another number of rows."""
        version = None if states.is_inference() else states._version
        seen = (padded.shape[0], as_graph, version, self._transformed.version())
        if not self._seen or self._seen[0] is not states or self._seen[1:] != seen:
            text, self._weights = self.model.text(padded), self._transformed.now()
            self._text = self._graphs.keep(text) if as_graph else text
            self._seen = (states, *seen[:3], self._transformed.version())

    def _call(self, inputs: UNetCall, kept: dict[str, Any], same: Tensor | None) -> Results:
        return self._run(inputs, **kept, twins=same is not None and bool(same))

    def _run(self, inputs: UNetCall, **kept: Any) -> Results:
        with many_shapes():
            return self.model(inputs, **kept)

    def _replay(self, inputs: UNetCall, kept: dict[str, Any], same: Tensor | None) -> Results:
        if same is None:
            return self._graphs(inputs, False, kept)
        answer = Answer(same)
        guess = answer.wait() if self._twins is None else self._twins
        results = self._graphs(inputs, guess, kept)
        self._twins = answer.wait()
        if guess and not self._twins:
            results = self._graphs(inputs, False, kept)
        return results


def _scalar(timestep: Tensor | float, device: torch.device) -> Tensor:
    """Bring a timestep to a device; a copy from the CPU would wait for all that the device has to do."""
    first = torch.as_tensor(timestep).flatten()[0]
    return first if first.device == device else torch.full((), first.item(), dtype=first.dtype, device=device)


def _same_halves(latents: Tensor) -> Tensor:
    """Tell whether both halves have the same bits, where the latents are."""
    one, other = latents.detach().view(BITS[latents.element_size()]).chunk(2)
    return (one == other).all()
