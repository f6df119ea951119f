"""How this project measures: interleaved timings with a control, and live tensor bytes."""

import functools
import gc
import random
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffumask_fast.borrow import patched_threads
from diffumask_fast.kernels.tune import graphed

CPU_PAIRS = 14
CUDA_PAIRS = 10
CPU_CLOCK, CUDA_CLOCK, GRAPH_CLOCK = "process CPU time", "CUDA events", "CUDA events, graph replays"
GRAPH_CALLS = 20
Workload = Callable[[], object]
Statistic = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Ratio:
    """A candidate's time over its baseline's, with what the baseline measured against itself taken off.

    `value` = `raw` - `deviation`; `low` and `high` bound it (10th and 90th percentile over resampled rounds);
    `deviation` is the control's ratio minus 1, 0 without a control; `n` counts the rounds.
    """

    value: float
    low: float
    high: float
    n: int
    raw: float
    deviation: float
    baseline_s: float
    clock: str

    def __str__(self) -> str:
        return (
            f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}; measured {self.raw:.3f}, "
            f"control {1 + self.deviation:.3f}, {self.n} rounds, {self.clock})"
        )


def compare(
    candidate: Workload,
    baseline: Workload,
    *,
    pairs: int | None = None,
    control: bool = True,
    device: str | torch.device = "cpu",
    threads: int = 1,
    warmup: int = 1,
) -> Ratio:
    """Time a candidate against a baseline, interleaved so that drift and order fall on both alike.

    On the CPU the ratio is that of the third-smallest process CPU times; on CUDA, of the median event times.

    Args:
        candidate, baseline: called without arguments, the same work each time.
        pairs: rounds of one call each; 14 on the CPU and 10 on CUDA when None.
        control: also time the baseline against itself in the same rounds, and subtract its deviation from 1.
        device: where the workloads run; `cuda` times with events on the current stream.
        threads: torch threads while timing; ratios with more than one are for reading, not for a bar.
        warmup: untimed calls of each before the first round.

    Returns:
        The ratio; above 1 the candidate is the slower one.

    Example:
        >>> compare(lambda: sum(range(40_000)), lambda: sum(range(10_000)), pairs=3).value > 1
        True
    """
    workloads = {"candidate": candidate, "baseline": baseline}
    chosen = "baseline" if control else None
    timed = race(workloads, control=chosen, pairs=pairs, device=device, threads=threads, warmup=warmup)
    return timed.ratio("candidate", "baseline")


class Race:
    """The times of several workloads in the same rounds, and what any two of them are to each other."""

    def __init__(self, times: dict[str, list[float]], control: str | None, clock: str) -> None:
        self.times = times
        self.control = control
        self.statistic = third_smallest if clock == CPU_CLOCK else statistics.median
        self.clock = clock

    def seconds(self, name: str) -> float:
        """Return a workload's time: the statistic over its rounds."""
        return self.statistic(self.times[name])

    def ratio(self, candidate: str, baseline: str, scale: float = 1.0) -> Ratio:
        """Return the time of one over the other's, times scale (where they draw different numbers of images)."""
        times = {"candidate": [scale * time for time in self.times[candidate]], "baseline": self.times[baseline]}
        if self.control:
            times |= {"control": self.times["control"], "controlled": self.times[self.control]}
        rounds = len(times["baseline"])
        raw, deviation = _ratio(times, range(rounds), self.statistic)
        low, high = _bounds(times, rounds, self.statistic)
        value = raw - deviation
        return Ratio(
            value=value,
            low=min(low, value),
            high=max(high, value),
            n=rounds,
            raw=raw,
            deviation=deviation,
            baseline_s=self.seconds(baseline),
            clock=self.clock,
        )


