"""The classes of a run: what `--classes` takes, and the vocabularies that come with the package."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.class_file import ClassLine, read_class_file, read_toml
from diffumask_fast.prompts.matching import matcher

SHIPPED = ("voc", "cityscapes", "human-vehicle", "coco", "ade20k", "ade20k-3")
SubClasses = str | int | None


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
            raise DiffuMaskError("no class is named: give names such as dog,cat, or voc, or a class file")
        names: dict[str, str] = {}
        ids: dict[int, str] = {}
        for entry in self.entries:
            stem = fold(entry.stem)
            if stem in names:
                raise DiffuMaskError(
                    f"classes {names[stem]!r} and {entry.name!r} clash, for they have one name: rename or remove one"
                )
            if entry.id in ids:
                raise DiffuMaskError(
                    f"classes {ids[entry.id]!r} and {entry.name!r} clash, for both have the id {entry.id}: give one of "
                    "them another"
                )
            names[stem] = ids[entry.id] = entry.name
        self._check_phrases()
        self._check_colours()

    def _check_phrases(self) -> None:
        owners = {fold(entry.name): entry.name for entry in self.entries}
        for entry in self.entries:
            for phrase in map(fold, entry.phrases):
                if owners.setdefault(phrase, entry.name) != entry.name:
                    raise DiffuMaskError(
                        f"the phrase {phrase!r} stands for {owners[phrase]} and for {entry.name}: leave it to one"
                    )

    def _check_colours(self) -> None:
        if any(entry.colour for entry in self.entries):
            shown: dict[tuple[int, ...], str] = {}
            for entry in self.entries:
                colour = tuple(self.palette[3 * entry.id : 3 * entry.id + 3])
                if colour in shown:
                    raise DiffuMaskError(
                        f"{shown[colour]} and {entry.name} have the same colour {colour}: give one of them another"
                    )
                shown[colour] = entry.name

    @classmethod
    def voc(cls) -> "Vocabulary":
        """Return the 20 classes of PASCAL VOC, named as in its devkit, each with one phrase alone."""
        return cls(_voc())

    @classmethod
    def shipped(cls, name: str) -> "Vocabulary":
        """Return a vocabulary that comes with the package, with synonyms, sub-classes, templates, scenes and views.

        Args:
            name: one of `SHIPPED`; docs/prompts.md lists them.
        """
        return cls(_shipped(name))

    @classmethod
    def named(cls, names: Iterable[str]) -> "Vocabulary":
        """Make a vocabulary of nouns; VOC's keep their ids, others are numbered from 21 in the order given."""
        return cls(_resolve([ClassLine("", name) for name in names]))

    @classmethod
    def from_file(cls, path: str | Path) -> "Vocabulary":
        """Read a class file: TOML where its name ends in .toml, else one class a line; docs/prompts.md has both forms.

        Raises:
            DiffuMaskError: the file cannot be read, or a line is something else; file and line are named.
        """
        lines = read_class_file(path)
        try:
            return cls(_resolve(lines))
        except DiffuMaskError:
            for number, line in enumerate(lines, 1):  # the first line that does not go with those before it
                try:
                    cls(_resolve(lines[:number]))
                except DiffuMaskError as error:
                    raise DiffuMaskError(f"{line.where}: {error}") from error
            raise

    @classmethod
    def parse(
        cls,
        text: str | None,
        known: "Vocabulary | None" = None,
        model: str = "the model",
        sub_classes: SubClasses = None,
    ) -> "Vocabulary":
        """Read what `--classes` takes: names joined by commas, one of `SHIPPED`, or a file.

        Args:
            text: the option's value; None means all known classes, or VOC's where none are known.
            known: the classes that the model lists, if it does.
            model: its name, for the message.
            sub_classes: what comes with the package beside each class's phrase. None: nothing of it. "auto": all of it
                where the model lists no classes, for those that do know no other words. "none": as "auto", without
                sub-classes, those of a class file among them. A number: at most so many sub-classes for each class.

        Raises:
            DiffuMaskError: a class is unknown to the model (the message lists the known ones), or as in `from_file`.
        """
        if text is None and known is not None:
            wanted = known
        elif text is None or text in SHIPPED:
            wanted = cls(tuple(map(_bare, _shipped(text or "voc"))))
        elif _names_a_file(text):
            wanted = cls.from_file(text)
        else:
            wanted = cls(_resolve([ClassLine("", name.strip()) for name in text.split(",") if name.strip()], known))
        if known is not None:
            listed = {fold(entry.name) for entry in known.entries}
            strange = [entry.name for entry in wanted.entries if fold(entry.name) not in listed]
            if strange:
                word = "class" if len(strange) == 1 else "classes"
                raise DiffuMaskError(
                    f"{model} does not know the {word} {', '.join(strange)}: it knows {', '.join(known.names)}"
                )
        if sub_classes is None:
            return wanted
        return _with_shipped(wanted, text if text in SHIPPED else "voc", known is not None, sub_classes)

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
        """The colours as Pillow takes them: 768 numbers, three for each value of a mask; VOC's where none are given."""
        return palette_of([entry.as_json() for entry in self.entries])

    def find(self, text: str) -> list[str]:
        """Return the names of the classes of which a phrase stands in a text, in the text's order.

        Where phrases overlap the longest counts: a hot dog is no dog where both are classes.

        Example:
            >>> Vocabulary.parse("dog,hot dog").find("a child with a hot dog")
            ['hot dog']
        """
        owners = {phrase: entry.name for entry in self.entries for phrase in entry.phrases}
        return list(dict.fromkeys(owners[phrase] for _, phrase in matcher(tuple(owners)).find(text)))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> ClassEntry:
        """Return the class of that name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)


def names_in(prompt: str) -> list[str]:
    """Return the VOC classes of which a phrase stands in a prompt as whole words, in the prompt's order."""
    return Vocabulary(_shipped("voc")).find(prompt)


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
    if not isinstance(classes, Iterable) or not all(isinstance(one, str | list | tuple) for one in classes):
        raise DiffuMaskError(f"classes are {classes!r}: give a list of names for each prompt, such as [['dog']].")
    rows = [[row] if isinstance(row, str) else list(row) for row in classes]
    if all(isinstance(row, str) for row in classes):
        rows = [[str(row) for row in classes]]
    if len(rows) == 1:
        rows = rows * count
    if len(rows) != count or not all(rows):
        raise DiffuMaskError(f"There are {count} prompts and {len(rows)} lists of classes: give one list for each.")
    return rows


