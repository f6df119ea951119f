"""One class: its value in masks, its name, and all words that may stand for it in a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from unicodedata import category

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.matching import matcher, phrase_in
from diffumask_fast.prompts.request import check_class, check_text, is_file_stem
from diffumask_fast.prompts.templates import check_template

Colour = tuple[int, int, int]
IGNORED_COLOUR: Colour = (224, 224, 192)  # what VOC's colour map shows for 255
MOST_LETTERS = 500  # of a text; the text encoder reads 77 tokens
_LISTS = ("synonyms", "sub_classes", "templates", "scenes", "views")


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """One class.

    Args:
        id: its value in masks, 1 to 254.
        name: as datasets, keys and reports say it.
        phrase: the words that prompts say.
        synonyms: other phrases: found in a prompt, they are the class as well.
        sub_classes: names that take the phrase's place in prompts, each with a phrase of the class in it, whose map is
            the class's: "Labrador dog".
        templates: captions with `{objects}` and, if wanted, `{scene}` and `{view}`; none takes the plan's.
        scenes: where it may be, such as "on the grass"; none takes the plan's.
        views: such as "from the side"; none takes the package's.
        colour: of its pixels in pictures, red, green and blue; None is that of its id in VOC's colour map.

    Raises:
        DiffuMaskError: a field cannot be what it is to be, or a sub-class holds no phrase of the class.

    Example:
        >>> ClassEntry(12, "dog", "dog", synonyms=("puppy",)).phrase_in("a photo of two puppies")
        'puppies'
    """

    id: int
    name: str
    phrase: str
    synonyms: tuple[str, ...] = ()
    sub_classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    colour: Colour | None = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.colour is not None:
            object.__setattr__(self, "colour", tuple(self.colour))
        for text in self._texts():
            check_text(text, "the class")
            if len(text) > MOST_LETTERS:
                raise DiffuMaskError(f"class {self.name[:80]!r} has a text of {len(text)} letters: {MOST_LETTERS} fit")
        for text in (self.name, *self.phrases):
            check_class(text)
        if not is_file_stem(self.stem, limit=80) or "  " in self.name:
            raise DiffuMaskError(
                f"class name {self.name!r} cannot stand in file names: use letters, digits, single spaces, - and _ "
                "(at most 80 bytes)"
            )
        for text in self._texts():
            if strange := _unseen(text):
                raise DiffuMaskError(
                    f"class {self.name!r} has in {text[:80]!r} the letter U+{ord(strange):04X}, which is not seen: "
                    "remove it"
                )
        if not all(any(category(letter)[0] in "LNS" for letter in text) for text in self.phrases):
            raise DiffuMaskError(f"class {self.name} has an empty phrase: give the words that stand for it in a prompt")
        if not 1 <= self.id <= 254:
            raise DiffuMaskError(f"class {self.name} has id {self.id}: use 1 to 254 (0 is background, 255 is ignored)")
        self._check_sub_classes()
        for template in self.templates:
            check_template(template)
        self._check_colour()

    def _texts(self) -> tuple[str, ...]:
        return (self.name, *self.phrases, *self.sub_classes, *self.templates, *self.scenes, *self.views)

    def _check_sub_classes(self) -> None:
        for name in self.sub_classes:
            if next(matcher(self.phrases).find(name), None) is None:
                raise DiffuMaskError(
                    f"sub-class {name!r} of {self.name} holds no phrase of the class, whose map is read: write "
                    f"{name + ' ' + self.phrase!r}, or add its noun to the phrases"
                )

    def _check_colour(self) -> None:
        if self.colour is not None and not (
            len(self.colour) == 3
            and all(isinstance(part, int) and 0 <= part <= 255 for part in self.colour)
            and self.colour not in ((0, 0, 0), IGNORED_COLOUR)
        ):
            raise DiffuMaskError(
                f"class {self.name} has the colour {self.colour}: give red, green and blue from 0 to 255, neither the "
                f"background's 0, 0, 0 nor {', '.join(map(str, IGNORED_COLOUR))}, which shows what is ignored"
            )

    @property
    def stem(self) -> str:
        """The name as keys have it: spaces become dashes."""
        return self.name.replace(" ", "-")

    @property
    def phrases(self) -> tuple[str, ...]:
        """All words that are the class, those of prompts first."""
        return (self.phrase, *self.synonyms)

    def phrase_in(self, prompt: str) -> str:
        """Return the words that stand for the class in a prompt."""
        return phrase_in(prompt, self.phrases)

    def as_json(self) -> dict[str, Any]:
        """Return the entry as JSON types, without what is left out."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in ((), None)
        }


def _unseen(text: str) -> str:
    """Return a letter that is not seen, none of those that join or part others, as some scripts and emoji need them."""
    if text.isprintable():
        return ""
    return next((one for one in text if category(one) in ("Cc", "Cf") and one not in "\u200c\u200d"), "")


def phrases_by_name(classes: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Return name -> phrases of the classes, as a dataset records them."""
    return {entry["name"]: (entry["phrase"], *entry.get("synonyms", ())) for entry in classes}


def words_of(classes: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return name -> all words that are found as the class, of the classes as a dataset records them."""
    return {name: matcher(phrases).forms for name, phrases in phrases_by_name(classes).items()}
