"""The compiled engine: OptimizedUNet and the VAE's decoder through torch.compile, on CUDA one graph per UNet call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from diffumask_fast.attention.tap import Levels
from diffumask_fast.attention.unet import first_row
from diffumask_fast.borrow import patched
from diffumask_fast.engines.cpu_forwards import PIECE_BYTES, TransformedWeights, cheaper_forwards
from diffumask_fast.engines.optimized_unet import KeysValues, OptimizedUNet
from diffumask_fast.kernels import native, source_hash
from diffumask_fast.models.cache import cache_folder

VARIANTS = 128
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of numbers of so many bytes

Results = tuple[Tensor, Levels, Levels]


def compile_pipe(pipe: DiffusionPipeline) -> None:
    """Let a pipeline draw with compiled code wherever maps are collected.

    Nothing is compiled yet: that happens at the first call of each set of shapes, twice where maps are propagated, and
    takes a minute or more. The code is kept for later runs: in TORCHINDUCTOR_CACHE_DIR where that is set, else in
    `~/.cache/diffumask-fast/inductor`, in a folder for each state of the kernels' sources, which torch's keys omit.

    Args:
        pipe: with a UNet2DConditionModel; its UNet and VAE become channels_last.

    Raises:
        DiffuMaskError: on the CPU without a C++ compiler that works.
    """
    if pipe.unet.device.type == "cpu":
        native.library()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor" / source_hash()))
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
        with patched("forward", cheaper_forwards(decoder, transformed) if latents.device.type == "cpu" else {}):
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
    """A compiled OptimizedUNet with the signature of UNetWithMaps; images are those of the eager one up to rounding.

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
        self.model.compile(fullgraph=True, dynamic=False)
        # each set of shapes is code of its own, and past the limit a call would fail
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        self.rows = 0
        self._seen: tuple[Any, ...] = ()
        self._text: KeysValues | None = None
        self._transformed = TransformedWeights(unet)
        self._weights: dict[str, Tensor] = {}
        self._twins: bool | None = None
        self._graphs: _Graphs | None = None
        self._captured: list[Any] = []

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        select: Tensor | None,
        prior: Levels | None = None,
        added: Mapping[str, Any] | None = None,
        *,
        first_conditional: int | None = None,
        **unet_kwargs: Any,
    ) -> tuple[Tensor, Levels, Levels]:
        """Predict the noise with maps, as UNetWithMaps.forward."""
        rows = latents.shape[0]
        first = first_row(latents, select, first_conditional)
        num = rows - first if select is None else select.shape[0]
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
            "timestep": _scalar(timestep, latents.device),
            "encoder_hidden_states": padded(encoder_hidden_states),
            "select": None if select is None else conditional(select),
            "prior": tree_map(conditional, dict(prior or {})),
            "added": tree_map(padded, dict(added)) if added is not None else None,
            "first_conditional": begin,
            **tree_map(padded, unet_kwargs),
        }
        by_graph = _by_graph(latents)
        if by_graph:
            self._see_to_graphs(latents.device)
        self._look_at(encoder_hidden_states, inputs["encoder_hidden_states"], by_graph)
        kept = {"weights": self._weights, "text": None if unet_kwargs else self._text}
        alike = halves == 2 and added is None and not unet_kwargs and self.model.unet.config.addition_embed_type is None
        run = self._replay if by_graph else self._call
        noise_pred, maps, propagated = run(inputs, kept, _same_halves(latents) if alike else None)
        noise_pred = noise_pred.unflatten(0, (halves, -1))[:, : rows // halves].flatten(0, 1)
        own = slice(before, before + num)
        return noise_pred, tree_map(lambda x: x[own], maps), tree_map(lambda x: x[own], propagated)

    def _see_to_graphs(self, device: torch.device) -> None:
        """Begin anew where the UNet is no longer what graphs have captured, or no call has as few rows any more."""
        captured = [device, self.rows, *_fixed(self.model.unet)]
        if captured != self._captured:
            torch.cuda.synchronize(device)  # they may still run
            self._graphs, self._captured, self._seen = _Graphs(self.model, device), captured, ()

    def _look_at(self, states: Tensor, padded: Tensor, by_graph: bool) -> None:
        """Make anew what is kept between steps, for other states or another number of rows."""
        version = None if states.is_inference() else states._version
        seen = (padded.shape[0], by_graph, version, self._transformed.version())
        if not self._seen or self._seen[0] is not states or self._seen[1:] != seen:
            text, self._weights = self.model.text(padded), self._transformed.now()
            self._text = self._graphs.keep(text) if by_graph else text
            self._seen = (states, *seen[:3], self._transformed.version())

    def _call(self, inputs: dict[str, Any], kept: dict[str, Any], same: Tensor | None) -> Results:
        return self.model(**inputs, **kept, twins=same is not None and bool(same))

    def _replay(self, inputs: dict[str, Any], kept: dict[str, Any], same: Tensor | None) -> Results:
        if same is None:
            return self._graphs({**inputs, "twins": False}, kept)
        answer = _Answer(same)
        guess = answer.wait() if self._twins is None else self._twins
        results = self._graphs({**inputs, "twins": guess}, kept)
        self._twins = answer.wait()
        if guess and not self._twins:
            results = self._graphs({**inputs, "twins": False}, kept)
        return results


def _by_graph(latents: Tensor) -> bool:
    """Tell whether a call is a graph's: one has no gradients, and reads what autocast has cast after it is gone."""
    return latents.is_cuda and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


def _scalar(timestep: Tensor | float, device: torch.device) -> Tensor:
    """Bring a timestep to a device; a copy from the CPU would wait for all that the device has to do."""
    first = torch.as_tensor(timestep).flatten()[0]
    return first if first.device == device else torch.full((), first.item(), dtype=first.dtype, device=device)


def _same_halves(latents: Tensor) -> Tensor:
    """Tell whether both halves have the same bits, where the latents are."""
    one, other = latents.detach().view(BITS[latents.element_size()]).chunk(2)
    return (one == other).all()


def _fixed(unet: torch.nn.Module) -> list[Any]:
    """List what a graph keeps of a UNet, whatever becomes of it: modules, their attributes, where parameters lie."""
    found: list[Any] = []
    for module in unet.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                found += map(_address, value.values())
            elif isinstance(value, dict):
                found += value.values()
            elif isinstance(value, list):
                found += value
            elif name != "_compiled_call_impl":  # stands before the module and is not in the graph
                found.append(_address(value) if type(value) is Tensor else value)
    return found


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) else id(tensor)


