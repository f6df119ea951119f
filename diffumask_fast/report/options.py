"""The options of a report."""

from dataclasses import dataclass
from pathlib import Path

from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.options import Options, ReadOptions, argument, option


@dataclass(frozen=True)
class ReportOptions(Options):
    """Which dataset to show, and where to."""

    source: Place = argument("Dataset to show.", "IN", place)
    out: Path | None = option(None, "The page; IN/report.html when not given.")
    reading: ReadOptions = ReadOptions()
