"""Time launch configurations on this machine's GPU and keep the best: what `diffumask-fast tune` does.

Everything runs on random tensors from a fixed seed; no maps that somebody collects are touched.
"""

import itertools
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend_sdpa, tuned
from diffumask_fast.kernels.inputs import CRF, attention_input, filter_input, step_input
from diffumask_fast.kernels.shapes import KEYS, STABLE_DIFFUSION
from diffumask_fast.own_files import check_own

logger = logging.getLogger("diffumask_fast")
Timer = Callable[[Callable[[], object]], Any]
Entries = dict[str, list[dict[str, Any]]]
LAYERS = [layer.shape for model in STABLE_DIFFUSION for layer in model.layers]
IMAGES, PHRASES, SIDE = 8, 1, 512
SIGN = '"when": {'  # in the first bytes of every table, however it is indented
CALLS, REPLAYS = 20, 9  # calls in a graph, replays of the graph
ROUNDING = 0.02  # of the largest value: implementations differ by no more, bf16 included
RADII = {8: [1, 16], 32: [17, 4096]}  # of the guided filter: one cell of SD 1.5's finest map is 8 pixels


@dataclass(frozen=True)
class Impl:
    """A kernel that can be launched in several configurations, and the call with one of them."""

    kernel: str
    configs: list[dict[str, int]]
    run: Callable[[dict[str, int]], object]


@dataclass(frozen=True)
class Case:
    """One shape: the facts that name it in the table, the implementations by name, and torch's own.

    The entry of the first one's kernel says which is the fastest. `maps` is what every call adds to.
    """

    when: dict[str, Any]
    impls: dict[str, Impl]
    plain: Callable[[], object]
    maps: Tensor | None = None

    def result(self, workload: Callable[[], object]) -> list[Tensor]:
        """Run a workload once on maps of zeros; return what it returns and the maps."""
        if self.maps is not None:
            self.maps.zero_()
        made = (workload(), self.maps)
        return [tensor.float().clone() for tensor in made if isinstance(tensor, Tensor)]


def tune(
    file: Path | None,
    progress: Callable[[str], None] = lambda sentence: None,
    *,
    quick: bool,
    only_this_device: bool,
) -> dict[str, Any]:
    """Measure all kernels on the current CUDA device; write the best configuration after each case.

    Times are of CUDA graph replays, so the host's time does not count.

    Args:
        file: a table like `tuned.json`; None is the one that the program reads. Other entries stay.
        progress: called with one sentence for each case.
        quick: only fp16 attention and the guided filter, in the few configurations that were the best elsewhere.
        only_this_device: write under the device's name, which is looked up before its architecture ("sm_90").

    Returns:
        The device's entries, kernel -> list.

    Raises:
        DiffuMaskError: there is no GPU, the file is there and no table of ours, or it cannot be written.
    """
    if file is not None:
        check_own(file, SIGN)
    table_at(file or tuned.FILE)
    if not torch.cuda.is_available():
        raise DiffuMaskError(
            "tune times kernels on an NVIDIA GPU, and torch sees none here: run it where there is one."
        )
    device = torch.device("cuda")
    by_name, by_architecture = tuned.names(device)
    key = by_name if only_this_device else by_architecture
    entries: Entries = {}
    # as in a compiled graph, where no operator stands between the caller and the launch
    with set_wrap_triton_enabled(False):
        for case in cases(device, quick):
            fastest = best(case, _milliseconds)
            for kernel, entry in fastest.items():
                entries.setdefault(kernel, []).append(entry)
            write(file or tuned.FILE, key, entries)
            kernel, entry = next(iter(fastest.items()))
            progress(f"{kernel} {entry['when']}: {entry['impl']}, {entry['launch']}; µs: {entry['us']}")
    return entries


def warm(part: int, parts: int) -> None:
    """Launch each configuration of a quick tune once, as one of several processes that compile side by side.

    Args:
        part: which of them, from 0.
        parts: how many.
    """
    impls = [impl for case in cases(torch.device("cuda"), quick=True) for impl in case.impls.values()]
    launches = [(impl, config) for impl in impls for config in impl.configs]
    for impl, config in launches[part::parts]:
        _timed(impl, config, lambda workload: workload())


