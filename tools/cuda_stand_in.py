"""Run a program as if this machine had a CUDA device: python tools/cuda_stand_in.py PROGRAM|-m MODULE ARGUMENTS

Tensors stay on the CPU and report "cuda" as their device; kernels run in Triton's interpreter, events read the clock,
and a graph replays the recorded operations. So code for a GPU runs line by line without one. It cannot show what only
hardware shows: speed, races between streams, memory on the wrong device.

tests/fake_cuda.py is another stand-in, for the compiled engine's graphs alone: it logs each call and fills undefined
memory with NaN. This one lets whole programs run, and needs defined values; so they stay two.
"""

import contextlib
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # imported before torch's functions are replaced, for it refers to them
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
MEMORY = 80 * 2**30
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero}  # forbidden in a capture
# these may take tensors of both devices; the result is on the first argument's, or on the device that is named
CROSSING = {Tensor.copy_, Tensor.to, Tensor.cpu, Tensor.__getitem__, Tensor.__setitem__, Tensor.data.__set__}


class _OnCuda(TorchFunctionMode):
    """Let tensors made on "cuda" report so, though they lie in the CPU's memory; refuse to mix devices as CUDA does."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func == Tensor.is_cuda.__get__:
            return on_cuda(args[0])
        if func == Tensor.device.__get__:
            return GPU if on_cuda(args[0]) else func(*args)
        if func is torch._has_compatible_shallow_copy_type:
            return on_cuda(args[0]) == on_cuda(args[1]) and func(*args)
        if func in (Tensor.pin_memory, Tensor.record_stream):
            return args[0]
        if _Graph.capturing and func in (Tensor.__getitem__, Tensor.__setitem__) and _copies_index(args[1]):
            raise RuntimeError("cannot copy an index between CPU and CUDA while a stream is capturing")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        place = _place(func, args, kwargs, given)
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        kwargs.pop("pin_memory", None)
        if (kernel := _python_of(func)) is not None:
            with self:
                return kernel(*args, **kwargs)
        result = func(*args, **kwargs)
        if func == Tensor.data.__set__:
            args[0].on_cuda = on_cuda(args[1])
        return tree_map(lambda leaf: _put(leaf, place, given), result)


def _copies_index(index: Any) -> bool:
    """Return whether an index becomes a tensor on the CPU first: it contains a sequence of numbers."""
    return any(isinstance(one, (list, tuple)) for one in (index if isinstance(index, tuple) else (index,)))


def on_cuda(tensor: Tensor) -> bool:
    """Return whether a tensor reports to be on CUDA."""
    return getattr(tensor, "on_cuda", False)


def _place(func: Any, args: tuple, kwargs: dict, given: list[Tensor]) -> bool:
    """Return whether the results are on CUDA; refuse tensors of both devices, as CUDA does."""
    named = [leaf for leaf in tree_leaves((args, kwargs)) if _is_place(leaf)]
    if func is Tensor.cpu:
        return False
    if named:
        return torch.device(named[0]).type == "cuda"
    places = {on_cuda(tensor) for tensor in given if tensor.ndim and tensor.device.type == "cpu"}
    if func in CROSSING:
        return on_cuda(given[0])
    if len(places) == 2:
        raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors are on both cuda:0 and cpu")
    return any(map(on_cuda, given))


def _is_place(value: Any) -> bool:
    return isinstance(value, torch.device) or isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")


def _put(leaf: Any, place: bool, given: list[Tensor]) -> Any:
    """Mark a result; one that only changed its device is a copy."""
    if not isinstance(leaf, Tensor) or on_cuda(leaf) == place:
        return leaf
    if any(leaf is tensor for tensor in given):
        if not place and not on_cuda(leaf):
            return leaf
        if _Graph.capturing:
            raise RuntimeError("cannot copy between CPU and CUDA while a stream is capturing")
        leaf = leaf.detach().clone()
    leaf.on_cuda = place
    return leaf


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def _python_of(func: Any) -> Callable[..., Any] | None:
    """Return the Python function of one of our own operators, so that its branch for CUDA runs."""
    name = getattr(func, "_qualified_op_name", None) or getattr(func, "_name", "")
    if not isinstance(name, str) or not name.startswith("diffumask_fast::"):
        return None
    from diffumask_fast.kernels import operators

    return getattr(operators, name.partition("::")[2].partition(".")[0])._init_fn


class _Recorder(TorchDispatchMode):
    """Note each operation with its results, so that it can run again into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        result = func(*args, **kwargs)
        kept = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

        def again() -> None:
            new = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, fresh in zip(kept, new, strict=True):
                if old.data_ptr() != fresh.data_ptr():  # a view, or a tensor changed in place, is up to date
                    old.copy_(fresh)

        self.calls.append(again)
        return result


