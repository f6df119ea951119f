"""What `diffumask-fast filter` does: the paper's noise learning. In each class, what ranks lowest is pruned."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.progress import Progress
from torch import Tensor

from diffumask_fast.dataset.derive import check_apart, derive
from diffumask_fast.dataset.reader import Row, read_rows
from diffumask_fast.dataset.writer import write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.cross_validation import (
    CleanlabFile,
    Scores,
    agreement,
    deal,
    held_out_predictions,
    train_folds,
)
from diffumask_fast.learning.data import Dataset, Example, SegmentationData
from diffumask_fast.learning.options import FilterOptions, LearnOptions, PruneOptions
from diffumask_fast.learning.training import STEPS
from diffumask_fast.learning.work_folder import begin, work_folder
from diffumask_fast.models.device import resolve_device
from diffumask_fast.options import Options

FOLDS = "folds"  # the folder in the new dataset that holds the segmenters
SCORES = "scores.json"  # of a round before the last
MOST_LEFT_OUT = 0.3  # of a class, from the second round on; with more, too few would be left to learn from


@dataclass(frozen=True)
class Recorded(Options):
    """The options under one name in `dataset.json`."""

    filter: PruneOptions


class Verdict(NamedTuple):
    """Where a sample stands in a class: rank 1 is the worst of `of`."""

    name: str
    rank: int
    of: int
    score: float
    pruned: bool


def filter_dataset(
    options: FilterOptions, *, progress: Callable[[int], Progress] = lambda total: Progress(disable=True)
) -> dict[str, Any]:
    """Write a dataset in which what ranks lowest in its class is rejected; run again, it is finished.

    The score of a sample in a class is the `agreement` of its mask with what a segmenter predicts that was trained on
    the other folds (Northcutt et al., JAIR 2021, as DiffuMask takes it up), or its stored quality. Segmenters learn
    wrong masks too, so they are trained again without the samples that ranked lowest (Chen et al., ICML 2019). A
    sample of several classes goes if it is pruned in one of them. Pruned rows stay, with their rank as the reason; rows
    that were rejected before stay as they are and take no part. The segmenters stay in `OUT/folds`.

    Args:
        options: the flags.
        progress: makes progress bars.

    Returns:
        folder, images, accepted, pruned; and `per_class`: images, pruned, and the lowest score that was kept.

    Raises:
        DiffuMaskError: a class has fewer images than there are folds, or the dataset is augmented; or as `train` and
            `derive`.
    """
    if options.export_cleanlab is not None and options.pruning.rank == "quality":
        raise DiffuMaskError("`export_cleanlab` needs predictions: rank by cross-validation")
    check_apart(options.source, options.out)
    by_quality = options.pruning.rank == "quality"
    scores = _qualities(options) if by_quality else _cross_validated(options, progress)
    verdicts = rank(scores, options.pruning.alpha)

    def transform(rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        for row in rows:
            reason = _reason(verdicts.get(row.key, []), options.pruning.rank) if row.accepted else ""
            yield {**row.values, "accepted": False, "reason": reason} if reason else row.values

    summary = derive(
        options.source, options.out, transform, Recorded(options.pruning), max_pixels=options.reading.max_pixels,
        progress=progress,
    )  # fmt: skip
    pruned = sum(any(verdict.pruned for verdict in given) for given in verdicts.values())
    return summary | {"pruned": pruned, "per_class": _per_class(verdicts)}


def rank(scores: Scores, alpha: float) -> dict[str, list[Verdict]]:
    """Rank samples in each of their classes, and prune the lowest share of each; equal scores go by name.

    Args:
        scores: name of the sample -> class -> score.
        alpha: share of each class that is pruned, to the nearest whole number; one sample at least stays.
    """
    by_class: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for key, classes in scores.items():
        for name, score in classes.items():
            by_class[name].append((score, key))
    verdicts: dict[tuple[str, str], Verdict] = {}
    for name, ranked in by_class.items():
        most = min(math.floor(alpha * len(ranked) + 0.5), len(ranked) - 1)
        for place, (score, key) in enumerate(sorted(ranked), 1):
            verdicts[key, name] = Verdict(name, place, len(ranked), score, place <= most)
    return {key: [verdicts[key, name] for name in classes] for key, classes in scores.items()}


def _qualities(options: FilterOptions) -> Scores:
    rows = read_rows(options.source, columns=["key", "classes", "quality"])
    scores = {row.key: dict(zip(row.classes, row.quality, strict=True)) for row in rows}
    if not scores:
        raise DiffuMaskError(f"{options.source} holds no accepted row: there is nothing to rank")
    return scores


def _cross_validated(options: FilterOptions, progress: Callable[[int], Progress]) -> Scores:
    """Train a segmenter for each fold, and compare each sample's mask with what is predicted for it."""
    pruning = options.pruning
    folds = work_folder(options.out, FOLDS, "segmenters", "rank by quality, or name a folder")
    data = Dataset(options.source, max_pixels=options.reading.max_pixels)
    if "augment" in data.rows.manifest["options"]:
        raise DiffuMaskError(
            f"{options.source} is augmented, and each segmenter would have seen parts of what it judges: filter the "
            "dataset that it was made of, then augment the result"
        )
    cleanlab = CleanlabFile(options.export_cleanlab, data) if options.export_cleanlab is not None else None
    classes = {entry.key: entry.classes for entry in data.rows.entries}
    fold_of = deal(list(classes.values()), pruning.folds, pruning.learning.seed)
    begin(folds, Recorded(pruning))
    device = resolve_device(options.device)
    scores: Scores = {}
    for number in range(1, pruning.rounds + 1):
        last, folder = number == pruning.rounds, folds / f"round-{number}"
        segmenters = train_folds(
            data, fold_of, folder, _learning(pruning, last=last), without=_doubtful(scores, pruning.alpha),
            device=options.device, progress=progress,
        )  # fmt: skip
        if not last and (folder / SCORES).exists():
            scores = json.loads((folder / SCORES).read_text())
            continue
        predictions = held_out_predictions(data, fold_of, segmenters, device)
        if cleanlab is not None and last:
            predictions = cleanlab.write(predictions)
        scores = _scores(data, classes, predictions, progress)
        if not last:  # so that the next round, begun and stopped, leaves out the same samples
            write_file(folder / SCORES, json.dumps(scores).encode())
    return scores


