"""Images for a calibration, each with its maps by every option of maps: drawn once, tried many times."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.attention.options import MapOptions, Propagate
from diffumask_fast.attention.store import MapStore
from diffumask_fast.dataset.writer import make_folder, write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.job import Job
from diffumask_fast.masks.make import quantise_maps
from diffumask_fast.models.decoding import decode, decodes_later, finished, timed_decoding
from diffumask_fast.models.generators import generators_of
from diffumask_fast.models.loading import without_bars
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.request import Request

MOST_TIMES = 4  # that maps are propagated


@dataclass(frozen=True)
class CalibrationSample:
    """An image and its maps.

    Args:
        key: of the sample.
        classes: names.
        class_ids: the values in its masks, 1 to 254.
        image: [H, W, 3] uint8.
        maps: by the options that made them, [K, h, w] uint8 as `quantise_maps` leaves them.
    """

    key: str
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    image: np.ndarray
    maps: Mapping[MapOptions, np.ndarray]


class Drawings:
    """Files of batches that were drawn, so that a killed calibration goes on.

    Args:
        folder: made if needed; None keeps nothing.
        facts: what the images depend on, values that JSON can hold.

    Raises:
        DiffuMaskError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self._folder = folder
        self._digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if folder is not None:
            make_folder(folder)

    def load(self, index: int) -> dict[str, np.ndarray] | None:
        """Return the arrays of a batch; None where it is to be drawn.

        Raises:
            DiffuMaskError: the folder holds images of another calibration.
        """
        if self._folder is None or not (path := self._path(index)).exists():
            return None
        try:
            with safe_open(path, "np") as file:
                same = (file.metadata() or {}).get("of") == self._digest
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        if not same:
            raise DiffuMaskError(f"{self._folder} holds images of another calibration: name another folder by `work`")
        return arrays

    def save(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep the arrays of a batch.

        Raises:
            DiffuMaskError: they cannot be written.
        """
        if self._folder is not None:
            write_file(self._path(index), safetensors.numpy.save(arrays, {"of": self._digest}))

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"batch-{index:05d}.safetensors"


def draw_samples(
    pipe: DiffuMaskPipeline,
    job: Job,
    requests: Sequence[Request],
    work: Path | None = None,
    on_drawn: Callable[[int], Any] = lambda count: None,
) -> list[CalibrationSample]:
    """Draw images as a job draws them, and keep their maps by every option.

    Args:
        pipe: what the job's `open` gives.
        job: the run; its own options of maps are among those that are kept.
        requests: what to draw.
        work: folder that keeps what is drawn.
        on_drawn: gets the number of images of each batch.

    Raises:
        DiffuMaskError: as for a call of the pipeline; or the folder cannot be written, or is another calibration's.
    """
    own: Propagate = job.maps.propagate
    times = max(min(MOST_TIMES, math.ceil(job.steps / 3)), own if isinstance(own, int) else 0)
    options = {name: value for name, value in job.options.items() if name not in (*vars(job.maps), *vars(job.mask))}
    facts = {"options": options, "weights": job.weights, "times": times, "requests": list(map(asdict, requests))}
    drawings = Drawings(work, facts)
    samples: list[CalibrationSample] = []
    for index, start in enumerate(range(0, len(requests), job.batch_size)):
        batch = requests[start : start + job.batch_size]
        arrays = drawings.load(index)
        if arrays is None or _name(job.maps) not in arrays:
            arrays = _draw(pipe, job, batch, times)
            drawings.save(index, arrays)
        samples += _samples_of(batch, arrays)
        on_drawn(len(batch))
    return samples


def variants(levels: Sequence[str], times: int, own: MapOptions) -> list[MapOptions]:
    """Return the options of maps to try: each rule, each run of neighbouring levels, each number of propagations.

    Args:
        levels: of the UNet, the finest first.
        times: that maps were propagated at most.
        own: options that are among them in any case.
    """
    runs = [",".join(levels[first : last + 1]) for first in range(len(levels)) for last in range(first, len(levels))]
    rules = dict.fromkeys(["paper", "reference", "finest", *runs, own.aggregation])
    spread: list[Propagate] = ["none", *range(1, times + 1)]
    return [MapOptions(rule, number) for rule in rules for number in spread]


@torch.no_grad()
def _draw(pipe: DiffuMaskPipeline, job: Job, batch: Sequence[Request], times: int) -> dict[str, np.ndarray]:
    """Return the images, and the maps under the names of their options."""
    later = decodes_later(pipe.pipe)
    negative = {"negative_prompt": [r.negative_prompt for r in batch]} if job.recipe.negative_prompt else {}
    phrases = [request.phrases for request in batch]
    with without_bars(pipe.pipe), collect_maps(pipe.pipe, phrases, propagate=times) as maps, ExitStack() as borrowed:
        if not later:
            borrowed.enter_context(timed_decoding(pipe.pipe, pipe.seconds))
        output = pipe.pipe(
            prompt=[r.prompt for r in batch], generator=generators_of([r.seed for r in batch], None, len(batch)),
            num_inference_steps=job.steps, guidance_scale=job.guidance_scale, height=job.height, width=job.width,
            output_type="latent" if later else "pt", return_dict=False, **negative,
        )[0]  # fmt: skip
    pixels = finished(output, pipe.pipe)
    if later:
        pixels = decode(pipe.pipe, pixels, pipe.seconds)
    images = (pixels.nan_to_num(0).permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
    return {"image": images.cpu().contiguous().numpy(), **_every_map(maps.store, times, job.maps)}


def _every_map(store: MapStore, times: int, own: MapOptions) -> dict[str, np.ndarray]:
    options = variants(sorted(store.levels, key=int), times, own)
    return {_name(one): quantise_maps(store.class_maps(one)).cpu().contiguous().numpy() for one in options}


def _samples_of(batch: Sequence[Request], arrays: Mapping[str, np.ndarray]) -> Iterator[CalibrationSample]:
    maps = {_options(name): array for name, array in arrays.items() if name != "image"}
    for row, request in enumerate(batch):
        own = {options: array[row, : len(request.class_ids)] for options, array in maps.items()}
        yield CalibrationSample(request.key, request.classes, request.class_ids, arrays["image"][row], own)


def _name(options: MapOptions) -> str:
    return f"{options.aggregation} {options.propagate}"


def _options(name: str) -> MapOptions:
    rule, times = name.split(" ")
    return MapOptions(rule, "none" if times == "none" else int(times))
