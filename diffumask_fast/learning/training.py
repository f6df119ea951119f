"""What `diffumask-fast train` does: a segmenter learns from data, and from others after them.

Everything random is a function of (seed, stage, step) or (seed, stage, epoch, example), and the state is saved whole
every few steps. So a run that was killed at any moment goes on as if it had not been.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn

from diffumask_fast.dataset.folder import lock
from diffumask_fast.dataset.writer import make_folder
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmenter import Augmenter
from diffumask_fast.learning.batches import Batches
from diffumask_fast.learning.checkpoint import (
    CHECKPOINT,
    State,
    check_same,
    clear,
    read_checkpoint,
    write_checkpoint,
)
from diffumask_fast.learning.class_lists import channels, lookup, united
from diffumask_fast.learning.data import SegmentationData, open_data
from diffumask_fast.learning.options import LearnOptions, TrainOptions, chosen_augmentations
from diffumask_fast.learning.segmenters import (
    PART,
    RECORD,
    STRIDE,
    new_segmenter,
    normalised,
    read_record,
)
from diffumask_fast.models.device import resolve_device

logger = logging.getLogger("diffumask_fast")

STEPS = 2400
LARGEST = 512  # side of crops, unless a size is given
RATES = {"tiny": 2e-3}
RATE = 1e-4  # of all others
WARM_UP, POWER = 100, 0.9
WEIGHT_DECAY, CLIP = 0.05, 1.0
AVERAGE = 0.998  # of the averaged weights (EMA), which are what is kept
SMOOTH = 0.98  # of the loss that is shown

ProgressBar = Callable[[int], Progress]


class Learner(Protocol):
    """What is trained: a model, made of a model and of the classes (id in masks -> name) that it learns."""

    model: Any

    def __init__(self, model: Any, classes: Mapping[int, str]) -> None: ...

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of images [B, 3, H, W] as `normalised` gives them and labels [B, H, W], 255 ignored."""

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write it and our record of it, as `save_trained` does."""


class Kind(NamedTuple):
    """A kind of learner: the option whose value names one, and what makes it, as `new_segmenter` does."""

    option: str
    new: Callable[[str, Mapping[int, str], int], Learner]


SEGMENTER = Kind("segmenter", new_segmenter)


@dataclass(frozen=True)
class Stage:
    """Data, and how long and how fast to learn from them."""

    data: SegmentationData
    steps: int
    lr: float


def train(options: TrainOptions, *, progress: ProgressBar = lambda total: Progress(disable=True)) -> dict[str, Any]:
    """Train a segmenter; run again, it goes on where the last run was stopped.

    Args:
        options: the flags.
        progress: makes a progress bar of the number of steps.

    Returns:
        folder, segmenter, weights (their number), images, classes, steps, loss (smoothed, of the last step).

    Raises:
        DiffuMaskError: data or segmenter cannot be read, the folder holds another training or something else, or the
            loss is no number any more.
    """
    most = options.reading.max_pixels
    first = open_data(options.data, split=options.split, max_pixels=most)
    steps, lr = steps_and_rate(options.learning, len(first))
    stages = [Stage(first, steps, lr)]
    if options.finetune_on is not None:
        more = open_data(options.finetune_on, split=options.finetune_split, max_pixels=most)
        stages.append(Stage(more, options.finetune_steps, options.finetune_lr or lr / 5))
    return train_stages(
        stages, options.out, options.learning, device=options.device, save_every=options.save_every, progress=progress
    )


def train_stages(
    stages: list[Stage],
    out: Path,
    options: LearnOptions,
    *,
    kind: Kind = SEGMENTER,
    device: str = "auto",
    save_every: int = 200,
    progress: ProgressBar = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Train a learner, which `options.segmenter` names, on one stage's data after the other's; see `train`."""
    where = resolve_device(device)
    plan = _plan(stages, options, where, kind)
    with _open_folder(out) as folder:
        record = _finished(folder, plan)
        if record is None:
            make_folder(folder / PART)
            record = _Training(stages, folder, plan, where, save_every, kind).run(progress)
        clear(folder)
        shutil.rmtree(folder / PART, ignore_errors=True)
    result = {"folder": str(out), "segmenter": options.segmenter, "weights": record["weights"]}
    images = sum(len(stage.data) for stage in stages)
    return result | {"images": images, "classes": record["classes"], "steps": record["steps"], "loss": record["loss"]}


