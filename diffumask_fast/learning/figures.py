"""Figures of `evaluate` as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffumask_fast.learning.options import EvaluateOptions

# What a figure's name does not say.
NOTES = {"best_threshold_iou": "(the maps alone, each image's cut at its own best threshold; masks may be better)"}


def table(figures: dict[str, Any], options: EvaluateOptions) -> Iterator[str]:
    """Yield lines: figures of all images, then those of each class, then what was taken for what.

    Args:
        figures: as `evaluate` returns them.
        options: of that call.
    """
    figures = dict(figures)
    ious, agreement = figures.pop("per_class_iou"), figures.pop("per_class_agreement", None)
    share, confusion = figures.pop("ignored_share"), figures.pop("confusion", None)
    figures.pop("boundary_iou", None)  # the same figure as the one that has its width in its name
    for name, value in figures.items():
        note = f"  {NOTES[name]}" if name in NOTES else ""
        yield f"{name:26} {value if isinstance(value, int) else number(value)}{note}"
    if share:
        counted = "counted as background" if options.ignored_is_background else "left out"
        yield f"{share:.2%} of the masks' pixels are 255, and {counted}."
    yield ""
    yield f"{'class':24} {'IoU':>5}" + (f" {'agreement':>10}" if agreement is not None else "")
    for name, iou in ious.items():
        yield f"{name:24} {number(iou)}" + (f" {number(agreement.get(name)):>10}" if agreement is not None else "")
    if confusion is not None:
        yield ""
        yield from _confused(confusion)


def _confused(confusion: dict[str, Any]) -> Iterator[str]:
    """Yield for each class the three that most of its pixels are predicted as."""
    yield "class                    its pixels are predicted as"
    for name, counts in zip(confusion["classes"], confusion["counts"], strict=True):
        if total := sum(counts):
            order = sorted(range(len(counts)), key=lambda place: -counts[place])[:3]
            said = [f"{confusion['predicted'][place]} {counts[place] / total:.1%}" for place in order if counts[place]]
            yield f"{name:24} {', '.join(said)}"


def number(value: float | None) -> str:
    """Write a figure between 0 and 1, or a dash."""
    return "    -" if value is None else f"{value:5.3f}"
