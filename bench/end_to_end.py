"""What maps, propagation and masks cost, against the plain diffusers pipeline that draws the same images."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.bench.harness import compare, environment, row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.loading import resolve_device
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import Vocabulary

logger = logging.getLogger("diffumask_fast")

SUITE = "end_to_end"
MODELS = {"mini": "mini"}
ROWS = ("maps_overhead", "propagation_overhead", "masks_overhead")


def run(
    geometry: str = "mini",
    device: str = "auto",
    *,
    model: str | Path | None = None,
    names: Sequence[str] = ROWS,
    batch: int = 8,
    steps: int = 3,
    mask_steps: int | None = None,
    pairs: int | None = None,
) -> list[dict]:
    """Measure the three overheads.

    `maps_overhead` and `propagation_overhead` compare the denoising alone: the costs shared with the plain pipeline
    after it (VAE, PIL) would make them look smaller. `masks_overhead` compares finished images with finished images and
    masks, at the steps that the model ships with, for a mask costs the same whatever the steps.

    Args:
        geometry: which model; "mini" is the embedded one.
        device: "auto", "cpu" or "cuda".
        model: another model folder of the same geometry.
        names: which rows.
        batch: images per call.
        steps: denoising steps of the first two rows.
        mask_steps: denoising steps of the third; None is the model's default.
        pairs: rounds of the comparison; None is the harness' number for the device.

    Returns:
        One row per name.

    Raises:
        DiffuMaskError: an unknown geometry or row.
    """
    if geometry not in MODELS:
        raise DiffuMaskError(f"There is no geometry {geometry}: use {', '.join(MODELS)}.")
    if unknown := [name for name in names if name not in ROWS]:
        raise DiffuMaskError(f"There is no row {unknown[0]} in {SUITE}: use {', '.join(ROWS)}.")
    where = resolve_device(device)
    pipe = DiffuMaskPipeline.from_pretrained(model or MODELS[geometry], device=where)
    pipe.pipe.set_progress_bar_config(disable=True)
    job = _Job(pipe, batch, steps, mask_steps or pipe.info.num_inference_steps)
    rows = []
    for name in names:
        candidate, baseline, config = getattr(job, name)()
        ratio = compare(candidate, baseline, pairs=pairs, device=str(where))
        config = {"geometry": geometry, "batch": batch, **config, **environment(str(where))}
        rows.append(row(SUITE, name, ratio, config=config))
        logger.info("%s %s", name, ratio)
    return rows


class _Job:
    """The same prompts and noise for the plain pipeline and for ours; one method per row."""

    def __init__(self, pipe: DiffuMaskPipeline, batch: int, steps: int, mask_steps: int) -> None:
        self.pipe = pipe
        self.steps = steps
        self.mask_steps = mask_steps
        self.options = pipe.mask_options(None)
        vocabulary = Vocabulary.named(pipe.info.classes) if pipe.info.classes else Vocabulary.voc()
        requests = plan(vocabulary, batch, scenes=pipe.info.scenes or None)
        self.prompts = [request.prompt for request in requests]
        self.phrases = [list(request.phrases) for request in requests]
        by_id = dict(zip(vocabulary.ids, vocabulary.names, strict=True))
        self.classes = [[by_id[id] for id in request.class_ids] for request in requests]
        self.seeds = [request.seed for request in requests]
        unet = pipe.pipe.unet
        shape = (batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.latents = noise.to(unet.device, unet.dtype)

    def maps_overhead(self) -> tuple[Any, Any, dict]:
        return self._denoising("none")

    def propagation_overhead(self) -> tuple[Any, Any, dict]:
        return self._denoising(self.options.propagate)

    def masks_overhead(self) -> tuple[Any, Any, dict]:
        settings = {"num_inference_steps": self.mask_steps, "guidance_scale": self.pipe.info.guidance_scale}

        def plain() -> None:
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            self.pipe.pipe(self.prompts, generator=generators, **settings)

        def masked() -> None:
            self.pipe(self.prompts, classes=self.classes, seeds=self.seeds, **settings)

        return masked, plain, {**settings, "output": "pil", "mask": dict(vars(self.options))}

    def _denoising(self, propagate: str | int) -> tuple[Any, Any, dict]:
        settings = {"num_inference_steps": self.steps, "guidance_scale": self.pipe.info.guidance_scale}

        def plain() -> None:
            self.pipe.pipe(self.prompts, latents=self.latents, output_type="latent", **settings)

        def mapped() -> None:
            with collect_maps(self.pipe.pipe, self.phrases, propagate=propagate) as maps:
                plain()
            assert maps.levels

        return mapped, plain, {**settings, "output": "latent", "propagate": propagate}
