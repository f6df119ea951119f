"""Which captions serve which classes, and which of them serve best."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unicodedata import category

from diffumask_fast.prompts.english import plural
from diffumask_fast.prompts.matching import IDEOGRAPHS
from diffumask_fast.prompts.vocabulary import Vocabulary

FILTERS = ("reference", "none")
PREFIX = "Photo of "  # which the reference puts before a caption
FIRST_WORDS = 5
MOST_WORDS = 50
BANNED = frozenset(
    "vector vectors stock 3d cartoon cartoons blur blurred blurry defocus defocused shot shots close-up closeup "
    "headlight headlights interior -".split()
)
_MARKS = ".,;:!?\"'()[]{}<>*#&|/\\\u2018\u2019\u201c\u201d\u2026\u3001\u3002\uff0c"

Names = tuple[str, ...]


@dataclass(frozen=True)
class Retrieved:
    """The captions that were found for classes, and what they were found by.

    Args:
        source: SHA-256 of the file that they are of.
        method: how the best were told: "embedding" or "words".
        per_class: how many of the same classes there are at most.
        caption_filter: "reference" or "none".
        captions: the names of classes, in alphabetical order, and the prompts that name just these, the best first.
    """

    source: str
    method: str
    per_class: int
    caption_filter: str
    captions: tuple[tuple[Names, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        captions = tuple((tuple(names), tuple(texts)) for names, texts in self.captions)
        object.__setattr__(self, "captions", captions)

    @property
    def options(self) -> dict[str, Any]:
        """What `dataset.json` records, named as the flags are; the last is the hash of what `as_bytes` returns."""
        return {
            "captions": self.source, "retrieval": self.method, "captions_per_class": self.per_class,
            "caption_filter": self.caption_filter, "retrieved": hashlib.sha256(self.as_bytes()).hexdigest(),
        }  # fmt: skip

    def as_bytes(self) -> bytes:
        """Return lines of JSON: what they were found by, and a line for each caption."""
        values = asdict(self)
        del values["captions"]
        lines: list[dict[str, Any]] = [values]
        lines += ({"classes": names, "caption": text} for names, texts in self.captions for text in texts)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Retrieved:
        """Read what `as_bytes` returned.

        Raises:
            ValueError, KeyError or TypeError: it is something else.
        """
        head, *lines = map(json.loads, data.decode().splitlines())
        captions: dict[Names, list[str]] = {}
        for line in lines:
            captions.setdefault(tuple(line["classes"]), []).append(line["caption"])
        return cls(**head, captions=tuple((names, tuple(texts)) for names, texts in captions.items()))


class CaptionMatcher:
    """Tells which classes a caption serves: those that it names, if they are as many as an image is to have.

    A caption that names other classes of the vocabulary as well serves none, for their objects would be drawn without a
    mask. The reference's filters: the words of a class begin among the first five of a caption, it has at most 50 words
    and none of 19 that stand for drawings, blur, parts of things and the like.

    Args:
        vocabulary: the classes.
        classes_per_image: how many a caption is to name.
        caption_filter: "reference", or "none" for no filter.
    """

    def __init__(self, vocabulary: Vocabulary, classes_per_image: int = 1, caption_filter: str = "reference") -> None:
        self._count, self._filters = classes_per_image, caption_filter == "reference"
        self._phrases: dict[str, list[tuple[list[str], str]]] = {}  # by their first word, the longest first
        self._unspaced: list[tuple[str, str]] = []
        for words, name in _forms(vocabulary).items():
            if words[0] >= IDEOGRAPHS:
                self._unspaced.append(("".join(words), name))
            self._phrases.setdefault(words[0], []).append((list(words), name))
        self._unspaced.sort(key=lambda phrase: -len(phrase[0]))
        for phrases in self._phrases.values():
            phrases.sort(key=lambda phrase: -len(phrase[0]))

    def match(self, caption: str) -> Names:
        """Return the names of the classes that a caption serves, in alphabetical order; () if it serves none."""
        words = _words(caption)
        if self._filters and len(words) > MOST_WORDS:
            return ()
        found = self._found(words)
        if len(found) != self._count:
            return ()
        if self._filters and (min(found.values()) >= FIRST_WORDS or not BANNED.isdisjoint(words)):
            return ()
        return tuple(sorted(found))

    def prompt(self, caption: str) -> str:
        """Return the prompt that a caption gives: "Photo of " and the caption, as the reference; or itself."""
        return PREFIX + caption if self._filters else caption

    def _found(self, words: Sequence[str]) -> dict[str, int]:
        """Return the name of each class with the place of its first word."""
        found: dict[str, int] = {}
        places: Sequence[int] = range(len(words))
        at, words = 0, list(words)
        if not all(map(str.isalnum, words)):
            pieces = [(piece, place) for place, word in enumerate(words) for piece in _pieces(word)]
            words, places = [piece for piece, _ in pieces], [place for _, place in pieces]
        while at < len(words):
            step = 1
            for phrase, name in self._phrases.get(words[at], ()):
                if len(phrase) == 1 or words[at : at + len(phrase)] == phrase:
                    found.setdefault(name, places[at])
                    step = len(phrase)
                    break
            at += step
        for letters, name in self._unspaced:
            for number, word in enumerate(words):
                if letters in word:
                    found.setdefault(name, places[number])
                    words[number] = word.replace(letters, " ")  # no shorter one is within it
        return found


class Best:
    """The texts with the highest scores, each once, whatever the order in which they come.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, str]] = []
        self._texts: set[str] = set()

    def add(self, score: float, text: str) -> None:
        """Keep a text if it is among the best so far."""
        if len(self._heap) == self._size and (score, text) <= self._heap[0] or text in self._texts:
            return
        self._texts.add(text)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (score, text))
        else:
            _, worst = heapq.heappushpop(self._heap, (score, text))
            self._texts.discard(worst)

    def add_all(self, pairs: Iterable[tuple[float, str]]) -> None:
        """Keep those of many texts that are among the best so far."""
        for score, text in pairs:
            self.add(score, text)

    def ranked(self) -> list[str]:
        """Return the texts, the best first."""
        return [text for _, text in sorted(self._heap, reverse=True)]


def chance(caption: str) -> float:
    """Return a number in 0..1 that depends on the caption alone: those with the highest are a fair sample of a file."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=6).digest(), "big") / 2**48


def _forms(vocabulary: Vocabulary) -> dict[tuple[str, ...], str]:
    """Return the words of each phrase, and of its plural where that is no other class's phrase, with the class."""
    phrases = [(phrase, entry.name) for entry in vocabulary.entries for phrase in entry.phrases]
    forms: dict[tuple[str, ...], str] = {}
    for form, name in (*phrases, *((plural(phrase), name) for phrase, name in phrases)):
        if words := tuple(piece for word in _words(form or "") for piece in _pieces(word)):
            forms.setdefault(words, name)
    return forms


def _pieces(word: str) -> list[str]:
    """Part a word where the marks within it part words, as in "dog/cat"; hyphens and apostrophes do not."""
    if word.isalnum():
        return [word]
    return "".join(letter if letter in "-'\u2019" or category(letter)[0] in "LMN" else " " for letter in word).split()


def _words(text: str) -> list[str]:
    """Return the words of a text in small letters, without the marks around them and a possessive's ending."""
    words = text.casefold().split()
    if text.isalnum() or text.replace(" ", "").isalpha():
        return words
    bare = [word.strip(_MARKS) or word for word in words]
    return [word[:-2] if word.endswith(("'s", "\u2019s")) and len(word) > 2 else word for word in bare]
