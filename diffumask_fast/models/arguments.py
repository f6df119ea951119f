"""What a diffusers pipeline is called with, where the caller says nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from diffumask_fast.attention.families import denoising_model, has_unet
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline
from diffumask_fast.models.find import ModelInfo
from diffumask_fast.models.scheduler import FEW_STEPS
from diffumask_fast.options import checked, whole

STEPS = 4  # of models that FEW_STEPS are for
EMBEDDED, OFF = 8.5, 1.0  # their guidance: LatentConsistencyModelPipeline's own, where the UNet takes it; else none
SCHEDULES = ("timesteps", "sigmas")
PICTURES = {"image", "control_image", "mask_image"}  # a pipeline's arguments that must be given, where it has them
OLD = ("callback", "callback_steps")  # that some take without naming them
RENAMED = {"steps": "num_inference_steps", "size": "height"}  # as the command line has them
ALSO_WITHOUT = ("FluxKontextPipeline",)


def suited(info: ModelInfo, pipe: DiffusersPipeline) -> ModelInfo:
    """Return a model's settings with steps and guidance by what its parts tell, where its folder has no say."""
    if info.scenes is not None:
        return info
    steps, guidance, origin, doubt = _for_unet(pipe) if has_unet(pipe) else _for_transformer(pipe)
    return replace(info, num_inference_steps=steps, guidance_scale=guidance, origin=origin, doubt=doubt)


def _for_unet(pipe: DiffusersPipeline) -> tuple[int, float, str, str]:
    """Return steps, guidance, their origin and what speaks against them."""
    scheduler, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    embedded = denoising_model(pipe).config.get("time_cond_proj_dim") is not None
    if scheduler in FEW_STEPS:
        guidance = "guidance that its UNet takes as an embedding" if embedded else "no guidance"
        return STEPS, EMBEDDED if embedded else OFF, f"{scheduler} is for few steps, with {guidance}", ""
    doubt = ""
    if embedded:
        doubt = "its UNet takes guidance as an embedding, as an LCM's does, which wants about 4 steps"
    elif config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr"):
        doubt = "its timesteps are trailing, as those of Turbo and Lightning, which want 1 to 8 steps and guidance 0"
    return ModelInfo.num_inference_steps, ModelInfo.guidance_scale, "most models with a UNet want them", doubt


def _for_transformer(pipe: DiffusersPipeline) -> tuple[int, float, str, str]:
    """Return steps, guidance, their origin and what speaks against them."""
    own, doubt = steps_and_guidance(pipe, {}), ""
    if not denoising_model(pipe).config.get("guidance_embeds", True):
        own["guidance_scale"] = 0.0  # the pipeline hands none to the transformer
        doubt = "its transformer takes no guidance, as that of FLUX.1 schnell, which wants 4 steps"
    return own["num_inference_steps"], own["guidance_scale"], f"{type(pipe).__name__} has them", doubt


def steps_and_guidance(pipe: DiffusersPipeline, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return num_inference_steps and guidance_scale of a call: as given, by a schedule of the caller's, or the
    pipeline's own."""
    own = inspect.signature(type(pipe).__call__).parameters
    found = {
        name: arguments.get(name, own[name].default if name in own else None)
        for name in ("num_inference_steps", "guidance_scale")
    }
    schedule = next((arguments[name] for name in SCHEDULES if arguments.get(name) is not None), None)
    if schedule is not None:
        found["num_inference_steps"] = len(schedule)
    return found


def check_arguments(pipe: DiffusersPipeline, arguments: Mapping[str, Any]) -> None:
    """Refuse what a pipeline would pass over in silence, or fail of in its midst.

    Args:
        pipe: to be called.
        arguments: of the call, by name.

    Raises:
        DiffuMaskError: the pipeline is diffusers' own and has no such argument, or the number of steps is none.
    """
    kind = type(pipe)
    known = {*inspect.signature(kind.__call__).parameters, *OLD}
    if kind.__module__.startswith("diffusers.") and (unknown := arguments.keys() - known):
        name = min(unknown)
        near = get_close_matches(RENAMED.get(name, name), known, 1)
        raise DiffuMaskError(
            f"{kind.__name__} takes no {name}: leave it out{f', or say {near[0]}' if near else ''}, as diffusers has it"
        )
    if "num_inference_steps" in arguments:
        checked("num_inference_steps", arguments["num_inference_steps"], whole(1))


def check_draws_from_prompts(pipe: DiffusersPipeline) -> None:
    """Refuse a pipeline that wants a picture beside each prompt, for a run has none.

    Raises:
        DiffuMaskError: it wants one, or its UNet does.
    """
    kind, config = type(pipe), denoising_model(pipe).config
    wanted = PICTURES & inspect.signature(kind.__call__).parameters.keys()
    if wanted and kind.__name__ not in ALSO_WITHOUT:
        raise DiffuMaskError(
            f"{kind.__name__} draws from a prompt and a picture, and a run has prompts alone: name a text-to-image "
            "model, or draw with DiffuMaskPipeline in Python, which takes the picture"
        )
    if has_unet(pipe) and config.in_channels > config.out_channels:
        raise DiffuMaskError(
            f"the UNet takes {config.in_channels} channels and gives {config.out_channels}, as those for inpainting "
            "do, and a run has no picture to give it: name a text-to-image model"
        )
