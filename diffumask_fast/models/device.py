"""The device and the dtype of a model."""

from __future__ import annotations

import torch

from diffumask_fast.errors import DiffuMaskError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device; for None or "auto" CUDA where there is one, else the CPU.

    Raises:
        DiffuMaskError: there is no such device here, or its kind is not supported.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise DiffuMaskError(f"There is no device {device}: use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise DiffuMaskError(f"Device {device} is not supported: use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DiffuMaskError(
            f"There is no CUDA device {device} here (torch sees {torch.cuda.device_count()}): use `device=cpu`."
        )
    return device


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the requested dtype; for None or "auto" fp16 on CUDA, fp32 on the CPU."""
    if dtype in (None, "auto"):
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise DiffuMaskError(f"There is no dtype {dtype}: use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def fitting_batch(unet: torch.nn.Module, pixels: int, device: torch.device) -> int:
    """Return the largest power of two of images of so many pixels that fits a GPU's memory, at least 1."""
    weights = sum(p.nbytes for p in unet.parameters())
    free = torch.cuda.get_device_properties(device).total_memory * 0.8 - 2 * weights
    fitting = int(free / (pixels * 7000))  # an estimate of UNet and VAE side by side; no GPU has confirmed it
    return 1 << max(fitting, 1).bit_length() - 1
