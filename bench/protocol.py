"""The paper's protocol on mini's world: which segmenters are trained, on what, and how their data are made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from diffumask_fast.dataset.derive import derive
from diffumask_fast.dataset.reader import Row, read_manifest
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.schema import encode_png
from diffumask_fast.dataset.writer import dump_manifest, write_file
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.learning.affinity import FOLDER as NETS
from diffumask_fast.learning.affinity import make_affinity_masks
from diffumask_fast.learning.class_lists import lookup
from diffumask_fast.learning.evaluation import ORACLE, batches, evaluate, predict
from diffumask_fast.learning.filtering import FOLDS, Recorded, filter_dataset
from diffumask_fast.learning.options import (
    AffinityLearning,
    AffinityMaskOptions,
    AffinityOptions,
    EvaluateOptions,
    FilterOptions,
    LearnOptions,
    PruneOptions,
)
from diffumask_fast.learning.work_folder import BEGUN
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.mini.oracle import load_oracle
from diffumask_fast.mini.world import write_world
from diffumask_fast.options import Options

SUITE = "reproduce"
DEFAULT = "default"  # name of the cell with which the ablations are compared
# The paper's five. The real scenes that a zero-shot segmenter learns from hold none of them.
UNSEEN = ("pottedplant", "sheep", "sofa", "train", "tvmonitor")
# Seeds on which nothing was tuned; those of training data are followed by those of the next repetitions.
SYNTHETIC, REAL = 60700, 60800
TESTS = {"kept": 60601, "held-out": 60602}  # objects that mini and the real training scenes show, and others

ProgressBar = Callable[[int | None], Progress]


@dataclass(frozen=True)
class Scale:
    """How much is drawn and learnt.

    Args:
        images: of the synthetic and of the real training data, each.
        tests: scenes in each test.
        steps: of the headline's segmenters and of those without some classes.
        finetune_steps: of those that go on with other data.
        ablation_steps: of all others.
        fold_steps: of each segmenter of the cross-validation by which images are pruned.
    """

    images: int
    tests: int
    steps: int
    finetune_steps: int
    ablation_steps: int
    fold_steps: int


SCALES = {"small": Scale(54, 54, 40, 10, 20, 15), "full": Scale(360, 400, 1000, 250, 500, 300)}


@dataclass(frozen=True)
class Cell:
    """One segmenter.

    Args:
        name: table/row.
        data: what it is trained on, a name that `TrainingData.path` knows.
        steps: the field of `Scale` that says for how many steps.
        augment: augmentations on the fly.
        start: name of the segmenter whose weights are the start; "" for none.
    """

    name: str
    data: str
    steps: str = "steps"
    augment: str = "all"
    start: str = ""


HEADLINE = (
    Cell("headline/synthetic", "synthetic"),
    Cell("headline/real", "real"),
    Cell("headline/synthetic-then-fifth", "fifth", "finetune_steps", start="headline/synthetic"),
    Cell("headline/oracle-masks", "oracle"),
    Cell("headline/fifth", "fifth"),
)
ABLATIONS = (
    Cell(DEFAULT, "synthetic", "ablation_steps"),
    Cell("masks/affinity", "affinity/affinity", "ablation_steps"),
    Cell("masks/adaptive-affinity", "affinity/attention", "ablation_steps"),
    *(Cell(f"masks/{cut}", f"masks/{cut}", "ablation_steps") for cut in ("adaptive", "0.35", "0.45", "0.55")),
    *(Cell(f"pruning/{alpha}", f"pruned/{alpha}", "ablation_steps") for alpha in ("0.3", "0.5", "0.7")),
    *(
        Cell(f"augmentation/{names}", "synthetic", "ablation_steps", augment=names)
        for names in ("none", "splice", "blur", "occlude", "perspective")
    ),
    Cell("zero-shot/real", "seen"),
    Cell("zero-shot/real-then-synthetic", "synthetic", "finetune_steps", start="zero-shot/real"),
    Cell("zero-shot/synthetic-then-real", "seen", "finetune_steps", start="headline/synthetic"),
)
CELLS = HEADLINE + ABLATIONS


def in_order(cells: Sequence[Cell], seeds: int) -> list[tuple[Cell, int]]:
    """Return each cell with each seed, the most important first: the headline of all seeds, then seed by seed."""
    groups = [[cell for cell in cells if (cell in HEADLINE) == first] for first in (True, False)]
    return [(cell, seed) for group in groups for seed in range(seeds) for cell in group]


@dataclass(frozen=True)
class MasksBy(Options):
    """Recorded where masks are a judge's."""

    masks_by: str


@dataclass(frozen=True)
class Without(Options):
    """Recorded where images with some classes are rejected."""

    without: tuple[str, ...]


