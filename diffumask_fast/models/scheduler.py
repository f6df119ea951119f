"""Replace the scheduler of a pipeline by name, and try it before anything is drawn."""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline


def set_scheduler(pipe: DiffusersPipeline, name: str) -> None:
    """Replace a pipeline's scheduler by the named one ("DDIMScheduler" or "ddim"), with the same noise schedule.

    Raises:
        DiffuMaskError: there is no such scheduler for this model here; lists the available ones.
    """
    compatible = {_short(cls): cls for cls in pipe.scheduler.compatibles}
    wanted = next((cls for cls in compatible.values() if cls.__name__ == name), compatible.get(name.lower()))
    if wanted is None or not _is_usable(wanted):
        usable = ", ".join(sorted(short for short, cls in compatible.items() if _is_usable(cls)))
        if not usable:
            own = type(pipe.scheduler).__name__
            raise DiffuMaskError(f"There is no scheduler {name} for this model, which has {own}: leave it out.")
        without = f" without {', '.join(missing)}" if (missing := _missing_libraries(wanted)) else ""
        raise DiffuMaskError(f"There is no scheduler {name} for this model{without}: use one of {usable}.")
    config = dict(pipe.scheduler.config)
    if "clip_sample" in inspect.signature(wanted.__init__).parameters:
        config.setdefault("clip_sample", False)  # latents are not pixels: DDIM's default would clip them to -1..1
    pipe.scheduler = wanted.from_config(config)


def try_scheduler(pipe: DiffusersPipeline, steps: int) -> None:
    """Try a pipeline's scheduler on small latents, before anything is drawn.

    Raises:
        DiffuMaskError: it fails with this number of steps, or its noise does not come from the images' generators.
    """
    name = _short(type(pipe.scheduler))
    try:
        with torch.random.fork_rng(devices=[]):
            pair, again = (_steps(pipe.scheduler, steps, seeds=(0, 1)) for _ in range(2))
            alone = _steps(pipe.scheduler, steps, seeds=(1,))
    except Exception as error:  # each scheduler fails in its own way
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise DiffuMaskError(
            f"The scheduler {name} cannot draw in {steps} steps ({cause}): use more steps or another scheduler."
        ) from error
    if not (torch.equal(pair, again) and torch.allclose(pair[1:], alone, rtol=1e-4, atol=1e-4)):
        raise DiffuMaskError(
            f"The scheduler {name} draws noise that does not come from an image's seed, so no image could be drawn "
            "again: use another scheduler."
        )


def _steps(scheduler: Any, steps: int, seeds: tuple[int, ...]) -> Tensor:
    """Denoise the noise of each seed as a pipeline's loop does; half of the latents stands for the UNet's output."""
    scheduler = type(scheduler).from_config(scheduler.config)
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **shift)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    kwargs = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = torch.cat([torch.randn(1, 4, 2, 2, generator=generator) for generator in generators])
    latents = latents * getattr(scheduler, "init_noise_sigma", 1)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        predicted = 0.5 * scaled
        latents = scheduler.step(predicted, timestep, latents, **kwargs).prev_sample
    return latents


def _is_usable(scheduler: Any) -> bool:
    """Tell whether a scheduler's libraries are installed and it takes a schedule of betas, unlike those of EDM."""
    return not _missing_libraries(scheduler) and "beta_schedule" in inspect.signature(scheduler.__init__).parameters


def _missing_libraries(scheduler: type | None) -> list[str]:
    """List the libraries that a scheduler needs and that are not installed; diffusers then has a dummy class."""
    return [name for name in getattr(scheduler, "_backends", []) if find_spec(name) is None]


def _short(scheduler: type) -> str:
    """Return "ddim" for DDIMScheduler, "euler" for EulerDiscreteScheduler, "dpmsolver" for the multistep solver."""
    return re.sub("(Discrete|Multistep)?Scheduler$", "", scheduler.__name__).lower()