def race(
    workloads: dict[str, Workload],
    *,
    control: str | None = None,
    pairs: int | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
    warmup: int = 1,
    graph_calls: int = 0,
) -> Race:
    """Time several workloads in the same rounds, each early as often as late; arguments as for `compare`.

    Args:
        workloads: by name.
        control: which of them runs twice in each round, against itself; None leaves the control out.
        graph_calls: on CUDA, time replays of a graph of so many calls, for kernels shorter than their launch; 0 times
            a call with the host's part in it.

    Example:
        >>> timed = race({"a": lambda: sum(range(40_000)), "b": lambda: sum(range(10_000))}, pairs=3)
        >>> timed.ratio("a", "b").value > 1
        True
    """
    cuda = torch.device(device).type == "cuda"
    rounds = pairs or (CUDA_PAIRS if cuda else CPU_PAIRS)
    if rounds < 1:
        raise ValueError(f"pairs is {pairs}: at least one round is needed")
    calls = graph_calls if cuda else 0
    with patched_threads(threads):
        for workload in tuple(workloads.values()) * warmup:
            workload()
        if calls:
            workloads = {name: graphed(workload, calls) for name, workload in workloads.items()}
        timed = workloads | ({"control": workloads[control]} if control else {})
        times = _time_rounds(timed, rounds, _cuda_seconds if cuda else _cpu_seconds)
    times = {name: [one / max(1, calls) for one in seconds] for name, seconds in times.items()}
    return Race(times, control, GRAPH_CLOCK if calls else CUDA_CLOCK if cuda else CPU_CLOCK)


def third_smallest(times: Sequence[float]) -> float:
    """Return the third-smallest time, or the largest of fewer than three."""
    return sorted(times)[min(2, len(times) - 1)]


def orders(names: Sequence[str], rounds: int) -> list[tuple[str, ...]]:
    """Return the order of the calls of each round: every other round is the one before it, backwards.

    Two names give AB BA AB BA; more are also rotated after each such pair, so that each is early as often as late.
    """
    result = []
    for index in range(rounds):
        shift = index // 2 % len(names)
        order = tuple(names[shift:]) + tuple(names[:shift])
        result.append(order[::-1] if index % 2 else order)
    return result


def _time_rounds(
    workloads: dict[str, Workload], rounds: int, seconds: Callable[[Workload], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in workloads}
    collects = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        for order in orders(list(workloads), rounds):
            gc.collect()
            for name in order:
                times[name].append(seconds(workloads[name]))
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return times


def _cpu_seconds(workload: Workload) -> float:
    start = time.process_time()
    workload()
    return time.process_time() - start


def _cuda_seconds(workload: Workload) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    workload()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _ratio(times: dict[str, list[float]], chosen: Sequence[int], statistic: Statistic) -> tuple[float, float]:
    level = {name: statistic([values[index] for index in chosen]) for name, values in times.items()}
    deviation = level["control"] / level["controlled"] - 1 if "control" in level else 0.0
    return level["candidate"] / level["baseline"], deviation


def _bounds(times: dict[str, list[float]], rounds: int, statistic: Statistic) -> tuple[float, float]:
    draw = random.Random(0)
    values = []
    for _ in range(500):
        raw, deviation = _ratio(times, draw.choices(range(rounds), k=rounds), statistic)
        values.append(raw - deviation)
    values.sort()
    return values[50], values[449]


class live_tensor_bytes(TorchDispatchMode):
    """Count the bytes of tensors born inside the context and still alive, on any device, views once.

    `now` is what lives at this moment, also after the context; `peak` the most that lived at once inside it. Counted
    are the results of torch operations: what a kernel takes and returns within one operation is not seen.

    Example:
        >>> with live_tensor_bytes() as live:
        ...     kept = torch.ones(256).exp()
        >>> live.now, live.peak
        (1024, 2048)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            born = func is torch.ops.aten.lift_fresh.default or id(storage) not in given
            if born or id(storage) in self._references:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._references:
            self._references[key] = weakref.ref(storage, functools.partial(self._forget, key))
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, _: weakref.ref) -> None:
        self.now -= self._sizes.pop(key)
        del self._references[key]


def _storages(tree: object) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided and not tensor.is_meta]
