"""The options of `diffumask-fast bench` and `tune`."""

from dataclasses import dataclass
from pathlib import Path

from diffumask_fast.bench import GEOMETRIES, SUITES
from diffumask_fast.options import Options, argument, number, one_of, option, whole


@dataclass(frozen=True)
class BenchOptions(Options):
    """What to measure, and where its rows go; None is the suite's own.

    Raises:
        DiffuMaskError: a value is not one that the help allows.
    """

    suite: str = option("end_to_end", f"{', '.join(SUITES)}.", one_of(*SUITES))
    geometry: str = option("mini", f"{', '.join(GEOMETRIES)}.", one_of(*GEOMETRIES))
    model: str | None = option(None, "A diffusers folder or hub id instead of a geometry's weights.")
    device: str = option("auto", "auto, cpu or cuda.")
    steps: int | None = option(None, "Denoising steps; the suite's own when left out.", whole(1, 1000))
    rows: str | None = option(None, "Only these rows, with commas.")
    pairs: int | None = option(None, "Rounds of a comparison; 14 on a CPU, 10 on CUDA.", whole(1))
    photos: Path | None = option(None, "Photographs with masks, for the suite quality.")
    output: Path | None = option(None, "Append the rows to this .jsonl file.", also="--out")
    plot: Path | None = option(None, "Draw the rows into this folder, PNG and SVG.")


@dataclass(frozen=True)
class CompareOptions(Options):
    """Two files of rows, and how much worse a row may become.

    Raises:
        DiffuMaskError: the threshold is no number from 0 on.
    """

    before: Path = argument("Rows of the earlier run.")
    after: Path = argument("Rows of the later run.")
    threshold: float = option(0.05, "Share by which a row may become worse.", number(0, 100))


@dataclass(frozen=True)
class TuneOptions(Options):
    """Which launch configurations are timed, and where the table goes."""

    out: Path | None = option(None, "Table to write; the installed one when left out.")
    quick: bool = option(False, "fp16 and the likely configurations alone: a minute.")
    only_this_device: bool = option(False, "Keep it for this GPU's name, not for its architecture.")


@dataclass(frozen=True)
class ReproduceOptions(Options):
    """How much of the paper's protocol is run, and where to."""

    out: Path = argument("Folder of data, segmenters and rows; run again to finish it.")
    scale: str = option("full", "full, or small: minutes, for a look.", one_of("full", "small"))
    seeds: int = option(3, "Repetitions, each with data and weights of its own.", whole(1))
    only: str = option("", "Some of headline, masks, pruning, augmentation, zero-shot, with commas.")
    rows: Path | None = option(None, "File to which rows are appended; OUT/rows.jsonl when left out.")
    engine: str = option("torch", "That draws: torch or compile.", one_of("torch", "compile"))
    dtype: str = option("auto", "Of training: auto, fp32 or bf16.", one_of("auto", "fp32", "bf16"))
