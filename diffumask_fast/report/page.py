"""What `diffumask-fast report` does: one HTML file that shows a dataset and asks nothing of the network."""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffumask_fast.dataset.reader import open_shard, read_manifest, read_shard, shard_paths
from diffumask_fast.dataset.shard_check import check_names, finished_shards
from diffumask_fast.dataset.storage import Place
from diffumask_fast.dataset.writer import write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import check_place
from diffumask_fast.prompts.class_entry import words_of
from diffumask_fast.prompts.vocabulary import palette_of
from diffumask_fast.report.entries import entry_of, rows_at, within
from diffumask_fast.report.options import ReportOptions
from diffumask_fast.report.page_data import page_data
from diffumask_fast.report.survey import Look, Survey, look_at

PAGE = "report.html"
SIGN = 'content="diffumask-fast report"'
MOST_GROUPS, MOST_TWINS = 12, 6  # of near-duplicates that are shown; of one group
MOST_LOOKING = 8
COLUMNS = ("key", "image", "mask", "classes", "class_ids", "quality", "accepted", "reason", "augmentation")


def write_report(
    options: ReportOptions, *, progress: Callable[[int], Progress] = lambda total: Progress(disable=True)
) -> dict[str, Any]:
    """Write a page that shows a dataset: figures of all its rows, pictures of some of them.

    Equal datasets give equal pages. A dataset that is not finished is shown as far as it is there.

    Args:
        options: which dataset, and where to.
        progress: makes a progress bar of the number of rows.

    Returns:
        page, images, accepted, shown (images with a picture in the page), twins (images nearly equal to another one).

    Raises:
        DiffuMaskError: the dataset cannot be read or holds no row, or the page cannot be written or is another's file.

    Example:
        write_report(ReportOptions(Path("demo")))
    """
    folder, max_pixels = options.source, options.reading.max_pixels
    out = options.out or _page_of(folder)
    manifest = read_manifest(folder)
    paths = _shards(folder, manifest)
    check_place(out, SIGN)
    classes, palette = manifest["classes"], palette_of(manifest["classes"])
    survey = Survey({entry["id"]: entry["name"] for entry in classes if "id" in entry}, words_of(classes))
    total = sum(map(_num_rows, paths))
    with progress(total) as bar:
        task = bar.add_task("looking", total=total)
        for look in _looks(paths, max_pixels):
            survey.add(look)
            bar.advance(task)
        twins = survey.twins()
        groups = {name: [numbers] for name, numbers in survey.views().items()}
        groups["twins"] = [group[:MOST_TWINS] for group in twins[:MOST_GROUPS]]
        wanted = _by_turns([group for some in groups.values() for group in some])
        task, entries = bar.add_task("pictures", total=len(wanted)), {}
        for number, row in rows_at(paths, set(wanted), max_pixels):
            entries[number] = entry_of(row, palette)
            bar.advance(task)
    entries = within(entries, wanted)
    missing = manifest["plan"]["shards"] - len(paths)
    write_file(out, _page(page_data(manifest, missing, survey, twins, groups, entries)))
    return {
        "page": str(out), "images": survey.rows, "accepted": survey.accepted, "shown": len(entries),
        "twins": sum(map(len, twins)),
    }  # fmt: skip


def _page_of(folder: Place) -> Path:
    if isinstance(folder, Path):
        return folder / PAGE
    raise DiffuMaskError(f"{folder} is no local folder: say by `out` where the page goes")


def _shards(folder: Place, manifest: dict[str, Any]) -> list[Place]:
    """List the shards that are there.

    Raises:
        DiffuMaskError: there is none yet, or one that is not of this dataset.
    """
    check_names(folder, manifest)
    paths = shard_paths(folder)
    if not paths:
        raise DiffuMaskError(f"{folder} holds no row yet: run the command again that began it")
    return finished_shards(folder, manifest) if len(paths) == manifest["plan"]["shards"] else paths


def _num_rows(path: Place) -> int:
    with open_shard(path) as file:
        return int(file.metadata.num_rows)


def _looks(paths: Sequence[Place], max_pixels: int) -> Iterator[Look]:
    """Look at all rows in order, some at a time."""
    rows = enumerate(row for path in paths for row in read_shard(path, COLUMNS, max_pixels))
    workers = min(MOST_LOOKING, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, "look") as pool:
        while ahead := list(islice(rows, 4 * workers)):
            yield from pool.map(look_at, *zip(*ahead, strict=True))


def _by_turns(groups: list[list[int]]) -> list[int]:
    """Put the first of each group first, then the second of each, and so on; each number once."""
    return list(dict.fromkeys(one for turn in zip_longest(*groups) for one in turn if one is not None))


def _page(data: dict[str, Any]) -> bytes:
    """Put figures, style and script into the page; whatever the figures say, they stay figures."""
    room = files("diffumask_fast.report")
    style, script = (room.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    parts = {
        "style": style,
        "style_hash": _digest(style),
        "script": script,
        "script_hash": _digest(script),
        # `<` as an escape, so that no text ends the element that it is in
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    template = room.joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _digest(text: str) -> str:
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()
