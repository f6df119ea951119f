"""Hugging Face's imagefolder: `load_dataset("imagefolder", data_dir=OUT)` gives the columns image, mask, prompt, ..."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import Item, mask_png
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.target import folder, put_file, write_lines
from diffumask_fast.dataset.writer import write_file

NUMBERING = "compact"


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images and masks; note each; see `formats.Format`."""
    folders = {split: [folder(job.out, split, kind) for kind in ("images", "masks")] for split in job.splits}
    for item in items:
        images, masks = folders[item.split]
        put_file(images / item.file_name, item.image)
        put_file(masks / f"{item.name}.png", mask_png(item.mask))
        files = {"file_name": f"images/{item.file_name}", "mask_file_name": f"masks/{item.name}.png"}
        yield {"split": item.split, "line": files | dict(item.facts) | {"class_numbers": list(item.classes)}}


def write_lists(job: Job, records: Records) -> None:
    """Write a line for each image, and the names of the classes."""
    for split in job.splits:
        lines = (json.dumps(record["line"]) for record in records(split))
        write_lines(folder(job.out, split) / "metadata.jsonl", lines)
    write_file(job.out / "classes.json", json.dumps(list(job.classes.values()), indent=2).encode() + b"\n")
