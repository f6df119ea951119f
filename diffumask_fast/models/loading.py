"""Load a checked folder as a diffusers pipeline, quietly and from safetensors alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffumask_fast.attention.families import family_of
from diffumask_fast.errors import DiffuMaskError, first_line
from diffumask_fast.models.complete import as_argument, load_models, try_tokenizers
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline
from diffumask_fast.models.find import ModelInfo
from diffumask_fast.models.hashing import OWN_OPTIONS
from diffumask_fast.models.lora import fuse_loras
from diffumask_fast.models.scheduler import set_scheduler

OF_T5 = ("text_encoder_3", "tokenizer_3")  # SD3 draws without them, with zeros in their place


def load_pipe(info: ModelInfo, dtype: torch.dtype, device: torch.device, **components: Any) -> DiffusersPipeline:
    """Load a checked folder as the diffusers pipeline that it names, quietly and from safetensors alone.

    Args:
        info: of the folder; the LoRA files that it names are fused into the weights.
        dtype: of the weights.
        device: of the pipeline.
        components: replacements of the folder's components, by name.

    Raises:
        DiffuMaskError: diffusers cannot load it, a component is incomplete, a tokenizer or a LoRA does not fit, or its
            denoiser is of a kind that gives no maps.
    """
    try:
        with quietly():
            models: dict[str, Any] = load_models(info.local_folder, dtype, held=components)
            models |= dict.fromkeys(_left_out(info.local_folder))
            pipe: Any = DiffusionPipeline.from_pretrained(
                info.folder, **as_argument(dtype), use_safetensors=True, local_files_only=True, **models, **components
            )
            try_tokenizers(pipe, info.local_folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise DiffuMaskError(f"diffusers cannot load {info.folder}: {first_line(error)[:300]}") from error
    try:
        family_of(pipe)
    except DiffuMaskError as error:
        raise DiffuMaskError(
            f"{info.name} is of a kind without maps ({error}): use a Stable Diffusion model up to 3.5, or FLUX.1."
        ) from error
    if info.scheduler not in (None, type(pipe.scheduler).__name__):
        try:
            set_scheduler(pipe, info.scheduler)
        except DiffuMaskError as error:
            raise DiffuMaskError(f"{info.local_folder / OWN_OPTIONS}: {error}") from error
    with quietly():
        fuse_loras(pipe, info.loras)
    return pipe.to(device)


def _left_out(folder: Path) -> list[str]:
    """List the components without which a folder is complete by its own word, and diffusers wants to be told so."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    return [name for name in OF_T5 if index.get(name) == [None, None]]


def says_force_upcast(folder: Path) -> bool:
    """Tell whether the VAE's config.json says that it overflows in fp16; diffusers takes a missing entry as True."""
    path = folder / "vae" / "config.json"
    return bool(path.is_file() and json.loads(path.read_text("utf-8")).get("force_upcast", False))


def check_size(pipe: DiffusersPipeline, height: int | None, width: int | None) -> None:
    """Refuse an image size that the model cannot draw.

    Raises:
        DiffuMaskError: height or width is no positive multiple of the pixels of a token, or of the VAE's factor.
    """
    factor = family_of(pipe).pixels_per_token(pipe)
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value <= 0 or value % factor):
            raise DiffuMaskError(
                f"{name} {value} is not a multiple of {factor}: use {max(1, round(value / factor)) * factor}."
            )


def check_whole(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments with which a pipeline draws a part of the image.

    Raises:
        DiffuMaskError: there is one.
    """
    if arguments.get("padding_mask_crop") is not None:
        raise DiffuMaskError(
            "With padding_mask_crop only a crop of the image is drawn, and maps of it would not fit the image: leave "
            "it out."
        )


@contextmanager
def without_bars(pipe: DiffusersPipeline) -> Iterator[None]:
    """Hide a pipeline's own progress bars."""
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**config | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**config)


@contextmanager
def quietly() -> Iterator[None]:
    """Hide progress bars and warnings of diffusers and transformers; errors are still raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    try:
        for module, _ in levels:
            module.set_verbosity_error()
            module.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
            module.enable_progress_bar()
