"""Writing shards beside the drawing."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from diffumask_fast.dataset.run import Run


class ShardWriter:
    """Write a run's shards in a thread, one at a time; to be used in a `with` statement.

    A slow disk holds up whoever adds shards, so that they cannot fill the memory. Leaving by an exception drops what is
    not yet being written.

    Args:
        run: whose shards they are.
        on_written: gets the index of each shard that is written, and the seconds which that took; in the thread.
    """

    def __init__(self, run: Run, on_written: Callable[[int, float], Any] = lambda index, seconds: None) -> None:
        self.waited = 0.0  # seconds for which the drawing was held up
        self._run, self._on_written = run, on_written
        self._pool = ThreadPoolExecutor(1, "write")
        self._written: Future[None] | None = None

    def add(self, index: int, rows: list[dict[str, Any]]) -> None:
        """Begin to write a shard, once the one before is written.

        Raises:
            DiffuMaskError: the one before could not be written.
        """
        self._wait()
        self._written = self._pool.submit(self._write, index, rows)

    def check(self) -> None:
        """Raise what the last shard failed with, when that is known already."""
        if self._written is not None and self._written.done():
            self._written.result()

    def _write(self, index: int, rows: list[dict[str, Any]]) -> None:
        start = time.perf_counter()
        self._run.write_rows(index, rows)
        self._on_written(index, time.perf_counter() - start)

    def _wait(self) -> None:
        start = time.perf_counter()
        try:
            if self._written is not None:
                self._written.result()
        finally:
            self.waited += time.perf_counter() - start

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # the folder stays locked until nothing writes in it
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._wait()