def _learning(pruning: PruneOptions, *, last: bool) -> LearnOptions:
    """Return how the segmenters of a round are trained: for half as long as those of the last one."""
    learning = pruning.learning
    if last:
        return learning
    if learning.epochs is not None:
        return replace(learning, epochs=-(-learning.epochs // 2))
    return replace(learning, steps=-(-(learning.steps or STEPS) // 2))


def _doubtful(scores: Scores, alpha: float) -> set[str]:
    """Return the samples that the next round's segmenters do not learn from; at most `MOST_LEFT_OUT` of a class."""
    verdicts = rank(scores, min(alpha, MOST_LEFT_OUT))
    return {name for name, given in verdicts.items() if any(verdict.pruned for verdict in given)}


def _scores(
    data: SegmentationData,
    classes: Mapping[str, Sequence[str]],
    predictions: Iterator[tuple[Example, Tensor]],
    progress: Callable[[int], Progress],
) -> Scores:
    ids = {name: value for value, name in data.classes.items()}
    values = sorted(data.classes)
    scores: Scores = {}
    with progress(len(data)) as bar:
        task = bar.add_task("ranking", total=len(data))
        for example, probabilities in predictions:
            pixels = probabilities.numpy()
            scores[example.name] = {
                name: agreement(example, pixels, values, ids[name]) for name in classes[example.name]
            }
            bar.advance(task)
    return scores


def _reason(given: list[Verdict], ranked_by: str) -> str:
    """Say in which classes a sample is pruned; "" where in none."""
    of = "agreement" if ranked_by == "cross-validation" else "quality"
    parts = [f"{one.rank} of {one.of} {one.name}, {of} {one.score:.3f}" for one in given if one.pruned]
    return f"pruned: rank from the worst {'; '.join(parts)}" if parts else ""


def _per_class(verdicts: dict[str, list[Verdict]]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for one in sorted(verdict for given in verdicts.values() for verdict in given):
        row = table.setdefault(one.name, {"images": one.of, "pruned": 0, "lowest_kept": None})
        row["pruned"] += one.pruned
        if not one.pruned and row["lowest_kept"] is None:
            row["lowest_kept"] = one.score
    return table
