"""Segmenters that have not seen what they judge: as many as there are folds, each trained on all folds but one."""

from __future__ import annotations

import io
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from diffumask_fast.dataset.writer import new_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.class_lists import channels
from diffumask_fast.learning.data import Example, SegmentationData
from diffumask_fast.learning.options import LearnOptions
from diffumask_fast.learning.segmenters import TransformersSegmenter, load_segmenter
from diffumask_fast.learning.training import Stage, steps_and_rate, train_stages
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.own_files import check_place

SIGN = "diffumask-fast"  # the first member of an archive that we wrote, by which it may be written over
Scores = dict[str, dict[str, float]]  # name of the example -> class -> score


class Part:
    """Some examples of data, by their numbers; with the classes of all."""

    def __init__(self, data: SegmentationData, numbers: Sequence[int]) -> None:
        self._data, self._numbers = data, numbers
        self.classes: Mapping[int, str] = data.classes
        self.names: Sequence[str] = [data.names[number] for number in numbers]
        self.origin = data.origin

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        return self._data[self._numbers[index]]


def deal(classes: Sequence[Sequence[str]], folds: int, seed: int) -> np.ndarray:
    """Return the fold of each example; each fold holds as many of a class as the others, or nearly.

    Examples are dealt in groups, by the rarest of their classes: of each group a fold gets as many as the others, or
    one less.

    Args:
        classes: of each example.
        folds: how many.
        seed: of the order in which a group is dealt.

    Raises:
        DiffuMaskError: a class is in fewer examples than there are folds, or in those of one fold alone.
    """
    count = Counter(name for names in classes for name in set(names))
    members: dict[str, list[int]] = defaultdict(list)
    for number, names in enumerate(classes):
        members[min(names, key=lambda name: (count[name], name), default="")].append(number)
    for name in sorted(count):
        if count[name] < folds:
            raise DiffuMaskError(
                f"{name} has {count[name]} images for {folds} folds, and a fold would be without it: draw more of "
                f"{name}, or give `folds={max(2, count[name])}`"
            )
    result = np.zeros(len(classes), int)
    for place, (_, numbers) in enumerate(sorted(members.items())):
        order = np.random.default_rng([seed, place]).permutation(numbers)
        result[order] = (np.arange(len(order)) + place) % folds
    pairs = {(name, int(fold)) for names, fold in zip(classes, result, strict=True) for name in names}
    for name, held in sorted(Counter(name for name, _ in pairs).items()):
        if held == 1:
            raise DiffuMaskError(
                f"all images of {name} came into one fold: give another `seed`, or draw more of {name}"
            )
    return result


def train_folds(
    data: SegmentationData,
    fold_of: np.ndarray,
    out: Path,
    options: LearnOptions,
    *,
    without: Collection[str] = (),
    device: str = "auto",
    progress: Callable[[int], Progress] = lambda total: Progress(disable=True),
) -> list[TransformersSegmenter]:
    """Train a segmenter for each fold on the examples of the others; run again, those that are finished are read.

    Args:
        data: all examples.
        fold_of: the fold of each example.
        out: folder in which each segmenter gets a folder.
        options: how they are trained.
        without: names of examples that none of them learns from.
        device: where.
        progress: makes a progress bar of the number of steps of one segmenter.

    Raises:
        DiffuMaskError: as `train`.
    """
    segmenters = []
    learnt = np.array([name not in without for name in data.names])
    for fold in range(int(fold_of.max()) + 1):
        part = Part(data, np.flatnonzero((fold_of != fold) & learnt).tolist())
        steps, rate = steps_and_rate(options, len(part))
        folder = out / f"fold-{fold}"
        train_stages([Stage(part, steps, rate)], folder, options, device=device, progress=progress)
        segmenters.append(load_segmenter(folder))
    return segmenters


