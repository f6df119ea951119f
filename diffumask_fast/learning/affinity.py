"""What `diffumask-fast affinity` does: masks of stored maps by the paper's AffinityNet, which learns from the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.dataset.derive import check_apart
from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.dataset.remask import remask
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.affinity_net import AffinityNet, affinity_maps, load_affinity, new_affinity
from diffumask_fast.learning.affinity_seeds import PLAIN, write_seeds
from diffumask_fast.learning.cross_validation import Part
from diffumask_fast.learning.data import Dataset, SegmentationData
from diffumask_fast.learning.options import AffinityLearning, AffinityOptions, LearnOptions
from diffumask_fast.learning.training import Kind, Stage, steps_and_rate, train_stages
from diffumask_fast.learning.work_folder import work_folder
from diffumask_fast.masks.make import make_masks, quantise_maps, refine_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu
from diffumask_fast.models.device import resolve_device

FOLDER = "affinity"  # in the new dataset: seeds and nets
AFFINITY = Kind("backbone", new_affinity)


def make_affinity_masks(
    options: AffinityOptions, *, progress: Callable[[int], Progress] = lambda total: Progress(disable=True)
) -> dict[str, Any]:
    """Write a dataset anew with masks that AffinityNet has a part in; run again, it is finished.

    Seeds are cut from the attention maps of the source, a net learns from them which cells belong together, and maps
    that walk at random along its affinities are the estimate that the adaptive threshold goes by (DiffuMask, section
    3.3), or the masks themselves. Seeds and nets stay in `OUT/affinity`.

    Args:
        options: the flags.
        progress: makes progress bars.

    Returns:
        folder, images, accepted, advice (what to change when no image is accepted).

    Raises:
        DiffuMaskError: the source holds no maps or is augmented, `out` is an address; or as `train` and `derive`.
    """
    check_apart(options.source, options.out)
    recorded = read_manifest(options.source)["options"]
    if "augment" in recorded or "affinity" in recorded:
        done = "augmented" if "augment" in recorded else "made by affinity"
        raise DiffuMaskError(f"{options.source} is {done}: name the dataset that it was made of")
    learning = options.masks.affinity
    folder = work_folder(options.out, FOLDER, "nets", "name a folder")
    device = resolve_device(options.device)
    write_seeds(
        options.source, folder / "seeds", faulty=learning.reference_labels, device=device,
        max_pixels=options.reading.max_pixels, progress=progress,
    )  # fmt: skip
    nets = _trained(options, folder, progress)
    return remask(
        options.source, options.out, options.masks, make=AffinityMasks(nets, learning), device=device,
        max_pixels=options.reading.max_pixels, progress=progress,
    )  # fmt: skip


class AffinityMasks:
    """Makes masks as `make_masks` does, with the affinity map's help.

    Args:
        nets: id of the class -> its net; 0 -> that of all classes.
        learning: what becomes of the affinity map.
    """

    def __init__(self, nets: Mapping[int, AffinityNet], learning: AffinityLearning) -> None:
        self.nets, self.learning = nets, learning

    def __call__(
        self, class_maps: Tensor, images: Tensor, options: MaskOptions, class_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Make masks; see `make_masks`."""
        walked = self.maps(class_maps, images, class_ids)
        if self.learning.mask == "affinity":
            words = {one.name: getattr(options, one.name) for one in fields(MaskOptions)}
            words["threshold"] = self.learning.affinity_threshold
            return make_masks(walked, images, MaskOptions(**words), class_ids)
        return make_masks(class_maps, images, options, class_ids, self.estimate(walked, images))

    def maps(self, class_maps: Tensor, images: Tensor, class_ids: Tensor) -> Tensor:
        """Return affinity maps [B, K, h, w], 0 to 1, of class maps [B, K, h, w], images [B, H, W, 3] and ids [B, K]."""
        maps = refine_maps(quantise_maps(class_maps).float(), images, PLAIN)
        beta, steps = self.learning.beta, self.learning.walk
        if 0 in self.nets:
            return affinity_maps(self.nets[0], images, maps, beta, steps)
        rows = [
            torch.cat(
                [
                    affinity_maps(self.nets[number], image, one, beta, steps)
                    for number, one in zip(ids, row, strict=True)
                ],
                1,
            )
            for ids, image, row in zip(class_ids.tolist(), images.split(1), _each(maps), strict=True)
        ]
        return torch.cat(rows)

    def estimate(self, walked: Tensor, images: Tensor) -> Tensor:
        """Return where affinity maps [B, K, h, w] put each class, [B, K, H, W] bool."""
        maps = F.interpolate(walked, images.shape[1:3], mode="bilinear", align_corners=False)
        maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        cut = self.learning.affinity_threshold
        levels = otsu(maps)[..., None, None] if cut == "otsu" else cut
        return (maps > levels) & (maps == maps.amax(1, keepdim=True))


def _each(maps: Tensor) -> Iterator[list[Tensor]]:
    """Yield the maps [1, 1, H, W] of each image."""
    for row in maps.split(1):
        yield list(row.split(1, 1))


def _trained(options: AffinityOptions, folder: Path, progress: Callable[[int], Progress]) -> dict[int, AffinityNet]:
    """Train the nets that are not there yet, and return all; the key 0 stands for all classes."""
    learning = options.masks.affinity
    data = Dataset(folder / "seeds", max_pixels=options.reading.max_pixels)
    parts: dict[int, SegmentationData] = {0: data}
    if learning.per_class:
        ids = [entry.class_ids for entry in data.rows.entries]
        numbers = sorted({number for row in ids for number in row})
        parts = {number: Part(data, [place for place, row in enumerate(ids) if number in row]) for number in numbers}
    learn = LearnOptions(
        segmenter=learning.backbone, steps=learning.steps, batch_size=learning.batch_size, lr=learning.lr,
        size=learning.size, augment="none", seed=learning.seed, dtype=learning.dtype,
    )  # fmt: skip
    device, nets = resolve_device(options.device), {}
    for number, part in parts.items():
        place = folder / (f"class-{number}" if number else "net")
        steps, rate = steps_and_rate(learn, len(part))
        train_stages(
            [Stage(part, steps, rate)], place, learn, kind=AFFINITY, device=options.device,
            save_every=options.save_every, progress=progress,
        )  # fmt: skip
        nets[number] = load_affinity(place, device)
    return nets
