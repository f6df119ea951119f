"""The classes: names, ids, the phrases that prompts use, and the colours that pictures use."""

import csv
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.request import check_class, check_text, is_file_stem

LINE_FORMS = "as name (dog) or as id,name,phrase (30,dgs,guide dog)"


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """One class: its value in masks (1 to 254), its name, and the words that stand for it in a prompt."""

    id: int
    name: str
    phrase: str

    def __post_init__(self) -> None:
        check_text(self.name, "the class name")
        check_text(self.phrase, "the class phrase")
        for text in (self.name, self.phrase):
            check_class(text)
        if not is_file_stem(self.stem, limit=80) or "  " in self.name:
            raise DiffuMaskError(
                f"class name {self.name!r} cannot stand in file names: use letters, digits, single spaces, - and _ "
                "(at most 80 bytes)"
            )
        if not self.phrase.strip():
            raise DiffuMaskError(f"class {self.name} has an empty phrase: give the words that stand for it in a prompt")
        if not 1 <= self.id <= 254:
            raise DiffuMaskError(f"class {self.name} has id {self.id}: use 1 to 254 (0 is background, 255 is ignored)")

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        if not self.entries:
            raise DiffuMaskError(
                "no class is named: give names such as dog,cat, or voc, or a file with one class a line"
            )
        seen: dict[object, str] = {}
        for entry in self.entries:
            for mark in (entry.id, _fold(entry.stem)):
                if mark in seen:
                    raise DiffuMaskError(f"classes {seen[mark]!r} and {entry.name!r} clash: name and id must be unique")
                seen[mark] = entry.name

    @classmethod
    def voc(cls) -> "Vocabulary":
        """Return the 20 classes of PASCAL VOC, named as in its devkit."""
        return cls(_VOC)

    @classmethod
    def named(cls, names: Iterable[str]) -> "Vocabulary":
        """Make a vocabulary of nouns; VOC's keep their ids, others are numbered from 21 in the order given."""
        return cls(_resolve([(None, name, "") for name in names]))

    @classmethod
    def from_file(cls, path: str | Path) -> "Vocabulary":
        """Read one class a line, `name` or `id,name,phrase`; empty lines and lines that start with # are skipped.

        Raises:
            DiffuMaskError: the file cannot be read, or a line is something else.
        """
        try:
            text = Path(path).read_text("utf-8-sig")
        except FileNotFoundError as error:
            raise DiffuMaskError(
                f"cannot read {path}, which is neither a class nor a file: give names such as dog,cat, or voc, or a "
                f"text file with one class a line, {LINE_FORMS}"
            ) from error
        except (OSError, ValueError) as error:
            raise DiffuMaskError(
                f"cannot read the class list {path} ({_first_line(error)}): give a text file in UTF-8 with one class a "
                f"line, {LINE_FORMS}"
            ) from error
        return cls(_resolve(list(_rows(text, path))))

    @classmethod
    def parse(cls, text: str | None, known: "Vocabulary | None" = None, model: str = "the model") -> "Vocabulary":
        """Read what `--classes` takes: names joined by commas, `voc`, or a file.

        Args:
            text: the option's value; None means all known classes, or VOC's where none are known.
            known: the classes that the model lists, if it does.
            model: its name, for the message.

        Raises:
            DiffuMaskError: a class is unknown to the model (the message lists the known ones), or as in `from_file`.
        """
        if text is None:
            return known or cls.voc()
        names = [name.strip() for name in text.split(",") if name.strip()]
        if text == "voc":
            wanted = cls.voc()
        elif _names_a_file(text):
            wanted = cls.from_file(text)
        else:
            wanted = cls(_resolve([(None, name, "") for name in names], known))
        if known is not None:
            listed = {_fold(entry.name) for entry in known.entries}
            strange = [entry.name for entry in wanted.entries if _fold(entry.name) not in listed]
            if strange:
                word = "class" if len(strange) == 1 else "classes"
                raise DiffuMaskError(
                    f"{model} does not know the {word} {', '.join(strange)}: it knows {', '.join(known.names)}"
                )
        return wanted

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(entry.id for entry in self.entries)

    @property
    def phrases(self) -> tuple[str, ...]:
        return tuple(entry.phrase for entry in self.entries)

    @property
    def palette(self) -> list[int]:
        """VOC's colour map as Pillow takes it: 768 numbers, three for each value of a mask."""
        return voc_palette()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> ClassEntry:
        """Return the class of that name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)


def names_in(prompt: str) -> list[str]:
    """Return the VOC classes whose phrase stands in a prompt as whole words, in the prompt's order."""
    text = " ".join(prompt.lower().split())
    matches = {entry.name: re.search(rf"(?<![\w-]){entry.phrase}(?![\w-])", text) for entry in _VOC}
    starts = {name: match.start() for name, match in matches.items() if match}
    return sorted(starts, key=lambda name: starts[name])


