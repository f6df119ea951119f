"""What `diffumask-fast augment` does: a dataset with new images made of its own, by the paper's four augmentations."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import Progress

from diffumask_fast.borrow import patched_threads
from diffumask_fast.dataset.derive import check_apart, write_derived
from diffumask_fast.dataset.lookup import RowLookup, class_names
from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.dataset.reader import Row
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmentations import Pixels, occlude, splice
from diffumask_fast.learning.augmenter import (
    blurred,
    check_others,
    draw_box,
    draw_corners,
    draw_length,
    draw_other,
    draw_parts,
    draw_seed,
    seen_from,
)
from diffumask_fast.learning.data import Example, checked_example
from diffumask_fast.learning.options import AugmentationOptions, AugmentOptions, span, splice_shares
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.prompts.request import Request

NOTHING_LEFT = "no class is left in the mask"


class Planned(NamedTuple):
    """A row of the new dataset, and the numbers of the rows it is made of; `kind` is "" for a row of the source."""

    key: str
    seed: int
    kind: str
    sources: tuple[int, ...]
    grid: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Made:
    """An augmented sample, as `make_row` takes it."""

    request: Request
    image: np.ndarray
    mask: np.ndarray
    quality: Sequence[float]
    accepted: bool
    reason: str
    drawn: bool
    maps: None = None


def augment(
    options: AugmentOptions, *, progress: Callable[[int], Progress] = lambda total: Progress(disable=True)
) -> dict[str, Any]:
    """Write a dataset with the images of another one and new ones made of them; run again, it is finished.

    New images follow the one that they are made of. Their `augmentation` says how, such as "splice 2x2" or "blur 13",
    their `sources` of which rows, their `seed` is that of what was drawn for them. Their classes are those that are
    left in the mask, their quality the least of their sources'; maps they have none, and splices no prompt.

    Args:
        options: what to augment, how, and where to.
        progress: makes a progress bar of the number of shards.

    Returns:
        folder, images, accepted.

    Raises:
        DiffuMaskError: the dataset is not finished, is augmented already or has no row to augment; patches are wanted
            and there is one image alone; or as `write_derived`.
    """
    source, out = options.source, options.out
    check_apart(source, out)
    rows = RowLookup(source, accepted_only=not options.all, max_pixels=options.reading.max_pixels)
    there = rows.manifest
    if "augment" in there["options"]:
        raise DiffuMaskError(f"{source} is augmented already: augment the dataset that it was made of")
    if not rows:
        raise DiffuMaskError(f"{source} holds no row to augment: let rejected rows count by `all`, or draw more")
    check_others(len(rows), options.augmentations.occlude)
    plan = plan_rows([(entry.key, entry.seed) for entry in rows.entries], options)
    names = [(planned.key, planned.seed) for planned in plan]
    size = there["options"]["shard_size"]
    recorded = {"seed": options.seed, "originals": options.originals, "all": options.all}
    manifest = {
        **{name: value for name, value in there.items() if name != "drift"},
        "options": {**there["options"], "augment": recorded | asdict(options.augmentations)},
        "plan": {"rows": len(plan), "shards": -(-len(plan) // size), "sha256": _digest(there["plan"], names)},
        "source": {name: there[name] for name in ("plan", "drift") if name in there},
    }
    maker, workers = _Maker(rows, options), torch.get_num_threads()
    with patched_threads(1), ThreadPoolExecutor(workers) as pool:

        def rows_of(shard: int) -> Iterator[dict[str, Any]]:
            planned = iter(plan[shard * size : (shard + 1) * size])
            while ahead := list(islice(planned, 2 * workers)):
                yield from pool.map(maker.row, ahead)

        return write_derived(
            source,
            out,
            manifest,
            lambda shard: names[shard * size : (shard + 1) * size],
            rows_of,
            max_pixels=options.reading.max_pixels,
            progress=progress,
        )


def plan_rows(there: Sequence[tuple[str, int]], options: AugmentOptions) -> list[Planned]:
    """Return all rows of the new dataset, in their order.

    Each image of the source is followed by what is made of it; splices are spread evenly among them.

    Args:
        there: key and seed of each row of the source.
        options: what is made of them.

    Raises:
        DiffuMaskError: there would be no row, or a key twice.
    """
    count, how = len(there), options.augmentations
    placed: list[tuple[Fraction, Planned]] = []
    if options.originals:
        placed += [(Fraction(index), Planned(*name, "", (index,))) for index, name in enumerate(there)]
    for kind in ("blur", "occlude", "perspective"):
        for copy, index in _chosen(count, Fraction(getattr(how, kind)), Random(draw_seed(options.seed, kind))):
            key = f"{there[index][0]}.{kind}-{copy}"
            seed = draw_seed(options.seed, key)
            others = (draw_other(Random(seed), index, count),) if kind == "occlude" else ()
            placed.append((Fraction(index), Planned(key, seed, kind, (index, *others))))
    for grid, share in splice_shares(how.splice).items():
        total = math.floor(share * count + Fraction(1, 2))
        for number in range(total):
            key = f"splice-{grid[0]}x{grid[1]}-{number:06d}"
            seed = draw_seed(options.seed, key)
            parts = tuple(draw_parts(Random(seed), math.prod(grid), count))
            placed.append((Fraction((2 * number + 1) * count, 2 * total), Planned(key, seed, "splice", parts, grid)))
    plan = [planned for _, planned in sorted(placed, key=lambda pair: pair[0])]
    if not plan:
        raise DiffuMaskError("no image would be made: give larger shares, or keep the originals")
    if len({planned.key for planned in plan}) < len(plan):
        raise DiffuMaskError("two rows would have one key: augment a dataset whose keys are not those of new rows")
    return plan


def _chosen(count: int, share: Fraction, rng: Random) -> Iterator[tuple[int, int]]:
    """Yield (number of the copy, row) of so many rows as the share says: each once before any comes twice."""
    total = math.floor(share * count + Fraction(1, 2))
    for copy in range(-(-total // count)):
        order = sorted(range(count), key=lambda _: rng.random())
        yield from ((copy, index) for index in order[: total - copy * count])


def _digest(source: dict[str, Any], names: Sequence[tuple[str, int]]) -> str:
    return hashlib.sha256(json.dumps([source, names], sort_keys=True).encode()).hexdigest()


class _Maker:
    """Makes the rows that are planned."""

    def __init__(self, rows: RowLookup, options: AugmentOptions) -> None:
        self._rows, self._how = rows, options.augmentations
        self._max_pixels = options.reading.max_pixels
        self._classes = class_names(rows)

    def row(self, planned: Planned) -> dict[str, Any]:
        """Return the values of a row."""
        if not planned.kind:
            return {**self._rows[planned.sources[0]].values, "augmentation": "", "sources": []}
        sources = [self._rows[index] for index in planned.sources]
        pixels, note = _augmented(planned, [self._pixels(row) for row in sources], self._how, self._max_pixels)
        made = make_row(self._sample(planned, pixels, sources))
        return {**made, "augmentation": note, "sources": [row.key for row in sources]}

    def _pixels(self, row: Row) -> Pixels:
        example = checked_example(Example(row.key, row.image, row.mask), self._classes)
        return example.image, example.labels

    def _sample(self, planned: Planned, pixels: Pixels, sources: list[Row]) -> Made:
        image, mask = pixels
        left = [number for number in np.unique(mask).tolist() if number not in (0, IGNORE)]
        ids = left or sorted({number for row in sources for number in row.class_ids})
        names = tuple(self._classes[number] for number in ids)
        rejected = [row.reason for row in sources if not row.accepted]
        reason = rejected[0] if rejected else "" if left else NOTHING_LEFT
        prompts = ("", "") if planned.kind == "splice" else (sources[0].prompt, sources[0].negative_prompt)
        request = Request(planned.key, *prompts, names, tuple(ids), planned.seed, names)
        quality = [_least_quality(number, sources) for number in ids]
        drawn = any(is_drawn(row.values["image"]["bytes"]) for row in sources)
        return Made(request, image, mask, quality, not rejected and bool(left), reason, drawn)


def _augmented(planned: Planned, parts: list[Pixels], how: AugmentationOptions, max_pixels: int) -> tuple[Pixels, str]:
    """Return the new picture, and what is noted of how it was made."""
    rng, shape = Random(draw_seed(planned.seed, "how")), parts[0][1].shape
    if planned.kind == "splice":
        rows, columns = planned.grid
        return splice(parts, planned.grid, how.splice_size, max_pixels), f"splice {rows}x{columns}"
    if planned.kind == "occlude":
        return occlude(parts[0], parts[1], draw_box(rng, shape, span(how.occlude_area))), "occlude"
    if planned.kind == "perspective":
        return seen_from(parts, {0: draw_corners(rng, how.perspective_shift)})[0], "perspective"
    length = draw_length(rng, shape, span(how.blur_lengths))
    return blurred(parts, {0: length})[0], f"blur {length}"


def _least_quality(number: int, sources: Sequence[Row]) -> float:
    pairs = (pair for row in sources for pair in zip(row.class_ids, row.quality, strict=True))
    return min((quality for class_id, quality in pairs if class_id == number), default=0.0)
