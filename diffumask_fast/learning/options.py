"""The options of `diffumask-fast evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from diffumask_fast.options import Options, ReadOptions, argument, option


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Whose masks to judge, and by which segmenter."""

    model: str = argument("mini-oracle: the judge of mini's world.")
    data: Path = argument("Dataset whose masks are judged.")
    accepted: bool = option(False, "Leave out rejected rows.")
    ignored_is_background: bool = option(False, "Count 255 in masks as background, in place of leaving it out.")
    sheet: Path | None = option(None, "Write the twenty worst images into this PNG file.")
    reading: ReadOptions = ReadOptions()
