"""Ultralytics: one folder for two tasks, each with a file that says how to read it.

data.yaml is for the segment task: a line for each part of a class, `number x y x y ...` as shares of the image, holes
joined to the outline by cuts. semantic.yaml is for the semantic task: masks of class numbers, 255 ignored. The
first has no class for the background and nothing that is ignored, so ignored pixels belong to no object there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import Item, mask_png
from diffumask_fast.convert.outlines import outlines
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.target import folder, put_file, write_lines

NUMBERING = "compact"
FEWEST = 3  # points of a polygon
MASKS = "semantic"  # a folder named masks would be taken with data.yaml as well, whose classes have other numbers


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images, polygons and masks; see `formats.Format`."""
    kinds = ("images", "labels", MASKS)
    folders = {split: [folder(job.out, kind, split) for kind in kinds] for split in job.splits}
    for item in items:
        images, labels, masks = folders[item.split]
        put_file(images / item.file_name, item.image)
        put_file(masks / f"{item.name}.png", mask_png(item.mask))
        put_file(labels / f"{item.name}.txt", "".join(f"{line}\n" for line in _lines(item)).encode())
        yield {"split": item.split}


def write_lists(job: Job, records: Records) -> None:
    """Write a file for each task."""
    names = list(job.classes.values())
    write_lines(job.out / "data.yaml", _description(job, names[1:]))
    write_lines(job.out / "semantic.yaml", [*_description(job, names), f"masks_dir: {MASKS}"])


def _description(job: Job, names: list[str]) -> Iterator[str]:
    yield "# No `path`: the folder that this file lies in is meant."
    yield f"train: images/{job.splits[0]}"
    yield f"val: images/{job.splits[-1]}" + ("" if len(job.splits) > 1 else "  # none was split off")
    yield "names:"
    yield from (f"  {number}: {json.dumps(name)}" for number, name in enumerate(names))


def _lines(item: Item) -> Iterator[str]:
    height, width = item.mask.shape
    for number in item.present():
        for points in outlines(item.mask == number):
            points = np.resize(points, (max(FEWEST, len(points)), 2))
            shares = (points + 0.5) / (width, height)  # of the pixels' centres
            yield f"{number - 1} " + " ".join(f"{share:.6f}" for share in shares.ravel().tolist())
