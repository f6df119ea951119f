"""The quality of masks by threshold, refinement and propagation, judged by the oracle; or on photographs."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.evaluation import predict
from diffumask_fast.learning.metrics import binary_iou, boundary
from diffumask_fast.masks.make import make_masks, quantise_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.mini.oracle import load_oracle
from diffumask_fast.models.device import resolve_device
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import Vocabulary

SUITE = "quality"
BATCH = 8
PROPAGATE: tuple[Any, ...] = ("none", 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    "otsu-colour": {},
    "otsu-guided": {"colour_steps": 0},
    "otsu-crf": {"refine": "crf"},
    "otsu-none": {"refine": "none"},
    **{f"{cut}-colour": {"threshold": cut} for cut in (0.4, 0.45, 0.5, 0.55, 0.6)},
    "adaptive-colour": {"threshold": "adaptive"},
}
SLOW = ("otsu-crf", "adaptive-colour")  # measured at one propagation alone


def run(
    geometry: str = "mini",
    device: str | torch.device = "auto",
    *,
    photos: Path | None = None,
    num: int = 500,
    seed: int = 901,
    settings: Sequence[str] = tuple(SETTINGS),
) -> Iterator[dict]:
    """Measure masks of images that mini draws, or of photographs: see `photographs.run`.

    Args:
        geometry: "mini", the only model that has an oracle.
        device: "auto", "cpu" or "cuda".
        photos: folder of photographs with masks; nothing is drawn then.
        num: images of one class, drawn once for all rows.
        seed: of their plan.
        settings: names in SETTINGS.

    Returns:
        One row per propagation and setting: value the mean foreground IoU, config.boundary_iou, config.cpu_ms for an
        image, and the rank correlation of quality and IoU.

    Raises:
        DiffuMaskError: an unknown geometry or setting, or no photographs.
    """
    if photos is not None:
        from diffumask_fast.bench.photographs import run as run_photographs

        return run_photographs(photos)
    if geometry != "mini":
        raise DiffuMaskError(f"There is no judge of {geometry}: use mini.")
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise DiffuMaskError(f"There is no setting {unknown[0]} in {SUITE}: use {', '.join(SETTINGS)}.")
    return _rows(geometry, resolve_device(device), num, seed, settings)


def _rows(geometry: str, device: torch.device, num: int, seed: int, settings: Sequence[str]) -> Iterator[dict]:
    images, maps, ids = _draw(DiffuMaskPipeline.from_pretrained(geometry, device=device), num, seed)
    truth = predict(load_oracle(), list(images.numpy()))
    facts = {"num": num, "seed": seed, **environment(device)}
    for propagate, stored in maps.items():
        for name in settings:
            if name in SLOW and propagate != 1:
                continue
            figures = _judge(stored, images, ids, truth, MaskOptions(**SETTINGS[name]), device)
            value = figures.pop("foreground_iou")
            yield row(SUITE, f"{propagate}-{name}", value, unit="IoU", n=num, config={**figures, **facts})


def _draw(pipe: DiffuMaskPipeline, num: int, seed: int) -> tuple[Tensor, dict[Any, Tensor], Tensor]:
    """Draw once; return images [N, H, W, 3], maps of each propagation [N, 1, h, w], class ids [N, 1]."""
    requests = plan(Vocabulary.named(pipe.info.classes), num, seed, 1, scenes=pipe.info.scenes)
    pipe.pipe.set_progress_bar_config(disable=True)
    aggregation = pipe.map_options().aggregation
    images: list[Tensor] = []
    maps: dict[Any, list[Tensor]] = {times: [] for times in PROPAGATE}
    for start in range(0, num, BATCH):
        batch = requests[start : start + BATCH]
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch]
        phrases = [list(request.phrases) for request in batch]
        with torch.no_grad(), collect_maps(pipe.pipe, phrases, propagate=max(PROPAGATE[1:])) as store:
            pixels = pipe.pipe(
                [request.prompt for request in batch], generator=generators, output_type="pt", return_dict=False,
                num_inference_steps=pipe.info.num_inference_steps, guidance_scale=pipe.info.guidance_scale,
            )[0]  # fmt: skip
        images.append((pixels.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu())
        for times in PROPAGATE:
            options = MapOptions(aggregation=aggregation, propagate=times)
            maps[times].append(quantise_maps(store.class_maps(options)).cpu())
    ids = torch.tensor([request.class_ids for request in requests])
    return torch.cat(images), {times: torch.cat(parts) for times, parts in maps.items()}, ids


def _judge(
    maps: Tensor, images: Tensor, ids: Tensor, truth: list[np.ndarray], options: MaskOptions, device: torch.device
) -> dict[str, float]:
    ious, edges, quality, seconds = [], [], [], 0.0
    for start in range(0, len(maps), BATCH):
        part = slice(start, start + BATCH)
        began = time.process_time()
        made, numbers = make_masks(maps[part].to(device), images[part].to(device), options, ids[part])
        masks = made.cpu().numpy()
        seconds += time.process_time() - began
        quality += numbers[:, 0].tolist()
        for mask, true in zip(masks > 0, truth[part], strict=True):
            ious.append(binary_iou(mask, true > 0))
            edges.append(binary_iou(boundary(mask), boundary(true > 0)))
    return {
        "foreground_iou": float(np.mean(ious)),
        "boundary_iou": round(float(np.mean(edges)), 4),
        "cpu_ms": round(1000 * seconds / len(maps), 2),
        "quality_rank": round(rank_correlation(quality, ious), 3),
    }


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two sequences.

    Example:
        >>> round(rank_correlation([1, 2, 5], [0.1, 0.3, 0.4]), 6)
        1.0
    """
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (left, right)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])
