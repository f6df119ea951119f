"""Label Studio: tasks with pre-annotations, each class of an image a brush with its score, to be corrected by people.

Ignored pixels are a brush of their own, so that nothing is lost. Images are named as Label Studio names files of its
own machine: by their place below the folder that LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT names, which is this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from diffumask_fast.convert import brush
from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import IGNORE, Item
from diffumask_fast.convert.names import IGNORED
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.target import folder, put_file, write_lines
from diffumask_fast.dataset.writer import new_file

NUMBERING = "compact"
LOCAL_FILES = "/data/local-files/?d="
BRUSH, IMAGE = "tag", "image"  # names in the labelling interface


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images, and a file of tasks for each split that the shard has items of; see `formats.Format`."""
    images = {split: folder(job.out, "images", split) for split in job.splits}
    files: dict[str, BinaryIO] = {}
    with ExitStack() as stack:
        for item in items:
            put_file(images[item.split] / item.file_name, item.image)
            is_first = item.split not in files
            if is_first:
                path = folder(job.out, "tasks") / f"{item.split}-{shard.place[item.split]:06d}.json"
                files[item.split] = stack.enter_context(new_file(path, flushed=False))
            files[item.split].write((b"[\n" if is_first else b",\n") + json.dumps(_task(job, item)).encode())
            yield {"split": item.split}
        for file in files.values():
            file.write(b"\n]\n")


def write_lists(job: Job, records: Records) -> None:
    """Write the labelling interface."""
    write_lines(job.out / "interface.xml", _interface(job))


def _interface(job: Job) -> Iterator[str]:
    yield "<View>"
    yield f'  <Image name="{IMAGE}" value="${IMAGE}" zoom="true"/>'
    yield f'  <BrushLabels name="{BRUSH}" toName="{IMAGE}">'
    for number, name in [*list(job.classes.items())[1:], (IGNORE, IGNORED)]:
        colour = "#" + bytes(job.palette[3 * number : 3 * number + 3]).hex()
        yield f'    <Label value={quoteattr(name)} background="{colour}"/>'
    yield "  </BrushLabels>"
    yield "</View>"


def _task(job: Job, item: Item) -> dict[str, Any]:
    """Return a task; its score is that of its worst class, so that sorted by it the worst images come first."""
    scores = dict(zip(item.classes, item.facts["quality"], strict=True))
    brushes = [(number, job.classes[number], scores.get(number)) for number in item.present()]
    if (item.mask == IGNORE).any():
        brushes.append((IGNORE, IGNORED, None))
    known = [score for score in scores.values() if score is not None]
    prediction = {"model_version": "diffumask-fast", "result": [_brush(item, *one) for one in brushes]}
    if known:
        prediction["score"] = min(known)
    url = LOCAL_FILES + quote(f"images/{item.split}/{item.file_name}")
    return {"data": {IMAGE: url, **item.facts}, "predictions": [prediction]}


def _brush(item: Item, number: int, name: str, score: float | None) -> dict[str, Any]:
    height, width = item.mask.shape
    found = {
        "id": f"{item.number}-{number}", "type": "brushlabels", "from_name": BRUSH, "to_name": IMAGE,
        "original_width": width, "original_height": height, "image_rotation": 0,
        "value": {"format": "rle", "rle": brush.encode(item.mask == number), "brushlabels": [name]},
    }  # fmt: skip
    return found if score is None else found | {"score": score}
