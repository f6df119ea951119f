"""Encoding and writing beside the drawing, in threads, with a bound on what waits for them."""

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from diffumask_fast.dataset.run import Run
from diffumask_fast.dataset.schema import Sample, make_row

logger = logging.getLogger("diffumask_fast")

MOST_ENCODERS = 8


class Background:
    """Encode a run's samples as they are drawn, and write its shards; to be used in a `with` statement.

    A slow disk or processor holds up whoever adds samples, so that it cannot fill the memory: at most `ahead` samples
    wait for their encoding, and one shard for the disk. Leaving by an exception drops what is not yet being written.

    Args:
        run: whose shards they are.
        ahead: samples that may wait.
    """

    def __init__(self, run: Run, ahead: int) -> None:
        self.waited = 0.0  # seconds for which the drawing was held up
        self._run, self._ahead = run, ahead
        self._encoders = ThreadPoolExecutor(min(MOST_ENCODERS, os.cpu_count() or 1), "encode")
        self._writer = ThreadPoolExecutor(1, "write")
        self._rows: list[Future] = []
        self._written: Future | None = None

    def add(self, sample: Sample) -> None:
        """Begin to encode the next sample of the shard.

        Raises:
            DiffuMaskError: an earlier one was not fit to be encoded, or the last shard could not be written.
        """
        if self._written is not None and self._written.done():
            self._wait_for_disk()
        if len(self._rows) >= self._ahead:
            with self._waiting():
                self._rows[-self._ahead].result()
        self._rows.append(self._encoders.submit(make_row, sample))

    def end_shard(self, index: int) -> None:
        """Begin to write the samples added since the last shard, once that one is written.

        Raises:
            DiffuMaskError: a sample was not fit to be encoded, or the shard before could not be written.
        """
        with self._waiting():
            rows = [row.result() for row in self._rows]
            self._wait_for_disk()
        self._rows, self._written = [], self._writer.submit(self._write, index, rows)

    def _write(self, index: int, rows: list[dict]) -> None:
        self._run.write_rows(index, rows)
        logger.info("shard %d written, %d images", index, len(rows))

    def _wait_for_disk(self) -> None:
        if self._written is not None:
            self._written.result()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self._encoders.shutdown(cancel_futures=True)
        finally:  # the folder stays locked until nothing writes in it, however often Ctrl-C is pressed
            self._writer.shutdown(cancel_futures=kind is not None)
        if kind is None:
            with self._waiting():
                self._wait_for_disk()
