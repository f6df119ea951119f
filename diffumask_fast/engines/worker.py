"""Finish a batch while the next one is denoised."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Copy tensors of one device to the CPU, on CUDA through pinned memory with one wait for all of them."""
    if not tensors[0].is_cuda:
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy().copy() for copy in copies]  # frees the pinned memory, which is scarce
