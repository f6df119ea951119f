"""What `generate --dry-run` does: draw a few batches, keep nothing, and tell what the run will take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from diffumask_fast.dataset.reader import shard_paths
from diffumask_fast.dataset.writer import shard_name
from diffumask_fast.generation.captions import with_captions
from diffumask_fast.generation.draw import draw_shards
from diffumask_fast.generation.generate import environment
from diffumask_fast.generation.job import Job, make_job, open_pipe, taken_for
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.models.loading import quietly
from diffumask_fast.pipeline import DiffuMaskPipeline

TIMED = 2  # batches, after one that warms up


def run_probe(options: GenerateOptions) -> dict[str, Any]:
    """Draw a few batches of a run, and tell what all of it will take; nothing is written.

    Args:
        options: the flags.

    Returns:
        images (of the run, or of its part; with `accept_per_class` the least that there can be: `is_least`), missing
        (those not drawn yet), taken (steps and guidance that the options leave open), shards, images_per_hour, hours
        (for the missing ones), bytes and bytes_per_shard (of `data/`), seconds (by stage, for an image), probed (images
        that were drawn to tell this), accepted (of those), batch_size, options (all resolved), model, environment.

    Raises:
        DiffuMaskError: anything that would keep the run from starting.
    """
    with quietly():
        pipe = open_pipe(options, options.device)
        job = with_captions(make_job(options, pipe), options.prompts, pipe, options.out)
        rows, seconds = _draw(pipe, job)
    num = job.accept_per_class * len(job.recipe.vocabulary) if job.accept_per_class else job.recipe.num
    shards = range(-(-num // job.shard_size))
    if options.part is not None:
        shards = options.part.shards(len(shards))
    there = {path.name for path in shard_paths(options.out)}
    counts = {index: min(job.shard_size, num - index * job.shard_size) for index in shards}
    num, missing = sum(counts.values()), sum(count for index, count in counts.items() if shard_name(index) not in there)
    rate = len(rows) / seconds["all"]
    size = sum(map(_stored_bytes, rows)) / len(rows)
    return {
        "images": num, "missing": missing, "is_least": job.accept_per_class is not None,
        "taken": taken_for(options, job, pipe.info),
        "shards": len(shards), "images_per_hour": round(3600 * rate),
        "hours": round(missing / rate / 3600, 6),
        "bytes": round(num * size), "bytes_per_shard": round(min(num, job.shard_size) * size),
        "seconds": {stage: round(value / len(rows), 5) for stage, value in seconds.items()},
        "probed": len(rows), "accepted": sum(row["accepted"] for row in rows), "batch_size": job.batch_size,
        "options": {**job.options, "shard_size": job.shard_size}, "model": job.identity,
        "environment": environment(pipe),
    }  # fmt: skip


def describe(estimate: dict[str, Any]) -> Iterator[str]:
    """Yield what `run_probe` found, in lines."""
    least = "at least " if estimate["is_least"] else ""
    seconds = [f"{stage} {value:.3f}" for stage, value in estimate["seconds"].items() if stage != "all"]
    shards = f"{estimate['shards']} shard{'s' if estimate['shards'] > 1 else ''}"
    yield f"{least}{estimate['images']} images in {least}{shards}, by {estimate['model']}"
    hours = f"{least}{estimate['hours']:.2f} h for the {estimate['missing']} missing"
    yield f"{estimate['images_per_hour']} images/h: {hours}"
    yield f"{least}{_size(estimate['bytes'])} on disk, {_size(estimate['bytes_per_shard'])} a shard"
    yield f"seconds an image: {', '.join(seconds)}"
    probe = f"a probe of {estimate['probed']} images, in batches of {estimate['batch_size']}"
    yield f"{probe}: {estimate['accepted']} accepted"
    yield from filter(None, [estimate["taken"]])
    for section in ("options", "environment"):
        yield section
        for name, value in estimate[section].items():
            yield f"  {name:18} {value}"
    yield "Nothing was written."


def _draw(pipe: DiffuMaskPipeline, job: Job) -> tuple[Sequence[dict[str, Any]], dict[str, float]]:
    """Return the rows of the timed batches, and their seconds by stage."""
    batch = min(job.batch_size, job.shard_size)
    recipe = replace(job.recipe, num=batch * (1 + TIMED), rounds=())
    shards = draw_shards(pipe, replace(job, recipe=recipe, batch_size=batch, shard_size=batch), range(1 + TIMED))
    next(shards)
    start, before = time.perf_counter(), pipe.seconds.as_dict()
    rows = [row for _, drawn in shards for row in drawn]
    seconds = {stage: value - before[stage] for stage, value in pipe.seconds.as_dict().items()}
    return rows, {**seconds, "all": time.perf_counter() - start}


def _stored_bytes(row: dict[str, Any]) -> int:
    """Return about how many bytes a row takes in a shard: pictures are compressed already, maps are not."""
    maps = pa.compress(bytes(row["maps"]), "zstd", asbytes=True)
    return len(row["image"]["bytes"]) + len(row["mask"]["bytes"]) + len(maps) + len(row["prompt"].encode())


def _size(num: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:.3g} {unit}"
        num /= 1000
    return f"{num:.3g} TB"
