"""Drawing the shards of a job."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from diffumask_fast.dataset.schema import Sample, make_row
from diffumask_fast.errors import DiffuMaskError, is_out_of_memory
from diffumask_fast.generation.job import Job
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.request import Request
from diffumask_fast.results import Result

MOST_ENCODERS = 8

Row = dict[str, Any]


def draw_shards(
    pipe: DiffuMaskPipeline,
    job: Job,
    indices: Iterable[int],
    on_result: Callable[[Result], Any] = lambda result: None,
    on_smaller: Callable[[int, list[int]], Any] = lambda batch_size, indices: None,
) -> Generator[tuple[int, list[Row]]]:
    """Draw shards of a job, in any process and any order; a shard's rows are the same whatever else is drawn.

    All shards are one stream: the last batch of one is finished beside the denoising of the first of the next, and
    images are encoded in threads. Where memory is short, the shard at hand is drawn anew and all others are drawn in
    batches of half the size, down to one image: then rows are the same up to rounding.

    Args:
        pipe: what the job's `open` gives.
        job: the run.
        indices: of the shards, in the order in which they are drawn.
        on_result: gets every image as soon as it is drawn, once.
        on_smaller: gets the new batch size, and the shards that are drawn with it.

    Returns:
        Each shard's index and its rows, as `dataset.schema.make_row` makes them.

    Raises:
        DiffuMaskError: as for a call of the pipeline; or memory is short for a single image.
    """
    left, told = list(indices), 0

    def tell(number: int, result: Result) -> None:
        nonlocal told
        if number == told:  # not told before the shard was drawn anew
            told += 1
            on_result(result)

    while left:
        try:
            for index, rows in _draw_stream(pipe, job, left, tell):
                left, told = left[1:], 0
                yield index, rows
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            largest = min(job.batch_size, job.num_rows(left[0]))
            if largest == 1:
                raise DiffuMaskError(
                    f"there is not enough memory for a single image of {job.height}x{job.width}: give a smaller `size`"
                ) from error
        job = replace(job, batch_size=largest // 2)
        _free_memory()
        on_smaller(job.batch_size, left)


def _draw_stream(
    pipe: DiffuMaskPipeline, job: Job, indices: Sequence[int], on_result: Callable[[int, Result], Any]
) -> Generator[tuple[int, list[Row]]]:
    """Draw shards as one stream; `on_result` gets each image and its number in its shard."""
    plan = job.plan(pipe)
    results = draw_batches(pipe, job, (batch for index in indices for batch in job.batches(plan, index)))
    with closing(results), Encoders(2 * job.batch_size) as encoders:
        for index in indices:
            for number, result in enumerate(islice(results, job.num_rows(index))):
                on_result(number, result)
                encoders.add(result)
            rows = encoders.take()
            pipe.seconds.encode += encoders.waited
            encoders.waited = 0.0
            yield index, rows


def draw_batches(pipe: DiffuMaskPipeline, job: Job, batches: Iterable[Sequence[Request]]) -> Generator[Result]:
    """Draw some batches of a job; a batch is asked for when the one before it is denoised.

    Args:
        pipe: what the job's `open` gives.
        job: the run.
        batches: of its `batches`.

    Raises:
        DiffuMaskError: as for a call of the pipeline.
    """
    return pipe.stream_batches(
        batches, job.mask, maps=job.maps,
        num_phrases=job.recipe.classes_per_image, use_negative_prompts=bool(job.recipe.negative_prompt),
        num_inference_steps=job.steps, guidance_scale=job.guidance_scale, height=job.height, width=job.width,
    )  # fmt: skip


def _free_memory() -> None:
    """Give back what an error's frames held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Encoders:
    """Threads that encode samples as they are drawn; to be used in a `with` statement.

    Slow processors hold up whoever adds samples, so that these cannot fill the memory. Leaving drops what waits.

    Args:
        ahead: samples that may wait for their encoding.
    """

    def __init__(self, ahead: int) -> None:
        self.waited = 0.0  # seconds for which the drawing was held up
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(min(MOST_ENCODERS, os.cpu_count() or 1), "encode")
        self._rows: list[Future[Row]] = []

    def add(self, sample: Sample) -> None:
        """Begin to encode a sample.

        Raises:
            DiffuMaskError: an earlier one was not fit to be encoded.
        """
        if len(self._rows) >= self._ahead:
            self._wait(self._rows[-self._ahead :][:1])
        self._rows.append(self._pool.submit(make_row, sample))

    def take(self) -> list[Row]:
        """Return the rows of all samples added since the last call, once they are encoded.

        Raises:
            DiffuMaskError: a sample was not fit to be encoded.
        """
        rows, self._rows = self._rows, []
        return self._wait(rows)

    def _wait(self, rows: list[Future[Row]]) -> list[Row]:
        start = time.perf_counter()
        try:
            return [row.result() for row in rows]
        finally:
            self.waited += time.perf_counter() - start

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
