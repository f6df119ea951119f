"""What `diffumask-fast import` does: other programs' images and masks as a dataset, on which all commands work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from rich.progress import Progress

from diffumask_fast.convert.names import key_of
from diffumask_fast.convert.options import ImportOptions
from diffumask_fast.convert.sources import Head, Pixels, Source
from diffumask_fast.dataset.derive import check_apart
from diffumask_fast.dataset.finish import finish
from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.matching import phrase_in
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary


@dataclass(frozen=True)
class Imported:
    """A sample, as `make_row` takes it."""

    request: Request
    image: np.ndarray
    mask: np.ndarray
    quality: list[float]
    maps: np.ndarray | None
    accepted: bool
    reason: str
    drawn: bool


def import_folder(
    options: ImportOptions, *, progress: Callable[[int], Progress] = lambda total: Progress(disable=True)
) -> dict[str, Any]:
    """Write other programs' images and masks as a dataset; run again, it is finished.

    All masks are read once before anything is written, so what is wrong with them is said first.

    Args:
        options: what and where to.
        progress: makes a progress bar of the number of images.

    Returns:
        folder, images, accepted, left_out: images without a class, which a dataset does not hold.

    Raises:
        DiffuMaskError: a file is missing, damaged or not of the layout, a class cannot be named so, or the dataset's
            folder cannot be written, is in use, or holds something else.

    Example:
        import_folder(ImportOptions(Path("VOC2012"), Path("voc"), "voc", split="train"))
    """
    check_apart(options.source, options.out)
    source = _open(options)
    vocabulary = Vocabulary(tuple(ClassEntry(n, name, name) for n, name in sorted(source.classes.items()) if n))
    with progress(len(source)) as bar:
        task = bar.add_task("read", total=len(source))
        requests, places, keys = [], [], set[str]()
        for index in range(len(source)):
            head = source.head(index)
            if head.class_ids:
                requests.append(_request(head, index, source, keys))
                places.append(index)
            bar.advance(task)
        if not requests:
            raise DiffuMaskError(f"no image in {options.source} has a class in its mask: there is nothing to import")
        accepted = _write(options, source, vocabulary, requests, places, bar)
    left_out = len(source) - len(requests)
    return {"folder": str(options.out), "images": len(requests), "accepted": accepted, "left_out": left_out}


def _write(
    options: ImportOptions,
    source: Source,
    vocabulary: Vocabulary,
    requests: list[Request],
    places: list[int],
    bar: Progress,
) -> int:
    """Write the shards that are missing, preview and card; return how many rows are accepted."""
    task = bar.add_task("write", total=len(requests))
    with open_run(options.out, requests, *_record(options), options.shard_size, vocabulary=vocabulary) as run:
        missing = run.missing_shards()
        bar.advance(task, len(requests) - sum(len(run.requests_of(index)) for index in missing))
        for index in missing:
            first, samples = index * options.shard_size, []
            for offset, request in enumerate(run.requests_of(index)):
                samples.append(_sample(request, source.pixels(places[first + offset])))
                bar.advance(task)
            run.write(index, samples)
        finish(options.out, None, max_pixels=options.reading.max_pixels)
        return sum(run.accepted_flags())


def _open(options: ImportOptions) -> Source:
    from diffumask_fast.convert.coco_folder import CocoFolder
    from diffumask_fast.convert.reference_folder import ReferenceFolder
    from diffumask_fast.convert.voc_folder import VocFolder

    kinds: dict[str, Callable[..., Source]] = {"voc": VocFolder, "coco": CocoFolder, "reference": ReferenceFolder}
    return kinds[options.layout](options.source, options.split, options.reading.max_pixels)


def _record(options: ImportOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options and environment of the dataset."""
    libraries = {library: metadata.version(library) for library in ("numpy", "pillow", "pyarrow")}
    return {"import": options.layout, "split": options.split}, libraries


def _request(head: Head, index: int, source: Source, keys: set[str]) -> Request:
    key = key_of(head.name, index)
    if key.casefold() in keys:
        key = f"{key}-{index:06d}"
    keys.add(key.casefold())
    names = tuple(source.classes[class_id] for class_id in head.class_ids)
    seed = index if head.seed is None else head.seed
    phrases = tuple(phrase_in(head.prompt, (name,)) for name in names)
    return Request(key, head.prompt, "", phrases, head.class_ids, seed, names)


def _sample(request: Request, pixels: Pixels) -> Imported:
    quality = [1.0] * len(request.class_ids) if pixels.quality is None else list(pixels.quality)
    accepted, reason = not pixels.reason, pixels.reason
    return Imported(request, pixels.image, pixels.mask, quality, pixels.maps, accepted, reason, pixels.drawn)