def held_out_predictions(
    data: SegmentationData, fold_of: np.ndarray, segmenters: Sequence[TransformersSegmenter], device: torch.device
) -> Iterator[tuple[Example, Tensor]]:
    """Yield each example with its probabilities [C, H, W] by the segmenter that has not seen it."""
    for segmenter in segmenters:
        segmenter.model.to(device)
    for number, fold in enumerate(fold_of):
        example = data[number]
        yield example, segmenters[fold].predict(example.image[None])[0].cpu()


def agreement(example: Example, probabilities: np.ndarray, classes: Sequence[int], value: int) -> float:
    """Return how well the mask of one class agrees with a prediction, from 0 to 1.

    It is the overlap of the mask with the object that is predicted, times the fourth root of how probable an object of
    its class is in it. A pixel outside counts against the mask by the probability that an object is there. One inside
    does so only where background is at least as probable as in the mean of the pixels that are labelled so (the rule of
    confident learning, Northcutt et al., JAIR 2021): a segmenter that has seen few images is seldom sure of objects,
    and is right where it is sure. The root lets a wrong class, or half of an object, weigh more than a doubt.

    Args:
        example: whose labels are judged; what is 255 in them, or another class, is left out.
        probabilities: [C, H, W] of background and classes, in the order of `classes`.
        classes: ids in the labels, 0 first.
        value: id of the class that is judged; where the labels do not show it, the result is 0.
    """
    mask, outside = example.labels == value, example.labels == 0
    if not mask.any():
        return 0.0
    background = probabilities[0]
    sure = background[outside].mean() if outside.any() else 0.5
    kept = np.count_nonzero(background[mask] < sure)
    overlap = kept / (np.count_nonzero(mask) + (1 - background[outside]).sum())
    inside = probabilities[1:, mask].mean(1)
    own = inside[list(classes).index(value) - 1] / max(inside.max(), 1e-12)  # beside the likeliest class
    return float(overlap * (own * (1 - background[mask].mean())) ** 0.25)


class CleanlabFile:
    """An archive of arrays (.npz, no pickle) that holds what `cleanlab.segmentation.find_label_issues` takes.

    `labels` [N, H, W] uint8, numbers of the `classes`; `pred_probs` [N, C, H, W] float32; `names` of the images. What
    is 255 in a mask gets the label that is predicted there, so that no issue is found in it. It is written image by
    image, and is at its place when all are there.

    Args:
        path: of the file.
        data: whose examples are added in their order.

    Raises:
        DiffuMaskError: images differ in size, somebody else's file is there, or there is no such folder.
    """

    def __init__(self, path: Path, data: SegmentationData) -> None:
        check_place(path, SIGN)
        self._path, self._data, self._table = path, data, channels(data.classes)

    def write(self, predictions: Iterator[tuple[Example, Tensor]]) -> Iterator[tuple[Example, Tensor]]:
        """Pass predictions on, and write them."""
        labels: list[np.ndarray] = []
        with new_file(self._path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo(f"{SIGN}.npy"), _npy(np.zeros(0, np.uint8)))
            member = zipfile.ZipInfo("pred_probs.npy")
            with archive.open(member, "w", force_zip64=True) as stream:
                for example, probabilities in predictions:
                    pixels = probabilities.numpy()
                    if not labels:
                        self._begin(stream, pixels.shape)
                    elif labels[0].shape != pixels.shape[1:]:
                        raise DiffuMaskError(
                            f"{example.name} has another size than the images before it, and cleanlab takes one array: "
                            "leave out `export_cleanlab`, or bring all images to one size"
                        )
                    stream.write(np.ascontiguousarray(pixels, "<f4").tobytes())
                    numbers = self._table[example.labels]
                    labels.append(np.where(numbers == IGNORE, pixels.argmax(0), numbers).astype(np.uint8))
                    yield example, probabilities
            names = [self._data.classes[value] for value in sorted(self._data.classes)]
            arrays = {"labels": np.stack(labels), "classes": np.array(names), "names": np.array(self._data.names)}
            for name, values in arrays.items():
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy(values))

    def _begin(self, stream: Any, shape: tuple[int, ...]) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self._data), *shape)}
        np.lib.format.write_array_header_1_0(stream, header)


def _npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()
