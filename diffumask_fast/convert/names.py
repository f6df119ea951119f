"""What keys and class names become outside of a dataset: each is checked here, in one place, before a file bears it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import unlinked
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.request import check_text, is_file_stem

IGNORED = "ignored"  # pixels that are, in formats that want a name for them
LONGEST = 200  # bytes of a name, so that folders, endings and temporary names find room


def file_stem(key: str) -> str:
    """Return the name that a row's files have, without ending: the key, with + for each dot.

    Programs take what follows the first dot for the ending, so a stem holds none.

    Raises:
        DiffuMaskError: the key is no safe file name: it has a separator, a control character, a space, or too many
            bytes, or does not begin with a letter or a digit.

    Example:
        >>> file_stem("dog-000042.blur-0")
        'dog-000042+blur-0'
    """
    if not is_file_stem(key, "_-+."):
        raise DiffuMaskError(f"key {key!r} is no safe file name: give the row another key")
    return key.replace(".", "+")


def key_of(name: str, number: int) -> str:
    """Return a key for somebody else's picture: its name where that is one, else what is left of it and a number.

    Args:
        name: of the file, without folder and ending.
        number: of the picture, which makes the key unique.

    Raises:
        DiffuMaskError: the name is no readable text.

    Example:
        >>> key_of("2007_000032", 3), key_of("my dog (1)", 3)
        ('2007_000032', 'my-dog--1-000003')
    """
    check_text(name, "the name")
    if is_file_stem(name, "_-+."):
        return name
    kept = "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
    kept = kept.encode()[: LONGEST - 10].decode(errors="ignore")
    key = f"{kept}-{number:06d}"
    return key if is_file_stem(key, "_-+.") else f"image-{number:06d}"


def check_classes(classes: Mapping[int, str]) -> None:
    """Raise unless each name is one that every format can hold: letters, digits, single spaces, - and _.

    Args:
        classes: number -> name; 0, the background, is passed over.

    Raises:
        DiffuMaskError: a name or a number is none that a class may have, or the name means pixels to ignore.
    """
    for number, name in classes.items():
        if number:
            ClassEntry(number, name, name)


def inside(root: Path, name: object) -> Path:
    """Return the place of a file that somebody else's list names, which is below the folder, and none of it a link.

    Raises:
        DiffuMaskError: it is no relative name, leads out of the folder, or through a link.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") or set(part) & set("\\\0:") for part in parts):
        raise DiffuMaskError(f"{str(name)[:200]!r} is no name of a file in {root}: list names below the folder alone")
    check_text(str(name), "the file name")
    return unlinked(root, *parts)
