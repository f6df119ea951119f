"""Dataset to dataset: what makes new shards of old ones, one for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from rich.progress import Progress

from diffumask_fast.dataset.finish import finish
from diffumask_fast.dataset.folder import DatasetPlace, differences, open_folder
from diffumask_fast.dataset.reader import Row, read_manifest, read_rows, read_shard
from diffumask_fast.dataset.schema import CAPTIONS
from diffumask_fast.dataset.shard_check import (
    Names,
    done_shards,
    finished_shards,
    mark_of,
    names_digest,
    read_content,
)
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.dataset.writer import dump_manifest, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import MAX_PIXELS, Options

Transform = Callable[[Iterator[Row]], Iterator[dict[str, Any]]]


def derive(
    source: str | Place,
    out: str | Place,
    transform: Transform,
    options: Options,
    *,
    replaces: Collection[str] = (),
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
        replaces: names of options of the source that are true of the new one only where `options` has them.
        max_pixels: of a picture that is decoded.
        progress: makes a progress bar of the number of shards.

    Returns:
        folder, images, accepted.

    Raises:
        DiffuMaskError: the source is not finished, a dataset cannot be read or written, or `out` is in use, holds
            something else, or is one folder with the source.
    """
    source, out = place(source), place(out)
    check_apart(source, out)
    there = read_manifest(source)
    paths = finished_shards(source, there)
    kept = {name: value for name, value in there["options"].items() if name not in replaces}
    manifest = {**there, "options": {**kept, **asdict(options)}}

    def names_of(index: int) -> Names:
        return read_content(paths[index]).names

    def rows_of(index: int) -> Iterator[dict[str, Any]]:
        with _naming(paths[index]):
            yield from _named(transform(read_shard(paths[index], max_pixels=max_pixels)), names_of(index))

    return write_derived(source, out, manifest, names_of, rows_of, max_pixels=max_pixels, progress=progress)


def write_derived(
    source: Place,
    out: Place,
    manifest: dict[str, Any],
    names_of: Callable[[int], Names],
    rows_of: Callable[[int], Iterator[dict[str, Any]]],
    *,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Write the shards of a dataset that is made of another one; run again, it goes on with those that are missing.

    Args:
        source: folder of that one.
        out: folder of the new one.
        manifest: its `dataset.json`, written before the first shard.
        names_of: gives the keys and seeds of a shard's rows.
        rows_of: makes a shard's rows, under those names.
        max_pixels: of a picture that is decoded for the preview.
        progress: makes a progress bar of the number of shards.

    Returns:
        folder, images, accepted.

    Raises:
        DiffuMaskError: `out` cannot be written, is in use, or holds something else.
    """
    manifest = json.loads(dump_manifest(manifest))  # JSON's types, as in the one that may be there
    shards = manifest["plan"]["shards"]
    with open_folder(out) as folder, progress(shards) as bar:
        done = _begin(folder, manifest, names_of)
        if "retrieved" in manifest["options"] and (source / CAPTIONS).exists():
            folder.keep_captions((source / CAPTIONS).read_bytes())
        task = bar.add_task("shards", total=shards)
        for index in range(shards):
            if index not in done:
                write_shard(out, index, rows_of(index), mark_of(manifest, index, names_of(index)))
            bar.advance(task)
        flags = [row.accepted for row in read_rows(out, accepted_only=False, columns=["accepted"])]
        finish(out, source, max_pixels=max_pixels)
    return {"folder": str(out), "images": len(flags), "accepted": sum(flags)}


def check_apart(source: Place, out: Place) -> None:
    """Raise where two datasets are one folder, or one lies in the other."""
    old, new = (one.resolve() if isinstance(one, Path) else PurePosixPath(one.url) for one in (source, out))
    if old == new or old in new.parents or new in old.parents:
        raise DiffuMaskError(f"{out} and {source} are one folder, or one lies in the other: name a folder of its own")


def _begin(folder: DatasetPlace, manifest: dict[str, Any], names_of: Callable[[int], Names]) -> set[int]:
    """Write the manifest, or check that the one that is there is the same; return the shards that are done."""
    there = folder.begun()
    if there is None:
        folder.write_manifest(manifest)
        return set()
    found = dict(differences(there, manifest))
    options = [f"`{name.split('.')[-1]}` {change}" for name, change in found.items() if name.startswith("options.")]
    changes = options or [f"{name} {change}" for name, change in found.items()]
    if changes:
        raise DiffuMaskError(
            f"{folder.path} holds another dataset, or one made with other options: {', '.join(changes)}; use another "
            "folder"
        )
    return done_shards(folder.path, there, lambda index: names_digest(names_of(index)))


def _named(rows: Iterator[dict[str, Any]], names: Names) -> Iterator[dict[str, Any]]:
    """Yield the rows that a transform gives, which are those that it got."""
    for (key, _), row in zip(names, rows, strict=True):
        if row["key"] != key:
            raise DiffuMaskError(f"it was to make {key} anew, and made {row['key']}")
        yield row


@contextmanager
def _naming(path: Place) -> Iterator[None]:
    """Say in a transform's error which shard it was, where it does not."""
    try:
        yield
    except DiffuMaskError as error:
        raise error if str(path) in str(error) else DiffuMaskError(f"{path}: {error}") from error
