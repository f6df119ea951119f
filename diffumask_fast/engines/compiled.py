"""The compiled engine: torch.compile for OptimizedUNet and the VAE's decoder, and on CUDA one graph per UNet call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.attention.call import Results, UNetCall
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.borrow import many_shapes, without_traces
from diffumask_fast.engines.cpu_forwards import TransformedWeights
from diffumask_fast.engines.cuda_graphs import Answer, Graphs, captured_state, runs_as_graph
from diffumask_fast.engines.decoder import CompiledDecoder
from diffumask_fast.engines.inductor import inductor
from diffumask_fast.engines.optimized_unet import KeysValues, OptimizedUNet
from diffumask_fast.errors import DiffuMaskError, first_line
from diffumask_fast.kernels import native
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


@dataclass(frozen=True)
class CompiledEngine:
    """Compiled replacements of a pipeline's UNet and of its VAE's decoder; None: the decoder is not replaced."""

    denoiser: CompiledDenoiser
    decoder: CompiledDecoder | None

    def decoding(self) -> AbstractContextManager[None]:
        """Replace the decoder of the pipeline's VAE by the compiled one inside the context."""
        return nullcontext() if self.decoder is None else self.decoder.in_place()


def compile_pipe(pipe: DiffusersPipeline) -> CompiledEngine:
    """Make compiled replacements of a pipeline's UNet and decoder.

    Compilation happens at the first call with each set of shapes (with propagation, calls have two sets) and takes a
    minute or more. The code is cached on disk for later runs, see engines/inductor.py.

    Args:
        pipe: with a UNet2DConditionModel; its UNet and VAE become channels_last.

    Raises:
        DiffuMaskError: there is no working C++ compiler, on the CPU.
    """
    if pipe.unet.device.type == "cpu":
        native.library()
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    decoder = getattr(pipe.vae, "decoder", None)
    return CompiledEngine(
        CompiledDenoiser(pipe.unet),
        CompiledDecoder(decoder, pipe.vae_scale_factor) if isinstance(decoder, torch.nn.Module) else None,
    )


class CompiledDenoiser:
    """A compiled OptimizedUNet as a Denoiser; its images are those of the eager UNet up to rounding.

    A call with fewer rows than an earlier one is padded with zeros, so that a run's last batch compiles nothing. The
    prompts' keys and values and the convolutions' transformed weights are made at the first call with a new tensor of
    encoder_hidden_states, and reused for the calls with the same tensor.

    On CUDA a call without gradients or autocast replays a graph. If the UNet was changed, by LoRA, FreeU or a move, it
    is captured again. Each replay assumes the last call's answer to whether both halves of the latents are equal, so
    that it starts without waiting for the GPU; if the assumption was wrong, the call is run again.

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
        """Predict the noise with maps, as UNetWithMaps.

        Raises:
            DiffuMaskError: a layer has a foreign processor, or another change that cannot be compiled.
        """
        latents, by_halves = call.latents, call.is_guided
        self.rows = max(self.rows, latents.shape[0])
        self.rows += by_halves * self.rows % 2  # halves need an even number
        inputs = call.padded(self.rows, by_halves=by_halves)
        inputs = replace(
            inputs,
            latents=inputs.latents.contiguous(memory_format=torch.channels_last),
            timestep=_scalar(call.timestep, latents.device),
        )
        graphs = self._current_graphs(latents.device) if runs_as_graph(latents) else None
        self._refresh(call.encoder_hidden_states, inputs.encoder_hidden_states, graphs)
        kept = {"weights": self._weights, "text": None if call.unet_kwargs else self._text}
        config: Any = self.model.unet.config
        only_text_differs = call.added is None and not call.unet_kwargs and config.addition_embed_type is None
        equal = _equal_halves(latents) if by_halves and only_text_differs else None
        if graphs is None:
            results = self._run(inputs, **kept, twins=equal is not None and bool(equal))
        else:
            results = self._replay(graphs, inputs, kept, equal)
        return call.cut(results, by_halves=by_halves)

    @property
    def unpropagated(self) -> frozenset[str]:
        """The levels whose self-attention ran on other tokens than all pixels in the last call."""
        return self.model.unpropagated

    def _current_graphs(self, device: torch.device) -> Graphs:
        """Return the graphs, new ones if the UNet is no longer the captured one or the number of rows has grown."""
        captured = [device, self.rows, *captured_state(self.model.unet)]
        if self._graphs is None or captured != self._captured:
            torch.cuda.synchronize(device)  # the old graphs may still run
            self._graphs, self._captured, self._seen = Graphs(self._run, device), captured, ()
        return self._graphs

    def _refresh(self, states: Tensor, padded: Tensor, graphs: Graphs | None) -> None:
        """Make the keys, values and transformed weights again if the states, the rows or the weights are new."""
        version = None if states.is_inference() else states._version
        seen = (padded.shape[0], graphs is not None, version, self._transformed.version())
        if not self._seen or self._seen[0] is not states or self._seen[1:] != seen:
            self.model.check()
            text, self._weights = self.model.text(padded), self._transformed.current()
            self._text = text if graphs is None else graphs.keep(text)
            self._seen = (states, *seen[:3], self._transformed.version())

    def _run(self, inputs: UNetCall, **kept: Any) -> Results:
        try:
            with many_shapes(), without_traces("forward", self.model.unet.modules()):
                return self.model(inputs, **kept)
        except torch._dynamo.exc.Unsupported as error:
            UNetWithMaps(self.model.unet)(inputs)  # which says what it cannot run either
            raise DiffuMaskError(
                f"`engine=compile` cannot compile this UNet as it was changed ({first_line(error)}): use `engine=torch`"
            ) from error

    def _replay(self, graphs: Graphs, inputs: UNetCall, kept: dict[str, Any], equal: Tensor | None) -> Results:
        if equal is None:
            return graphs(inputs, False, kept)
        answer = Answer(equal)
        guess = answer.wait() if self._twins is None else self._twins
        results = graphs(inputs, guess, kept)
        self._twins = answer.wait()
        if guess and not self._twins:
            results = graphs(inputs, False, kept)
        return results


def _scalar(timestep: Tensor | float, device: torch.device) -> Tensor:
    """Make a timestep a scalar on a device; filled there, because a copy from the CPU waits for the device."""
    first = torch.as_tensor(timestep).flatten()[0]
    return first if first.device == device else torch.full((), first.item(), dtype=first.dtype, device=device)


def _equal_halves(latents: Tensor) -> Tensor:
    """Tell whether both halves have the same bits: a bool on the device of the latents."""
    one, other = latents.detach().view(INTEGERS[latents.element_size()]).chunk(2)
    return (one == other).all()
