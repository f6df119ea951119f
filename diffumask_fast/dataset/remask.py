"""What `diffumask-fast remask` does: new masks from the stored maps and images, without drawing anything."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from diffumask_fast.dataset.preview import write_preview
from diffumask_fast.dataset.reader import Row, read_manifest, read_shard, shard_paths
from diffumask_fast.dataset.schema import MANIFEST, encode_png
from diffumask_fast.dataset.writer import dump_manifest, make_folder, write_file, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.accept import NOT_FINITE, rejections
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions

BATCH = 8
PREVIEW = 24
DRAWN_WITH = ("aggregation", "propagate")  # what stored maps cannot undo


def remask(
    source: str | Path,
    out: str | Path,
    options: MaskOptions | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Write a dataset anew with other masks: images, prompts and maps stay, masks, quality and acceptance are made.

    Run again, it goes on with the shards that are missing.

    Args:
        source: a dataset with stored maps.
        out: folder of the new one.
        options: of the mask stage; `aggregation` and `propagate` are those that the maps were drawn with.
        device: where masks are made; on the CPU as many batches at once as torch has threads.
        progress: makes a progress bar of the number of shards.

    Returns:
        folder, images, accepted.

    Raises:
        DiffuMaskError: a dataset cannot be read or written, holds no maps, or `out` holds something else.
    """
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise DiffuMaskError(f"remask writes a new dataset: name another folder than {source}")
    there, paths = read_manifest(source), shard_paths(source)
    if not paths:
        raise DiffuMaskError(f"{source} holds no data/shard-*.parquet: name the folder that generate wrote")
    drawn_with = {name: there["options"][name] for name in DRAWN_WITH if name in there["options"]}
    options = replace(options or MaskOptions(), **drawn_with)
    manifest = {**there, "options": {**there["options"], **vars(options)}}
    _begin(out, dump_manifest(manifest))
    phrases = {entry["name"]: entry["phrase"] for entry in there.get("classes", [])}
    images = accepted = 0
    workers = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    with (
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        progress(len(paths)) as bar,
    ):
        task = bar.add_task("masks", total=len(paths))
        for path in paths:
            target = out / "data" / path.name
            if target.exists():
                values = [row.values for row in read_shard(target, ["accepted"])]
            else:
                values = list(_remade(pool, read_shard(path), options, phrases, torch.device(device), path))
                write_shard(out, int(path.stem.split("-")[1]), values)
            images += len(values)
            accepted += sum(row["accepted"] for row in values)
            bar.advance(task)
    write_preview(out, PREVIEW)
    return {"folder": str(out), "images": images, "accepted": accepted}


def _begin(out: Path, manifest: bytes) -> None:
    make_folder(out / "data")
    path = out / MANIFEST
    if path.exists() and path.read_bytes() != manifest and shard_paths(out):
        raise DiffuMaskError(f"{out} holds another dataset, or masks made with other options: use another folder")
    if not path.exists() and shard_paths(out):
        raise DiffuMaskError(f"{out} holds shards but no {MANIFEST}: use another folder")
    write_file(path, manifest)


def _remade(
    pool: ThreadPoolExecutor, rows: list[Row], options: MaskOptions, phrases: dict, device: torch.device, path: Path
) -> Iterator[dict]:
    """Yield the values of a shard's rows with new masks, in their order."""
    if any(row.map_sizes == [] for row in rows):
        raise DiffuMaskError(f"{path} stores no maps to make masks of: remask takes what generate wrote")
    jobs = []
    for _, same in groupby(rows, key=lambda row: (row.image.shape, row.map_sizes)):
        same = list(same)
        for start in range(0, len(same), BATCH):
            jobs.append(pool.submit(_batch, same[start : start + BATCH], options, phrases, device))
    for job in jobs:
        yield from job.result()


@torch.inference_mode()
def _batch(rows: Sequence[Row], options: MaskOptions, phrases: dict, device: torch.device) -> list[dict]:
    maps = torch.from_numpy(np.stack([row.maps for row in rows])).to(device)
    images = torch.from_numpy(np.stack([row.image for row in rows])).to(device)
    ids = torch.tensor([row.class_ids for row in rows], device=device)
    mask, _, quality = make_masks(maps, images, options, ids)
    names = [[phrases.get(name, name) for name in row.classes] for row in rows]
    reasons = rejections(images, mask, ids, names, options, quality)
    values = []
    for row, pixels, numbers, reason in zip(rows, mask.cpu().numpy(), quality.tolist(), reasons, strict=True):
        reason = NOT_FINITE if row.reason == NOT_FINITE else reason
        picture = {"bytes": encode_png(pixels), "path": row.values["mask"]["path"]}
        made = {"mask": picture, "quality": numbers, "accepted": not reason, "reason": reason}
        values.append({**row.values, **made})
    return values