def best(case: Case, milliseconds: Timer) -> dict[str, dict[str, Any]]:
    """Return an entry for each kernel of a case: its fastest configuration that fits the device and computes the same.

    A compiler can be wrong about a device: a configuration whose result is not torch's up to rounding is left out, and
    logged. The first kernel's entry also has the times of all implementations, and says which was the fastest; torch's
    in a tie.
    """
    entries: dict[str, dict[str, Any]] = {}
    us: dict[str, float] = {}
    truth = case.result(case.plain)

    def checked(workload: Callable[[], object]) -> float:
        if not all(map(_close, case.result(workload), truth)):
            raise ArithmeticError("its result is not torch's")
        return milliseconds(workload)

    for name, impl in case.impls.items():
        timed = [(_timed(impl, config, checked), config) for config in impl.configs]
        fitting = [(time, config) for time, config in timed if time is not None]
        fastest, config = min(fitting, key=lambda one: one[0], default=(None, impl.configs[0]))
        entries[impl.kernel] = {"when": case.when, "launch": config}
        if fastest is not None:
            us[name] = round(1000 * fastest, 2)
    us["torch"] = round(1000 * milliseconds(case.plain), 2)
    entries[next(iter(entries))] |= {"impl": min(us, key=lambda name: (us[name], name != "torch")), "us": us}
    return entries


def _close(found: Tensor, truth: Tensor) -> bool:
    return bool((found - truth).abs().max() <= ROUNDING * truth.abs().max())


def _timed(impl: Impl, config: dict[str, int], milliseconds: Timer) -> float | None:
    """Time a configuration; None where it asks for too much, a compiler fails or it is wrong, which is logged."""
    try:
        return milliseconds(partial(impl.run, config))
    except Exception as error:  # Triton, its assembler and CUDA have no error in common
        logger.warning("%s %s: %s: %s", impl.kernel, config, type(error).__name__, " ".join(str(error).split())[:200])
        return None


def graphed(workload: Callable[[], object], calls: int) -> Callable[[], None]:
    """Capture calls of a workload in one CUDA graph and return its replay, in which the host's time does not count.

    Args:
        workload: launches the same each time, and does not wait for the GPU.
        calls: how many are captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        workload()  # lets libraries allocate what a capture cannot
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            workload()
    return graph.replay


def _milliseconds(workload: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU."""
    replay, times = graphed(workload, CALLS), []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    """Yield every case, its tensors made when it is asked for."""
    generator = torch.Generator(device).manual_seed(0)
    dtypes = (torch.float16,) if quick else (torch.float16, torch.bfloat16)
    for dtype, shape in itertools.product(dtypes, LAYERS):
        yield _attend(device, generator, dtype, shape, quick)
    for radius in RADII:
        yield _guided_filter(device, generator, radius, quick)
    if not quick:
        yield _mean_field(device, generator)


def _attend(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int, int], quick: bool
) -> Case:
    from diffumask_fast.kernels import attend_triton

    pixels, heads, head_dim = shape
    given = attention_input(shape, dtype, device, generator, rows=2 * IMAGES, conditional=IMAGES, num=PHRASES)
    q, k, v, select, maps = given.q, given.k, given.v, given.select, given.maps
    settings, scale = given.settings, head_dim**-0.5

    def fused(config: dict[str, int]) -> Tensor:
        return attend_triton.attend(q, k, v, select, maps, **settings, scale=scale, config=config)

    def beside(config: dict[str, int]) -> Tensor:
        out, _ = attend_sdpa.attend(q, k, v, None, heads=heads, scale=scale)
        attend_triton.attend_maps(q[IMAGES:], k[IMAGES:], select, maps, heads=heads, scale=scale, config=config)
        return out

    def plain() -> Tensor:
        out, added = attend_sdpa.attend(q, k, v, select, **settings, scale=scale)
        assert added is not None
        maps.add_(added)
        return out

    blocks: Iterable[tuple[int, int]] = ((64, 4), (128, 8), *(((32, 8),) if head_dim > 128 else ()))
    if not quick:
        blocks = itertools.product((16, 32, 64, 128), (4, 8))
    configs = [
        {"block": block, "num_warps": warps, "num_stages": stages} for block, warps in blocks for stages in (1, 2)
    ]
    return Case(
        {"dtype": tuned.DTYPES[dtype], "heads": heads, "head_dim": head_dim, "pixels": pixels, "keys": KEYS},
        {"triton": Impl("attend", configs, fused), "sdpa+maps": Impl("attend_maps", configs, beside)},
        plain,
        maps,
    )


