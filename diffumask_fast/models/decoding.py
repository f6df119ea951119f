"""Decode latents: inside the diffusers pipeline's call, or after it where the result is known to be the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffumask_fast.borrow import patched
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline
from diffumask_fast.results import Seconds


def decodes_later(pipe: DiffusersPipeline) -> bool:
    """Tell whether a call for latents, followed by `decode`, gives the pixels that the call itself would give."""
    from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline

    kind: Any = type(pipe)
    extras = ("safety_checker", "watermark")
    return (
        # their calls end with the VAE and the image processor alone; these VAEs decode without noise
        kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)
        and type(pipe.vae) in (AutoencoderKL, AutoencoderTiny)
        and not (_is_xl(pipe) and pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast)
        and all(getattr(pipe, name, None) is None for name in extras)
        and not hasattr(pipe.vae, "_hf_hook")  # an offloaded VAE is on the device during the call alone
    )


def finished(output: Any, pipe: DiffusersPipeline) -> Tensor:
    """Wait for what a pipeline's call gave, and return it as a tensor.

    A few pipelines (T2I-Adapter, Safe Stable Diffusion) give an array [B, H, W, 3] where a tensor is asked for.

    Raises:
        DiffuMaskError: it is neither of the two, for a pipeline may not know other output types than its own.
    """
    if isinstance(output, np.ndarray) and output.ndim == 4 and output.dtype.kind == "f":
        return torch.from_numpy(output).movedim(3, 1).to(pipe._execution_device)
    if not isinstance(output, Tensor):
        raise DiffuMaskError(f"{type(pipe).__name__} gives its images not as tensors: use collect_maps with it.")
    _wait(output)
    return output


def decode(pipe: DiffusersPipeline, latents: Tensor, seconds: Seconds) -> Tensor:
    """Decode latents as the pipeline's own call would.

    Args:
        pipe: one that `decodes_later`.
        latents: [B, C, h, w], as its call gives them.
        seconds: the time of decoding is added to it.

    Returns:
        [B, 3, H, W] in 0..1.
    """
    start = time.perf_counter()
    config, mean, std = pipe.vae.config, None, None
    if _is_xl(pipe):
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents.device, latents.dtype) for v in (mean, std))
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
    latents = latents.to(next(pipe.vae.parameters()).device, compute_dtype(pipe, latents))
    pixels = pipe.vae.decode(latents, return_dict=False)[0]
    # Stable Diffusion's call maps -1..1 to 0..1, whatever the image processor's configuration
    denormalize = None if _is_xl(pipe) else [True] * len(pixels)
    pixels = pipe.image_processor.postprocess(pixels, output_type="pt", do_denormalize=denormalize)
    _wait(latents)
    seconds.decode += time.perf_counter() - start
    return pixels


def compute_dtype(pipe: DiffusersPipeline, given: Tensor) -> torch.dtype:
    """Return the dtype in which the VAE computes, which for weights stored as fp8 or quantised is not their own."""
    dtype = pipe.vae.dtype  # of layerwise casting's hooks, where there are some
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else given.dtype


@contextmanager
def timed_decoding(pipe: DiffusersPipeline, seconds: Seconds) -> Iterator[None]:
    """Time the VAE's decoder in a call, and hand it the dtype in which it computes (fp32 beside an fp16 UNet)."""

    def in_own_dtype(method: Any, stage: str) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(tensor.to(compute_dtype(pipe, tensor)), *args, **kwargs)
            finally:
                _wait(tensor)
                if stage == "decode":
                    seconds.decode += time.perf_counter() - start

        return call

    with (
        patched("encode", {pipe.vae: in_own_dtype(pipe.vae.encode, "encode")}),
        patched("decode", {pipe.vae: in_own_dtype(pipe.vae.decode, "decode")}),
    ):
        yield


def _is_xl(pipe: DiffusersPipeline) -> bool:
    from diffusers import StableDiffusionXLPipeline

    kind: Any = type(pipe)
    return kind is StableDiffusionXLPipeline


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
