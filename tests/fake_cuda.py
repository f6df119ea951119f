"""A stand-in for CUDA's streams, events and graphs on the CPU.

A graph is replayed op by op on the tensors that it captured. Memory that CUDA leaves undefined is NaN here: a graph's
results before its first replay, and after another graph of its pool was replayed. A capture raises on operations that
CUDA forbids. Nothing is compiled, for only ops can be recorded.

tools/cuda_stand_in.py is another stand-in: it lets whole programs run, and needs defined values. This one logs each
call of the compiled engine and shows reads of undefined memory; so they stay two.

    with fake_cuda() as log:
        denoiser(...)  # as on CUDA; `log` lists captures, replays, waits and devices in order
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffumask_fast.engines import compiled

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero}


class _Recorder(TorchDispatchMode):
    """Note each op, and the memory that it makes."""

    def __init__(self, graph: "FakeGraph") -> None:
        super().__init__()
        self.graph, self.outside = graph, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        made = self.graph.made
        self.outside |= {s._cdata for s in _storages((args, kwargs)) if s._cdata not in made}
        out = func(*args, **kwargs)
        made |= {s._cdata: s for s in _storages(out) if s._cdata not in self.outside}
        self.graph.ops.append((func, args, kwargs, out))
        return out


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self, fake: "_Fake") -> None:
        self.fake = fake
        self.ops: list[tuple] = []
        self.made: dict[int, torch.UntypedStorage] = {}
        self.pool_id = None

    def pool(self):
        return self.pool_id

    def reset(self) -> None:
        self.ops, self.made = [], {}

    def replay(self) -> None:
        self.fake.log.append(("replay", self, self.fake.devices[-1]))
        for other in self.fake.graphs:
            if other is not self and other.pool_id == self.pool_id:
                other.spoil()
        with torch.inference_mode():  # which writes to tensors of either kind
            for func, args, kwargs, out in self.ops:
                for own, again in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(own, Tensor) and own.data_ptr() != again.data_ptr():
                        own.copy_(again)

    def spoil(self) -> None:
        for storage in self.made.values():
            storage.fill_(255)  # NaN, of any floating type


class FakeStream:
    """Stands for torch.cuda.Stream."""

    cuda_stream = 0

    def __init__(self, fake: "_Fake", device=None) -> None:
        self.fake, self.device = fake, fake.device_of(device)

    def wait_stream(self, other: "FakeStream") -> None:
        self.fake.log.append(("wait_stream", self, other))

    def wait_event(self, event: "FakeEvent") -> None:
        self.fake.log.append(("wait_event", self, event))

    def synchronize(self) -> None:
        self.fake.log.append(("synchronize", self))

    def record_event(self, event=None) -> "FakeEvent":
        event = event or FakeEvent(self.fake)
        event.record(self)
        return event


class FakeEvent:
    """Stands for torch.cuda.Event."""

    def __init__(self, fake: "_Fake", enable_timing: bool = False, **_) -> None:
        self.fake, self.at = fake, None

    def record(self, stream: FakeStream | None = None) -> None:
        self.at = time.perf_counter()
        self.fake.log.append(("record", self))

    def synchronize(self) -> None:
        assert self.at is not None, "an event that was never recorded is not waited for"
        self.fake.log.append(("wait", self))

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.at - self.at)


class _Fake:
    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.graphs: list[FakeGraph] = []
        self.devices = [torch.device("cuda", 0)]
        self.streams: dict[torch.device, FakeStream] = {}
        self.pools = 0

    def device_of(self, device) -> torch.device:
        if device is None:
            return self.devices[-1]
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)  # "cpu" too

    @contextmanager
    def device(self, device):
        self.devices.append(self.device_of(device))
        self.log.append(("device", self.devices[-1]))
        try:
            yield
        finally:
            self.devices.pop()

    def current_stream(self, device=None) -> FakeStream:
        device = self.device_of(device)
        return self.streams.setdefault(device, FakeStream(self, device))

    @contextmanager
    def stream(self, stream: FakeStream | None):
        if stream is None:
            yield
            return
        before = self.current_stream(stream.device)
        with self.device(stream.device):
            self.streams[stream.device] = stream
            try:
                yield
            finally:
                self.streams[stream.device] = before

    def pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    @contextmanager
    def graph(self, graph: FakeGraph, pool=None, stream=None, capture_error_mode="global", **_):
        graph.pool_id = self.pool() if pool is None else pool
        stream = stream or FakeStream(self)
        self.log.append(("capture", graph, graph.pool_id, stream, capture_error_mode, self.devices[-1]))
        with self.stream(stream), _Recorder(graph):
            yield
        self.graphs.append(graph)
        graph.spoil()  # a capture runs nothing


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def fake_cuda() -> Iterator[list[tuple]]:
    """Let the compiled engine draw on the CPU as it does on CUDA, and give the log of what it asks CUDA for."""
    fake = _Fake()
    stand_ins = {
        "CUDAGraph": lambda **_: FakeGraph(fake),
        "graph": fake.graph,
        "graph_pool_handle": fake.pool,
        "Stream": lambda device=None, **_: FakeStream(fake, device),
        "Event": lambda **options: FakeEvent(fake, **options),
        "current_stream": fake.current_stream,
        "current_device": lambda: fake.devices[-1].index or 0,
        "stream": fake.stream,
        "device": fake.device,
        "synchronize": lambda device=None: fake.log.append(("synchronize", fake.device_of(device))),
        "empty_cache": lambda: None,
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(compiled, "runs_as_graph", lambda _: not torch.is_grad_enabled()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield fake.log
