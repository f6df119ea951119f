"""VOC: what torchvision's VOCSegmentation, MMSegmentation's VOC dataset and CVAT ("Segmentation mask 1.1") read.

Masks have VOC's palette, and its numbers where all classes are VOC's; else 1, 2, ... in the order of labelmap.txt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import Item, mask_png
from diffumask_fast.convert.names import IGNORED
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.target import folder, put_file, write_lines
from diffumask_fast.prompts.vocabulary import Vocabulary

NUMBERING = "voc"
IGNORED_COLOUR = "224,224,192"  # the palette's last colour: who reads colours must find each in the list


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images and masks; see `formats.Format`."""
    images, masks = folder(job.out, "JPEGImages"), folder(job.out, "SegmentationClass")
    for item in items:
        put_file(images / item.file_name, item.image)
        put_file(masks / f"{item.name}.png", mask_png(item.mask, job.palette))
        yield {"split": item.split, "name": item.name}


def write_lists(job: Job, records: Records) -> None:
    """Write the lists of names, and the classes with their colours."""
    lists = folder(job.out, "ImageSets", "Segmentation")
    for split in job.splits:
        write_lines(lists / f"{split}.txt", (record["name"] for record in records(split)))
    if len(job.splits) > 1:
        write_lines(lists / "trainval.txt", (record["name"] for split in job.splits for record in records(split)))
    write_lines(job.out / "labelmap.txt", _labelmap(job))


def _labelmap(job: Job) -> Iterator[str]:
    names = dict(job.classes)
    if list(names) != list(range(len(names))):  # VOC's own numbers: all of VOC's classes, so that a line is a number
        names = {0: "background"} | {entry.id: entry.name for entry in Vocabulary.voc().entries}
    yield "# label:color_rgb:parts:actions"
    for number, name in names.items():
        yield f"{name}:{','.join(map(str, job.palette[3 * number : 3 * number + 3]))}::"
    yield f"{IGNORED}:{IGNORED_COLOUR}::"
