"""CUDA graphs of a denoiser: one UNet call is one replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from diffumask_fast.attention.call import Results, UNetCall

# called with a UNetCall, and `twins`, `text` and `weights` of OptimizedUNet
Model = Callable[..., Results]


class Graphs:
    """A model's CUDA graphs, one for each set of shapes, which share their memory. No GPU has run them.

    Args:
        model: called without gradients.
        device: where it is.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
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

    def __call__(self, call: UNetCall, twins: bool, kept: dict[str, Any]) -> Results:
        """Call the model with inputs, which are copied, and with what is read where it lies.

        Args:
            call: the inputs.
            twins: as OptimizedUNet takes it; a graph is for one answer.
            kept: its `text` and `weights`.
        """
        with torch.cuda.device(self.device):
            key = (twins, _key(vars(call)), *map(id, tree_leaves(kept)))
            if key not in self._graphs:
                self._graphs[key] = _Graph(self.model, call, {**kept, "twins": twins}, self._stream, self._pool)
            return self._graphs[key](call)


class _Graph:
    """What the model does with a call of these shapes, as a CUDA graph on copies of its own."""

    def __init__(
        self, model: Model, call: UNetCall, kept: dict[str, Any], stream: torch.cuda.Stream, pool: Any
    ) -> None:
        self.inputs, self.kept = tree_map(_own, vars(call)), kept
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

    def _call(self, model: Model) -> Results:
        # mapped over a tree, its lists are new ones, for a UNet pops what it takes from them
        return model(UNetCall(**tree_map(lambda leaf: leaf, self.inputs)), **self.kept)

    def __call__(self, call: UNetCall) -> Results:
        _copy(vars(call), self.inputs)
        self.graph.replay()
        # the next replay, of this graph or of another in the pool, writes over its outputs
        return tree_map(torch.clone, self.outputs)


class Answer:
    """A yes or no of a GPU; only what comes before it on its stream is waited for, not what is begun after."""

    def __init__(self, yes: Tensor) -> None:
        self._yes = torch.empty(yes.shape, dtype=yes.dtype, device="cpu", pin_memory=yes.is_cuda)
        self._yes.copy_(yes, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(yes.device))

    def wait(self) -> bool:
        """Return it, once it is known."""
        self._copied.synchronize()
        return bool(self._yes)


def runs_as_graph(latents: Tensor) -> bool:
    """Tell whether a call is a graph's: one has no gradients, and reads what autocast has cast after it is gone."""
    return latents.is_cuda and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


def captured_state(unet: torch.nn.Module) -> list[Any]:
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
