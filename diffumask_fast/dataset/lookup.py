"""Rows of a finished dataset by their number, in any order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import pyarrow as pa

from diffumask_fast.dataset.reader import Row, open_shard, read_manifest, rows_of
from diffumask_fast.dataset.shard_check import finished_shards
from diffumask_fast.dataset.storage import Place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import MAX_PIXELS

KEPT_BYTES = 2**30  # of encoded rows that stay in memory
INDEX = ("key", "seed", "classes", "class_ids", "accepted")


class Entry(NamedTuple):
    """What is known of a row without reading its pictures."""

    key: str
    seed: int
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    path: Place
    group: int
    place: int


class RowLookup(Sequence[Row]):
    """The rows of a finished dataset.

    A row group is read whole and stays in memory, still encoded, until `kept_bytes` are full: of a larger dataset each
    row that is asked for at random costs the reading of its group, 64 rows. Threads may share it.

    Args:
        folder: the dataset.
        accepted_only: leave out rejected rows.
        max_pixels: of a picture, when it is decoded.
        kept_bytes: of encoded rows that stay in memory.

    Raises:
        DiffuMaskError: the dataset is not finished or cannot be read.
    """

    def __init__(
        self,
        folder: str | Place,
        *,
        accepted_only: bool = True,
        max_pixels: int = MAX_PIXELS,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.manifest: dict[str, Any] = read_manifest(folder)
        self.entries: list[Entry] = []
        self._max_pixels, self._kept_bytes = max_pixels, kept_bytes
        self._groups: OrderedDict[tuple[Place, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        for path in finished_shards(folder, self.manifest):
            self._index(path, accepted_only)

    def _index(self, path: Place, accepted_only: bool) -> None:
        with open_shard(path) as file:
            for group in range(file.num_row_groups):
                for place, row in enumerate(file.read_row_group(group, list(INDEX)).to_pylist()):
                    if row["accepted"] or not accepted_only:
                        classes, ids = tuple(row["classes"]), tuple(row["class_ids"])
                        self.entries.append(Entry(row["key"], row["seed"], classes, ids, path, group, place))

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        entry = self.entries[index]
        batch = self._group(entry.path, entry.group).slice(entry.place, 1).to_batches()[0]
        return next(rows_of(batch, entry.path, self._max_pixels))

    def _group(self, path: Place, group: int) -> pa.Table:
        with self._lock:
            if (path, group) not in self._groups:
                with open_shard(path) as file:
                    self._groups[path, group] = file.read_row_group(group)
                while sum(table.nbytes for table in self._groups.values()) > self._kept_bytes and len(self._groups) > 1:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((path, group))
            return self._groups[path, group]


def class_names(rows: RowLookup) -> dict[int, str]:
    """Return the classes of a dataset, id -> name, background included: those in its manifest and those of its rows.

    Raises:
        DiffuMaskError: an id or a name stands for two classes.
    """
    pairs = [(entry["id"], entry["name"]) for entry in rows.manifest["classes"] if "id" in entry]
    pairs += [pair for entry in rows.entries for pair in zip(entry.class_ids, entry.classes, strict=True)]
    names: dict[int, str] = {0: "background"}
    ids: dict[str, int] = {"background": 0}
    for number, name in dict.fromkeys(pairs):
        if names.setdefault(number, name) != name:
            raise DiffuMaskError(f"id {number} stands for {names[number]} and for {name}: give each class its own id")
        if ids.setdefault(name, number) != number:
            raise DiffuMaskError(f"{name} has the ids {ids[name]} and {number}: give each class one id")
    return dict(sorted(names.items()))
