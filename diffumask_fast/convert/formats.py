"""The formats: each is a module that writes the files of some items, and lists of all at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffumask_fast.convert.item import Item
from diffumask_fast.convert.plan import Shard

Records = Callable[[str], Iterable[dict[str, Any]]]  # split -> what was noted of its items, in their order
WITH_MAPS = ("reference",)  # formats that hold the maps of the classes


@dataclass(frozen=True)
class Job:
    """What a format is told of the conversion.

    Args:
        out: the folder.
        classes: number in the files -> name, background included.
        splits: those that have items.
        image_format: jpg, png or webp.
        images: their number, over all splits.
        palette: 768 numbers, the colour of each number in the files.
        like: see `options.ConvertOptions`.
    """

    out: Path
    classes: Mapping[int, str]
    splits: tuple[str, ...]
    image_format: str
    images: int
    palette: list[int]
    like: str | None = None


class Format(Protocol):
    """What a module of a format has."""

    NUMBERING: str  # see `plan.number_classes`

    def write_items(self, job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Write the files of a shard's items; yield what the lists need to know of each, `split` among it."""

    def write_lists(self, job: Job, records: Records) -> None:
        """Write the files that name all items."""


def format_named(name: str) -> Format:
    """Return the module of a format of `options.FORMATS`."""
    if name == "reference":  # it loads torch
        from diffumask_fast.convert import reference

        return reference
    from diffumask_fast.convert import (
        coco,
        coco_panoptic,
        imagefolder,
        label_studio,
        lance,
        mmseg,
        voc,
        webdataset,
        yolo,
    )

    modules: dict[str, Format] = {
        "voc": voc, "mmseg": mmseg, "coco": coco, "coco-panoptic": coco_panoptic, "yolo": yolo,
        "webdataset": webdataset, "imagefolder": imagefolder, "label-studio": label_studio, "lance": lance,
    }  # fmt: skip
    return modules[name]
