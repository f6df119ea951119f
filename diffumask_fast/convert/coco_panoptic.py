"""COCO panoptic: a picture of segment ids for each image, id = R + 256 G + 65536 B, and a JSON file.

There is one segment for each class of an image, and its id is the category's: masks tell classes apart, not objects, so
all categories are stuff (`isthing` 0). Background is a category of its own, for what has no segment (id 0) is void:
here those are the ignored pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from diffumask_fast.convert.coco import INFO, box, image_entry
from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import IGNORE, Item
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.target import folder, put_file, write_list
from diffumask_fast.dataset.schema import encode_png

NUMBERING = "own"


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images and pictures of segments; note each with its segments; see `formats.Format`."""
    images = {split: folder(job.out, "images", split) for split in job.splits}
    segments = {split: folder(job.out, "annotations", f"panoptic_{split}") for split in job.splits}
    for item in items:
        ids = _segment_ids(item.mask, _background(job))
        put_file(images[item.split] / item.file_name, item.image)
        picture = np.stack([ids & 255, ids >> 8, np.zeros_like(ids)], -1).astype(np.uint8)
        put_file(segments[item.split] / f"{item.name}.png", encode_png(picture))
        annotation = {"image_id": item.number, "file_name": f"{item.name}.png", "segments_info": _segments(ids)}
        yield {"split": item.split, "image": image_entry(item), "annotation": annotation}


def write_lists(job: Job, records: Records) -> None:
    """Write the annotations of each split."""
    names, palette = {number or _background(job): name for number, name in job.classes.items()}, job.palette
    categories = [
        {"id": number, "name": name, "supercategory": name, "isthing": 0, "color": palette[3 * number : 3 * number + 3]}
        for number, name in sorted(names.items())
    ]
    for split in job.splits:
        lists: dict[str, Iterable[Any]] = {
            "images": (record["image"] for record in records(split)),
            "annotations": (record["annotation"] for record in records(split)),
        }
        path = folder(job.out, "annotations") / f"panoptic_{split}.json"
        write_list(path, lists, {"categories": categories, "info": INFO, "licenses": []})


def _background(job: Job) -> int:
    """Return the background's category: the one after the classes."""
    return max(job.classes) + 1


def _segment_ids(mask: np.ndarray, background: int) -> np.ndarray:
    """Return segment ids [H, W] int32 of a mask: 0 for ignored pixels."""
    ids = np.where(mask == 0, background, mask.astype(np.int32))
    return np.where(mask == IGNORE, 0, ids)


def _segments(ids: np.ndarray) -> list[dict[str, Any]]:
    found = [(number, ids == number) for number in np.unique(ids).tolist() if number]
    return [
        {"id": number, "category_id": number, "area": int(pixels.sum()), "bbox": box(pixels), "iscrowd": 0}
        for number, pixels in found
    ]
