"""Samples as a run makes them, without a model: colour noise that is a function of the seed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary


@dataclass
class Drawn:
    request: Request
    image: np.ndarray
    mask: np.ndarray
    quality: list[float]
    maps: np.ndarray | None
    accepted: bool = True
    reason: str = ""
    drawn: bool = False


def requests(num: int = 7, classes: str = "dog,car", **keywords) -> tuple[Request, ...]:
    return plan(Vocabulary.parse(classes), num, **keywords)[:]


def draw(request: Request, height: int = 24, width: int = 40) -> Drawn:
    rng = np.random.default_rng(request.seed)
    mask = rng.choice(np.array([0, 255, *request.class_ids], np.uint8), (height, width))
    maps = rng.integers(0, 256, (len(request.class_ids), 3, 5), dtype=np.uint8)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    quality = rng.random(len(request.class_ids)).tolist()
    accepted = request.seed % 3 > 0
    return Drawn(request, image, mask, quality, maps, accepted, "" if accepted else "too small")


def contents(folder: Path) -> dict[str, bytes]:
    """Return path in the folder -> bytes, of all its files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
