"""Workers of Ray beside one process: images per second, and what a shard costs on its way."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffumask_fast.bench.rows import environment, row
from diffumask_fast.borrow import patched_threads
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.cluster import Cluster
from diffumask_fast.generation.draw import draw_shards
from diffumask_fast.generation.job import open_pipe
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.models.device import resolve_device
from diffumask_fast.models.loading import quietly
from diffumask_fast.pipeline import DiffuMaskPipeline

SUITE = "cluster"
WORKERS = 2  # on CPUs; as many as there are GPUs on CUDA
SHARDS, SHARD_SIZE = 6, 8  # of each worker
SMALL = 12  # shards of one image, for what a shard costs
ROWS, ROW_BYTES = 64, 2**19  # a shard as Stable Diffusion fills it


def run(
    geometry: str = "mini",
    device: str | torch.device = "auto",
    *,
    model: str | Path | None = None,
    steps: int = 10,
    pairs: int = 3,
) -> Iterator[dict]:
    """Measure drawing by workers of Ray, each with one thread or one GPU, beside drawing in this process.

    Args:
        geometry: "mini", where no model is given: workers load a folder.
        device: "auto", "cpu" or "cuda".
        model: another model folder.
        steps: denoising steps.
        pairs: rounds; in each, this process draws first.

    Returns:
        Rows `images_per_s` of this process and of the workers, `speedup`; `shard_overhead` beyond the drawing, for a
        shard of one small image; `shard_transfer`, for 64 rows of 0.5 MiB from a worker to the driver.

    Raises:
        DiffuMaskError: Ray is missing, or a geometry without a folder.
    """
    if geometry != "mini" and model is None:
        raise DiffuMaskError("The suite cluster draws in other processes: give a `model` folder.")
    device = resolve_device(device)
    workers = torch.cuda.device_count() if device.type == "cuda" else WORKERS
    return _rows(str(model or geometry), device, workers, steps, pairs)


def _rows(model: str, device: torch.device, workers: int, steps: int, pairs: int) -> Iterator[dict]:
    options = GenerateOptions(
        Path("-"), model, num=workers * SHARDS * SHARD_SIZE, shard_size=SHARD_SIZE, batch_size=SHARD_SIZE, steps=steps,
        device=device.type, ray="local", workers=workers,
    )  # fmt: skip
    threads = 1 if device.type == "cpu" else torch.get_num_threads()
    with quietly(), patched_threads(threads), Cluster(options) as cluster:
        cluster.wait_for_all()
        pipe, job = open_pipe(options, device.type), cluster.job
        shared = {"model": model, "num_inference_steps": steps, "workers": workers, "shard_size": SHARD_SIZE}
        shared |= environment(device, threads)
        alone, together = [], []
        for _ in range(pairs + 1):
            alone.append(SHARDS * SHARD_SIZE / _seconds(draw_shards(pipe, job, range(SHARDS))))
            together.append(job.recipe.num / _seconds(cluster.draw_shards(job, range(job.num_shards))))
        speedups = [two / one for one, two in zip(alone[1:], together[1:], strict=True)]  # the first round is warm-up
        for name, values, unit in (
            ("images_per_s", alone[1:], "images/s"), ("images_per_s_on_ray", together[1:], "images/s"),
            ("speedup", speedups, "ratio"),
        ):  # fmt: skip
            yield _row(name, values, unit, shared)
        yield _row("shard_overhead", _overheads(cluster, pipe), "ms", shared)
        yield _row("shard_transfer", _transfers(pairs), "ms", shared | {"rows": ROWS, "row_bytes": ROW_BYTES})


def _overheads(cluster: Cluster, pipe: DiffuMaskPipeline) -> list[float]:
    """Return for how many milliseconds longer a worker has a shard of one image than this process."""
    job = replace(cluster.job, recipe=replace(cluster.job.recipe, num=SMALL), shard_size=1, steps=1)
    here = [_seconds(draw_shards(pipe, job, [index])) for index in range(SMALL)]
    there = [_seconds(cluster.draw_shards(job, [index])) for index in range(SMALL)]
    return [1000 * (far - near) for near, far in zip(here, there, strict=True)]


def _transfers(pairs: int) -> list[float]:
    """Return in how many milliseconds the rows of a shard come from a worker."""
    import ray

    @ray.remote(num_cpus=0)
    def rows() -> list[dict[str, bytes]]:
        return [{"image": os.urandom(ROW_BYTES)} for _ in range(ROWS)]

    found = []
    for _ in range(pairs + 1):
        call = rows.remote()
        ray.wait([call], fetch_local=False)
        found.append(1000 * _seconds(map(ray.get, [call])))
    return found[1:]


def _seconds(work: Iterable[Any]) -> float:
    """Return how long an iteration takes."""
    start = time.perf_counter()
    for _ in work:
        pass
    return time.perf_counter() - start


def _row(name: str, values: list[float], unit: str, config: dict[str, Any]) -> dict:
    return row(SUITE, name, median(values), unit=unit, low=min(values), high=max(values), n=len(values), config=config)
