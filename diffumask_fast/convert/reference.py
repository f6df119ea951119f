"""The paper's program's folders, one for each class: `train_image/image_<class>_<n>.jpg` and `npy/` of the same names.

An image lies in the folder of its first class. Image and maps are brought to 512x512, which that program's next scripts
assume; they make the masks. As the drop-in does, prompts.jsonl tells of each image where it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import Item, encode_image
from diffumask_fast.convert.plan import SPLITS, Shard
from diffumask_fast.convert.target import folder, put_file
from diffumask_fast.dataset.writer import new_file
from diffumask_fast.dropin.class_folder import ClassFolder, pack_maps
from diffumask_fast.dropin.class_maps import SIDE, fuse

NUMBERING = "voc-only"


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images and maps; note each; see `formats.Format`."""
    for item in items:
        name = next(iter(item.classes.values()))
        place = ClassFolder(job.out, name, job.images, {}).path.name
        stem = f"image_{name}_{item.number}"
        picture = item.picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        put_file(folder(job.out, place, "npy") / f"{stem}.npy", pack_maps(_maps(item)))
        put_file(folder(job.out, place, "train_image") / f"{stem}.jpg", encode_image(b"", picture, "jpg", stem))
        facts = {name: item.facts[name] for name in ("prompt", "seed", "key")}
        yield {"split": item.split, "folder": place, "line": {"image": stem, "class": name, **facts}}


def write_lists(job: Job, records: Records) -> None:
    """Write prompts.jsonl in each folder."""
    files: dict[str, BinaryIO] = {}
    with ExitStack() as stack:
        for split in SPLITS:
            for record in records(split):
                place = record["folder"]
                if place not in files:
                    files[place] = stack.enter_context(new_file(job.out / place / "prompts.jsonl"))
                files[place].write(json.dumps(record["line"]).encode() + b"\n")


def _maps(item: Item) -> dict[int, np.ndarray]:
    """Return class index, 0 to 19 -> [512, 512] fp32 of maximum 1."""
    assert item.maps is not None  # `formats.WITH_MAPS`
    small = torch.from_numpy(item.maps.astype(np.float32))
    return {number - 1: fuse([small[place, None]]).numpy() for place, number in enumerate(item.classes)}
