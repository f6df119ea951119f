"""Plots of rows, PNG and SVG: throughput over batches, memory over steps, time by stage, speed-ups."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import SIGN, check_own

PLOTS = ("throughput", "memory", "stages", "speedups")
NOTES = {".png": "Software", ".svg": "Creator"}  # where each kind says who wrote it


def needs_matplotlib() -> None:
    """Raise a DiffuMaskError when matplotlib is not there."""
    if find_spec("matplotlib") is None:
        raise DiffuMaskError('Plots need matplotlib: pip install "diffumask-fast[bench]".')


def draw(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Draw what the rows hold, each plot as PNG and SVG.

    Args:
        rows: of one run; rows that no plot shows are passed over.
        folder: made when it is not there.

    Returns:
        The files written.

    Raises:
        DiffuMaskError: matplotlib is not installed, or a file is there that we did not write.
    """
    needs_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, points, labels in (
        ("throughput", _points(rows, "images_per_s", "batch"), ("images per batch", "images/s")),
        ("memory", _points(rows, "peak_memory_steps", "num_inference_steps"), ("steps", "peak GiB above the weights")),
    ):
        if points:
            figure, axes = _figure()
            axes.plot(*zip(*points, strict=True), marker="o")
            axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, None))
            written += _save(figure, folder / name)
    stages = [one["config"]["stages_s"] for one in rows if "stages_s" in one["config"]]
    if stages:
        figure, axes = _figure()
        axes.barh(list(stages[-1]), list(stages[-1].values()))
        axes.set(xlabel="seconds for a batch")
        written += _save(figure, folder / "stages")
    if any(one["name"].startswith("speedup") for one in rows):
        figure, axes = _figure()
        _bars(axes, rows)
        written += _save(figure, folder / "speedups")
    return written


def check_places(folder: Path) -> None:
    """Look for files that `draw` may not replace, before anything is measured.

    Raises:
        DiffuMaskError: there is one.
    """
    for name in PLOTS:
        for suffix in NOTES:
            check_own(folder / f"{name}{suffix}")


def overview(rows: Sequence[dict], path: Path, digest: str) -> None:
    """Draw the speed-ups of the README, and write the rows' digest into the file.

    Raises:
        DiffuMaskError: matplotlib is not installed.
    """
    needs_matplotlib()
    figure, axes = _figure()
    _bars(axes, [one for one in rows if one["config"].get("geometry") == "mini"])
    figure.savefig(path, dpi=100, metadata={"rows": digest})


def _bars(axes: Any, rows: Sequence[dict]) -> None:
    """Draw speed-ups with their ranges; that with CRFs is off every scale, so it is left out."""
    bars = [one for one in rows if one["name"].startswith("speedup") and "with_masks" not in one["name"]]
    names = [one["name"].removeprefix("speedup_vs_").replace("_", " ") for one in bars]
    values = [one["value"] for one in bars]
    ranges = [[one["value"] - one["low"] for one in bars], [one["high"] - one["value"] for one in bars]]
    axes.barh(names, values, xerr=ranges)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="times as fast as")
    axes.invert_yaxis()


def _points(rows: Sequence[dict], name: str, over: str) -> list[tuple[float, float]]:
    return sorted((one["config"][over], one["value"]) for one in rows if one["name"] == name)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in NOTES]
    for path in paths:
        check_own(path)
    for path in paths:
        figure.savefig(path, dpi=120, metadata={NOTES[path.suffix]: SIGN})
    return paths
