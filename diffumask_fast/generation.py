"""What `diffumask-fast generate` does: plan, draw shard by shard, write, show."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffumask_fast import __version__
from diffumask_fast.attention.choice import attention_of
from diffumask_fast.attention.phrases import PhraseNotFound, phrase_columns
from diffumask_fast.dataset.background import Background
from diffumask_fast.dataset.preview import write_preview
from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.loading import check_size, set_scheduler
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.planner import Plan, plan
from diffumask_fast.prompts.vocabulary import Vocabulary

logger = logging.getLogger("diffumask_fast")
PREVIEW = 24
FEWEST = 8  # images that one can judge a run by


@dataclass(frozen=True)
class GenerateOptions:
    """The flags of `generate`; see `diffumask-fast generate --help`."""

    out: Path
    model: str = "mini"
    revision: str | None = None
    classes: str | None = None
    classes_per_image: int = 1
    num: int = 24
    seed: int = 0
    batch_size: str = "auto"
    shard_size: int = 64
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    size: str | None = None
    dtype: str = "auto"
    mask: MaskOptions = MaskOptions()
    engine: str = "torch"
    engine_path: Path | None = None
    attention: str = "sdpa"
    device: str = "auto"
    allow_drift: bool = False


def run_generate(options: GenerateOptions, progress: Callable[[int], Any]) -> dict[str, Any]:
    """Draw a dataset, or finish one that was begun with the same options.

    Args:
        options: the flags.
        progress: gets the number of images and gives a rich Progress.

    Returns:
        images, accepted, drawn (in this call), images_per_s, seconds by stage ("write": for how long
        encoding and writing held up the drawing), dropped_captions, folder.

    Raises:
        DiffuMaskError: anything that keeps the run from starting or from going on, in one sentence.
    """
    _check_numbers(options)
    for library in (diffusers_logging, transformers_logging):  # their advice is for programmers
        library.set_verbosity_error()
    pipe = DiffuMaskPipeline.from_pretrained(
        options.model, engine=options.engine, engine_path=options.engine_path, dtype=options.dtype,
        device=options.device, revision=options.revision, attention=options.attention,
    )  # fmt: skip
    if options.scheduler:
        set_scheduler(pipe.pipe, options.scheduler)
    size = parse_size(options.size, pipe)
    vocabulary = read_vocabulary(options, pipe)
    requests = make_plan(options, pipe, vocabulary)
    resolved, batch_size = _resolve(options, pipe, size, vocabulary)
    model = {"id": pipe.info.identity, "weights": pipe.weights}
    with open_run(
        options.out, requests.requests, resolved, environment(pipe), options.shard_size, options.allow_drift,
        model=model, vocabulary=vocabulary,
    ) as run:  # fmt: skip
        start = time.perf_counter()
        drawn, writing = _draw_missing(run, pipe, options, resolved, batch_size, size, progress)
        seconds = time.perf_counter() - start
        accepted = sum(run.accepted_flags())
        write_preview(options.out, PREVIEW)
    return {
        "folder": str(options.out), "images": len(requests), "accepted": accepted, "drawn": drawn,
        "dropped_captions": requests.dropped, "images_per_s": drawn / seconds if drawn else 0.0,
        "seconds": {**pipe.seconds.as_dict(), "write": writing, "all": seconds},
    }  # fmt: skip


def _draw_missing(run, pipe, options, resolved, batch_size, size, progress) -> tuple[int, float]:
    """Draw and write the missing shards; return the number of images, and for how long writing held up the drawing."""
    missing, total, drawn = run.missing_shards(), len(run.requests), 0
    todo = [request for _, part in missing for request in part]
    stream = pipe.stream(
        todo, batch_size, options.mask, num_phrases=options.classes_per_image, group_size=run.shard_size,
        num_inference_steps=resolved["steps"], guidance_scale=resolved["guidance_scale"],
        height=size[0], width=size[1],
    )  # fmt: skip
    with progress(total) as bar, Background(run, 2 * batch_size) as background, closing(stream) as results:
        task = bar.add_task("drawing", total=total, completed=total - len(todo))
        for index, part in missing:
            first = []
            for result in islice(results, len(part)):
                background.add(result)
                bar.advance(task)
                drawn += 1
                if index == 0 and len(first) < (enough := min(max(batch_size, FEWEST), len(part))):
                    first.append(result)
                    if len(first) == enough:
                        _check_first_batch(first)
            background.end_shard(index)
    return drawn, background.waited


def _check_numbers(options: GenerateOptions) -> None:
    for name in ("num", "classes_per_image", "shard_size"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise DiffuMaskError(f"--{flag} {getattr(options, name)} leaves nothing to draw: give a number from 1 on.")
    if options.steps is not None and options.steps < 1:
        raise DiffuMaskError(f"--steps {options.steps} draws nothing: give a number from 1 on.")
    if options.guidance_scale is not None and not math.isfinite(options.guidance_scale):
        raise DiffuMaskError(
            f"--guidance-scale {options.guidance_scale} is no number to draw with: give one such as 7.5."
        )
    if not 0 <= options.seed < 2**63:
        raise DiffuMaskError(f"--seed {options.seed} is out of range: give a whole number from 0 to 2^63 - 1.")


def parse_size(size: str | None, pipe: DiffuMaskPipeline) -> tuple[int | None, int | None]:
    """Return height and width of "HxW", (None, None) for the model's own.

    Raises:
        DiffuMaskError: it is written otherwise, or is no multiple of the VAE's factor.
    """
    if size is None:
        return None, None
    height, width = split_size(size, "--size")
    check_size(pipe.pipe, height, width)
    return height, width


def split_size(size: str, flag: str) -> tuple[int, int]:
    """Return height and width of "HxW".

    Raises:
        DiffuMaskError: it is written otherwise; names the flag.
    """
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise DiffuMaskError(f"{flag} {size} is not HxW: write height and width in pixels, such as 512x512.")
    return int(parts[0]), int(parts[1])


def read_vocabulary(options: GenerateOptions, pipe: DiffuMaskPipeline) -> Vocabulary:
    """Return the classes to draw: those asked for, checked against what the model lists."""
    known = Vocabulary.named(pipe.info.classes) if pipe.info.classes else None
    return Vocabulary.parse(options.classes, known, options.model)


def make_plan(options: GenerateOptions, pipe: DiffuMaskPipeline, vocabulary: Vocabulary) -> Plan:
    """Plan the run's requests from its flags and what the model knows."""
    tokenizer = pipe.pipe.tokenizer

    def fits(prompt: str, phrases: tuple[str, ...]) -> bool:
        try:
            phrase_columns(tokenizer, [prompt], [list(phrases)], length=tokenizer.model_max_length)
        except PhraseNotFound:
            return False
        return True

    return plan(vocabulary, options.num, options.seed, options.classes_per_image, scenes=pipe.info.scenes, fits=fits)


