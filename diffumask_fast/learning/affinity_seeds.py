"""Where a map leaves no doubt: what AffinityNet learns from, by the rules of the paper's program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from diffumask_fast.dataset.derive import derive
from diffumask_fast.dataset.reader import Row
from diffumask_fast.dataset.remask import batches_of, tensors_of
from diffumask_fast.dataset.schema import encode_png
from diffumask_fast.dataset.storage import Place
from diffumask_fast.masks.crf import PRESETS, crf
from diffumask_fast.masks.make import IGNORE, quantise_maps, refine_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.options import MAX_PIXELS, Options, option

BIN = 0.01  # of the histogram of a map
STEP, LOWEST, HIGHEST = 0.03, 0.30, 0.75  # how the threshold moves, and from where on it stays
WINDOW = 15  # offsets of the CRF along each side
PLAIN = MaskOptions(refine="none")


class Rule(NamedTuple):
    """How the seeds of a class are found.

    The threshold is sought from `low` to `high`. Object is what exceeds the mean above it plus `object_shift`,
    background what does not exceed the mean below it plus `background_shift`. Each of the means has to leave
    `least_area` of the pixels on its far side.
    """

    low: float
    high: float
    object_shift: float
    background_shift: float
    least_area: float = 0.06


RULE = Rule(0.45, 0.53, -0.04, 0.02)
RULES = {
    "person": Rule(0.48, 0.55, 0.06, 0.06, 0.01),
    "sofa": Rule(0.48, 0.58, -0.01, 0.07),
    "aeroplane": Rule(0.48, 0.53, -0.02, 0.05),
    "boat": Rule(0.48, 0.53, -0.02, 0.05),
    "diningtable": Rule(0.55, 0.64, -0.04, 0.04),
}


@dataclass(frozen=True)
class SeedOptions(Options):
    """Recorded in the dataset of seeds."""

    reference_labels: bool = option(False, "Labels that a fault in the paper's program makes.")


def seed_levels(maps: Tensor, rule: Rule) -> tuple[float, float]:
    """Return above which value a map is object, and up to which it is background.

    Args:
        maps: one map, [H, W] in 0..1.
        rule: of its class.
    """
    values = maps.flatten().double()
    bins = range(round(rule.low / BIN), round(rule.high / BIN))
    index = (values / BIN + 1e-6).floor().long()  # a value on an edge is in the bin above it
    threshold = BIN * max(bins, key=lambda number: int((index == number).sum()))
    least = rule.least_area * len(values)
    while not _enough(values > _mean(values, values > threshold), least) and threshold >= LOWEST:
        threshold -= STEP
    while not _enough(values < _mean(values, values < threshold), least) and threshold <= HIGHEST:
        threshold += STEP
    above, below = _mean(values, values > threshold), _mean(values, values < threshold)
    return above + rule.object_shift, below + rule.background_shift


def _enough(chosen: Tensor, least: float) -> bool:
    return int(chosen.sum()) >= least


def _mean(values: Tensor, chosen: Tensor) -> float:
    """Return the mean of some values; NaN, which nothing exceeds, where there are none."""
    return values[chosen].mean().item()


def seed_labels(
    class_maps: Tensor, images: Tensor, class_ids: Tensor, names: Sequence[Sequence[str]], *, faulty: bool = False
) -> Tensor:
    """Label the pixels where it is sure what they are.

    Two hard labellings go through a CRF: a strict one, whose objects are then kept, and a generous one, whose
    background is. What is neither is ignored. A pixel that exceeds the level of several classes is of the one whose
    level it exceeds most.

    Args:
        class_maps: [B, K, h, w], of as many classes in each image.
        images: [B, H, W, 3] uint8.
        class_ids: [B, K] whole numbers 1..254.
        names: of the classes of each image, by which their rules are found.
        faulty: as the paper's program does, take the least likely label of the CRF for the likeliest. Then 0 stands in
            the core of objects, the id of the image's first class everywhere else, and nothing is ignored.

    Returns:
        [B, H, W] uint8: 0, class ids, 255 where nothing is known.
    """
    maps = refine_maps(quantise_maps(class_maps).float(), images, PLAIN)
    rules = [[RULES.get(name, RULE) for name in row] for row in names]
    levels = torch.tensor(
        [[seed_levels(one, rule) for one, rule in zip(*pair, strict=True)] for pair in zip(maps, rules, strict=True)],
        device=maps.device,
    )  # [B, K, 2]
    excess = maps[:, None] - levels.movedim(2, 1)[..., None, None].float()  # [B, 2, K, H, W]
    most, winner = excess.nan_to_num(-1).max(2)
    labels = torch.where(most > 0, winner + 1, 0)
    size = maps.shape[1] + 1
    # the reference's CRF has labels that no pixel bears; one stands for all of them
    found = crf(labels, size + 1 if faulty else size, images, PRESETS["seeds"], window=WINDOW)
    strict, generous = (1 - found if faulty else found).argmax(2).unbind(1)
    if faulty:
        strict = strict.clamp(max=1)
    ids = torch.cat([torch.full_like(class_ids[:, :1], IGNORE), class_ids], 1).long()
    seeds = ids.gather(1, strict.flatten(1)).view(strict.shape)
    return torch.where(generous == 0, 0, seeds).to(torch.uint8)


def write_seeds(
    source: Place,
    out: Place,
    *,
    faulty: bool = False,
    device: torch.device,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> None:
    """Write a dataset anew with seeds in the place of masks; run again, it goes on with the shards that are missing.

    Args:
        source: a dataset with stored maps.
        out: folder of the new one.
        faulty: see `seed_labels`.
        device: where seeds are made.
        max_pixels: of a picture that is decoded.
        progress: makes a progress bar of the number of shards.

    Raises:
        DiffuMaskError: as `derive`; or the source holds no maps.
    """

    def transform(rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        for batch in batches_of(rows):
            names = [row.classes for row in batch]
            labels = seed_labels(*tensors_of(batch, device), names, faulty=faulty).cpu().numpy()
            for row, pixels in zip(batch, labels, strict=True):
                picture = {"bytes": encode_png(pixels), "path": row.values["mask"]["path"]}
                yield {**row.values, "mask": picture}

    kind = SeedOptions(faulty)
    derive(source, out, transform, kind, max_pixels=max_pixels, progress=progress)
