"""The classes: names, ids, the phrases that prompts use, and the colours that pictures use."""

import csv
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError

_NAME = re.compile(r"\w[\w-]*( [\w-]+)*")


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """One class: its value in masks, its name, and the words that stand for it in a prompt."""

    id: int
    name: str
    phrase: str

    @property
    def stem(self) -> str:
        """The name as keys have it: spaces become dashes."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Vocabulary:
    """An ordered set of classes.

    Args:
        entries: the classes in the order in which they are drawn.

    Raises:
        DiffuMaskError: a name cannot stand in a file name, an id is out of range, or two classes are the same.

    Example:
        >>> Vocabulary.parse("dog,potted plant").ids
        (12, 16)
    """

    entries: tuple[ClassEntry, ...]

    def __post_init__(self):
        object.__setattr__(self, "entries", tuple(self.entries))
        if not self.entries:
            raise DiffuMaskError("no class is named: give names such as dog,cat, or voc, or a file with one class a line")
        seen: dict[object, str] = {}
        for entry in self.entries:
            _check(entry)
            for mark in (entry.id, entry.stem.casefold(), entry.phrase.casefold().split().__repr__()):
                if mark in seen:
                    raise DiffuMaskError(f"classes {seen[mark]!r} and {entry.name!r} are the same: name each one once")
            seen |= {entry.id: entry.name, entry.stem.casefold(): entry.name}

    @classmethod
    def voc(cls) -> "Vocabulary":
        """Return the 20 classes of PASCAL VOC."""
        return cls(_read_lines(resources.files(__package__).joinpath("voc.txt").read_text("utf-8"), "voc.txt"))

    @classmethod
    def from_file(cls, path: str | Path) -> "Vocabulary":
        """Read one class a line, `name` or `id,name,phrase`; empty lines and lines that start with # are skipped."""
        try:
            text = Path(path).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise DiffuMaskError(f"cannot read the class list {path}: {error}") from error
        return cls(_read_lines(text, path))
