"""What `diffumask-fast affinity` does: masks of stored maps by the paper's AffinityNet, which learns from the maps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.dataset.derive import check_apart
from diffumask_fast.dataset.lookup import RowLookup
from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.schema import MANIFEST, PREVIEW
from diffumask_fast.dataset.storage import Place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.affinity_net import AffinityNet, affinity_maps, load_affinity, new_affinity
from diffumask_fast.learning.affinity_seeds import PLAIN, write_seeds
from diffumask_fast.learning.cross_validation import Part
from diffumask_fast.learning.data import Dataset, SegmentationData
from diffumask_fast.learning.options import AffinityLearning, AffinityOptions, LearnOptions
from diffumask_fast.learning.segmenters import RECORD
from diffumask_fast.learning.training import Kind, Stage, steps_and_rate, train_stages
from diffumask_fast.learning.work_folder import begin, work_folder
from diffumask_fast.masks.make import make_masks, quantise_maps, refine_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu
from diffumask_fast.models.device import resolve_device

FOLDER = "affinity"  # in the new dataset: the nets, and until it is finished the seeds
SEEDS = "seeds"
ALL = 0  # in the place of a class's id: the net of all classes
AFFINITY = Kind("backbone", new_affinity)


def make_affinity_masks(
    options: AffinityOptions, *, progress: Callable[[int], Progress] = lambda total: Progress(disable=True)
) -> dict[str, Any]:
    """Write a dataset anew with masks that AffinityNet has a part in; run again, it is finished.

    Seeds are cut from the attention maps of the source, a net learns from them which cells belong together, and maps
    that walk at random along its affinities are the estimate that the adaptive threshold goes by (DiffuMask, section
    3.3), or the masks themselves. The nets stay in `OUT/affinity`, with a picture of the seeds.

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
    numbers = _parts(options.source, options)  # what cannot be learnt from is refused before seeds are made
    begin(folder, options.masks)
    device = resolve_device(options.device)
    trained = all((folder / _name(number) / RECORD).exists() for number in numbers)
    if not (trained and (options.out / MANIFEST).exists()):  # nets without it may be of another source
        write_seeds(
            options.source, folder / SEEDS, faulty=learning.reference_labels, device=device,
            max_pixels=options.reading.max_pixels, progress=progress,
        )  # fmt: skip
        _train(options, folder, progress)
    summary = remask(
        options.source, options.out, options.masks, make=AffinityMasks(folder, learning, device), device=device,
        max_pixels=options.reading.max_pixels, progress=progress,
    )  # fmt: skip
    if (folder / SEEDS / PREVIEW).exists():
        os.replace(folder / SEEDS / PREVIEW, folder / f"{SEEDS}.png")
    shutil.rmtree(folder / SEEDS, ignore_errors=True)
    return summary


class AffinityMasks:
    """Makes masks as `make_masks` does, with the affinity map's help.

    Args:
        folder: of the nets, which are read when they are needed.
        learning: which nets there are, and what becomes of the affinity map.
        device: where they run.
    """

    def __init__(self, folder: Path, learning: AffinityLearning, device: torch.device) -> None:
        self.folder, self.learning, self.device = folder, learning, device
        self._nets: dict[int, AffinityNet] = {}

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
        if not self.learning.per_class:
            return self._walked(ALL, images, maps)
        rows = [
            torch.cat([self._walked(number, image, one) for number, one in zip(ids, row.split(1, 1), strict=True)], 1)
            for ids, image, row in zip(class_ids.tolist(), images.split(1), maps.split(1), strict=True)
        ]
        return torch.cat(rows)

    def _walked(self, number: int, images: Tensor, maps: Tensor) -> Tensor:
        if number not in self._nets:
            self._nets[number] = load_affinity(self.folder / _name(number), self.device)
        return affinity_maps(self._nets[number], images, maps, self.learning.beta, self.learning.walk)

    def estimate(self, walked: Tensor, images: Tensor) -> Tensor:
        """Return where affinity maps [B, K, h, w] put each class, [B, K, H, W] bool."""
        maps = F.interpolate(walked, images.shape[1:3], mode="bilinear", align_corners=False)
        maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        cut = self.learning.affinity_threshold
        levels = otsu(maps)[..., None, None] if cut == "otsu" else cut
        return (maps > levels) & (maps == maps.amax(1, keepdim=True))


def _name(number: int) -> str:
    return f"class-{number}" if number else "net"


def _parts(place: Place, options: AffinityOptions) -> dict[int, SegmentationData]:
    """Return what each net learns from: all examples, or those of each class that any row, also a rejected one, bears.

    Raises:
        DiffuMaskError: no row is accepted, or none of a class.
    """
    data = Dataset(place, max_pixels=options.reading.max_pixels)
    if not options.masks.affinity.per_class:
        return {ALL: data}
    rows = RowLookup(place, accepted_only=False).entries
    names = {number: name for row in rows for number, name in zip(row.class_ids, row.classes, strict=True)}
    places = {
        number: [at for at, row in enumerate(data.rows.entries) if number in row.class_ids] for number in sorted(names)
    }
    for number, some in places.items():
        if not some:
            raise DiffuMaskError(f"no image of {names[number]} is accepted: leave out `per_class`, or draw more of it")
    return {number: Part(data, some) for number, some in places.items()}


def _train(options: AffinityOptions, folder: Path, progress: Callable[[int], Progress]) -> None:
    """Train the nets that are not there yet: one for all classes, or one for each."""
    learning = options.masks.affinity
    learn = LearnOptions(
        segmenter=learning.backbone, steps=learning.steps, batch_size=learning.batch_size, lr=learning.lr,
        size=learning.size, augment="none", seed=learning.seed, dtype=learning.dtype,
    )  # fmt: skip
    for number, part in _parts(folder / SEEDS, options).items():
        steps, rate = steps_and_rate(learn, len(part))
        train_stages(
            [Stage(part, steps, rate)], folder / _name(number), learn, kind=AFFINITY, device=options.device,
            save_every=options.save_every, progress=progress,
        )  # fmt: skip
