"""What a diffusers pipeline is called with, where the caller says nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffumask_fast.attention.families import has_unet
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline
from diffumask_fast.models.find import ModelInfo

SCHEDULES = ("timesteps", "sigmas")


def suited(info: ModelInfo, pipe: DiffusersPipeline) -> ModelInfo:
    """Return a model's settings with the pipeline's own steps and guidance, where its folder has no say and it is no
    UNet, for which the general ones are."""
    if info.scenes is not None or has_unet(pipe):
        return info
    return replace(info, **steps_and_guidance(pipe, {}))


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
