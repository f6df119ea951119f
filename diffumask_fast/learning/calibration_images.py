"""Where the images of a calibration come from: drawn for it, drawn again, or as a run stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.dataset.lookup import RowLookup
from diffumask_fast.dataset.reader import Row, read_manifest
from diffumask_fast.dataset.schema import MANIFEST
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.captions import with_captions
from diffumask_fast.generation.job import Job, make_job, open_pipe
from diffumask_fast.generation.options import GenerateOptions, RebuildOptions
from diffumask_fast.generation.rebuild import job_of
from diffumask_fast.learning.calibration_judges import DataJudge, SegmenterJudge
from diffumask_fast.learning.calibration_samples import CalibrationSample, draw_samples
from diffumask_fast.learning.calibration_trials import Choice
from diffumask_fast.learning.options import CalibrateOptions
from diffumask_fast.models.find import ModelInfo
from diffumask_fast.prompts.request import Request

MOST_APART = 8.0  # levels of 255, on average, between an image and the same one drawn elsewhere
SHARED = (
    "model", "revision", "classes", "classes_per_image", "prompts", "num", "seed", "batch_size", "steps",
    "guidance_scale", "scheduler", "size", "dtype", "device",
)  # fmt: skip
RECORDED = ("seed", "steps", "guidance_scale", "scheduler", "size", "dtype", "lora", "lora_sha256")
OnDrawn = Callable[[int, int], Any]  # gets the number of images of a batch, and of all


@dataclass(frozen=True)
class CalibrationImages:
    """What options are tried on.

    Args:
        samples: images and maps.
        own: the options that the model has.
        facts: how they were drawn, as JSON types.
        fixed: a sentence on what is not varied; "" where all is.
    """

    samples: list[CalibrationSample]
    own: Choice
    facts: dict[str, Any]
    fixed: str = ""


def new_images(options: CalibrateOptions, judge: SegmenterJudge, on_drawn: OnDrawn) -> CalibrationImages:
    """Draw images for the calibration.

    Raises:
        DiffuMaskError: as `generate`; or the judge does not know a class.
    """
    asked = {name: getattr(options, name) for name in SHARED}
    wanted = GenerateOptions(out=place("."), **asked)
    pipe = open_pipe(wanted, options.device)
    job = make_job(wanted, pipe)
    judge.check(job.recipe.vocabulary.names)
    job = with_captions(job, wanted.prompts, pipe)
    requests = list(job.plan(pipe))
    samples = draw_samples(pipe, job, requests, options.work, lambda count: on_drawn(count, len(requests)))
    return CalibrationImages(samples, Choice(job.maps, job.mask), _facts(job))


def run_images(options: CalibrateOptions, judge: DataJudge, info: ModelInfo, on_drawn: OnDrawn) -> CalibrationImages:
    """Take the images of a run of which the judge has right masks, with maps that are drawn again, or as stored.

    Raises:
        DiffuMaskError: the run lacks one of them, another model drew it, or it stores no maps where they are asked for.
    """
    run = options.run if options.run is not None else place(options.judge)
    if not (run / MANIFEST).exists():
        raise DiffuMaskError(f"{options.judge} does not say how its images were drawn: name their dataset by `run`")
    rows = RowLookup(run, accepted_only=False, max_pixels=options.reading.max_pixels)
    judge.check([entry["name"] for entry in rows.manifest["classes"]])
    numbers = {entry.key: number for number, entry in enumerate(rows.entries)}
    if missing := [key for key in judge.keys if key not in numbers]:
        raise DiffuMaskError(f"{run} has no image {missing[0]}, of which {options.judge} has a mask: take it out there")
    wanted = [rows[numbers[key]] for key in judge.keys]
    if not options.redraw:
        return _stored(run, wanted, info)
    return _redrawn(run, {numbers[row.key]: row for row in wanted}, options, on_drawn)


def _stored(run: Place, rows: list[Row], info: ModelInfo) -> CalibrationImages:
    manifest = read_manifest(run)
    recorded, model = manifest["options"], {"id": None, "weights": None, **manifest["model"]}
    if "aggregation" not in recorded or any(row.maps is None for row in rows):
        raise DiffuMaskError(f"{run} stores no maps to make masks of: name what generate wrote by `run`")
    if model["weights"] not in (None, info.weights):
        raise DiffuMaskError(
            f"{run} was drawn by {model['id']}, and the weights of {info.name} are others: name the model that drew it"
        )
    maps = MapOptions(recorded["aggregation"], recorded["propagate"])
    samples = [
        CalibrationSample(row.key, tuple(row.classes), tuple(row.class_ids), row.image, {maps: row.maps})
        for row in rows
        if row.maps is not None
    ]
    fixed = (
        f"`aggregation` and `propagate` stay {maps.aggregation} and {maps.propagate}, as the stored maps were made: "
        "let the images be drawn again to try others."
    )
    facts = {name: recorded[name] for name in RECORDED if name in recorded}
    facts = {"model": model["id"], "weights": model["weights"], **facts}
    return CalibrationImages(samples, Choice(maps, info.mask_options(None, facts.get("steps"))), facts, fixed)


def _redrawn(run: Place, rows: Mapping[int, Row], options: CalibrateOptions, on_drawn: OnDrawn) -> CalibrationImages:
    manifest = read_manifest(run)
    if "lora" in manifest["options"]:
        raise DiffuMaskError(f"{run} was drawn with a LoRA: calibrate by its stored maps (no `redraw`)")
    job = job_of(run, manifest, RebuildOptions(model=_model(options.model)))
    job = replace(job, engine="torch", engine_path=None, engine_sha256=None)
    pipe = job.open(options.device)
    own = Choice(pipe.map_options(None, job.steps), pipe.info.mask_options(None, job.steps))
    job = replace(job, maps=own.maps, recipe=replace(job.recipe, scenes=pipe.info.scenes))
    plan = job.plan(pipe)
    requests = [_same(plan[number], row, run) for number, row in rows.items()]
    drawn = draw_samples(pipe, job, requests, options.work, lambda count: on_drawn(count, len(requests)))
    samples = [replace(sample, image=row.image) for sample, row in zip(drawn, rows.values(), strict=True)]
    for sample, stored in zip(drawn, samples, strict=True):
        apart = np.abs(sample.image.astype(np.int16) - stored.image).mean()
        if apart > MOST_APART:
            raise DiffuMaskError(
                f"{sample.key}, drawn again, is not the image that {run} stores ({apart:.0f} levels of 255 apart): "
                "calibrate by its stored maps (no `redraw`), or on the machine that drew it"
            )
    return CalibrationImages(samples, own, _facts(job))


def _model(model: str) -> str:
    """Return the model as a job names it."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if model != "mini" and folder.is_dir() else model


def _same(request: Request, row: Row, run: Place) -> Request:
    if (request.key, request.prompt, request.seed) != (row.key, row.prompt, row.seed):
        raise DiffuMaskError(
            f"{run} holds other samples than are planned now, such as {row.key}: calibrate by its stored maps (no "
            "`redraw`)"
        )
    return request


def _facts(job: Job) -> dict[str, Any]:
    facts = {name: job.options[name] for name in RECORDED if name in job.options}
    return {"model": job.identity, "weights": job.weights, **facts}
