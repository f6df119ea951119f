"""The class lists of public datasets: a dataset's classes with the names and numbers that their files have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.public_ids import public_ids
from diffumask_fast.prompts.vocabulary import Vocabulary, fold

IGNORES_ZERO = ("cityscapes", "ade20k")  # whose readers take what is none of their classes for ignored pixels


def public_names(like: str, how: str) -> dict[int, str]:
    """Return number -> name of a public dataset's classes, background included.

    Args:
        like: one of `PUBLIC`.
        how: see `plan.number_classes`; own has the category ids of files in COCO's form, which may have gaps, all
            others have 1, 2, ... in the dataset's order.
    """
    there = Vocabulary.shipped(like)
    numbers = public_ids(like) if how == "own" else there.ids
    return {0: "background"} | dict(zip(numbers, there.names, strict=True))


def numbers_like(
    like: str, how: str, classes: Mapping[int, str], entries: Sequence[Mapping[str, Any]]
) -> dict[int, int]:
    """Return class id -> number in a public dataset's files, background included.

    A class is theirs by its name or its phrase, where that is a name of theirs or a synonym that the package knows.

    Args:
        like: one of `PUBLIC`.
        how: see `public_names`.
        classes: id -> name.
        entries: the classes as a dataset records them, some with a phrase.

    Raises:
        DiffuMaskError: a class is none of theirs, or two are the same one.
    """
    there = Vocabulary.shipped(like).entries
    known = {_folded(phrase): entry.name for entry in there for phrase in entry.phrases}
    known |= {_folded(entry.name): entry.name for entry in there}
    phrases = {entry.name: entry.phrase for entry in Vocabulary.voc().entries}
    phrases |= {entry["name"]: entry["phrase"] for entry in entries if "phrase" in entry}
    numbers, owners = {name: number for number, name in public_names(like, how).items()}, dict[str, str]()
    found = {0: 0}
    for class_id, name in sorted(classes.items()):
        if not class_id:
            continue
        theirs = known.get(_folded(name)) or known.get(_folded(phrases.get(name, "")))
        if theirs is None:
            raise DiffuMaskError(
                f"{name!r} is no class of {like}: leave out `like`, or convert a dataset of that list's classes alone"
            )
        if theirs in owners:
            raise DiffuMaskError(
                f"{owners[theirs]!r} and {name!r} are both {theirs!r} of {like}, and convert merges no classes: leave "
                "out `like`"
            )
        owners[theirs] = name
        found[class_id] = numbers[theirs]
    return found


def _folded(text: str) -> str:
    return fold(text.replace("_", " "))
