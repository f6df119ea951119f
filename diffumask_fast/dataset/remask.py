"""What `diffumask-fast remask` does: new masks from the stored maps and images, without drawing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from diffumask_fast.borrow import patched_threads
from diffumask_fast.dataset.derive import derive
from diffumask_fast.dataset.reader import Row, read_manifest, read_rows
from diffumask_fast.dataset.schema import MANIFEST, encode_png
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import NOT_FINITE, advice, rejections
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.prompts.class_entry import phrases_by_name
from diffumask_fast.prompts.matching import phrase_in

Maker = Callable[[Tensor, Tensor, MaskOptions, Tensor], tuple[Tensor, Tensor]]

BATCH = 8
BATCH_PIXELS = 8 * 1024 * 1024  # larger images come fewer at a time


def remask(
    source: str | Place,
    out: str | Place,
    options: MaskOptions | None = None,
    *,
    make: Maker = make_masks,
    device: str | torch.device = "cpu",
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Write a dataset anew with other masks: images, prompts and maps stay, masks, quality and acceptance are made.

    Run again, it goes on with the shards that are missing. What was pruned for its old mask is judged as all others.

    Args:
        source: a dataset with stored maps.
        out: folder of the new one.
        options: how masks are made of maps; None is as the source records.
        make: makes them, as `make_masks` does; from several threads at once.
        device: where masks are made; on the CPU as many batches at once as torch has threads.
        max_pixels: of a picture that is decoded.
        progress: makes a progress bar of the number of shards.

    Returns:
        folder, images, accepted, advice (what to change when no image is accepted).

    Raises:
        DiffuMaskError: as `derive`; or the source holds no maps.
    """
    options, device = options or recorded_options(source), torch.device(device)
    phrases = phrases_by_name(read_manifest(source).get("classes", []))
    workers = torch.get_num_threads() if device.type == "cpu" else 1

    with patched_threads(1), ThreadPoolExecutor(workers) as pool:

        def transform(rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
            batches = batches_of(rows)
            while ahead := list(islice(batches, 2 * workers)):
                made = [pool.submit(_remade, batch, make, options, phrases, device) for batch in ahead]
                yield from (row for batch in made for row in batch.result())

        summary = derive(
            source, out, transform, options, replaces=("affinity", "filter"), max_pixels=max_pixels, progress=progress
        )
    rejected = [] if summary["accepted"] else read_rows(out, accepted_only=False, columns=["reason"])
    return {**summary, "advice": advice([row.reason for row in rejected], options)}


def recorded_options(source: str | Place) -> MaskOptions:
    """Return how a dataset says that its masks were made; an option that it does not record has its default.

    Raises:
        DiffuMaskError: it has no record, or one with values that are not allowed.
    """
    recorded = read_manifest(source)["options"]
    try:
        return MaskOptions(**{one.name: recorded[one.name] for one in fields(MaskOptions) if one.name in recorded})
    except DiffuMaskError as error:
        raise DiffuMaskError(f"{place(source) / MANIFEST} is damaged ({error}): bring back the old one") from error


def batches_of(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Put rows together that follow each other and whose images and maps have the same size."""
    for (shape, map_sizes), same in groupby(rows, key=lambda row: (row.image.shape, tuple(map(tuple, row.map_sizes)))):
        if not map_sizes:
            raise DiffuMaskError("it stores no maps to make masks of: name what generate wrote")
        most = max(1, min(BATCH, BATCH_PIXELS // (shape[0] * shape[1])))
        while batch := list(islice(same, most)):
            yield batch


def tensors_of(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps [B, K, h, w] uint8, images [B, H, W, 3] uint8 and class ids [B, K] of one of `batches_of`."""
    maps = torch.from_numpy(np.stack([row.maps for row in rows if row.maps is not None])).to(device)
    images = torch.from_numpy(np.stack([row.image for row in rows])).to(device)
    return maps, images, torch.tensor([row.class_ids for row in rows], device=device)


@torch.inference_mode()
def _remade(
    rows: Sequence[Row], make: Maker, options: MaskOptions, phrases: dict[str, tuple[str, ...]], device: torch.device
) -> list[dict[str, Any]]:
    """Return the values of rows with new masks."""
    maps, images, ids = tensors_of(rows, device)
    mask, quality = make(maps, images, options, ids)
    names = [[phrase_in(row.prompt, phrases.get(name, (name,))) for name in row.classes] for row in rows]
    reasons = rejections(images, mask, ids, names, options, quality)
    values = []
    for row, pixels, numbers, reason in zip(rows, mask.cpu().numpy(), quality.tolist(), reasons, strict=True):
        reason = NOT_FINITE if row.reason == NOT_FINITE else reason
        picture = {"bytes": encode_png(pixels), "path": row.values["mask"]["path"]}
        made = {"mask": picture, "quality": numbers, "accepted": not reason, "reason": reason}
        values.append({**row.values, **made})
    return values
