"""What `diffumask-fast verify` does: read every shard and every row of a dataset, and say all that is wrong."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.progress import Progress

from diffumask_fast.dataset.reader import BATCH, Row, open_shard, read_manifest, rows_of
from diffumask_fast.dataset.schema import CAPTIONS, MANIFEST
from diffumask_fast.dataset.shard_check import Content, check_content, planned_line
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.dataset.writer import MARK, shard_path
from diffumask_fast.errors import DiffuMaskError, as_flags
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.prompts.class_entry import phrases_by_name
from diffumask_fast.prompts.matching import phrase_in
from diffumask_fast.prompts.request import Request

MOST_THREADS = 8
AGAIN = "run the command again that wrote the dataset"
REQUESTED = [part.name for part in fields(Request) if part.name != "phrases"]
ANEW = f"delete the shard and {AGAIN}"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a shard, or with one row of it.

    Args:
        file: in the dataset's folder.
        key: of the row; "" where it is the shard.
        what: is wrong.
        remedy: what to do.
    """

    file: str
    key: str
    what: str
    remedy: str


def verify(
    source: str | Place,
    *,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Read every shard and every row of a dataset, a few rows at a time.

    A shard must decode, bear the mark of its place in this dataset and hold the rows that are planned; a row's image,
    mask and maps must decode and fit each other, its classes and the dataset's class list. All rows together must be
    those of the plan, prompts included.

    Args:
        source: the dataset: drawn, derived of another one, or imported.
        max_pixels: of a picture that is decoded.
        progress: makes a progress bar of the number of rows.

    Returns:
        folder, shards, images, accepted, and faults: a `Fault` as JSON types for each shard or row with one.

    Raises:
        DiffuMaskError: there is no dataset, or a newer version wrote it.

    Example:
        verify("demo")["faults"]
    """
    folder = place(source)
    reading = _Reading(folder, read_manifest(folder), max_pixels)
    with progress(reading.manifest["plan"]["rows"]) as bar:
        task = bar.add_task("rows", total=reading.manifest["plan"]["rows"])
        faults = [asdict(fault) for fault in reading.faults(lambda rows: bar.advance(task, rows))]
    return {
        "folder": str(source), "shards": reading.manifest["plan"]["shards"], "images": reading.images,
        "accepted": reading.accepted, "faults": faults,
    }  # fmt: skip


def told(summary: dict[str, Any]) -> list[str]:
    """Return what a command says of the summary of `verify`: a line for each fault, or that there is none."""
    lines = [f"{fault['file']:26} {fault['key']:24} {as_flags(fault['what'])}" for fault in summary["faults"]]
    shards = f"{summary['shards']} shard{'s'[: summary['shards'] - 1]}"
    counts = f"{summary['images']} images in {shards}, {summary['accepted']} accepted"
    return lines or [f"{counts}: all is well."]


def sentence(summary: dict[str, Any]) -> str:
    """Say of faults, in one sentence, the first, how many there are, and what to do; "" where there are none."""
    if not (faults := summary["faults"]):
        return ""
    first, files = faults[0], len({fault["file"] for fault in faults})
    where = ", ".join(filter(None, [f"{summary['folder']}/{first['file']}", first["key"]]))
    more = f" (the first of {len(faults)} faults in {files} file{'s'[: files - 1]})" if faults[1:] else ""
    return f"{where}: {first['what']}{more}: {first['remedy']}"


class _Reading:
    """One reading of a dataset, and what it counts.

    Args:
        folder: of the dataset.
        manifest: of the dataset.
        max_pixels: of a picture that is decoded.
    """

    def __init__(self, folder: Place, manifest: dict[str, Any], max_pixels: int) -> None:
        self.folder, self.manifest = folder, manifest
        self.images = self.accepted = 0
        self._max_pixels = max_pixels
        self._classes = {entry["name"]: entry for entry in manifest["classes"]}
        self._phrases = phrases_by_name(manifest["classes"])
        self._size = manifest["options"].get("size")  # HxW; imported images have sizes of their own
        self._digest = hashlib.sha256()

    def faults(self, on_rows: Callable[[int], object]) -> Iterator[Fault]:
        """Yield all faults, and tell how many rows are read."""
        clean = True
        yield from self._strange_files()
        yield from self._caption_faults()
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "decode") as pool:
            for index in range(self.manifest["plan"]["shards"]):
                for fault in self._shard_faults(index, pool, on_rows):
                    clean = False
                    yield fault
        # an augmented dataset's plan is a hash of its names, which its shards' marks hold
        planned = self._classes and "augment" not in self.manifest["options"]
        if clean and planned and self._digest.hexdigest() != self.manifest["plan"]["sha256"]:
            remedy = "bring back the files as they were written"
            yield Fault("data", "", f"the rows are not those of the plan in {MANIFEST}: a prompt changed", remedy)

    def _strange_files(self) -> Iterator[Fault]:
        """Yield the files in `data/` that are no shard of the dataset."""
        shards = self.manifest["plan"]["shards"]
        planned = {shard_path(self.folder, index).name for index in range(shards)}
        for name in sorted(path.name for path in self.folder.glob("data/*")):
            if name not in planned:
                half = name.endswith(".tmp")
                what = "half-written" if half else f"none of the {shards} shards of this dataset"
                yield Fault(f"data/{name}", "", what, AGAIN if half else "move it away")

    def _caption_faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the captions that the prompts were taken from."""
        recorded, path = self.manifest["options"].get("retrieved"), self.folder / CAPTIONS
        if recorded is not None and not path.exists():
            yield Fault(CAPTIONS, "", "missing", AGAIN)
        elif recorded is not None and hashlib.sha256(path.read_bytes()).hexdigest() != recorded:
            yield Fault(CAPTIONS, "", "not what the dataset was drawn from", AGAIN)

    def _shard_faults(self, index: int, pool: ThreadPoolExecutor, on_rows: Callable[[int], object]) -> Iterator[Fault]:
        path = shard_path(self.folder, index)
        file = f"data/{path.name}"
        if not path.exists():
            yield Fault(file, "", "missing", AGAIN)
            return
        names: list[tuple[str, int]] = []
        try:
            with open_shard(path) as shard:
                for batch in shard.iter_batches(BATCH, use_threads=False):
                    rows = list(rows_of(batch, path, self._max_pixels))
                    names += [(row.key, row.seed) for row in rows]
                    for row, (line, fault) in zip(rows, pool.map(self._checked, rows), strict=True):
                        self.images += 1
                        self.accepted += row.accepted
                        self._digest.update(line)
                        if fault is not None:
                            yield Fault(file, row.key, *fault)
                    on_rows(len(rows))
                mark = (shard.schema_arrow.metadata or {}).get(MARK)
            content = Content(names, None if mark is None else mark.decode(errors="replace"), bytes=0)
            check_content(path, content, self.manifest, index)
        except DiffuMaskError as error:
            yield Fault(file, "", *_parts(error, path))

    def _checked(self, row: Row) -> tuple[bytes, tuple[str, str] | None]:
        """Return what the plan's hash takes of a row, and what is wrong with it and the remedy."""
        if empty := [name for name, value in row.values.items() if value is None]:
            return b"", (f"{empty[0]} is empty", ANEW)
        try:
            request = self._request(row)
            what = next(self._wrong(row, request), None)
            return planned_line(request), None if what is None else (what, ANEW)
        except DiffuMaskError as error:
            what, remedy = _parts(error, row.path)
            return b"", (what, remedy if "max_pixels" in remedy else ANEW)

    def _request(self, row: Row) -> Request:
        phrases = tuple(phrase_in(row.prompt, self._phrases.get(name, (name,))) for name in row.classes)
        return Request(**{name: row.values[name] for name in REQUESTED}, phrases=phrases)

    def _wrong(self, row: Row, request: Request) -> Iterator[str]:
        """Yield what is wrong with a row that decodes."""
        for name, class_id in zip(request.classes, request.class_ids, strict=True):
            if self._classes and self._classes.get(name, {}).get("id") != class_id:
                yield f"{name} with the id {class_id} is not in the class list of {MANIFEST}"
        (height, width), shape = row.image.shape[:2], row.mask.shape
        if self._size not in (None, f"{height}x{width}") and not row.values.get("augmentation"):
            yield f"the image has {height}x{width} pixels, not {self._size}"
        if shape != (height, width):
            yield f"the mask has {shape[0]}x{shape[1]} pixels, the image {height}x{width}"
        counts = np.bincount(row.mask.ravel(), minlength=256)
        counts[[0, IGNORE, *request.class_ids]] = 0
        if counts.any():
            yield f"the mask holds the id {counts.argmax()}, which is of none of the row's classes"
        for name, values in (("maps", row.maps), ("values of quality", row.quality)):
            if values is not None and len(values) != len(request.class_ids):
                yield f"there are {len(values)} {name} for {len(request.class_ids)} classes"
        if row.accepted and not all(map(math.isfinite, row.quality)):
            yield "the quality of an accepted row is no number"
        if row.accepted == bool(row.reason):
            yield "an accepted row has a reason to be rejected" if row.reason else "a rejected row has no reason"


def _parts(error: DiffuMaskError, path: Place | None) -> tuple[str, str]:
    """Return what a sentence says is wrong, without the file, and what to do."""
    what, _, remedy = str(error).removeprefix(str(path)).strip(" :").rpartition(": ")
    return (what, remedy) if what else (remedy, ANEW)
