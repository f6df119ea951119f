"""Replace the scheduler of a pipeline by name."""

from __future__ import annotations

import inspect
import re

from diffusers import DiffusionPipeline

from diffumask_fast.errors import DiffuMaskError


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Replace the pipeline's scheduler by the named one ("DDIMScheduler", or in short "ddim"), same noise schedule.

    Raises:
        DiffuMaskError: diffusers knows no such scheduler for this model; lists those there are.
    """
    compatible = {_short(cls): cls for cls in pipe.scheduler.compatibles}
    wanted = next((cls for cls in compatible.values() if cls.__name__ == name), compatible.get(name.lower()))
    if wanted is None:
        raise DiffuMaskError(
            f"There is no scheduler {name} for this model: use one of {', '.join(sorted(compatible))}."
        )
    config = dict(pipe.scheduler.config)
    if "clip_sample" in inspect.signature(wanted.__init__).parameters:
        config.setdefault("clip_sample", False)  # latents are not pixels: DDIM's default would clip them to -1..1
    pipe.scheduler = wanted.from_config(config)


def _short(scheduler: type) -> str:
    """Return "ddim" for DDIMScheduler, "euler" for EulerDiscreteScheduler, "dpmsolver" for the multistep solver."""
    return re.sub("(Discrete|Multistep)?Scheduler$", "", scheduler.__name__).lower()
