"""What `diffumask-fast export` does: write an engine, or an engine's copy with other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffumask_fast.export.manifest import Manifest
from diffumask_fast.export.onnx_export import export_onnx
from diffumask_fast.export.options import ExportOptions
from diffumask_fast.export.tensorrt_build import export_tensorrt
from diffumask_fast.export.tensorrt_refit import refit_engine


def export_model(options: ExportOptions, progress: Callable[[str], Any] = lambda _: None) -> Manifest:
    """Write a model for an engine other than torch, and check it against torch.

    Args:
        options: the flags.
        progress: is called with a sentence before each step.

    Returns:
        what was written.

    Raises:
        DiffuMaskError: as export_onnx, export_tensorrt and refit_engine.
    """
    model, out, revision = options.model, options.out, options.revision
    if options.refit:
        return refit_engine(model, options.refit, out, revision=revision, progress=progress)
    if options.to == "onnx":
        dtype = "fp32" if options.dtype == "auto" else options.dtype
        return export_onnx(model, out, dtype, options.shapes, revision=revision, progress=progress)
    dtype = "fp16" if options.dtype == "auto" else options.dtype
    return export_tensorrt(
        model, out, dtype, options.shapes, to=options.to, compute_capability=options.compute_capability,
        refittable=options.refittable, revision=revision, progress=progress,
    )  # fmt: skip
