"""WebDataset: tar files of samples, each with the same three members: image, mask and facts.

The mask is grey (`.decode("pill")` or "l8" gives its numbers): a palette would be turned into colours.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import Item, mask_png
from diffumask_fast.convert.plan import Shard
from diffumask_fast.dataset.writer import new_file, write_file

NUMBERING = "compact"


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write a tar file for each split that the shard has items of; see `formats.Format`."""
    tars: dict[str, tarfile.TarFile] = {}
    with ExitStack() as stack:
        for item in items:
            if item.split not in tars:
                path = job.out / f"{item.split}-{shard.place[item.split]:06d}.tar"
                file = stack.enter_context(new_file(path, flushed=False))
                tars[item.split] = stack.enter_context(
                    tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8")
                )
            facts = dict(item.facts) | {"class_numbers": list(item.classes)}
            _add(tars[item.split], item.file_name, item.image)
            _add(tars[item.split], f"{item.name}.mask.png", mask_png(item.mask))
            _add(tars[item.split], f"{item.name}.json", json.dumps(facts).encode())
            yield {"split": item.split}


def write_lists(job: Job, records: Records) -> None:
    """Write the names of the classes."""
    write_file(job.out / "classes.json", json.dumps(list(job.classes.values()), indent=2).encode() + b"\n")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member that tells nothing of when and where it was written."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
