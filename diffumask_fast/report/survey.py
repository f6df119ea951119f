"""What a report says of all rows: figures and the numbers of the rows that are worth showing, in little memory."""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from diffumask_fast.dataset.card import kind_of
from diffumask_fast.dataset.reader import Row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.report.twins import groups_of_twins, perceptual_hash

IGNORED = 255  # in a mask
GRID = 16  # cells of a heat map, across and down
QUALITY_BINS = 20
AREA_EDGES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
SHOWN, ENDS = 240, 48  # pictures of the sample; of the best, the worst, the rejected
MOST_KINDS = 64  # of reasons that are told apart
OTHER = "other reasons"


@dataclass(frozen=True)
class Look:
    """What a row says, and what its pictures show.

    Args:
        number: of the row in the dataset.
        row: its columns; pictures are not kept.
        size: height and width; None where a picture is damaged.
        areas: class id -> share of the image.
        places: class id -> share of each cell, [GRID, GRID].
        ignored: share of the image.
        hash: perceptual; None where it is not to be compared.
    """

    number: int
    key: str
    classes: tuple[tuple[int, str], ...]
    quality: tuple[float, ...]
    accepted: bool
    reason: str
    size: tuple[int, int] | None
    areas: dict[int, float]
    places: dict[int, np.ndarray]
    ignored: float
    hash: bytes | None


def look_at(number: int, row: Row) -> Look:
    """Decode the pictures of a row and note what is to be counted."""
    size, areas, places, ignored, code = None, {}, {}, 0.0, None
    try:
        image, mask = row.image, row.mask
        if image.shape[:2] == mask.shape:
            size = mask.shape
            counts = np.bincount(mask.reshape(-1), minlength=256)
            shares = {value: int(counts[value]) / mask.size for value in np.flatnonzero(counts).tolist()}
            ignored = shares.pop(IGNORED, 0.0)
            areas = {value: share for value, share in shares.items() if value}
            places = {value: _cells(mask == value) for value in areas}
            code = None if row.values.get("augmentation") else perceptual_hash(image)
    except DiffuMaskError:
        pass  # it is counted as damaged
    numbers = (value for value in row.quality or () if value is not None)
    quality = tuple(value for value in numbers if math.isfinite(value))
    classes = tuple(zip(row.class_ids, row.classes, strict=False))
    return Look(
        number, row.key, classes, quality if len(quality) == len(classes) else (), row.accepted, row.reason or "", size,
        areas, places, ignored, code,
    )  # fmt: skip


