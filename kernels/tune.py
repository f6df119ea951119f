"""Time launch configurations on the GPU at hand and keep the best: what `diffumask-fast tune` does.

Everything runs on tensors made here from a fixed seed; no map that somebody collects is touched.
"""

import itertools
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._library.triton import set_wrap_triton_enabled

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend_sdpa, tuned
from diffumask_fast.kernels.shapes import KEYS, MODELS

logger = logging.getLogger("diffumask_fast")
Timer = Callable[[Callable[[], object]], Any]
Entries = dict[str, list[dict[str, Any]]]
LAYERS = [(layer.pixels, layer.heads, layer.head_dim) for model in MODELS for layer in model.layers]
IMAGES, PHRASES, SIDE = 8, 1, 512
CALLS, REPLAYS = 20, 9  # in a graph; of the graph
RADII = {8: [1, 16], 32: [17, 4096]}  # of the guided filter: one cell of SD 1.5's finest map is 8 pixels


@dataclass(frozen=True)
class Form:
    """A kernel that can be launched in several configurations, and the call with one of them."""

    kernel: str
    configs: list[dict[str, int]]
    run: Callable[[dict[str, int]], object]


@dataclass(frozen=True)
class Case:
    """One shape: the facts that name it in the table, its forms (the first one's kernel says which is the fastest), and
    the torch form."""

    when: dict[str, Any]
    forms: dict[str, Form]
    plain: Callable[[], object]


def tune(
    file: Path | None = None,
    progress: Callable[[str], None] = lambda sentence: None,
    *,
    quick: bool = False,
    only_this_device: bool = False,
) -> dict[str, Any]:
    """Measure all kernels on the current CUDA device and write what is best for it, after each case.

    Times are of CUDA graph replays, so that no time of the host is in them.

    Args:
        file: a table like `tuned.json`; None is the one that the program reads. Other entries stay.
        progress: is told one sentence for each case.
        quick: fp16 attention and the guided filter alone, in the few configurations that were the best elsewhere.
        only_this_device: write under the device's name in place of its architecture's ("sm_90"); it comes first there.

    Returns:
        The device's entries, kernel -> list.

    Raises:
        DiffuMaskError: there is no GPU, or the file cannot be written.
    """
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
            found = best(case, _milliseconds)
            for kernel, entry in found.items():
                entries.setdefault(kernel, []).append(entry)
            write(file or tuned.FILE, key, entries)
            first = next(iter(found.values()))
            progress(f"{next(iter(found))} {first['when']}: {first['impl']}, {first['launch']}; µs: {first['us']}")
    return entries


def warm(part: int, parts: int) -> None:
    """Launch each configuration of a quick tune once, as one of several processes that compile side by side.

    Args:
        part: which of them, from 0.
        parts: how many.
    """
    forms = [form for case in cases(torch.device("cuda"), quick=True) for form in case.forms.values()]
    launches = [(form, config) for form in forms for config in form.configs]
    for form, config in launches[part::parts]:
        _timed(form, config, lambda workload: workload())


def best(case: Case, milliseconds: Timer) -> dict[str, dict[str, Any]]:
    """Return an entry for each kernel of a case: its fastest configuration that fits the device.

    The first kernel's entry also has the times of all forms, and says which was the fastest; torch's in a tie.
    """
    entries, us = {}, {}
    for name, form in case.forms.items():
        times = []
        for config in form.configs:
            if (found := _timed(form, config, milliseconds)) is not None:
                times.append((found, len(times), config))
        fastest, _, config = min(times, default=(None, 0, form.configs[0]))
        entries[form.kernel] = {"when": case.when, "launch": config}
        if fastest is not None:
            us[name] = round(1000 * fastest, 2)
    us["torch"] = round(1000 * milliseconds(case.plain), 2)
    entries[next(iter(entries))] |= {"impl": min(us, key=lambda name: (us[name], name != "torch")), "us": us}
    return entries


def _timed(form: Form, config: dict[str, int], milliseconds: Timer) -> float | None:
    """Time a configuration; None where it asks for too much or a compiler fails, which is logged."""
    try:
        return milliseconds(partial(form.run, config))
    except Exception as error:  # Triton, its assembler and CUDA have no error in common
        logger.warning("%s %s: %s: %s", form.kernel, config, type(error).__name__, " ".join(str(error).split())[:200])
        return None


