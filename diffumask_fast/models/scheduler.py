"""Replace the scheduler of a pipeline by name, and try it before anything is drawn."""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError, in_one_line
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline

TRAILING = "-trailing"
FEW_STEPS = ("LCMScheduler", "TCDScheduler")  # of such models; diffusers says of none that they are compatible


def set_scheduler(pipe: DiffusersPipeline, name: str) -> None:
    """Replace a pipeline's scheduler by the named one, with the same noise schedule.

    Args:
        pipe: whose scheduler is replaced.
        name: "DDIMScheduler" or "ddim"; with "-trailing" behind it, its timesteps begin with the noisiest one, as
            models for few steps want it.

    Raises:
        DiffuMaskError: there is no such scheduler for this model here; lists the available ones.
    """
    base = name.removesuffix(TRAILING)
    compatible = {_short(cls): cls for cls in _compatible(pipe.scheduler)}
    wanted = next((cls for cls in compatible.values() if cls.__name__ == base), compatible.get(base.lower()))
    if wanted is None or not _is_usable(wanted):
        usable = ", ".join(sorted(short for short, cls in compatible.items() if _is_usable(cls)))
        if not usable:
            own = type(pipe.scheduler).__name__
            raise DiffuMaskError(f"There is no scheduler {name} for this model, which has {own}: leave it out.")
        without = f" without {', '.join(missing)}" if (missing := _missing_libraries(wanted)) else ""
        raise DiffuMaskError(f"There is no scheduler {name} for this model{without}: use one of {usable}.")
    config, taken = dict(pipe.scheduler.config), inspect.signature(wanted.__init__).parameters
    changes: dict[str, Any] = {}  # given apart, for diffusers drops what the old scheduler had by default
    if "clip_sample" in taken:  # latents are not pixels: DDIM's default would clip them to -1..1
        changes["clip_sample"] = config.get("clip_sample", False)
    if base != name:
        if "timestep_spacing" not in taken or wanted.__name__ in FEW_STEPS:  # which take theirs from their training's
            raise DiffuMaskError(f"The scheduler {base} spaces its timesteps in one way: leave out {TRAILING}.")
        changes["timestep_spacing"] = "trailing"
    pipe.scheduler = wanted.from_config(config, **changes)


def scheduler_name(pipe: DiffusersPipeline, asked: str | None) -> str:
    """Return the name by which `set_scheduler` makes a pipeline's scheduler again.

    Args:
        pipe: that has it.
        asked: the name by which it was made; None where it is the model's own.
    """
    spacing = TRAILING if asked is not None and asked.endswith(TRAILING) else ""
    return type(pipe.scheduler).__name__ + spacing


def try_scheduler(pipe: DiffusersPipeline, steps: int) -> int:
    """Try a pipeline's scheduler on small latents, before anything is drawn.

    Returns:
        How often it calls the denoiser for an image.

    Raises:
        DiffuMaskError: it fails with this number of steps, or its noise does not come from the images' generators.
    """
    name = _short(type(pipe.scheduler))
    try:
        with torch.random.fork_rng(devices=[]):
            (pair, calls), (again, _) = (_steps(pipe.scheduler, steps, seeds=(0, 1)) for _ in range(2))
            alone, _ = _steps(pipe.scheduler, steps, seeds=(1,))
    except Exception as error:  # each scheduler fails in its own way
        cause = in_one_line(error)
        raise DiffuMaskError(
            f"The scheduler {name} cannot draw in {steps} steps ({cause}): use other steps or another scheduler."
        ) from error
    if not (torch.equal(pair, again) and torch.allclose(pair[1:], alone, rtol=1e-4, atol=1e-4)):
        raise DiffuMaskError(
            f"The scheduler {name} draws noise that does not come from an image's seed, so no image could be drawn "
            "again: use another scheduler."
        )
    return calls


def _steps(scheduler: Any, steps: int, seeds: tuple[int, ...]) -> tuple[Tensor, int]:
    """Denoise the noise of each seed as a pipeline's loop does, and count the calls of the denoiser.

    Half of the latents stands for its output.
    """
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
    return latents, len(scheduler.timesteps)


def _compatible(own: Any) -> list[Any]:
    """List the schedulers that take the noise schedule of a model's own; those of few-step models list none."""
    if not _is_usable(type(own)):
        return list(own.compatibles)
    ddim: Any = diffusers.DDIMScheduler()
    return [*own.compatibles, *ddim.compatibles, *(getattr(diffusers, name) for name in FEW_STEPS)]


def _is_usable(scheduler: Any) -> bool:
    """Tell whether a scheduler's libraries are installed and it takes a schedule of betas, unlike those of EDM."""
    return not _missing_libraries(scheduler) and "beta_schedule" in inspect.signature(scheduler.__init__).parameters


def _missing_libraries(scheduler: type | None) -> list[str]:
    """List the libraries that a scheduler needs and that are not installed; diffusers then has a dummy class."""
    return [name for name in getattr(scheduler, "_backends", []) if find_spec(name) is None]


def _short(scheduler: type) -> str:
    """Return "ddim" for DDIMScheduler, "euler" for EulerDiscreteScheduler, "dpmsolver" for the multistep solver."""
    return re.sub("(Discrete|Multistep)?Scheduler$", "", scheduler.__name__).lower()