class _Answer:
    """A yes or no of a GPU; only what comes before it on its stream is waited for, not what is begun after."""

    def __init__(self, yes: Tensor) -> None:
        self._yes = torch.empty(yes.shape, dtype=yes.dtype, device="cpu", pin_memory=yes.is_cuda)
        self._yes.copy_(yes, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(yes.device))

    def wait(self) -> bool:
        self._copied.synchronize()
        return bool(self._yes)


class _Graphs:
    """A model's CUDA graphs, one for each set of shapes, which share their memory. No GPU has run them.

    Args:
        model: called without gradients.
        device: where it is.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self._graphs: dict[Any, _Graph] = {}
        self._kept: dict[Any, Any] = {}
        self._stream = torch.cuda.Stream(device)  # torch's own one for captures is of the device that came first
        self._pool = torch.cuda.graph_pool_handle()

    def keep(self, tree: Any) -> Any:
        """Return tensors with the values of a tree's, always the same ones for the same shapes: graphs read those."""
        key = _key(tree)
        if key not in self._kept:
            self._kept[key] = tree_map(_own, tree)
        else:
            _copy(tree, self._kept[key])
        return self._kept[key]

    def __call__(self, inputs: dict[str, Any], kept: dict[str, Any]) -> Results:
        """Call the model with inputs, which are copied, and with what is read where it lies."""
        with torch.cuda.device(self.device):
            key = (_key(inputs), *map(id, tree_leaves(kept)))
            if key not in self._graphs:
                self._graphs[key] = _Graph(self.model, inputs, kept, self._stream, self._pool)
            return self._graphs[key](inputs)


class _Graph:
    """What the model does with inputs of these shapes, as a CUDA graph on copies of its own."""

    def __init__(
        self, model: torch.nn.Module, inputs: dict[str, Any], kept: dict[str, Any], stream: torch.cuda.Stream, pool: Any
    ) -> None:
        self.inputs, self.kept = tree_map(_own, inputs), kept
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries allocate what a capture cannot
                self._call(model)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # a capture must not trip over what another thread does on a stream of its own
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.outputs = self._call(model)

    def _call(self, model: torch.nn.Module) -> Results:
        # mapped over a tree, its lists are new ones, for a UNet pops what it takes from them
        return model(**tree_map(lambda leaf: leaf, self.inputs), **self.kept)

    def __call__(self, inputs: dict[str, Any]) -> Results:
        _copy(inputs, self.inputs)
        self.graph.replay()
        # the next replay, of this graph or of another in the pool, writes over its outputs
        return tree_map(torch.clone, self.outputs)


def _key(tree: Any) -> tuple[Any, ...]:
    leaves, structure = tree_flatten(tree)
    return (str(structure), *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def _own(leaf: Any) -> Any:
    with torch.inference_mode(False), torch.no_grad():  # else no later call could write to it
        return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _copy(given: Any, own: Any) -> None:
    for to, source in zip(tree_leaves(own), tree_leaves(given), strict=True):
        if isinstance(to, Tensor):
            to.copy_(source)
