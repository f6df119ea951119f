"""What `diffumask-fast calibrate` does: find the options of maps and masks that suit a model best."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from diffumask_fast import __version__
from diffumask_fast.dataset.writer import write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.calibration_images import CalibrationImages, new_images, run_images
from diffumask_fast.learning.calibration_judges import SegmenterJudge, open_judge, seen
from diffumask_fast.learning.calibration_search import SURE, difference, halves, search
from diffumask_fast.learning.calibration_trials import FIGURES, Trials
from diffumask_fast.learning.options import CalibrateOptions
from diffumask_fast.models.device import resolve_device
from diffumask_fast.models.find import MEASURED, ModelInfo, find_model, with_options
from diffumask_fast.models.hashing import OWN_OPTIONS, before_calibration
from diffumask_fast.models.loading import quietly
from diffumask_fast.own_files import check_no_link

FEW_STEPS = 8  # up to which options are kept for so many steps alone
FEWEST = 16  # images that a judge must see, half of them to choose by
LIBRARIES = ("torch", "diffusers", "transformers")


def calibrate(
    options: CalibrateOptions,
    *,
    progress: Callable[[int | None], Progress] = lambda total: Progress(disable=True),
) -> dict[str, Any]:
    """Find the options of maps and masks that agree best with a judge, and write them as the model's own.

    They are chosen on one half of the images and confirmed on the other: where they are not better than the model's own
    by two standard errors, the model keeps its own.

    Args:
        options: the flags.
        progress: makes a progress bar.

    Returns:
        out, judge, images, judged (images in which the judge sees what was asked for), trials, seconds (draw, try),
        before, best and after (options by name: the model's, those that were found, and those that it has now), figures
        (of `before` and `best`, on the half that confirms: class_iou, foreground_iou, boundary_iou, and score, their
        mean), difference (of the scores), standard_error, chosen_on and confirmed_on (images), switched, fixed (a
        sentence on what was not varied), up_to_steps (of the runs that take the options; None where all others do).

    Raises:
        DiffuMaskError: there is no such model or judge, they do not fit together, the judge sees too few of the
            objects, or the options cannot be written.
    """
    device = resolve_device(options.device)
    with quietly(), progress(None) as bar:
        info = find_model(options.model, options.revision)
        out = _out(options, info)
        start = time.perf_counter()
        images, labels = _images(options, info, device, bar)
        trials = _trials(options, images, labels, device)
        choosing, confirming = halves([sample.classes for sample in trials.samples])
        task, drawn = bar.add_task("trying", total=None), time.perf_counter()
        best = search(trials, images.own, choosing, lambda: bar.advance(task))
    figures = {
        name: _means(trials.figures(choice, confirming)) for name, choice in (("before", images.own), ("best", best))
    }
    gain = difference(trials.scores(best, confirming), trials.scores(images.own, confirming))
    switched = gain.mean > SURE * gain.error
    found = {
        "judge": Path(options.judge).name, "images": len(labels), "chosen_on": len(choosing),
        "confirmed_on": len(confirming), "before": images.own.options, "best": best.options, "figures": figures,
        "difference": round(gain.mean, 5), "standard_error": round(gain.error, 5), "switched": switched,
    }  # fmt: skip
    after = (best if switched else images.own).options
    up_to = _up_to(images.facts.get("steps"), info)
    _write(out, info, after, {**found, "up_to_steps": up_to, "images_drawn_by": images.facts})
    seconds = {"draw": drawn - start, "try": time.perf_counter() - drawn}
    return {
        "out": str(out), **found, "judged": len(trials.samples), "trials": trials.count, "seconds": seconds,
        "after": after, "up_to_steps": up_to, "fixed": images.fixed,
    }  # fmt: skip


def told(summary: dict[str, Any]) -> list[str]:
    """Return what a command says of the summary of `calibrate`."""
    seconds, figures, before = summary["seconds"], summary["figures"], summary["before"]
    changes = {name: value for name, value in summary["best"].items() if value != before[name]}
    shown = ", ".join(f"{name} {before[name]} -> {value}" for name, value in changes.items()) or "none are better"
    gain = f"{summary['difference']:+.3f}, standard error {summary['standard_error']:.3f}"
    verdict = "" if summary["switched"] else "; no better beyond noise, nothing is changed"
    return [
        f"{summary['images']} images, {summary['judged']} judged by {summary['judge']}, {summary['trials']} trials: "
        f"{seconds['draw']:.0f} s drawing, {seconds['try']:.0f} s trying.",
        f"{'':16} {'before':>8} {'best':>8}   on {summary['confirmed_on']} images that had no part in the choice",
        *(f"{name:16} {old:8.3f} {figures['best'][name]:8.3f}" for name, old in figures["before"].items()),
        f"{shown} ({gain}){verdict}.",
        *filter(None, [summary["fixed"]]),
        f"Written to {summary['out']}{_runs(summary['up_to_steps'])}.",
    ]


def _runs(up_to: int | None) -> str:
    return f", for runs of up to {up_to} step{'s' * (up_to > 1)}" if up_to else ""


def _up_to(steps: int | None, info: ModelInfo) -> int | None:
    """Return the most steps of the runs that options are for; None where they are not for few steps alone."""
    return steps if steps is not None and steps <= min(FEW_STEPS, info.num_inference_steps - 1) else None


def _images(
    options: CalibrateOptions, info: ModelInfo, device: torch.device, bar: Progress
) -> tuple[CalibrationImages, list[np.ndarray]]:
    """Return images, and the right mask of each."""
    judge, task = open_judge(options, device), bar.add_task("drawing", total=None)

    def on_drawn(count: int, total: int) -> None:
        bar.update(task, total=total, advance=count)

    if isinstance(judge, SegmenterJudge):
        images = new_images(options, judge, on_drawn)
    else:
        images = run_images(options, judge, info, on_drawn)
    return images, judge.labels(images.samples)


def _trials(
    options: CalibrateOptions, images: CalibrationImages, labels: list[np.ndarray], device: torch.device
) -> Trials:
    kept = seen(images.samples, labels)
    if len(kept) < FEWEST:
        raise DiffuMaskError(
            f"{options.judge} sees what was asked for in {len(kept)} of {len(labels)} images, and {FEWEST} are the "
            "fewest to go by: take more images, other classes, or another judge"
        )
    return Trials([images.samples[index] for index in kept], [labels[index] for index in kept], device)


def _means(figures: np.ndarray) -> dict[str, float]:
    means = dict(zip(FIGURES, figures.mean(0).tolist(), strict=True))
    return {name: round(value, 5) for name, value in {**means, "score": float(figures.mean())}.items()}


def _out(options: CalibrateOptions, info: ModelInfo) -> Path:
    """Return where the options go; to be asked before long work.

    Raises:
        DiffuMaskError: they cannot be written there.
    """
    folder = info.local_folder
    if options.out is None:
        if info.name == "mini":
            raise DiffuMaskError("mini is a part of this program: say by `out` into which file its options go")
        if not Path(options.model).expanduser().is_dir():
            raise DiffuMaskError(f"{options.model} is no folder of yours: say by `out` into which file its options go")
    out = options.out.expanduser() if options.out is not None else folder / OWN_OPTIONS
    check_no_link(out)
    if not out.parent.is_dir():
        raise DiffuMaskError(f"{out.parent} is no folder: make it, or name another file by `out`")
    if not os.access(out.parent, os.W_OK):
        raise DiffuMaskError(f"{out.parent} cannot be written: name by `out` a file elsewhere for the options")
    if out.exists() and out != folder / OWN_OPTIONS:
        if not any(name in _read(out) for name in MEASURED):
            raise DiffuMaskError(f"{out} is there and holds no options of a model: name another file by `out`")
        with_options(info, out)
    return out


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(out: Path, info: ModelInfo, chosen: dict[str, Any], calibration: dict[str, Any]) -> None:
    """Write the model's own settings with these options, and what the file has for other numbers of steps."""
    own = info.local_folder / OWN_OPTIONS
    earlier = _read(out)
    known = {**_read(own), **{name: earlier[name] for name in MEASURED if name in earlier}}
    versions = {"diffumask_fast": __version__, **{name: version(name) for name in LIBRARIES}}
    if up_to := calibration["up_to_steps"]:
        few = known.setdefault("few_steps", {})
        few[str(up_to)] = {**few.get(str(up_to), {}), **chosen}
    else:
        known["mask"] = {**known.get("mask", {}), **chosen}
    known["calibration"] = {**calibration, "versions": versions, "before_sha256": before_calibration(own)}
    write_file(out, (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode())
