"""Finish a batch while the next one is denoised."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

IN_FLIGHT = 2


class StreamWorker:
    """A thread with its own CUDA stream; without CUDA, `submit` runs the work at once in the caller's thread.

    On the CPU a thread would gain nothing: two busy OpenMP programs on the same cores are slower than one after the
    other. The first piece of work always runs at once, because it may compile or tune what the others use.

    Args:
        device: of the work's tensors.
        threaded: whether to use a thread; None uses one on CUDA.
    """

    def __init__(self, device: torch.device, threaded: bool | None = None) -> None:
        self.device = device
        # a thread would not inherit the caller's autocast
        useful = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        threaded = useful if threaded is None else threaded
        self._pool = ThreadPoolExecutor(1, "finish") if threaded else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun = False

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Start a piece of work.

        Args:
            work: may read only tensors that are already computed, and returns when its result is computed.
        """
        if self._pool is not None and self._begun:
            return self._pool.submit(self._run, work)
        self._begun = True
        done: Future[Any] = Future()
        done.set_result(self._run(work))
        return done

    def _run(self, work: Callable[[], Any]) -> Any:
        if self._stream is None:
            return work()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return work()

    def __enter__(self) -> StreamWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class Turn:
    """Let one thread after the other do what changes a pipeline; a copy of it is of another pipeline, and new."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()
