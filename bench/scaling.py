"""How time and memory grow with the batch, and that memory does not grow with the number of steps."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.bench.contenders import Contenders
from diffumask_fast.bench.geometries import check_geometry, check_memory, open_geometry
from diffumask_fast.bench.harness import race
from diffumask_fast.bench.memory import GIB, over_steps, peak_bytes
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.models.device import resolve_device

SUITE = "scaling"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STEPS = (10, 20, 30, 40, 50)


def run(
    geometry: str = "mini",
    device: str | torch.device = "auto",
    *,
    model: str | Path | None = None,
    batches: Sequence[int] = BATCHES,
    numbers: Sequence[int] = STEPS,
    steps: int = 2,
    pairs: int = 3,
) -> Iterator[dict]:
    """Measure images per second and peak memory of finished images with masks over batch sizes, and memory over steps.

    Args:
        geometry: one of `bench.GEOMETRIES`.
        device: "auto", "cpu" or "cuda".
        model: another model folder of the same geometry.
        batches: images per call.
        numbers: numbers of steps whose peak memory is taken, at batch 1.
        steps: denoising steps of the rows over batches.
        pairs: timed calls of each batch.

    Returns:
        Rows `images_per_s` and `peak_memory` for each batch, `peak_memory_steps` for each number of steps.

    Raises:
        DiffuMaskError: an unknown geometry, too little memory for its weights.
    """
    check_geometry(geometry)
    device = resolve_device(device)
    if geometry != "mini" and model is None:
        check_memory(geometry, device, reference=False)
    return _rows(geometry, device, model, batches, numbers, steps, pairs)


def _rows(
    geometry: str,
    device: torch.device,
    model: str | Path | None,
    batches: Sequence[int],
    numbers: Sequence[int],
    steps: int,
    pairs: int,
) -> Iterator[dict]:
    pipe = open_geometry(geometry, device, model=model)
    shared = {"geometry": geometry, "model": str(model or geometry), **environment(device)}
    for batch in batches:
        contenders = Contenders(pipe, batch, steps)
        call = contenders.ours(like_reference=False)
        before = pipe.seconds.as_dict()
        timed = race({"ours": call}, pairs=pairs, device=device)
        stages = {name: (value - before[name]) / (pairs + 1) for name, value in pipe.seconds.as_dict().items() if value}
        config = {**shared, "batch": batch, **contenders.settings, "clock": timed.clock}
        config["stages_s"] = {name: round(value, 4) for name, value in stages.items()}
        rates = sorted(batch / seconds for seconds in timed.times["ours"])
        spread: dict[str, Any] = {"low": rates[0], "high": rates[-1], "n": pairs}
        yield row(SUITE, "images_per_s", batch / timed.seconds("ours"), unit="images/s", config=config, **spread)
        yield row(SUITE, "peak_memory", peak_bytes(call) / GIB, unit="GiB", config=config)
    for count, peak in over_steps(pipe, tuple(numbers)):
        config = {**shared, "batch": 1, "num_inference_steps": count}
        yield row(SUITE, "peak_memory_steps", peak / GIB, unit="GiB", config=config)