def _cells(where: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(where.astype(np.uint8) * 255)
    return np.asarray(grey.resize((GRID, GRID), Image.Resampling.BOX), np.float32) / 255


class Few:
    """The numbers of the few rows that rank lowest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[float, int]] = []

    def add(self, rank: float, number: int) -> None:
        """Take a row in, if it is among them."""
        if len(self._kept) < self._most or (rank, number) < self._kept[-1]:
            insort(self._kept, (rank, number))
            del self._kept[self._most :]

    @property
    def numbers(self) -> list[int]:
        """Of the rows, the lowest first."""
        return [number for _, number in self._kept]


@dataclass
class ClassFigures:
    """What the rows of one class add up to."""

    name: str
    images: int = 0
    accepted: int = 0
    seen: int = 0
    area: float = 0.0
    areas: list[int] = field(default_factory=lambda: [0] * (len(AREA_EDGES) + 1))
    quality: float = 0.0
    qualities: list[int] = field(default_factory=lambda: [0] * QUALITY_BINS)
    place: np.ndarray = field(default_factory=lambda: np.zeros((GRID, GRID)))
    sample: Few = field(default_factory=lambda: Few(SHOWN))


class Survey:
    """Figures of the rows that were seen.

    Args:
        classes: id -> name, as the dataset's manifest has them.
        words: name -> all words that stand for the class.
    """

    def __init__(self, classes: Mapping[int, str], words: Mapping[str, Sequence[str]]) -> None:
        self.rows = self.accepted = self.damaged = 0
        self.ignored = self.covered = 0.0
        self.words = words
        self.classes = {number: ClassFigures(name) for number, name in classes.items()}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.quality = {True: [0] * QUALITY_BINS, False: [0] * QUALITY_BINS}
        self.lowest, self.highest = math.inf, -math.inf
        self.best, self.worst, self.without = Few(ENDS), Few(ENDS), Few(SHOWN)
        self.rejected: dict[str, Few] = {}
        self.broken = Few(ENDS)
        self._hashes, self._hashed = bytearray(), array("L")

    def add(self, look: Look) -> None:
        """Count a row."""
        self.rows += 1
        self.accepted += look.accepted
        order = int.from_bytes(hashlib.blake2b(look.key.encode(), digest_size=6).digest())
        if look.size is None:
            self.damaged += 1
            self.broken.add(look.number, look.number)
        else:
            self.sizes[look.size] += 1
            self.ignored += look.ignored
            self.covered += sum(look.areas.values())
        if look.hash is not None:
            self._hashes += look.hash
            self._hashed.append(look.number)
        self._count_classes(look, order)
        self._count_quality(look)
        if not look.accepted:
            names = [name for _, name in look.classes]
            kind = kind_of(look.reason, [*names, *(word for name in names for word in self.words.get(name, ()))])
            kind = kind if kind in self.rejected or len(self.rejected) < MOST_KINDS else OTHER
            self.reasons[kind] += 1
            self.rejected.setdefault(kind, Few(ENDS)).add(order, look.number)

    def _count_classes(self, look: Look, order: int) -> None:
        for number, name in look.classes:
            figures = self.classes.setdefault(number, ClassFigures(name))
            figures.images += 1
            figures.accepted += look.accepted
            figures.sample.add(order, look.number)
        if not look.classes:
            self.without.add(order, look.number)
        for number, area in look.areas.items():
            figures = self.classes.setdefault(number, ClassFigures(f"id {number}"))
            figures.seen += 1
            figures.area += area
            figures.areas[bisect_right(AREA_EDGES, area)] += 1
            figures.place += look.places[number]

    def _count_quality(self, look: Look) -> None:
        for (number, _), value in zip(look.classes, look.quality, strict=False):
            place = min(max(int(value * QUALITY_BINS), 0), QUALITY_BINS - 1)
            self.quality[look.accepted][place] += 1
            self.classes[number].qualities[place] += 1
            self.classes[number].quality += value
        if look.quality and look.size:
            least = min(look.quality)
            self.lowest, self.highest = min(self.lowest, least), max(self.highest, least)
            if look.accepted:
                self.best.add(-least, look.number)
                self.worst.add(least, look.number)

    @property
    def ranked(self) -> bool:
        """Whether quality tells rows apart."""
        return self.lowest < self.highest

    def views(self) -> dict[str, list[int]]:
        """Return what to show: name of a view -> numbers of rows; a view of nothing is left out."""
        sample = in_turn([*(figures.sample.numbers for figures in self.classes.values()), self.without.numbers], SHOWN)
        views = {
            "sample": sample,
            "best": self.best.numbers if self.ranked else [],
            "worst": self.worst.numbers if self.ranked else [],
            "rejected": in_turn([few.numbers for few in self.rejected.values()], ENDS),
            "damaged": self.broken.numbers,
        }
        return {name: numbers for name, numbers in views.items() if numbers}

    def twins(self) -> list[list[int]]:
        """Return the numbers of rows whose images are nearly equal, in groups, the largest first."""
        hashes = np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, 16)
        return [[self._hashed[place] for place in group] for group in groups_of_twins(hashes)]


def in_turn(groups: Iterable[list[int]], most: int) -> list[int]:
    """Take a number from each group in turn, none twice, until there are `most`.

    Example:
        >>> in_turn([[1, 2, 3], [2, 9]], 4)
        [1, 2, 3, 9]
    """
    taken: dict[int, None] = {}
    queues = [iter(group) for group in groups]
    while queues and len(taken) < most:
        for queue in list(queues):
            number = next((number for number in queue if number not in taken), None)
            if number is None:
                queues.remove(queue)
            else:
                taken[number] = None
    return list(taken)[:most]
