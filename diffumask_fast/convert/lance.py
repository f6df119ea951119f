"""Lance: a dataset for each split, `<split>.lance`, whose fragments are the shards.

The names of the files with rows are ours, and so are their bytes; Lance adds a version with a time and a random name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffumask_fast.convert.formats import Job, Records
from diffumask_fast.convert.item import Item, mask_png
from diffumask_fast.convert.plan import Shard
from diffumask_fast.convert.target import folder
from diffumask_fast.dataset.writer import temporary_path, write_file
from diffumask_fast.errors import DiffuMaskError

NUMBERING = "compact"
VERSION = "2.1"  # of the files
COLUMNS = [
    ("key", pa.string()), ("image", pa.binary()), ("mask", pa.binary()), ("prompt", pa.string()),
    ("negative_prompt", pa.string()), ("seed", pa.int64()), ("classes", pa.list_(pa.string())),
    ("class_numbers", pa.list_(pa.int32())), ("quality", pa.list_(pa.float32())),
]  # fmt: skip


def write_items(job: Job, shard: Shard, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Write a file of rows for each split that the shard has items of; note it; see `formats.Format`."""
    files: dict[str, _File] = {}
    for item in items:
        if item.split not in files:
            place = folder(job.out, f"{item.split}.lance", "data")
            files[item.split] = _File(place / f"{shard.place[item.split]:06d}.lance", _schema(job))
        row = dict(item.facts) | {"image": item.image, "mask": mask_png(item.mask)}
        files[item.split].add(row | {"class_numbers": list(item.classes)})
    for split, file in files.items():
        yield {"split": split, **file.close()}


def write_lists(job: Job, records: Records) -> None:
    """Make a dataset of each split's files, and write the names of the classes."""
    library, schema = _library(), _schema(job)
    leaves = list(_leaves(library.schema.LanceSchema.from_pyarrow(schema).fields()))
    major, minor = map(int, VERSION.split("."))
    for split in job.splits:
        place = folder(job.out, f"{split}.lance")
        for name in ("_versions", "_transactions"):  # of a conversion that was killed here
            shutil.rmtree(place / name, ignore_errors=True)
        fragments, files = [], set()
        for number, note in enumerate(records(split)):
            file = library.fragment.DataFile(
                note["name"], leaves, list(range(len(leaves))), major, minor, file_size_bytes=note["size"]
            )
            fragments.append(library.fragment.FragmentMetadata(number, [file], note["rows"]))
            files.add(place / "data" / note["name"])
        for left in set((place / "data").iterdir()) - files:  # Lance has temporary names of its own
            left.unlink()
        library.LanceDataset.commit(str(place), library.LanceOperation.Overwrite(schema, fragments))
    write_file(job.out / "classes.json", json.dumps(list(job.classes.values()), indent=2).encode() + b"\n")


class _File:
    """A file of rows, which has its name when it is closed."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._writer = _library().file.LanceFileWriter(str(temporary_path(path)), schema, version=VERSION)

    def add(self, row: dict[str, Any]) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist([row], self._schema))

    def close(self) -> dict[str, Any]:
        """Return what is noted of it."""
        rows = self._writer.close()
        os.replace(temporary_path(self._path), self._path)
        return {"name": self._path.name, "rows": rows, "size": self._writer.size_bytes}


def _schema(job: Job) -> pa.Schema:
    return pa.schema(COLUMNS, metadata={"classes": json.dumps(list(job.classes.values()))})


def _leaves(fields: Iterable[Any]) -> Iterator[int]:
    """Yield the numbers of the fields that hold values, as a file has them one after the other."""
    for field in fields:
        if children := field.children():
            yield from _leaves(children)
        else:
            yield field.id()


def _library() -> Any:
    try:
        import lance
        import lance.file
        import lance.fragment
        import lance.schema
    except ImportError as error:
        raise DiffuMaskError('Lance needs pylance: pip install "diffumask-fast[convert]"') from error
    return lance
