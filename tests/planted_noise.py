"""Masks spoiled on purpose, in known rows of a dataset whose images show one class each."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from diffumask_fast.dataset.derive import derive
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.schema import encode_png
from diffumask_fast.options import Options

KINDS = ("shifted", "swapped", "eroded", "emptied")


@dataclass(frozen=True)
class Planted(Options):
    """What is recorded in `dataset.json`."""

    planted: float


def plant(source: Path, out: Path, share: float, seed: int) -> dict[str, str]:
    """Write a dataset in which a share of each class's masks is spoiled; return key -> kind of those.

    The kinds are taken in turn: the mask is shifted by a quarter of its box to half of it, in both directions; mask and
    label become another class's; it is eroded to 0.3 to 0.5 of its area; it is emptied.
    """
    rng, ids, by_class = np.random.default_rng(seed), {}, defaultdict(list)
    for row in read_rows(source, columns=["key", "classes", "class_ids"]):
        ids[row.classes[0]] = row.class_ids[0]
        by_class[row.classes[0]].append(row.key)
    names, kinds, others = sorted(ids), {}, {}
    for place, name in enumerate(names):
        spoiled = rng.permutation(by_class[name])[: round(share * len(by_class[name]))]
        kinds |= {str(key): KINDS[(place + number) % len(KINDS)] for number, key in enumerate(spoiled)}
        # the next class, so that no class gains more rows than it loses
        others |= {str(key): names[(place + 1) % len(names)] for key in spoiled}

    def transform(rows):
        for row in rows:
            values, kind = row.values, kinds.get(row.key)
            if kind:
                mask = spoil(row.mask, kind, ids[others[row.key]], np.random.default_rng([seed, row.seed % 2**32]))
                values = values | {"mask": values["mask"] | {"bytes": encode_png(mask)}}
            if kind == "swapped":
                values |= {"classes": [others[row.key]], "class_ids": [ids[others[row.key]]]}
            yield values

    derive(source, out, transform, Planted(share))
    return kinds


def spoil(mask: np.ndarray, kind: str, other: int, rng: Any) -> np.ndarray:
    """Return a mask of one class, [H, W] uint8, spoiled."""
    value = int(mask[(mask != 0) & (mask != 255)][0])
    shown = mask == value
    rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
    if kind == "swapped":
        return np.where(shown, other, mask).astype(np.uint8)
    if kind == "emptied":
        return np.where(shown, 0, mask).astype(np.uint8)
    if kind == "eroded":
        depth = ndimage.distance_transform_edt(np.pad(shown, 1))[1:-1, 1:-1]
        rim = np.quantile(depth[shown], 1 - rng.uniform(0.3, 0.5))
        return np.where(shown & (depth <= rim), 0, mask).astype(np.uint8)
    moved = np.zeros_like(mask)
    down, right = (
        round(int(np.ptp(along) + 1) * rng.uniform(0.25, 0.5)) * int(rng.choice([-1, 1])) for along in (rows, columns)
    )
    y, x = np.nonzero(shown)
    inside = (0 <= y + down) & (y + down < mask.shape[0]) & (0 <= x + right) & (x + right < mask.shape[1])
    moved[y[inside] + down, x[inside] + right] = value
    return moved