def names_of(
    prompts: Sequence[str], classes: Sequence[Sequence[str]] | Sequence[str] | str | None, count: int
) -> list[list[str]]:
    """Return one list of class names for each of `count` prompts.

    Args:
        prompts: read for VOC's phrases where classes is None.
        classes: a list for each prompt, or one list or name for all.
        count: of the prompts; they themselves may be unknown where classes are given.

    Raises:
        DiffuMaskError: nothing known is named in a prompt, an empty list, another number of lists than of prompts.

    Example:
        >>> names_of(["a cat and a dog"], None, 1), names_of([], ["dog", "cat"], 2)
        ([['cat', 'dog']], [['dog', 'cat'], ['dog', 'cat']])
    """
    if classes is None:
        names = [names_in(prompt) for prompt in prompts]
        for prompt, found in zip(prompts, names, strict=True):
            if not found:
                raise DiffuMaskError(f'No known class is named in "{prompt[:80]}": say classes=[["..."]].')
        return names
    if isinstance(classes, str):
        classes = [classes]
    rows = [[row] if isinstance(row, str) else list(row) for row in classes]
    if all(isinstance(row, str) for row in classes):
        rows = [[str(row) for row in classes]]
    if len(rows) == 1:
        rows = rows * count
    if len(rows) != count or not all(rows):
        raise DiffuMaskError(f"There are {count} prompts and {len(rows)} lists of classes: give one list for each.")
    return rows


def phrases_and_ids(names: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[list[int]]]:
    """Return the phrases and mask values of class names; names outside VOC are numbered from 21 in their order."""
    distinct = list(dict.fromkeys(name for row in names for name in row))
    by_name = dict(zip(distinct, Vocabulary.named(distinct).entries, strict=True))
    phrases = [[by_name[name].phrase for name in row] for row in names]
    return phrases, [[by_name[name].id for name in row] for row in names]


def voc_palette() -> list[int]:
    """Compute the colour map of the VOC devkit: 256 colours, the bits of the index spread over red, green and blue."""
    return [
        sum((index >> (3 * step + channel) & 1) << (7 - step) for step in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().replace(" ", "-")


def _first_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _names_a_file(text: str) -> bool:
    """Tell a path from a noun: a path exists, or has a separator, or ends like a text file."""
    known = any(_fold(text) in (_fold(entry.name), _fold(entry.phrase)) for entry in _VOC)
    looks = "/" in text or "\\" in text or text.lower().endswith((".txt", ".csv"))
    return not known and "," not in text and (looks or Path(text).is_file())


Line = tuple[int | None, str, str]  # id, if it has one, name, phrase


def _rows(text: str, path: str | Path) -> Iterator[Line]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]
        if len(fields) == 1:
            yield None, fields[0], ""
        elif len(fields) == 3 and fields[0].isdecimal():
            yield int(fields[0]), fields[1], fields[2]
        else:
            raise DiffuMaskError(f"{path}, line {number}: {line!r} is no class: write {LINE_FORMS}")


def _resolve(rows: list[Line], known: "Vocabulary | None" = None) -> tuple[ClassEntry, ...]:
    """Give each row without an id that of the known or VOC class of that name or phrase, else the next free one."""
    table: dict[str, ClassEntry] = {}
    for entry in (*_VOC, *(known.entries if known else ())):
        table |= {_fold(entry.phrase): entry, _fold(entry.name): entry}
    taken = {row[0] for row in rows} | {entry.id for entry in table.values()}
    free = (number for number in range(21, 100_000) if number not in taken)
    entries = []
    for class_id, name, phrase in rows:
        name = unicodedata.normalize("NFC", name)
        if class_id is not None:
            entries.append(ClassEntry(class_id, name, " ".join(phrase.split())))
        elif _fold(name) in table:
            entries.append(table[_fold(name)])
        else:
            entries.append(ClassEntry(next(free), name, name.replace("_", " ")))
    return tuple(entries)


def _load_voc() -> tuple[ClassEntry, ...]:
    text = resources.files(__package__).joinpath("voc.txt").read_text("utf-8")
    return tuple(ClassEntry(number, name, phrase) for number, name, phrase in _rows(text, "voc.txt") if number)


_VOC = _load_voc()