class _Training:
    """The loop, over all stages."""

    def __init__(
        self,
        stages: list[Stage],
        folder: Path,
        plan: dict[str, Any],
        device: torch.device,
        save_every: int,
        kind: Kind,
    ) -> None:
        self.stages, self.folder, self.plan, self.device, self.save_every = stages, folder, plan, device, save_every
        self.kind = kind
        self.classes = {int(value): name for value, name in plan["classes"].items()}
        shares = [chosen_augmentations(plan["augment"], len(stage.data)) for stage in stages]
        self.augmenters = [
            Augmenter(stage.data, chosen, _number(plan["seed"], number)) if chosen else None
            for number, (stage, chosen) in enumerate(zip(stages, shares, strict=True))
        ]

    def run(self, progress: ProgressBar) -> dict[str, Any]:
        """Train from the beginning or from the checkpoint, write the segmenter, and return its record."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), progress(sum(stage.steps for stage in self.stages)) as bar:
            torch.manual_seed(self.plan["seed"])
            learner = self.kind.new(self.plan[self.kind.option], self.classes, max(self.plan["size"]))
            learner.model.to(self.device)
            state = State(learner.model, copy.deepcopy(learner.model), _adam(learner.model))
            read_checkpoint(self.folder, state, self.plan)
            done = sum(stage.steps for stage in self.stages[: state.stage]) + state.step
            task = bar.add_task("training", total=sum(stage.steps for stage in self.stages), completed=done)
            while state.stage < len(self.stages):
                self._learn(learner, state, lambda: bar.advance(task))
                state = self._next(state)
        average = type(learner)(state.average.eval(), self.classes)
        weights = sum(part.numel() for part in average.model.parameters())
        record = {"weights": weights, "steps": self.plan["steps"], "loss": state.loss, "plan": self.plan}
        average.save(self.folder, record)
        return read_record(self.folder)

    def _learn(self, learner: Learner, state: State, advance: Callable[[], None]) -> None:
        """Take the steps of one stage that are left."""
        stage, plan = self.stages[state.stage], self.plan
        table = channels(self.classes)[lookup(stage.data.classes, self.classes)]
        seed = (plan["seed"], state.stage)
        augmenter = self.augmenters[state.stage]
        batches = Batches(stage.data, table, plan["batch_size"], tuple(plan["size"]), seed, augmenter)
        half = plan["dtype"] == "bf16"
        learner.model.train()
        for images, labels in _ahead(batches, state.step, stage.steps):
            torch.manual_seed(_number(*seed, state.step))  # of dropout, and of the points where masks are compared
            images, labels = images.to(self.device), labels.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                loss = learner.loss(normalised(images), labels)
            state.adam.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(learner.model.parameters(), CLIP)
            _check_finite(state, loss.item(), norm.item())
            _set_rate(state.adam, stage.lr * falling(state.step, stage.steps, plan["schedule"]))
            state.adam.step()
            _follow(state.average, learner.model, min(AVERAGE, (1 + state.step) / (10 + state.step)))
            state.loss = loss.item() if state.loss is None else SMOOTH * state.loss + (1 - SMOOTH) * loss.item()
            state.step += 1
            advance()
            if state.step % self.save_every == 0 and state.step < stage.steps:
                write_checkpoint(self.folder, state, plan)

    def _next(self, state: State) -> State:
        """Begin the next stage with the averaged weights of this one."""
        state.model.load_state_dict(state.average.state_dict())
        state = State(state.model, state.average, _adam(state.model), state.stage + 1, 0, state.loss)
        if state.stage < len(self.stages):
            write_checkpoint(self.folder, state, self.plan)
        return state


def falling(step: int, steps: int, schedule: str) -> float:
    """Return the share of the highest learning rate that a step has: it rises first, then falls towards 0."""
    rise = min(1.0, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    left = 1 - step / steps
    return rise * (left**POWER if schedule == "poly" else 0.5 - 0.5 * math.cos(math.pi * left))


def _ahead(batches: Batches, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the steps from the first on, each made while the one before is learnt from."""
    with ThreadPoolExecutor(1) as pool:
        following = [pool.submit(batches.__getitem__, step) for step in range(first, min(first + 1, end))]
        for step in range(first, end):
            batch = following.pop().result()
            if step + 1 < end:
                following.append(pool.submit(batches.__getitem__, step + 1))
            yield batch


