"""What comes after the denoising of a batch, beside the denoising of the next."""

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
    """A thread with a CUDA stream of its own; where there is no CUDA, work is done at once by who hands it in.

    Two busy OpenMP programs on the same cores are slower than one after the other, so that the CPU gains nothing here.
    The first piece of work is always done at once, for it may compile or tune what the others use.

    Args:
        device: where the work's tensors are.
        threaded: whether there is a thread; None is what suits the device.
    """

    def __init__(self, device: torch.device, threaded: bool | None = None) -> None:
        self.device = device
        # a thread would not inherit the caller's autocast
        useful = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        threaded = useful if threaded is None else threaded
        self._pool = ThreadPoolExecutor(1, "finish") if threaded else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun = False

    def submit(self, work: Callable[[], Any]) -> Future:
        """Begin a piece of work; all that it reads must be finished, and its result be finished when it returns."""
        later, self._begun = self._begun and self._pool is not None, True
        if later:
            return self._pool.submit(self._run, work)
        done: Future = Future()
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
    return [copy.numpy().copy() for copy in copies]  # page-locked memory is scarce, and results may be kept for long