def _resolve(
    options: GenerateOptions, pipe: DiffuMaskPipeline, size: tuple[int | None, int | None], vocabulary: Vocabulary
) -> tuple[dict[str, Any], int]:
    """Return all options that decide what a shard holds, resolved, and the batch size."""
    batch_size = pipe.batch_size(options.batch_size, *size)
    mask = pipe.mask_options(options.mask)
    engine = {"engine": options.engine}
    if pipe.engine is not None:
        engine["engine_sha256"] = pipe.engine.sha256
        pipe.engine.limits.check(batch_size, *pipe.size(*size), options.classes_per_image, mask.propagate)
    guidance = pipe.info.guidance_scale if options.guidance_scale is None else options.guidance_scale
    resolved = {
        "revision": options.revision, "classes": ",".join(vocabulary.names),
        "classes_per_image": options.classes_per_image, "num": options.num, "seed": options.seed,
        "batch_size": batch_size, "steps": options.steps or pipe.info.num_inference_steps, "guidance_scale": guidance,
        "scheduler": type(pipe.pipe.scheduler).__name__, "size": "x".join(map(str, pipe.size(*size))),
        "dtype": str(pipe.pipe.unet.dtype).removeprefix("torch."), **engine,
        "attention": options.attention, **vars(mask),
    }  # fmt: skip
    return resolved, batch_size


def environment(pipe: DiffuMaskPipeline) -> dict[str, Any]:
    """Return what else the bytes of a run depend on: device, threads, versions."""
    device = pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    libraries = ["torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow"]
    versions = {library: metadata.version(library) for library in libraries}
    if pipe.engine is not None:
        versions |= pipe.engine.libraries
    elif attention_of(pipe.pipe.unet) == "xformers":
        versions["xformers"] = metadata.version("xformers")
    return {
        "device": name, "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
        "diffumask_fast": __version__, **versions,
    }  # fmt: skip


def _check_first_batch(results: list[Any]) -> None:
    """Stop a run whose first batch is over 90 % rejected: its settings are wrong, not its luck."""
    reasons = [result.reason for result in results if not result.accepted]
    if len(results) >= 4 and len(reasons) > 0.9 * len(results):
        common = max(set(reasons), key=reasons.count)
        raise DiffuMaskError(
            f"{len(reasons)} of the first {len(results)} images were rejected ({common}), so nothing was written; "
            "check model, dtype, steps and guidance scale."
        )
