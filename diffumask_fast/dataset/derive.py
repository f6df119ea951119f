"""Dataset to dataset: what makes new shards of old ones, one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffumask_fast.dataset.folder import DatasetFolder, differences
from diffumask_fast.dataset.preview import write_preview
from diffumask_fast.dataset.reader import Row, read_manifest, read_shard
from diffumask_fast.dataset.writer import shard_path, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import Options

PREVIEW = 24

Transform = Callable[[list[Row]], list[dict[str, Any]]]


def derive(
    source: str | Path,
    out: str | Path,
    transform: Transform,
    options: Options,
    *,
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Write a dataset whose shards are made of those of another one; run again, it goes on with those that are missing.

    `dataset.json` is the source's with these options added; it is written before the first shard and never changes.

    Args:
        source: a finished dataset.
        out: folder of the new one.
        transform: gets the rows of a shard and gives those of the new one, as `make_row` makes them; a function of the
            rows and the options alone.
        options: recorded among the options of the dataset.
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
    paths = _shards(source, there)
    manifest = {**there, "options": {**there["options"], **asdict(options)}}
    images = accepted = 0
    with DatasetFolder(out) as place, progress(len(paths)) as bar:
        _begin(place, manifest)
        task = bar.add_task("shards", total=len(paths))
        for index, path in enumerate(paths):
            target = shard_path(out, index)
            if target.exists():
                values = [row.values for row in read_shard(target, ["accepted"])]
            else:
                with _naming(path):
                    values = transform(list(read_shard(path)))
                write_shard(out, index, values)
            images += len(values)
            accepted += sum(row["accepted"] for row in values)
            bar.advance(task)
        write_preview(out, PREVIEW)
    return {"folder": str(out), "images": images, "accepted": accepted}


def _check_apart(source: Path, out: Path) -> None:
    old, new = source.resolve(), out.resolve()
    if old == new or old in new.parents or new in old.parents:
        raise DiffuMaskError(f"{out} and {source} are one folder, or one lies in the other: name a folder of its own")


def _shards(source: Path, manifest: dict[str, Any]) -> list[Path]:
    """List the shards of a dataset.

    Raises:
        DiffuMaskError: one is missing.
    """
    paths = [shard_path(source, index) for index in range(manifest["plan"]["shards"])]
    missing = [path for path in paths if not path.exists()]
    if missing:
        first, command = missing[0].name, "run the command again that began it"
        raise DiffuMaskError(f"{source} is not finished: {first} is missing, one of {len(missing)}; {command}")
    return paths


def _begin(place: DatasetFolder, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that the one that is there is the same."""
    there = place.begun()
    if there is None:
        place.write_manifest(manifest)
        return
    changes = [
        f"`{name.removeprefix('options.')}` {change}" if name.startswith("options.") else f"{name} {change}"
        for name, change in differences(there, manifest)
    ]
    if changes:
        raise DiffuMaskError(
            f"{place.path} holds another dataset, or one made with other options: {', '.join(changes)}; use another "
            "folder"
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in a transform's error which shard it was."""
    try:
        yield
    except DiffuMaskError as error:
        raise DiffuMaskError(f"{path}: {error}") from error
