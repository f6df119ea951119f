"""The search for the best options: all maps with a few thresholds, then one option after the other, from two starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from diffumask_fast.learning.calibration_trials import Choice, Trials
from diffumask_fast.masks.options import MaskOptions

FIRST: tuple[Any, ...] = ("otsu", 0.3, 0.4, 0.5, 0.6, 0.7)
VALUES: dict[str, tuple[Any, ...]] = {
    "threshold": ("otsu", *(round(0.05 * step, 2) for step in range(3, 18))), "refine": ("none", "guided"),
    "colour_steps": (0, 1, 2, 3, 4, 6), "radius": ("cell", 2, 4, 6, 8, 12, 16), "eps": (1e-5, 1e-4, 1e-3, 1e-2),
}  # fmt: skip
STEPS = (-0.025, -0.0125, 0.0125, 0.025)  # from a fixed threshold, at the end
SWEEPS = 3
SURE = 2.0  # standard errors by which other options must be better than those that the model has


class Difference(NamedTuple):
    """The mean difference of two scores of the same images, and its standard error."""

    mean: float
    error: float


def difference(scores: np.ndarray, others: np.ndarray) -> Difference:
    """Compare scores [n] with others of the same images; n is at least 2."""
    apart = scores - others
    return Difference(float(apart.mean()), float(apart.std(ddof=1) / np.sqrt(len(apart))))


def halves(classes: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Part images in two halves in which each class has as many, or one more or less.

    Args:
        classes: of each image, in order.

    Returns:
        The indices of the images to choose by, and of those to confirm by.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, names in enumerate(classes):
        groups[names].append(index)
    order = [index for group in groups.values() for index in group]
    return tuple(sorted(order[::2])), tuple(sorted(order[1::2]))


def search(trials: Trials, own: Choice, indices: tuple[int, ...], on_tried: Callable[[], Any] = lambda: None) -> Choice:
    """Find options that agree better with the judge than a model's own, on some images.

    What is changed earns its place: an option whose own value is no worse beyond noise keeps it. A CRF, which is slow,
    is taken only where it is better beyond noise.

    Args:
        trials: what is tried.
        own: the model's.
        indices: of the images to choose by.
        on_tried: called after each trial.

    Returns:
        The best ones; `own` where none are better.
    """

    def score(choice: Choice) -> np.ndarray:
        count = trials.count
        scores = trials.scores(choice, indices)
        if trials.count > count:
            on_tried()
        return scores

    def best_of(best: Choice, others: Sequence[Choice]) -> Choice:
        for other in others:
            gain = difference(score(other), score(best))
            if gain.mean > (gain.error if other.is_slow and not best.is_slow else 0):
                best = other
        return best

    def descend(best: Choice) -> Choice:
        for _ in range(SWEEPS):
            before = best
            for name in VALUES:
                best = best_of(best, [best.having(**{name: value}) for value in VALUES[name]])
            best = best_of(best, [Choice(maps, best.mask) for maps in trials.maps])
            if best == before:
                break
        return best_of(best, _near(best))

    # sharpened maps and soft ones like other thresholds, so each kind has a start of its own
    starts = [best_of(first, rest) for first, *rest in (_grid(trials, own, kind) for kind in VALUES["refine"])]
    first, *others = map(descend, starts)
    best = best_of(first, others)
    best = best_of(best, _slow(best))
    if difference(score(best), score(own)).mean <= 0:
        return own
    return _reduced(best, own, trials, score)


def _grid(trials: Trials, own: Choice, refine: Any) -> list[Choice]:
    """Every map with a few thresholds, one way of refining, and what is best in general."""
    general = MaskOptions(refine=refine)
    mask = replace(own.mask, **{name: getattr(general, name) for name in VALUES})
    return [Choice(maps, replace(mask, threshold=cut)) for maps in trials.maps for cut in FIRST]


def _near(best: Choice) -> list[Choice]:
    cut = best.mask.threshold
    return [best.having(threshold=round(cut + step, 4)) for step in STEPS] if isinstance(cut, float) else []


def _slow(best: Choice) -> list[Choice]:
    """The options by which a CRF is run, tried once, for each costs as much as all others together."""
    return [best.having(threshold="adaptive"), best.having(refine="crf"), best.having(refine="crf", threshold="otsu")]


def _reduced(best: Choice, own: Choice, trials: Trials, score: Callable[[Choice], np.ndarray]) -> Choice:
    """Take back each change without which the masks are no worse beyond noise."""
    kept = best
    for name, value in own.options.items():
        less = kept.having(**{name: value})
        if less == kept or less.maps not in trials.samples[0].maps or (less.is_slow and not best.is_slow):
            continue
        loss = difference(score(best), score(less))
        if loss.mean <= loss.error:
            kept = less
    return kept