def phrases_and_ids(
    names: Sequence[Sequence[str]], prompts: Sequence[str] = ()
) -> tuple[list[list[str]], list[list[int]]]:
    """Return the phrases and mask values of class names; names outside VOC are numbered from 21 in their order.

    Args:
        names: of each prompt's classes.
        prompts: in which synonyms and plurals are looked for, where they are known.
    """
    distinct = list(dict.fromkeys(name for row in names for name in row))
    known = {entry.name: entry for entry in _shipped("voc")}
    by_name = {
        name: known.get(entry.name, entry)
        for name, entry in zip(distinct, Vocabulary.named(distinct).entries, strict=True)
    }
    texts = prompts or [""] * len(names)
    phrases = [[_asked_for(by_name[name], text) for name in row] for text, row in zip(texts, names, strict=True)]
    return phrases, [[by_name[name].id for name in row] for row in names]


def _asked_for(entry: ClassEntry, prompt: str) -> str:
    """Return the words for a class that somebody named: its own phrase if that is there, before any other of it."""
    found = [form for form, _ in matcher(entry.phrases).find(prompt)]
    return entry.phrase if entry.phrase in found else next(iter(found), entry.phrase)


def voc_palette() -> list[int]:
    """Compute the colour map of the VOC devkit: 256 colours, the bits of the index spread over red, green and blue."""
    return [
        sum((index >> (3 * step + channel) & 1) << (7 - step) for step in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def palette_of(classes: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return VOC's colour map with the colours that classes have of their own, as a dataset records them."""
    palette = voc_palette()
    for entry in classes:
        if "colour" in entry:
            palette[3 * entry["id"] : 3 * entry["id"] + 3] = entry["colour"]
    return palette


def is_file(text: str) -> bool:
    """Tell whether what `--classes` was given is a file, and neither names nor a vocabulary of the package."""
    return text not in SHIPPED and _names_a_file(text)


def fold(name: str) -> str:
    """Return what names that differ in case, spaces or composed letters have in common."""
    return unicodedata.normalize("NFC", name).casefold().replace(" ", "-")


def _names_a_file(text: str) -> bool:
    """Tell a path from a noun: a path exists, or has a separator, or ends like a text file."""
    known = any(fold(text) in (fold(entry.name), fold(entry.phrase)) for entry in _voc())
    looks = "/" in text or "\\" in text or text.lower().endswith((".txt", ".csv", ".toml"))
    return not known and "," not in text and (looks or Path(text).is_file())


def _resolve(lines: Sequence[ClassLine], known: "Vocabulary | None" = None) -> tuple[ClassEntry, ...]:
    """Give each line what it leaves out: id and phrase of the known or VOC class of its name, else the next free id."""
    table: dict[str, ClassEntry] = {}
    for entry in (*_voc(), *(known.entries if known else ())):
        table |= {fold(entry.phrase): entry, fold(entry.name): entry}
    taken = {line.id for line in lines} | {entry.id for entry in table.values()}
    free = (number for number in range(21, 100_000) if number not in taken)
    return tuple(_entry(line, table.get(fold(line.name)), free) for line in lines)


def _entry(line: ClassLine, like: ClassEntry | None, free: Iterator[int]) -> ClassEntry:
    if like is not None and line.id is None and not line.phrases and not line.extras:
        return like
    name = unicodedata.normalize("NFC", line.name)
    phrases = line.phrases or ((like.phrase if like else name.replace("_", " ")),)
    number = line.id if line.id is not None else like.id if like else next(free)
    return ClassEntry(number, name, phrases[0], phrases[1:], **line.extras)


def _with_shipped(wanted: Vocabulary, source: str, of_model: bool, sub_classes: str | int) -> Vocabulary:
    """Give classes what the package knows of them, as `Vocabulary.parse` says."""
    entries = wanted.entries
    if isinstance(sub_classes, int) or not of_model:
        full = {_bare(entry): entry for entry in _shipped(source)}
        strange = tuple(phrase for entry in entries if entry not in full for phrase in entry.phrases)
        entries = tuple(_without(full[entry], strange) if entry in full else entry for entry in entries)
        if of_model:  # which has its own scenes
            entries = tuple(
                replace(entry, templates=(), scenes=(), views=()) if entry not in wanted.entries else entry
                for entry in entries
            )
    if sub_classes == "none" or isinstance(sub_classes, int):
        most = 0 if isinstance(sub_classes, str) else sub_classes
        entries = tuple(replace(entry, sub_classes=entry.sub_classes[:most]) for entry in entries)
    return Vocabulary(entries)


def _without(entry: ClassEntry, strange: tuple[str, ...]) -> ClassEntry:
    """Return a class of the package without the synonyms and sub-classes that are classes of the user's own."""
    if not strange:
        return entry
    folded = set(map(fold, strange))
    synonyms = tuple(phrase for phrase in entry.synonyms if fold(phrase) not in folded)
    finds = matcher((entry.phrase, *synonyms, *strange)).find

    def is_own(name: str) -> bool:
        found = {phrase for _, phrase in finds(name)}
        return bool(found) and found.isdisjoint(strange)

    return replace(entry, synonyms=synonyms, sub_classes=tuple(filter(is_own, entry.sub_classes)))


def _bare(entry: ClassEntry) -> ClassEntry:
    return ClassEntry(entry.id, entry.name, entry.phrase)


@cache
def _voc() -> tuple[ClassEntry, ...]:
    return tuple(map(_bare, _shipped("voc")))


@cache
def _shipped(name: str) -> tuple[ClassEntry, ...]:
    file = f"{name}.toml"
    text = resources.files(__package__).joinpath("vocabularies", file).read_text("utf-8")
    entries = [
        ClassEntry(line.id or 0, line.name, line.phrases[0], line.phrases[1:], **line.extras)
        for line in read_toml(text, file)
    ]
    if name == "voc":
        return tuple(entries)
    among = Vocabulary(tuple(entries))
    return tuple(_like_vocs(entry, among) for entry in entries)


def _like_vocs(entry: ClassEntry, among: Vocabulary) -> ClassEntry:
    """Give a class what it does not say of the VOC class of its phrase: sub-classes that are no other class, scenes."""
    like = next((one for one in _shipped("voc") if entry.phrase in one.phrases), None)
    if like is None:
        return entry
    if not entry.sub_classes:
        names = tuple(name for name in like.sub_classes if among.find(name) == [entry.name])
        entry = replace(entry, sub_classes=names)
    if not entry.scenes:
        scenes = tuple(scene for scene in like.scenes if not among.find(scene))
        entry = replace(entry, templates=like.templates, scenes=scenes, views=like.views)
    return entry
