"""MMSegmentation: class ids as grey PNG, 255 ignored, with the part of a config that names them.

LightlyTrain reads the same folders (`images`, `masks` and `classes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import Item, mask_png
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.public import IGNORES_ZERO
from diffumask_fast.convert.target import folder, put_file, write_lines

NUMBERING = "compact"


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write images and masks; see `formats.Format`."""
    folders = {split: (folder(job.out, "img_dir", split), folder(job.out, "ann_dir", split)) for split in job.splits}
    for item in items:
        images, masks = folders[item.split]
        put_file(images / item.file_name, item.image)
        put_file(masks / f"{item.name}.png", mask_png(item.mask))
        yield {"split": item.split}


def write_lists(job: Job, records: Records) -> None:
    """Write the part of a config: `_base_` of one's own, or to be copied from."""
    write_lines(job.out / "dataset_config.py", _config(job))


def _config(job: Job) -> Iterator[str]:
    reduced = job.like in IGNORES_ZERO  # 0 becomes 255 and all others one less, as in those datasets' own configs
    names = {number: name for number, name in job.classes.items() if number or not reduced}
    colours = [job.palette[3 * number : 3 * number + 3] for number in names]
    yield "# Give `pipeline` and loaders in your own config; data_root is where this folder lies."
    yield f"metainfo = dict(classes={tuple(names.values())!r}, palette={colours!r})"
    for split in job.splits:
        yield f"{split}_dataset = dict("
        yield "    type='BaseSegDataset', data_root='.',"
        yield f"    data_prefix=dict(img_path='img_dir/{split}', seg_map_path='ann_dir/{split}'),"
        yield f"    img_suffix='.{job.image_format}', seg_map_suffix='.png',"
        yield f"    metainfo=metainfo, reduce_zero_label={reduced})"
