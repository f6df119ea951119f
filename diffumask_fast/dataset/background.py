"""Encoding and writing beside the drawing, in threads, with a bound on what waits for them."""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from diffumask_fast.dataset.run import Run
from diffumask_fast.dataset.schema import Sample, make_row

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
            DiffuMaskError: an earlier one was not fit to be encoded.
        """
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
        self._rows, self._written = [], self._writer.submit(self._run.write_rows, index, rows)

    def _wait_for_disk(self) -> None:
        if self._written is not None:
            self._written.result()

    @contextmanager
    def _waiting(self):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._encoders.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=kind is not None)
        if kind is None:
            with self._waiting():
                self._wait_for_disk()
