"""Drawing the shards of a job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

from diffumask_fast.dataset.schema import Sample, make_row
from diffumask_fast.generation.job import Job
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.results import Result

MOST_ENCODERS = 8

Row = dict[str, Any]


def draw_shards(
    pipe: DiffuMaskPipeline, job: Job, indices: Iterable[int], on_result: Callable[[Result], Any] = lambda result: None
) -> Generator[tuple[int, list[Row]]]:
    """Draw shards of a job, in any process and any order; a shard's rows are the same whatever else is drawn.

    All shards are one stream: the last batch of one is finished beside the denoising of the first of the next, and
    images are encoded in threads.

    Args:
        pipe: what the job's `open` gives.
        job: the run.
        indices: of the shards, in the order in which they are drawn.
        on_result: gets every image as soon as it is drawn.

    Returns:
        Each shard's index and its rows, as `dataset.schema.make_row` makes them.

    Raises:
        DiffuMaskError: as for a call of the pipeline.
    """
    indices, plan = list(indices), job.plan(pipe)
    results = pipe.stream_batches(
        (batch for index in indices for batch in job.batches(plan, index)), job.mask, maps=job.maps,
        num_phrases=job.recipe.classes_per_image, use_negative_prompts=bool(job.recipe.negative_prompt),
        num_inference_steps=job.steps, guidance_scale=job.guidance_scale, height=job.height, width=job.width,
    )  # fmt: skip
    with closing(results), Encoders(2 * job.batch_size) as encoders:
        for index in indices:
            for result in islice(results, job.num_rows(index)):
                on_result(result)
                encoders.add(result)
            rows = encoders.take()
            pipe.seconds.encode += encoders.waited
            encoders.waited = 0.0
            yield index, rows


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
