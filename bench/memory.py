"""Memory by counting live tensors: of drawing with maps, and of the reference program's store."""

from collections.abc import Callable, Iterator

import torch

from diffumask_fast.bench.baselines import ReferenceStore
from diffumask_fast.bench.contenders import Contenders
from diffumask_fast.bench.harness import live_tensor_bytes
from diffumask_fast.pipeline import DiffuMaskPipeline

GIB = 2**30


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes of tensors that live at once during a call, above what lived before (the weights).

    Example:
        >>> peak_bytes(lambda: torch.ones(256).exp())
        2048
    """
    with torch.no_grad(), live_tensor_bytes() as live:
        call()
    return live.peak


def against_reference(contenders: Contenders) -> tuple[float, dict[str, float]]:
    """Return our peak over the reference store's while one image is denoised; and both peaks and both stores' sizes."""
    reference, ours = ReferenceStore(contenders.pipe.pipe), contenders.collector()
    theirs = peak_bytes(lambda: contenders.denoise_alone(reference))
    kept = reference.num_bytes
    reference.clear()
    mine = peak_bytes(lambda: contenders.denoise_alone(ours))
    config = {"peak_gib": round(mine / GIB, 4), "reference_peak_gib": round(theirs / GIB, 4)}
    config |= {"kept_gib": round(ours.store.num_bytes / GIB, 6), "reference_kept_gib": round(kept / GIB, 4)}
    return mine / theirs, config


def over_steps(pipe: DiffuMaskPipeline, steps: tuple[int, ...] = (10, 50)) -> Iterator[tuple[int, int]]:
    """Yield the peak bytes of denoising one image with maps and propagation, for each number of steps."""
    for count in steps:
        yield count, peak_bytes(Contenders(pipe, 1, count).mapped(1))
