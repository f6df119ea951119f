"""What goes where: the classes and their numbers, which images are for validation, the number of each item."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffumask_fast.convert.names import check_classes, file_stem
from diffumask_fast.convert.options import ConvertOptions
from diffumask_fast.dataset.lookup import named_classes
from diffumask_fast.dataset.reader import Row, read_shard
from diffumask_fast.dataset.shard_check import finished_shards
from diffumask_fast.dataset.storage import Place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.vocabulary import Vocabulary, palette_of, voc_palette

logger = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"
SPLITS = (TRAIN, VAL)


@dataclass(frozen=True)
class Shard:
    """A shard of the dataset.

    Args:
        index: of the shard.
        path: of its file.
        first: number of its first item.
        count: of its items.
        place: for each split, its number among the shards that have items of it, from 0 on.
    """

    index: int
    path: Place
    first: int
    count: int
    place: Mapping[str, int]


@dataclass(frozen=True)
class Split:
    """Which rows are for validation: those of some groups, as `group_of` gives them."""

    seed: int
    validation: frozenset[int]

    def of(self, row: Row) -> str:
        """Return train or val."""
        return VAL if self.validation and group_of(row, self.seed) in self.validation else TRAIN


@dataclass(frozen=True)
class Plan:
    """All that is known before a picture is read.

    Args:
        classes: id -> name, background included.
        shards: of the dataset.
        counts: items of each split.
        split: which is which.
        colours: of the dataset's classes, those that have one of their own, as `dataset.json` records them.
    """

    classes: Mapping[int, str]
    shards: tuple[Shard, ...]
    counts: Mapping[str, int]
    split: Split
    colours: tuple[Mapping[str, Any], ...] = ()


def make_plan(manifest: dict[str, Any], options: ConvertOptions) -> Plan:
    """Read keys, prompts and classes of a dataset; a few bytes of each row stay in memory.

    Args:
        manifest: of the dataset.
        options: what is converted, and how it is split.

    Raises:
        DiffuMaskError: the dataset is not finished, holds no accepted row, a key twice or one that is no file name, or
            cannot be split so.
    """
    if options.val and "augment" in manifest["options"]:
        raise DiffuMaskError(
            f"{options.source} is augmented, so that parts of one image would be on both sides: give `val=0`, or split "
            "the dataset that it was made of"
        )
    paths = finished_shards(options.source, manifest)
    groups, ends, pairs, names = array("Q"), [0], set[tuple[int, str]](), set[int]()
    shown, shown_in = array("B"), array("Q")  # class ids of all rows, and the group of each
    for path in paths:
        for row in picked(path, options, ("key", "prompt", "classes", "class_ids")):
            pairs.update(zip(row.class_ids, row.classes, strict=True))
            groups.append(group_of(row, options.seed))
            shown.extend(row.class_ids)
            shown_in.extend([groups[-1]] * len(row.class_ids))
            names.add(_hash(file_stem(row.key).casefold()))
            if len(names) < len(groups):
                raise DiffuMaskError(f"{path}: the name {row.key} comes twice: give each row its own key")
        ends.append(len(groups))
    if not groups:
        raise DiffuMaskError(f"{options.source} holds no accepted row: draw more, or let rejected ones count by `all`")
    classes = named_classes(manifest, sorted(pairs))
    check_classes(classes)
    validation = choose(Counter(groups), options.val)
    if validation:
        _warn_of_missing_classes(classes, zip(shown, shown_in, strict=True), validation)
    flags = [[group in validation for group in groups[low:high]] for low, high in zip(ends, ends[1:], strict=False)]
    counts = [{TRAIN: len(some) - sum(some), VAL: sum(some)} for some in flags]
    return Plan(
        classes=classes,
        shards=tuple(_shards(paths, counts)),
        counts={split: sum(count[split] for count in counts) for split in SPLITS},
        split=Split(options.seed, validation),
        colours=tuple(entry for entry in manifest["classes"] if "colour" in entry),
    )


def _shards(paths: list[Place], counts: list[dict[str, int]]) -> Iterator[Shard]:
    first, place = 1, dict.fromkeys(SPLITS, 0)
    for index, (path, count) in enumerate(zip(paths, counts, strict=True)):
        yield Shard(index, path, first, sum(count.values()), dict(place))
        first += sum(count.values())
        for split in SPLITS:
            place[split] += count[split] > 0


def picked(path: Place, options: ConvertOptions, columns: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of a shard that are converted."""
    for row in read_shard(path, [*columns, "accepted"], options.reading.max_pixels):
        if row.accepted or options.all:
            yield row