def _adam(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW whose decay leaves norms and biases alone."""
    weights = [part for part in model.parameters() if part.requires_grad]
    kinds = ([part for part in weights if part.ndim > 1], [part for part in weights if part.ndim <= 1])
    return torch.optim.AdamW(
        [
            {"params": part, "weight_decay": decay}
            for part, decay in zip(kinds, (WEIGHT_DECAY, 0.0), strict=True)
            if part
        ]
    )


def _set_rate(adam: torch.optim.AdamW, lr: float) -> None:
    for group in adam.param_groups:
        group["lr"] = lr


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights towards the model's; its running statistics are averages already."""
    for mean, part in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(part, 1 - decay)
    for statistics, current in zip(average.buffers(), model.buffers(), strict=True):
        statistics.copy_(current)


def _check_finite(state: State, loss: float, norm: float) -> None:
    """Raise before weights become what is no number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        rate = "finetune_lr" if state.stage else "lr"
        raise DiffuMaskError(
            f"the loss is {loss:.3g} and its gradient {norm:.3g} at step {state.step}: use another folder and a "
            f"smaller `{rate}`"
        )


def _number(*parts: int) -> int:
    """Return one seed of several numbers."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4])


def steps_and_rate(options: LearnOptions, images: int) -> tuple[int, float]:
    """Return the number of steps on so many images, and the highest learning rate.

    Raises:
        DiffuMaskError: both steps and epochs are given.
    """
    rate = options.lr or RATES.get(options.segmenter, RATE)
    if options.epochs is None:
        return options.steps or STEPS, rate
    if options.steps is not None:
        raise DiffuMaskError("`steps` and `epochs` say the same thing twice: give one of them")
    return -(-options.epochs * images // options.batch_size), rate


def _plan(stages: list[Stage], options: LearnOptions, device: torch.device, kind: Kind) -> dict[str, Any]:
    """Return all that makes a difference to the weights, values that JSON can hold, `auto` resolved."""
    classes: Mapping[int, str] = {}
    for stage in stages:
        classes = united(classes, stage.data.classes) if classes else stage.data.classes
    sides = stages[0].data[0].labels.shape
    if options.size and any(side % STRIDE or not side for side in options.size):
        raise DiffuMaskError(f"`size` must be multiples of {STRIDE}, such as 256x256, not {options.size}")
    given = {kind.option if name == "segmenter" else name: value for name, value in asdict(options).items()}
    plan = given | {
        "classes": {str(value): name for value, name in sorted(classes.items())},
        "data": [_digest(stage.data) for stage in stages],
        "images": [len(stage.data) for stage in stages],
        "stage_steps": [stage.steps for stage in stages],
        "steps": sum(stage.steps for stage in stages),
        "lr": [stage.lr for stage in stages],
        "size": list(options.size or [-(-min(LARGEST, side) // STRIDE) * STRIDE for side in sides]),
        "dtype": options.dtype if options.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32",
    }
    del plan["epochs"]
    return plan


def _digest(data: SegmentationData) -> str:
    """Return a hash by which data are known again; pixels that changed in place are not noticed."""
    known = [list(data.names), sorted(data.classes.items()), data.origin]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


@contextmanager
def _open_folder(path: Path) -> Iterator[Path]:
    """Make and lock the folder of a segmenter, which holds nothing but one."""
    make_folder(path)
    descriptor = lock(path)
    try:
        left = [file.name for file in path.iterdir() if not file.name.startswith(".")]
        if left and not any((path / name).exists() for name in (RECORD, CHECKPOINT, PART)):
            raise DiffuMaskError(f"{path} holds {min(left)} and is no segmenter's folder: name another for `out`")
        yield path
    finally:
        os.close(descriptor)


def _finished(folder: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of a segmenter that is there, None where it is still to be trained."""
    if not (folder / RECORD).exists():
        return None
    record = read_record(folder)
    check_same(folder, record.get("plan", {}), plan)
    return record
