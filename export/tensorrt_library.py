"""TensorRT in its two flavours: the one for all cards, and TensorRT-RTX, which builds without a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.session import extra

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}


def library(flavour: str) -> Any:
    """Return the module of a flavour, "tensorrt" or "tensorrt-rtx".

    Raises:
        DiffuMaskError: it is not installed, or broken.
    """
    try:
        return importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as error:
        name = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[flavour]
        raise DiffuMaskError(
            f"{name} cannot be imported ({error}): on Linux, pip install 'diffumask-fast[{extra()},{flavour}]'."
        ) from error


def is_rtx(trt: Any) -> bool:
    """Tell whether a module is that of TensorRT-RTX."""
    return trt.__name__ == MODULES["tensorrt-rtx"]


def keeping_logger(trt: Any) -> Any:
    """Return a logger that keeps the library's errors in its list `errors`."""

    class Kept(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Kept()


def words_of(logger: Any) -> str:
    """Return what a keeping_logger was told, cut to a sentence's length."""
    return "; ".join(logger.errors)[:300] or "without a reason"


def compute_capability(device: torch.device | None = None) -> str | None:
    """Return the compute capability of a GPU, such as "8.9"; None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))