def group_of(row: Row, seed: int) -> int:
    """Return a number that rows of one prompt share, and no others; each row without a prompt has its own."""
    prompt = " ".join(row.prompt.casefold().split())
    return _hash(f"{seed}\0prompt\0{prompt}" if prompt else f"{seed}\0key\0{row.key}")


def choose(sizes: Mapping[int, int], share: float) -> frozenset[int]:
    """Choose the groups for validation: at random, but together as near below the share as whole groups allow.

    Args:
        sizes: group -> its number of rows; the groups are random numbers.
        share: of the rows.

    Raises:
        DiffuMaskError: a share is wanted, and there is one group alone.
    """
    if not share:
        return frozenset()
    if len(sizes) < 2:
        raise DiffuMaskError(
            "all images have one prompt, and images of one prompt are not split: draw with more prompts, or give "
            "`val=0`"
        )
    chosen, left = set(), max(1, round(share * sum(sizes.values())))
    for group in sorted(sizes):
        if sizes[group] <= left:
            chosen.add(group)
            left -= sizes[group]
    if len(chosen) == len(sizes):
        chosen.remove(max(chosen))
    return frozenset(chosen or {min(sizes, key=lambda group: (sizes[group], group))})


def _warn_of_missing_classes(
    classes: Mapping[int, str], shown: Iterable[tuple[int, int]], validation: frozenset[int]
) -> None:
    held: dict[str, set[int]] = {split: set() for split in SPLITS}
    for class_id, group in shown:
        held[VAL if group in validation else TRAIN].add(class_id)
    for split, other in ((VAL, TRAIN), (TRAIN, VAL)):
        absent = [classes[class_id] for class_id in sorted(held[other] - held[split])]
        if absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            logger.warning(
                "%s has no image of %s%s, for images of one prompt stay together and there are few prompts: take "
                "another seed or a larger share, or draw with more scenes, views or templates",
                split, ", ".join(absent[:5]), more,
            )  # fmt: skip


def number_classes(classes: Mapping[int, str], how: str) -> dict[int, int]:
    """Return class id -> number in the files, background included.

    Args:
        classes: id -> name.
        how: own (the ids), compact (0, 1, 2, ... in the order of the ids), voc (VOC's numbers where all classes are
            VOC's, else compact) or voc-only.

    Raises:
        DiffuMaskError: it is voc-only, and a class is none of VOC's.
    """
    voc = {entry.id: entry.name for entry in Vocabulary.voc().entries} | {0: "background"}
    strange = [name for class_id, name in classes.items() if voc.get(class_id) != name]
    if how == "voc-only" and strange:
        raise DiffuMaskError(f"{strange[0]} is none of VOC's classes, and this format has no others: take another one")
    if how == "own" or (how.startswith("voc") and not strange):
        return {class_id: class_id for class_id in classes}
    return {class_id: number for number, class_id in enumerate(sorted(classes))}


def palette_for(plan: Plan, numbers: Mapping[int, int]) -> list[int]:
    """Return the colours of the numbers in the files: VOC's; where a class has its own, each has that of its class id.

    Args:
        plan: of the conversion.
        numbers: class id -> number in the files.
    """
    palette, of_ids = voc_palette(), palette_of(plan.colours)
    for class_id, number in numbers.items() if plan.colours else ():
        palette[3 * number : 3 * number + 3] = of_ids[3 * class_id : 3 * class_id + 3]
    return palette


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