def graphed(workload: Callable[[], object], calls: int) -> Callable[[], None]:
    """Capture calls of a workload in one CUDA graph and return its replay: no time of the host is in it.

    Args:
        workload: what it launches must be the same each time, and must not wait for the GPU.
        calls: in the graph.
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
    random = torch.Generator(device).manual_seed(0)
    dtypes = (torch.float16,) if quick else (torch.float16, torch.bfloat16)
    for dtype, (pixels, heads, head_dim) in itertools.product(dtypes, LAYERS):
        yield _attend(device, random, dtype, pixels, heads, head_dim, quick)
    for radius in RADII:
        yield _guided_filter(device, random, radius, quick)
    if not quick:
        yield _mean_field(device, random)


def _attend(
    device: torch.device,
    random: torch.Generator,
    dtype: torch.dtype,
    pixels: int,
    heads: int,
    head_dim: int,
    quick: bool,
) -> Case:
    from diffumask_fast.kernels import attend_triton

    def draw(num: int) -> torch.Tensor:
        return torch.randn(2 * IMAGES, num, heads * head_dim, generator=random, device=device).to(dtype)

    q, k, v = draw(pixels), draw(KEYS), draw(KEYS)
    select = torch.rand(IMAGES, KEYS, PHRASES, generator=random, device=device)
    maps = torch.zeros(IMAGES, PHRASES, pixels, device=device)
    shared = {"heads": heads, "scale": head_dim**-0.5, "first_conditional": IMAGES}

    def with_maps(config: dict[str, int]) -> None:
        attend_sdpa.attend(q, k, v, None, heads=heads, scale=shared["scale"])
        attend_triton.attend_maps(
            q[IMAGES:], k[IMAGES:], select, maps, heads=heads, scale=shared["scale"], config=config
        )

    def plain() -> None:
        maps.add_(attend_sdpa.attend(q, k, v, select, **shared)[1])

    blocks = ((64, 4), (128, 8), *(((32, 8),) if head_dim > 128 else ()))
    if not quick:
        blocks = tuple(itertools.product((16, 32, 64, 128), (4, 8)))
    configs = [
        {"block": block, "num_warps": warps, "num_stages": stages} for block, warps in blocks for stages in (1, 2)
    ]
    fused = Form("attend", configs, lambda config: attend_triton.attend(q, k, v, select, maps, **shared, config=config))
    return Case(
        {"dtype": tuned.DTYPES[dtype], "heads": heads, "head_dim": head_dim, "pixels": pixels, "keys": KEYS},
        {"triton": fused, "sdpa+maps": Form("attend_maps", configs, with_maps)},
        plain,
    )


def _guided_filter(device: torch.device, random: torch.Generator, radius: int, quick: bool) -> Case:
    from diffumask_fast.kernels import guided_filter_triton
    from diffumask_fast.kernels.guided_filter import filter_planes

    guide, maps = (torch.rand(IMAGES, num, SIDE, SIDE, generator=random, device=device) for num in (3, PHRASES))
    tiles = {"rows": (8,), "columns": (64, 128)} if quick else {"rows": (4, 8, 16), "columns": (32, 64, 128)}
    form = Form(
        "guided_filter",
        _grid(**tiles, num_warps=(4, 8), num_stages=(1,)),
        lambda config: guided_filter_triton.guided_filter(guide, maps, radius, 1e-3, config=config),
    )
    return Case({"radius": RADII[radius]}, {"triton": form}, lambda: filter_planes(guide, maps, radius, 1e-3))


def _mean_field(device: torch.device, random: torch.Generator) -> Case:
    from diffumask_fast.kernels import mean_field_triton
    from diffumask_fast.kernels.mean_field import mean_field

    q = torch.rand(2, 8, 2, SIDE, SIDE, generator=random, device=device).softmax(2)
    guide = 255 * torch.rand(2, 3, SIDE, SIDE, generator=random, device=device)
    settings = {"window": 11, "dilation": 1, "bilateral": (10.0, 80.0, 13.0), "gaussian": (3.0, 3.0)}
    settings["norm"] = torch.ones(2, 1, SIDE, SIDE, device=device)
    form = Form(
        "mean_field",
        _grid(block=(64, 128, 256), candidates=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(1,)),
        lambda config: mean_field_triton.mean_field(q, q, guide, **settings, config=config),
    )
    return Case({}, {"triton": form}, lambda: mean_field(q, q, guide, **settings, impl="torch"))


def _grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def write(file: Path, device: str, entries: Entries) -> None:
    """Put a device's entries into a table, at once or not at all; a file that is not there begins as ours.

    Its older entries stay behind the new ones, but for those of the same facts.
    """
    source = file if file.exists() else tuned.FILE
    table = json.loads(source.read_text(encoding="utf-8"))
    kept = table.get(device, {})
    for kernel, new in entries.items():
        measured = [entry["when"] for entry in new]
        kept[kernel] = new + [entry for entry in kept.get(kernel, []) if entry["when"] not in measured]
    table[device] = kept
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(as_text(table))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        raise DiffuMaskError(f"Cannot write {file} ({error.strerror}): choose another `out`.") from error


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
