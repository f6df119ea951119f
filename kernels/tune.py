"""Time launch configurations on the GPU at hand and keep the best: what `diffumask-fast tune` does.

Everything runs on tensors made here from a fixed seed; no map that somebody collects is touched.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend_sdpa, tuned
from diffumask_fast.kernels.account import KEYS, MODELS

Timer = Callable[[Callable[[], object]], float]
LAYERS = [(layer.pixels, layer.heads, layer.head_dim) for model in MODELS for layer in model.layers]
IMAGES, PHRASES = 8, 2


@dataclass(frozen=True)
class Case:
    """A kernel at one shape: the configurations to try, the call with one of them, and its torch form."""

    kernel: str
    when: dict[str, Any]
    configs: list[dict[str, int]]
    run: Callable[[dict[str, int]], object]
    plain: Callable[[], object]


def tune(file: Path | None = None, progress: Callable[[str], None] = lambda sentence: None) -> dict[str, Any]:
    """Measure all kernels on the current CUDA device and write what is best for it.

    Args:
        file: a table like `tuned.json`; None is the one that the program reads. Entries of other devices stay.
        progress: is told one sentence for each case.

    Returns:
        The device's entries, kernel -> list.

    Raises:
        DiffuMaskError: there is no GPU, or the file cannot be written.
    """
    if not torch.cuda.is_available():
        raise DiffuMaskError(
            "tune times kernels on an NVIDIA GPU, and torch sees none here: run it where there is one."
        )
    from triton.testing import do_bench

    entries: dict[str, list[dict[str, Any]]] = {}
    for case in cases(torch.device("cuda")):
        entry = best(case, lambda workload: do_bench(workload, warmup=10, rep=40, return_mode="median"))
        entries.setdefault(case.kernel, []).append(entry)
        progress(f"{case.kernel} {case.when}: {entry['us'][0]} µs, torch {entry['us'][1]} µs")
    write(file or tuned.FILE, torch.cuda.get_device_name(), entries)
    return entries


def best(case: Case, milliseconds: Timer) -> dict[str, Any]:
    """Return the entry of a case: its fastest configuration that fits the device, and the faster of the two forms."""
    from triton.runtime.errors import OutOfResources

    times = []
    for config in case.configs:
        try:
            times.append((milliseconds(lambda config=config: case.run(config)), len(times), config))
        except OutOfResources:
            continue
    plain = milliseconds(case.plain)
    fastest, _, config = min(times, default=(float("inf"), 0, case.configs[0]))
    us = [round(1000 * fastest, 2) if times else None, round(1000 * plain, 2)]
    return {"when": case.when, "launch": config, "impl": "triton" if fastest < plain else "torch", "us": us}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield every case, its tensors made when it is asked for."""
    random = torch.Generator(device).manual_seed(0)
    for dtype, (pixels, heads, head_dim) in itertools.product((torch.float16, torch.bfloat16), LAYERS):
        yield _attend(device, random, dtype, pixels, heads, head_dim)
    yield _guided_filter(device, random)
    yield _mean_field(device, random)


def _attend(
    device: torch.device, random: torch.Generator, dtype: torch.dtype, pixels: int, heads: int, head_dim: int
) -> Case:
    from diffumask_fast.kernels import attend_triton

    def draw(num: int) -> torch.Tensor:
        return torch.randn(2 * IMAGES, num, heads * head_dim, generator=random, device=device).to(dtype)

    q, k, v = draw(pixels), draw(KEYS), draw(KEYS)
    select = torch.rand(IMAGES, KEYS, PHRASES, generator=random, device=device)
    maps = torch.zeros(IMAGES, PHRASES, pixels, device=device)
    shared = {"heads": heads, "scale": head_dim**-0.5, "first_conditional": IMAGES}

    def plain() -> None:
        maps.add_(attend_sdpa.attend(q, k, v, select, **shared)[1])

    return Case(
        "attend",
        {"dtype": tuned.DTYPES[dtype], "heads": heads, "head_dim": head_dim, "pixels": pixels, "keys": KEYS},
        _grid(block=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(1,)),
        lambda config: attend_triton.attend(q, k, v, select, maps, **shared, config=config),
        plain,
    )


def _guided_filter(device: torch.device, random: torch.Generator) -> Case:
    from diffumask_fast.kernels import guided_filter_triton
    from diffumask_fast.kernels.guided_filter import filter_planes

    guide, maps = (torch.rand(IMAGES, num, 512, 512, generator=random, device=device) for num in (3, PHRASES))
    return Case(
        "guided_filter",
        {},
        _grid(rows=(4, 8, 16), columns=(32, 64, 128), num_warps=(4, 8), num_stages=(1,)),
        lambda config: guided_filter_triton.guided_filter(guide, maps, 32, 1e-3, config=config),
        lambda: filter_planes(guide, maps, 32, 1e-3),
    )


def _mean_field(device: torch.device, random: torch.Generator) -> Case:
    from diffumask_fast.kernels import mean_field_triton
    from diffumask_fast.kernels.mean_field import mean_field

    q = torch.rand(2, 8, 2, 512, 512, generator=random, device=device).softmax(2)
    guide = 255 * torch.rand(2, 3, 512, 512, generator=random, device=device)
    settings = {"window": 11, "dilation": 1, "bilateral": (10.0, 80.0, 13.0), "gaussian": (3.0, 3.0)}
    settings["norm"] = torch.ones(2, 1, 512, 512, device=device)
    return Case(
        "mean_field",
        {},
        _grid(block=(64, 128, 256), candidates=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(1,)),
        lambda config: mean_field_triton.mean_field(q, q, guide, **settings, config=config),
        lambda: mean_field(q, q, guide, **settings, impl="torch"),
    )


def _grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def write(file: Path, device: str, entries: dict[str, list[dict[str, Any]]]) -> None:
    """Replace a device's entries in a table, at once or not at all; a file that is not there begins as ours."""
    source = file if file.exists() else tuned.FILE
    table = json.loads(source.read_text(encoding="utf-8")) | {device: entries}
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(as_text(table))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        raise DiffuMaskError(f"Cannot write {file} ({error.strerror}): choose another file with --out.") from error


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
