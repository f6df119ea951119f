"""Dataset to dataset: what makes new shards of old ones, one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffumask_fast.dataset.folder import DatasetFolder, differences
from diffumask_fast.dataset.preview import write_preview
from diffumask_fast.dataset.reader import Row, read_manifest, read_rows, read_shard
from diffumask_fast.dataset.shard_check import (
    Names,
    done_shards,
    finished_shards,
    mark_of,
    names_digest,
    read_content,
)
from diffumask_fast.dataset.writer import write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import MAX_PIXELS, Options

PREVIEW = 24

Transform = Callable[[Iterator[Row]], Iterator[dict[str, Any]]]


def derive(
    source: str | Path,
    out: str | Path,
    transform: Transform,
    options: Options,
    *,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Write a dataset whose shards are made of those of another one; run again, it goes on with those that are missing.

    `dataset.json` is the source's with these options added; it is written before the first shard and never changes.

    Args:
        source: a finished dataset.
        out: folder of the new one.
        transform: gets the rows of a shard and gives those of the new one, as `make_row` makes them and under the same
            keys, some at a time; a function of the rows and the options alone.
        options: recorded among the options of the dataset.
        max_pixels: of a picture that is decoded.
        progress: makes a progress bar of the number of shards.

    Returns:
        folder, images, accepted.

    Raises:
        DiffuMaskError: the source is not finished, a dataset cannot be read or written, or `out` is in use, holds
            something else, or is one folder with the source.
    """
    source, out = Path(source), Path(out)
    _check_apart(source, out)
    there = read_manifest(source)
    paths = finished_shards(source, there)
    manifest = {**there, "options": {**there["options"], **asdict(options)}}
    with DatasetFolder(out) as place, progress(len(paths)) as bar:
        done = _begin(place, manifest, paths)
        task = bar.add_task("shards", total=len(paths))
        for index, path in enumerate(paths):
            if index not in done:
                names = read_content(path).names
                with _naming(path):
                    rows = _named(transform(read_shard(path, max_pixels=max_pixels)), names)
                    write_shard(out, index, rows, mark_of(manifest, index, names))
            bar.advance(task)
        flags = [row.accepted for row in read_rows(out, accepted_only=False, columns=["accepted"])]
        write_preview(out, PREVIEW, max_pixels=max_pixels)
    return {"folder": str(out), "images": len(flags), "accepted": sum(flags)}


def _check_apart(source: Path, out: Path) -> None:
    old, new = source.resolve(), out.resolve()
    if old == new or old in new.parents or new in old.parents:
        raise DiffuMaskError(f"{out} and {source} are one folder, or one lies in the other: name a folder of its own")


def _begin(place: DatasetFolder, manifest: dict[str, Any], sources: Sequence[Path]) -> set[int]:
    """Write the manifest, or check that the one that is there is the same; return the shards that are done."""
    there = place.begun()
    if there is None:
        place.write_manifest(manifest)
        return set()
    changes = [
        f"`{name.removeprefix('options.')}` {change}" if name.startswith("options.") else f"{name} {change}"
        for name, change in differences(there, manifest)
    ]
    if changes:
        raise DiffuMaskError(
            f"{place.path} holds another dataset, or one made with other options: {', '.join(changes)}; use another "
            "folder"
        )
    return done_shards(place.path, there, lambda index: names_digest(read_content(sources[index]).names))


def _named(rows: Iterator[dict[str, Any]], names: Names) -> Iterator[dict[str, Any]]:
    """Yield the rows that a transform gives, which are those that it got."""
    for (key, _), row in zip(names, rows, strict=True):
        if row["key"] != key:
            raise DiffuMaskError(f"it was to make {key} anew, and made {row['key']}")
        yield row


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in a transform's error which shard it was, where it does not."""
    try:
        yield
    except DiffuMaskError as error:
        raise error if str(path) in str(error) else DiffuMaskError(f"{path}: {error}") from error
