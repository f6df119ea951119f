"""CUDA graphs of a denoiser: each UNet call is one replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from diffumask_fast.attention.call import Results, UNetCall

# takes a UNetCall, and `twins`, `text` and `weights` as OptimizedUNet does
Model = Callable[..., Results]


class Graphs:
    """A model's CUDA graphs, one for each set of shapes, in one memory pool. Never run on a GPU so far.

    Args:
        model: called without gradients.
        device: of the model.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.device = model, device
        self._graphs: dict[Any, _Graph] = {}
        self._kept: dict[Any, Any] = {}
        self._stream = torch.cuda.Stream(device)  # torch's own capture stream is on one device alone
        self._pool = torch.cuda.graph_pool_handle()

    def keep(self, tree: Any) -> Any:
        """Copy a tree's tensors to fixed addresses, one set for each set of shapes: a graph reads from addresses."""
        key = _key(tree)
        if key not in self._kept:
            self._kept[key] = tree_map(_writable_copy, tree)
        else:
            _copy_into(self._kept[key], tree)
        return self._kept[key]

    def __call__(self, call: UNetCall, twins: bool, kept: dict[str, Any]) -> Results:
        """Replay the graph for these shapes; capture it first where there is none.

        Args:
            call: copied into the graph's inputs.
            twins: as OptimizedUNet takes it; True and False are different graphs.
            kept: its `text` and `weights`, which the graph reads at their own addresses.
        """
        with torch.cuda.device(self.device):
            key = (twins, _key(vars(call)), *map(id, tree_leaves(kept)))
            if key not in self._graphs:
                self._graphs[key] = _Graph(self.model, call, {**kept, "twins": twins}, self._stream, self._pool)
            return self._graphs[key](call)


class _Graph:
    """One captured call of the model, with its own copies of the inputs."""

    def __init__(
        self, model: Model, call: UNetCall, kept: dict[str, Any], stream: torch.cuda.Stream, pool: Any
    ) -> None:
        self.inputs, self.kept = tree_map(_writable_copy, vars(call)), kept
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):  # to compile, and to let libraries allocate memory, which a capture forbids
                self._call(model)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # "global", the default, would make a capture fail when another thread uses its own stream
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.outputs = self._call(model)

    def _call(self, model: Model) -> Results:
        # tree_map makes new lists: a UNet pops the residuals from those that it is given
        return model(UNetCall(**tree_map(lambda leaf: leaf, self.inputs)), **self.kept)

    def __call__(self, call: UNetCall) -> Results:
        _copy_into(self.inputs, vars(call))
        self.graph.replay()
        # cloned, because the next replay of any graph in the pool overwrites the outputs
        return tree_map(torch.clone, self.outputs)


class Answer:
    """A bool computed on the GPU; `wait` waits for the work queued before it, not for work queued later."""

    def __init__(self, yes: Tensor) -> None:
        self._yes = torch.empty(yes.shape, dtype=yes.dtype, device="cpu", pin_memory=yes.is_cuda)
        self._yes.copy_(yes, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(yes.device))

    def wait(self) -> bool:
        """Wait for the bool, and return it."""
        self._copied.synchronize()
        return bool(self._yes)


def runs_as_graph(latents: Tensor) -> bool:
    """Tell whether a graph can run a call: it has no gradients, and autocast frees the cast weights that it reads."""
    return latents.is_cuda and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


def captured_state(unet: torch.nn.Module) -> list[Any]:
    """List what a captured graph has fixed of a UNet: modules, their attributes and the addresses of parameters."""
    state: list[Any] = []
    for module in unet.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                state += map(_address, value.values())
            elif isinstance(value, dict):
                state += value.values()
            elif isinstance(value, list):
                state += value
            elif name != "_compiled_call_impl":  # wraps the module from outside and is not in the graph
                state.append(_address(value) if type(value) is Tensor else value)
    return state


def _address(tensor: Tensor | None) -> int:
    if tensor is not None and type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.data_ptr()
    return id(tensor)


def _key(tree: Any) -> tuple[Any, ...]:
    leaves, structure = tree_flatten(tree)
    return (str(structure), *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def _writable_copy(leaf: Any) -> Any:
    with torch.inference_mode(False), torch.no_grad():  # calls outside inference mode cannot write to inference tensors
        return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _copy_into(target: Any, source: Any) -> None:
    for target_leaf, source_leaf in zip(tree_leaves(target), tree_leaves(source), strict=True):
        if isinstance(target_leaf, Tensor):
            target_leaf.copy_(source_leaf)