class _Graph:
    """torch.cuda.CUDAGraph: the operations of a capture, and the launches of kernels, to be run again."""

    capturing = False

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():  # tensors made in between carry no device
            for call in self.calls:
                call()

    def reset(self) -> None:
        self.calls = []

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextlib.contextmanager
def _capture(graph: _Graph, *_: Any, **__: Any) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    recorder, launch = _Recorder(), GridExecutor.__call__

    def recorded(executor: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.calls.append(lambda: launch(executor, *args, **kwargs))
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own operations are not recorded
            return launch(executor, *args, **kwargs)

    with (
        mock.patch.object(_Graph, "capturing", True),
        mock.patch.object(GridExecutor, "__call__", recorded),
        recorder,
    ):
        yield
    graph.calls = recorder.calls


class _Event:
    """torch.cuda.Event: the clock at the moment it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return max(1e-4, 1e3 * (end.seconds - self.seconds))

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    wait = synchronize


class _Stream:
    """torch.cuda.Stream: everything runs at once, in the order of the program."""

    cuda_stream, device = 0, GPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = wait_stream

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


def _parameter(cls: type, data: Tensor | None = None, requires_grad: bool = True, **_: Any) -> Tensor:
    # accelerate makes a parameter again out of the attributes of another, `on_cuda` among them
    made = _NEW_PARAMETER(cls, data, requires_grad)
    made.on_cuda = data is not None and on_cuda(data)
    return made


_NEW_PARAMETER = torch.nn.Parameter.__new__


class _Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")


def _eager(call: Any = None, **_: Any) -> Any:
    """torch.compile: the call as it is."""
    return call or (lambda call: call)


class _Nothing(contextlib.nullcontext):
    """A guard of a device or a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


PROPERTIES = SimpleNamespace(
    name="stand-in", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, L2_cache_size=50 * 2**20,
    warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, uuid="stand-in",
)  # fmt: skip
CUDA = {
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), lambda *_: True),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "current_device"), lambda *_: 0),
    **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"), lambda *_: None),
    **dict.fromkeys(("set_stream", "_sleep", "manual_seed", "manual_seed_all"), lambda *_: None),
    **dict.fromkeys(("current_stream", "default_stream", "Stream"), _Stream),
    **dict.fromkeys(("stream", "device", "device_of"), _Nothing),
    "is_current_stream_capturing": lambda: False,
    "device_count": lambda: 1,
    "get_device_name": lambda *_: PROPERTIES.name,
    "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda *_: PROPERTIES,
    "mem_get_info": lambda *_: (MEMORY, MEMORY),
    "graph_pool_handle": lambda: (0, 0),
    "CUDAGraph": _Graph,
    "graph": _capture,
    "Event": _Event,
}


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Pretend that there is a CUDA device, in every thread, inside the context.

    torch.compile runs eagerly; set TRITON_INTERPRET=1 before Triton is imported.
    """
    run = threading.Thread.run

    def in_mode(thread: threading.Thread) -> None:
        with _OnCuda():
            run(thread)

    with contextlib.ExitStack() as stack:
        for name, value in CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch.nn.Parameter, "__new__", _parameter))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "0.0"))
        stack.enter_context(mock.patch.object(threading.Thread, "run", in_mode))
        stack.enter_context(mock.patch.object(torch, "compile", _eager))
        stack.enter_context(_OnCuda())
        yield


def main() -> None:
    """Run the program that the command line names, as Python itself would."""
    sys.argv = sys.argv[1:]
    with stand_in():
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main()