def _guided_filter(device: torch.device, generator: torch.Generator, radius: int, quick: bool) -> Case:
    from diffumask_fast.kernels import guided_filter_triton
    from diffumask_fast.kernels.guided_filter import filter_planes

    guide, maps = filter_input(IMAGES, PHRASES, SIDE, device, generator)
    tiles = {"rows": (8,), "columns": (64, 128)} if quick else {"rows": (4, 8, 16), "columns": (32, 64, 128)}
    triton = Impl(
        "guided_filter",
        _grid(**tiles, num_warps=(4, 8), num_stages=(1,)),
        lambda config: guided_filter_triton.guided_filter(guide, maps, radius, 1e-3, config=config),
    )
    return Case({"radius": RADII[radius]}, {"triton": triton}, lambda: filter_planes(guide, maps, radius, 1e-3))


def _mean_field(device: torch.device, generator: torch.Generator) -> Case:
    from diffumask_fast.kernels import mean_field_triton
    from diffumask_fast.kernels.mean_field import bilateral_norm, mean_field

    q, unary, guide = step_input(2, SIDE, device, generator)
    around = {name: CRF[name] for name in ("window", "dilation", "bilateral")}
    norm = bilateral_norm(guide, **around)
    triton = Impl(
        "mean_field",
        _grid(block=(64, 128, 256), candidates=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(1,)),
        lambda config: mean_field_triton.mean_field(q, unary, guide, **CRF, norm=norm, config=config),
    )
    return Case({}, {"triton": triton}, lambda: mean_field(q, unary, guide, **CRF, norm=norm, impl="torch"))


def _grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def write(file: Path, device: str, entries: Entries) -> None:
    """Write a device's entries into a table, at once or not at all; a new file starts as a copy of `tuned.json`.

    The device's older entries follow the new ones, without those of the same facts.
    """
    table = table_at(file)
    kept = table.get(device, {})
    for kernel, new in entries.items():
        measured = [entry["when"] for entry in new]
        kept[kernel] = new + [entry for entry in kept.get(kernel, []) if entry["when"] not in measured]
    table[device] = kept
    part = file.with_name(f".{file.name}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("x", encoding="utf-8") as stream:  # a link that somebody has put there is not followed
            stream.write(as_text(table))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        raise DiffuMaskError(f"Cannot write {file} ({error.strerror}): choose another `out`.") from error


def table_at(file: Path) -> tuned.Table:
    """Read the table at a path; where nothing is, `tuned.json`.

    Raises:
        DiffuMaskError: what is there is no such table.
    """
    try:
        table = json.loads((file if file.exists() else tuned.FILE).read_text(encoding="utf-8"))
        entries = [entry for kernels in table.values() for listed in kernels.values() for entry in listed]
        if all(isinstance(entry["when"], dict) and isinstance(entry["launch"], dict) for entry in entries):
            return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DiffuMaskError(f"{file} is there and no table of launch configurations: move it away, or name another `out`.")


def as_text(table: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Return a table as JSON, one entry on a line."""
    devices = []
    for device, kernels in table.items():
        lists = []
        for kernel, entries in kernels.items():
            lines = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
            lists.append(f"    {json.dumps(kernel)}: [\n{lines}\n    ]")
        devices.append(f"  {json.dumps(device)}: {{\n" + ",\n".join(lists) + "\n  }")
    return "{\n" + ",\n".join(devices) + "\n}\n"
