"""COCO: one annotation for each class of an image, its pixels as run-length code, so that holes and parts are exact.

Category ids are the dataset's class ids, or a public dataset's (`like`). Ignored pixels are a crowd annotation
(`iscrowd` 1) of each class of their image: a detection there counts neither for nor against; `"ignore": 1` tells
`import` what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from diffumask_fast.convert import rle
from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import IGNORE, Item
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.target import folder, put_file, write_list
from diffumask_fast.prompts.public_ids import supercategory

NUMBERING = "own"
IDS = 512  # annotation ids of an image: twice its classes at most
INFO = {"description": "Synthetic images with masks, written by diffumask-fast"}


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images; note each with its annotations; see `formats.Format`."""
    folders = {split: folder(job.out, "images", split) for split in job.splits}
    for item in items:
        put_file(folders[item.split] / item.file_name, item.image)
        yield {"split": item.split, "image": image_entry(item), "annotations": list(_annotations(item))}


def write_lists(job: Job, records: Records) -> None:
    """Write the annotations of each split."""
    categories = [
        {"id": number, "name": name, "supercategory": supercategory(number) if job.like == "coco" else name}
        for number, name in job.classes.items()
        if number
    ]
    for split in job.splits:
        lists: dict[str, Iterable[Any]] = {
            "images": (record["image"] for record in records(split)),
            "annotations": (one for record in records(split) for one in record["annotations"]),
        }
        path = folder(job.out, "annotations") / f"instances_{split}.json"
        write_list(path, lists, {"categories": categories, "info": INFO, "licenses": []})


def image_entry(item: Item) -> dict[str, Any]:
    """Return what COCO's files say of an image; prompt and seed are there as well."""
    height, width = item.mask.shape
    prompt, seed = item.facts["prompt"], item.facts["seed"]
    size = {"height": height, "width": width}
    return {"id": item.number, "file_name": item.file_name, **size, "prompt": prompt, "seed": seed}


def _annotations(item: Item) -> Iterator[dict[str, Any]]:
    ignored = item.mask == IGNORE
    for number in item.present():
        yield _annotation(item, number, item.mask == number, item.number * IDS + number)
    if ignored.any():
        for number in sorted(item.classes):
            crowd = _annotation(item, number, ignored, item.number * IDS + IDS // 2 + number)
            yield crowd | {"iscrowd": 1, "ignore": 1}


def _annotation(item: Item, number: int, pixels: np.ndarray, annotation_id: int) -> dict[str, Any]:
    return {
        "id": annotation_id, "image_id": item.number, "category_id": number, "iscrowd": 0,
        "segmentation": {"size": list(pixels.shape), "counts": rle.encode(pixels)},
        "area": int(pixels.sum()), "bbox": box(pixels),
    }  # fmt: skip


def box(pixels: np.ndarray) -> list[int]:
    """Return x, y, width and height of the box around pixels [H, W] bool, some of which are True."""
    rows, columns = np.flatnonzero(pixels.any(1)).tolist(), np.flatnonzero(pixels.any(0)).tolist()
    return [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