class TrainingData:
    """The training data of one repetition, made when they are first asked for; what was begun is finished.

    Args:
        folder: in which each has a folder.
        scale: how many.
        seed: number of the repetition, from 0 on.
        learning: how the cross-validation's segmenters are trained.
        engine: that draws.
        progress: makes progress bars.
    """

    def __init__(
        self, folder: Path, scale: Scale, seed: int, learning: LearnOptions, engine: str, progress: ProgressBar
    ) -> None:
        self.folder, self.scale, self.seed = folder, scale, seed
        self.learning, self.engine, self.progress = learning, engine, progress
        self._made: set[str] = set()
        self._ious: dict[str, float] = {}

    def path(self, name: str) -> Path:
        """Return the folder of a dataset, which is finished then.

        Args:
            name: "synthetic"; "real"; "fifth", of the real ones; "oracle", the synthetic images with the oracle's
                masks; "seen", the real ones without classes in UNSEEN; "masks/" and a threshold; "affinity/" and
                which map masks are made of; "pruned/" and alpha.
        """
        out = self.folder / name
        if name not in self._made:
            self._make(name, out)
            self._made.add(name)
        return out

    def masks_iou(self, name: str) -> float | None:
        """Return the foreground IoU of the synthetic masks with the oracle's; None for others, which need no judge."""
        if name.partition("/")[0] not in ("synthetic", "masks", "affinity", "pruned"):
            return None
        if name not in self._ious:
            options = EvaluateOptions(ORACLE, self.path(name), accepted=True)
            self._ious[name] = evaluate(options, progress=self.progress)["foreground_iou"]
        return self._ious[name]

    def _make(self, name: str, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        match name.split("/"):
            case ["synthetic"]:
                num, seed = self.scale.images, SYNTHETIC + self.seed
                run_generate(GenerateOptions(out, num=num, seed=seed, engine=self.engine), self.progress)
            case ["real" | "fifth"]:
                num = self.scale.images if name == "real" else self.scale.images // 5
                write_world(out, num, REAL + self.seed)
            case ["oracle"]:
                with_oracle_masks(self.path("synthetic"), out)
            case ["seen"]:
                without(self.path("real"), out, UNSEEN)
            case ["masks", cut]:
                options = MaskOptions(threshold="adaptive" if cut == "adaptive" else float(cut))
                remask(self.path("synthetic"), out, options, progress=self.progress)
            case ["affinity", mask]:
                learning = AffinityLearning(mask=mask, seed=self.seed, dtype=self.learning.dtype)
                made = AffinityMaskOptions(affinity=learning)
                self._share(out, NETS, made)
                make_affinity_masks(AffinityOptions(self.path("synthetic"), out, made), progress=self.progress)
            case ["pruned", alpha]:
                pruning = PruneOptions(alpha=float(alpha), learning=self.learning)
                self._share(out, FOLDS, Recorded(pruning))
                filter_dataset(FilterOptions(self.path("synthetic"), out, pruning), progress=self.progress)
            case _:
                raise KeyError(name)

    def _share(self, out: Path, models: str, options: Options) -> None:
        """Take over what was trained for another dataset of the same kind: it is trained once for all of them.

        Their options differ only in what the training does not depend on: what becomes of affinity maps, and shares
        that are pruned, of which earlier rounds leave out the same.
        """
        trained = next((folder for folder in sorted(out.parent.glob(f"*/{models}")) if folder.parent != out), None)
        if trained is not None and not (out / models).exists():
            out.mkdir(exist_ok=True)
            shutil.rmtree(out / ".part", ignore_errors=True)
            shutil.copytree(trained, out / ".part")
            write_file(out / ".part" / BEGUN, dump_manifest(asdict(options)))
            os.replace(out / ".part", out / models)


def with_oracle_masks(source: Path, out: Path) -> dict[str, Any]:
    """Write a dataset anew with the masks that mini's oracle predicts, as if somebody had drawn them by hand.

    An image in which it sees nothing is rejected.
    """
    oracle = load_oracle()
    names = {entry["id"]: entry["name"] for entry in read_manifest(source)["classes"]}
    table = lookup({number: name for name, number in oracle.class_ids.items()} | {0: ""}, names | {0: ""})

    def transform(rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        for part in batches(rows, 32):
            for row, truth in zip(part, predict(oracle, [row.image for row in part]), strict=True):
                yield _with_mask(row, table[truth], names)

    return derive(source, out, transform, MasksBy(ORACLE))


def _with_mask(row: Row, mask: np.ndarray, names: dict[int, str]) -> dict[str, Any]:
    """Return the values of a row with another mask."""
    picture = {"bytes": encode_png(mask), "path": row.values["mask"]["path"]}
    values = {**row.values, "mask": picture, "maps": np.zeros(0, np.uint8), "map_sizes": []}
    ids = [number for number in np.unique(mask).tolist() if number in names]
    if not ids:
        return {**values, "accepted": False, "reason": f"{ORACLE} sees nothing in it"}
    return {**values, "class_ids": ids, "classes": [names[number] for number in ids], "quality": [1.0] * len(ids)}


def without(source: Path, out: Path, classes: Sequence[str]) -> dict[str, Any]:
    """Write a dataset anew in which images with one of some classes are rejected."""

    def transform(rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        for row in rows:
            held = [name for name in classes if name in row.classes]
            yield {**row.values, "accepted": False, "reason": f"holds {held[0]}"} if held else row.values

    return derive(source, out, transform, Without(tuple(classes)))
